"""The sharded example: trained, killed, resumed; the end is that of a run that was left alone."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
OPTIONS = "--steps 40 --save-every 5 --layers 1 --width 32 --context 16 --batch-size 4"


class Run:
    """The example on some processes, each of which can be killed."""

    def __init__(self, folder: Path, world: int, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        command = [sys.executable, "-m", "examples.qat_fsdp2", *OPTIONS.split()]
        self.processes = [
            subprocess.Popen(
                [*command, "--save-dir", str(folder), *options],
                cwd=ROOT,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(world)
        ]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()

    def result(self) -> str:
        """What it printed of the end, but for the time it took."""
        try:
            texts = [process.communicate(timeout=120)[0] for process in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        assert not any(process.returncode for process in self.processes), texts
        assert "Warning" not in "".join(texts), texts
        found = re.search(r"(step 40, .* on levels [\d.]+)", texts[0])
        assert found is not None, texts
        return found[1]


def kill_when(pattern: str, run: Run, folder: Path) -> None:
    """Kills the run when it has made a file of this name that was not there before."""
    before, end = set(folder.glob(pattern)), time.monotonic() + 60
    while not set(folder.glob(pattern)) - before:
        assert time.monotonic() < end, f"no {pattern} in 60 s"
        time.sleep(0.001)
    run.kill()


def test_killed_and_resumed_it_ends_as_if_left_alone(tmp_path: Path) -> None:
    alone = Run(tmp_path / "alone", 2).result()
    assert "inverse slope 0.0000, on levels 1.0000" in alone
    kill_when("step-*", Run(tmp_path / "killed", 2), tmp_path / "killed")
    kill_when(
        ".step-*.parq_fn-unfinished", Run(tmp_path / "killed", 2, "--resume"), tmp_path / "killed"
    )
    assert not (tmp_path / "killed" / "step-000040").exists()
    assert Run(tmp_path / "killed", 2, "--resume").result() == alone
    again = Run(tmp_path / "killed", 1, "--resume").result()  # nothing is left to do
    assert again == alone.replace("2 processes", "1 processes")
