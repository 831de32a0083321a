"""The benchmarks run, assert what they assert, and end with an error where a limit is missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import parq_fn as pf
from tests.benchmarks import __main__ as suite
from tests.benchmarks import measure, peer, prox_pass, scale
from tests.benchmarks.measure import interleaved, ratio, table
from tests.benchmarks.report import Found, combined, geometric_mean, overall, show


@pytest.mark.rare
def test_the_suite_runs_on_small_inputs(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(peer, "available", False)
    file = tmp_path / "figures.json"
    wanted = ["pass", "fits", "steps", "refits", "gpu", "--tiny", "--repeats", "1", "--rounds", "1"]
    assert suite.main([*wanted, "--json", str(file)]) == 0
    report = json.loads(file.read_text())
    groups = {figure["group"] for figure in report["figures"]}
    assert groups >= {"pass", "fits", "steps", "memory", "refits"}
    assert report["machine"]["torch"] == torch.__version__
    shown = capsys.readouterr().out
    assert "parq, 16 levels, channel" in shown
    assert ("no GPU is at hand" in shown) == (not torch.cuda.is_available())


@pytest.fixture(autouse=True)
def _impatient(monkeypatch) -> None:
    """The suite makes the one clock patient, and what came after it in a process waited too."""
    monkeypatch.setattr(measure.CORES, "patience", 0)


@pytest.mark.rare
def test_a_missed_limit_is_an_error(monkeypatch, capsys) -> None:
    found = [Found("g", "a case", "seconds", 2.0, 0.1, 1.0), Found("g", "b", "seconds", 0.5, 0, 1)]
    monkeypatch.setattr(suite, "GROUPS", {"pass": lambda size, repeats: iter(found)})
    assert suite.main(["--repeats", "1"]) == 1
    shown = capsys.readouterr().out
    assert "1 of 2 limits met" in shown
    assert "MISSED" in shown
    with pytest.raises(SystemExit):
        suite.main(["passes"])
    assert "no such group: passes; they are pass" in capsys.readouterr().err


def test_figures_know_whether_they_keep_their_limit() -> None:
    assert Found("", "", "", 1.0).met is None
    assert Found("", "", "", 1.0, 0, 1.0).met is True
    assert Found("", "", "", 1.1, 0, 1.0).met is False
    assert Found("", "", "", 1.1, 0, 1.0, at_most=False).met is True
    assert geometric_mean([1.0, 4.0]) == pytest.approx(2)
    one, two = (Found("peer", "", "eager, peer's time over ours", v) for v in (1.0, 9.0))
    (mean,) = overall([one, two, Found("peer", "", "eager, mean", 100.0)])
    assert mean.value == pytest.approx(3)
    assert mean.met
    assert "MISSED" not in show([mean])


def test_a_slow_round_is_seen_in_the_spread() -> None:
    """It changes no median, and what changes a case's name between rounds is refused."""
    rounds = [[Found("g", "a", "s", value, 0.1, 1.0)] for value in (0.9, 2.9, 0.8)]
    (one,) = combined(rounds)
    assert (one.value, one.met) == (0.9, True)
    assert one.spread == pytest.approx(1.05)
    assert combined(rounds[:1]) == rounds[0]
    with pytest.raises(ValueError, match="rounds differ"):
        combined([rounds[0], [rounds[0][0]._replace(case="b")]])


def test_works_are_timed_in_turns_and_set_back_before_each() -> None:
    seen: list[str] = []
    works = {name: lambda name=name: seen.append(name) for name in ("a", "b")}
    times = interleaved(works, 3, before=lambda: seen.append("-"))
    assert seen[-12:] == ["-", "a", "-", "b"] * 3
    assert {name: len(t) for name, t in times.items()} == {"a": 3, "b": 3}
    assert ratio([2.0, 4.0, 6.0, 8.0], [1.0, 2.0, 3.0, 4.0]) == (2.0, 0.0)
    assert table([["a", "b"], ["ccc", "d"]]) == "a    b\nccc  d"


def test_what_slow_cores_measure_is_measured_again(monkeypatch) -> None:
    cores, made = measure.Cores(), []

    def work() -> int:
        made.append(len(made))
        return len(made)

    assert cores.steady(work) == (1, False)  # without patience nothing is asked
    monkeypatch.setattr(measure.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(cores, "seconds", lambda: 1.2 if len(made) in (2, 3) else 1.0)
    cores.least, cores.patience = 1.0, 3
    assert cores.steady(work) == (5, False)  # 2 and 3 ended slow, 4 began so
    assert cores.again == 3
    monkeypatch.setattr(cores, "seconds", lambda: 2.0)
    assert cores.steady(work) == (9, True)
    assert cores.again == 6
    slow = iter([True, False, False, True])
    monkeypatch.setattr(measure, "CORES", cores)
    monkeypatch.setattr(cores, "steady", lambda work: (work(), next(slow)))
    assert len(interleaved({"a": work, "b": work}, 2)["a"]) == 2
    assert cores.were_slow
    slow = iter([True, False, False, False])
    assert len(interleaved({"a": work, "b": work}, 2)["a"]) == 1
    assert not cores.were_slow


def test_rounds_of_slow_cores_count_only_without_others() -> None:
    def rounds(*slow: int) -> list[list[Found]]:
        values = zip((1.0, 2.0, 4.0), slow, strict=True)
        return [[Found("g", "a", "s", value, slow=n)] for value, n in values]

    assert [combined(rounds(*slow))[0].value for slow in ((0, 1, 2), (1, 0, 0), (1, 1, 1))] == [
        1.0,
        3.0,
        2.0,
    ]
    assert combined(rounds(1, 1, 1))[0].slow


def test_a_wrong_weight_is_noticed(monkeypatch) -> None:
    link = prox_pass.LINKS["parq"](prox_pass.QUANTIZERS[4])
    state, jobs = prox_pass.state_of(link), prox_pass.jobs_of(link, [torch.randn(16, 16)])

    class Wrong(prox_pass.Pass):
        def __call__(self, link, state, jobs) -> None:
            super().__call__(link, state, jobs)
            jobs[0].weight.view(-1)[3] += 1e-6

    prox_pass.check(link, state, jobs, {"right": prox_pass.Pass()})
    with pytest.raises(AssertionError):
        prox_pass.check(link, state, jobs, {"wrong": Wrong()})

    def off(link, state, jobs) -> None:
        for job in jobs:
            job.weight.copy_(job.latent)

    monkeypatch.setattr(prox_pass, "plain", off)  # far from what float64 gives
    with pytest.raises(AssertionError):
        prox_pass.check(link, state, jobs, {})


def small_model(monkeypatch: pytest.MonkeyPatch, blocks: int, rows: int = 32) -> None:
    """Takes the place of the models."""
    block = [((16, 32), 0), ((8, 32), 0), ((64, 32), 0), ((rows, 16), 1), ((32, 64), 1)]
    tiny = blocks * [*(scale.Matrix(*one) for one in block), scale.Matrix((8, 16, 64), None)]
    monkeypatch.setattr(scale, "MODELS", {"tiny": lambda: tiny})
    for how, rows in {"tensor": pf.per_tensor(), "block": pf.per_block(4)}.items():
        monkeypatch.setitem(scale.GRANULARITIES, how, lambda _, rows=rows: rows)


def test_small_models_on_many_ranks_keep_the_limits_of_communication_and_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small_model(monkeypatch, 4)
    found = list(scale.rows(["tiny"], [8], 2))
    assert not [row for row in found if row.missed]
    sent = {(row.layout, row.granularity) for row in found if row.costs.received}
    assert sent >= {("FSDP2", "tensor"), ("columns", "channel")}
    assert all(row.costs.qparams for row in found)


def test_what_all_ranks_receive_of_rows_is_what_their_owners_lack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Counted on every rank, of which some have nothing of a weight."""
    small_model(monkeypatch, 1, rows=6)
    monkeypatch.setattr(scale, "TENSOR", 2)
    monkeypatch.setattr(scale, "GRANULARITIES", {"tensor": scale.GRANULARITIES["tensor"]})
    found = list(scale.rows(["tiny"], [8], 8))  # raises where the two differ
    assert {row.layout for row in found if row.costs.pieces} == set(scale.LAYOUTS)
