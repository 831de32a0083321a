"""The sharded example: trained, killed, resumed; the end is that of a run that was left alone."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import pytest

from tests.processes import Program

OPTIONS = "--steps 40 --save-every 5 --layers 1 --width 32 --context 16 --batch-size 4"


def run(folder: Path, world: int, *options: str) -> Program:
    """The example on some processes."""
    flags = [*OPTIONS.split(), "--save-dir", str(folder), *options]
    return Program("examples.qat_fsdp2", flags, world, folder.with_name(f"{folder.name}-shown"))


def result(program: Program) -> str:
    """What it printed of the end, but for the time it took."""
    shown = program.end()
    assert "Warning" not in shown
    found = re.search(r"(step 40, .* on levels [\d.]+)", shown)
    assert found is not None, shown
    return found[1]


def kill_when(pattern: str, program: Program, folder: Path) -> None:
    """Kills the run when it has made a file of this name that was not there before."""
    before, end = set(folder.glob(pattern)), time.monotonic() + 60
    while not set(folder.glob(pattern)) - before:
        assert time.monotonic() < end, f"no {pattern} in 60 s:\n{program.shown}"
        assert program.running, program.shown
        time.sleep(0.001)
    program.signal(signal.SIGKILL)
    while program.running:
        time.sleep(0.001)


@pytest.mark.rare
def test_killed_and_resumed_it_ends_as_if_left_alone(tmp_path: Path) -> None:
    alone = result(run(tmp_path / "alone", 2))
    assert "inverse slope 0.0000, on levels 1.0000" in alone
    folder = tmp_path / "killed"
    kill_when("step-*", run(folder, 2), folder)
    kill_when(".step-*.parq_fn-unfinished", run(folder, 2, "--resume"), folder)
    assert not (folder / "step-000040").exists()
    assert result(run(folder, 2, "--resume")) == alone
    again = result(run(folder, 1, "--resume"))  # nothing is left to do
    assert again == alone.replace("2 processes", "1 processes")


@pytest.mark.rare
def test_training_goes_on_under_tensor_parallelism(tmp_path: Path) -> None:
    run(tmp_path / "net", 2, "--stop-after", "20").end()
    shown = result(run(tmp_path / "net", 4, "--resume", "--tensor-parallel", "2"))
    assert "4 processes" in shown
    assert "inverse slope 0.0000, on levels 1.0000" in shown
