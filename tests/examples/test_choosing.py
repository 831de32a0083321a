"""The program of the page on what to choose: what it trains, and its tables."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import parq_fn as pf
from examples import choosing
from parq_fn.foundation.command import UserError


def test_a_table_has_every_line_and_what_is_kept_is_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = []

    def train(task: choosing.Task, link: choosing.Link, seeds: range) -> list[float]:
        trained.append(str(link(task)))
        return [float(len(trained)) for _ in seeds]

    monkeypatch.setattr(choosing, "train", train)
    flags = ["--tasks", "digits", "--save-dir", str(tmp_path)]
    first = choosing.main(flags)
    links = [link for cells in choosing.compared().values() for link in cells.values()]
    assert (
        len(trained) == len(set(trained)) == len({str(x(choosing.TASKS["digits"])) for x in links})
    )
    assert first.count("| 1.00 ± 0.00") == 5  # full precision, in each column
    assert choosing.main(flags) == first
    assert len(trained) == len(set(trained))


@pytest.mark.slow  # the data of both tasks
@pytest.mark.parametrize("task", choosing.TASKS.values(), ids=list(choosing.TASKS))
def test_seeds_are_trained_at_once_as_each_alone(task: choosing.Task) -> None:
    link = choosing.annealed(pf.parq_prox, pf.lsbq(2))
    short = task._replace(steps=5)
    both = choosing.train(short, link, [0, 1])
    assert all(math.isfinite(score) for score in both)
    assert choosing.train(short, link, [1]) == pytest.approx(both[1:], rel=0.02)


@pytest.mark.parametrize("line", ['{"cut off', "3", '["digits", 10, "None", 5]', "\x00"])
def test_a_file_of_results_that_was_cut_off_is_told_in_one_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(UserError, match=r"results.jsonl, line 1 is no result; delete that line"):
        choosing.results(choosing.TASKS["digits"], file, [])
