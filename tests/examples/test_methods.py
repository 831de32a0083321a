"""The program of the page on methods: what it trains, its tables, its figure and its file."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from examples import methods
from examples.choosing import Link, Task
from parq_fn.foundation.command import UserError


def test_a_table_has_every_method_and_a_figure_and_a_file_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def counted(task: Task, link: Link, seeds: range) -> list[float]:
        trained.append(str(link(task)))
        return [float(len(trained) + seed) for seed in seeds]

    monkeypatch.setattr("examples.choosing.train", counted)
    flags = ["--tiny", "--bits", "0", "1", "2", "3", "--save-dir", str(tmp_path), "--workers", "1"]
    found = methods.main(flags)
    digits = methods.TASKS["digits"]
    names = {str(link(digits)) for link in methods.compared(range(4)).values()}
    assert len(trained) == 2 * len(names)  # of two tasks
    shown = capsys.readouterr().out
    assert "| straight-through | 2.50 ± 0.50 |" in shown
    assert "| saturated | +" in shown
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    kept = json.loads((tmp_path / "methods.json").read_text())["results"]
    assert {(x["method"], x["bits"]) for x in kept["bytes"]} == set(found["bytes"])
    assert methods.main(flags) == found
    assert len(trained) == 2 * len(names)


@pytest.mark.slow  # the data of both tasks
@pytest.mark.parametrize("task", methods.TASKS.values(), ids=list(methods.TASKS))
def test_the_program_trains_both_tasks(task: Task, tmp_path: Path) -> None:
    flags = ["--steps", "10", "--seeds", "1", "--bits", "0", "--methods", "TTQ", "--tasks"]
    found = methods.main([*flags, task.name, "--save-dir", str(tmp_path)])[task.name]
    assert set(found) == {(name, 0) for name in (methods.FULL, methods.BASE, "TTQ")}
    assert all(math.isfinite(score) for scores in found.values() for score in scores)


@pytest.mark.slow
def test_processes_train_the_bits_that_are_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--steps", "10", "--seeds", "1", "--methods", "LSQ", "--tasks", "digits"]
    flags += ["--save-dir", str(tmp_path), "--workers", "2", "--bits", "1", "2"]
    found = methods.main(flags)["digits"]
    assert set(found) == {(name, b) for name in (methods.FULL, methods.BASE, "LSQ") for b in (1, 2)}
    monkeypatch.setattr("subprocess.Popen", None)  # all is there
    assert methods.main(flags)["digits"] == found
    (tmp_path / "results.jsonl").unlink()
    monkeypatch.undo()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "torch.py").write_text("raise ImportError\n")
    with pytest.raises(UserError, match="a process of --workers has failed"):
        methods.main(flags)


def test_a_link_s_name_tells_methods_apart() -> None:
    """Results are kept under it."""
    task = methods.TASKS["digits"]
    for bits in range(4):
        names = [str(link) for link in methods.methods(bits, task.steps, task.rate).values()]
        assert len(names) == len(set(names))
