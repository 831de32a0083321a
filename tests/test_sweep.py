"""examples/sweep.py: the same as runs alone, the same again, a table and a figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.sweep import Setting, draw, main
from parq_fn.foundation.command import UserError

SMALL = ["--steps", "24", "--lr", "0.01", "--anneal-end", "0.5", "--seeds", "2", "--no-progress"]


@pytest.mark.rare
@pytest.mark.usefixtures("graphs_alone")
def test_a_sweep_equals_its_runs_one_after_another(tmp_path: Path, capsys) -> None:
    flags = [*SMALL, "--dtype", "float64", "--chunk", "3", "--one-by-one"]
    flags += ["--save-dir", str(tmp_path)]
    rows = main(flags)  # raises where they differ
    assert len(rows) == 2
    assert {row["steepness"] for row in rows} == {5.0, 50.0}
    assert all(10 < row["mean"] <= 100 for row in rows)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert report["table"] == rows
    assert report["seconds_one_by_one"] > 0
    shown = capsys.readouterr()
    assert "test accuracy (%)" in shown.out
    assert "differ by up to 0.00" in shown.err


@pytest.mark.rare
@pytest.mark.usefixtures("graphs_alone")
def test_a_sweep_of_one_run_is_compiled_once(tmp_path: Path) -> None:
    """A batch of one is laid out in two ways that a compiler tells apart."""
    flags = [*SMALL[2:], "--steps", "12", "--seeds", "1", "--steepness", "5"]
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        main([*flags, "--save-dir", str(tmp_path)])


@pytest.mark.rare
@pytest.mark.usefixtures("graphs_alone")
def test_a_sweep_gives_the_same_again(tmp_path: Path) -> None:
    flags = [*SMALL[2:], "--steps", "12"]
    once, again = (main([*flags, "--save-dir", str(tmp_path / name)]) for name in "ab")
    assert once == again


@pytest.mark.rare
@pytest.mark.usefixtures("graphs_alone")
def test_a_second_grid_of_another_size_is_trained_in_the_same_process(tmp_path: Path) -> None:
    """A compiler would take the sizes that changed for symbols."""
    torch.compiler.reset()
    for steps, seeds in (("12", "1"), ("16", "2")):
        flags = [*SMALL[2:6], "--steps", steps, "--seeds", seeds, "--steepness", "5"]
        assert main([*flags, "--no-progress", "--save-dir", str(tmp_path / steps)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--anneal-end", "0.05"], "expected shares above 0.1 (step 40), up to 1, got [0.05]"),
        (["--anneal-end", "0.11", "--steps", "10"], "expected shares above 0.1 (step 1), up to"),
        (["--seeds", "0"], "expected a whole number from 1 on, got '0'"),
        (["--lr", "-1"], "expected a number above 0, got '-1'"),
        (["--lr", "0.1", "1e-1"], "--lr: expected each value once, got [0.1, 0.1]"),
        (["--save-dir", "/dev/null/x"], "--save-dir: "),
        (["--model", "large"], "invalid choice: 'large'"),
    ],
)
def test_flags_that_mean_nothing_are_refused(flags, message: str, capsys) -> None:
    threads = torch.get_num_threads()
    with pytest.raises(SystemExit):
        main(flags)
    assert message in capsys.readouterr().err
    assert torch.get_num_threads() == threads


def test_ray_that_is_not_installed_is_named_with_its_extra(monkeypatch, capsys) -> None:
    monkeypatch.setattr("examples.sweep.find_spec", lambda _: None)
    with pytest.raises(SystemExit):
        main(["--ray"])
    assert "--ray: Ray is not installed; pip install -e '.[ray]'" in capsys.readouterr().err


def test_a_batch_is_no_larger_than_the_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--batch-size: expected at most 1347 images, got 1348"):
        main(["--batch-size", "1348", "--save-dir", str(tmp_path)])


def test_marks_of_a_large_grid_lie_beside_their_learning_rate() -> None:
    """They lay on the next one's, and beyond the ends of the axis."""
    rates, steeps = torch.tensor([1e-3, 1e-2, 1e-1]).double(), torch.arange(1.0, 17.0).double()
    grid = torch.cartesian_prod(rates, steeps, torch.tensor([9.0]).double())
    settings = Setting(*grid.unbind(1), torch.zeros(len(grid), dtype=torch.int64))
    (panel,) = draw(settings, torch.rand(len(grid)), 1, "title").axes
    assert len(panel.lines) == 16
    for line in panel.lines:
        assert [round(x) for x in line.get_xdata()] == [0, 1, 2]
        assert max(abs(x - round(x)) for x in line.get_xdata()) < 0.45
