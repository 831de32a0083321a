"""Training that is killed at every moment: before each step, and at each thing that saving does
to a file. Run as `python -m tests.optim.killed FOLDER ADAPTER FIRST EVERY`, which takes every so
manieth moment from the first on; prints the last moment that there was, and those after which
resuming did not end as the run that was left alone.

Each run is a fork of this process, which has torch loaded and no threads started.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.command import Parser, command
from parq_fn.optim import load_checkpoint, save_checkpoint
from tests.optim.helpers import scheduled, state_of, train

STEPS, EVERY = 5, 2
FILES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


class Moments:
    """Counts moments, and kills this process at one of them."""

    def __init__(self, last: int | None, folder: Path) -> None:
        self.count, self.last, self.folder = 0, last, str(folder)
        self.lock = threading.Lock()

    def tick(self) -> None:
        with self.lock:
            self.count += 1
            if self.count == self.last:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        if event in FILES and args and str(args[0]).startswith(self.folder):
            self.tick()


def train_on(folder: Path, adapter: str, tick: Callable[[], None]) -> list[Tensor]:
    """Trains from the last checkpoint, or from the start; saves as it goes."""
    net, optimizer, scheduler = scheduled(adapter, 0)
    progress = {"step": 0}
    with suppress(FileNotFoundError):
        load_checkpoint(folder / "last", net, optimizer, scheduler=scheduler, progress=progress)
    saved = folder / "saved"
    assert progress["step"] >= (int(saved.read_text()) if saved.exists() else 0), "it is gone"
    while progress["step"] < STEPS:
        tick()
        train(net, optimizer, 1)
        scheduler.step()
        progress["step"] += 1
        if progress["step"] % EVERY == 0:
            others = {"scheduler": scheduler, "progress": progress}
            save_checkpoint(folder / "last", net, optimizer, **others)
            saved.write_text(str(progress["step"]))
    return state_of(net, optimizer)


def forked(work: Callable[[], None]) -> int:
    """The signal that ended a fork doing the work, 0 where none did; raises where it failed."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    return os.WEXITSTATUS(status) and -1


def main(base: Path, adapter: str, first: int, every: int) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    folder = base / "run"

    def alone() -> None:
        torch.save(train_on(base / "alone", adapter, lambda: None), base / "end.pt")

    def resume() -> None:
        end = torch.load(base / "end.pt")
        assert all(map(torch.equal, train_on(folder, adapter, lambda: None), end))

    assert forked(alone) == 0
    moment, wrong, killed = first - every, [], signal.SIGKILL
    while killed == signal.SIGKILL:
        moment += every
        shutil.rmtree(folder, ignore_errors=True)

        def until(moment: int = moment) -> None:
            moments = Moments(moment, folder)
            sys.addaudithook(moments.audit)
            train_on(folder, adapter, moments.tick)

        killed = forked(until)
        if forked(resume) != 0:
            wrong.append(moment)
    assert killed == 0
    print(json.dumps({"last": moment - every, "wrong": wrong}))


def program() -> None:
    parser = Parser("tests.optim.killed", __doc__)
    parser.add_argument("folder", type=Path, help="for checkpoints; it is emptied")
    parser.add_argument("adapter", help="such as QuantOptimizer")
    parser.add_argument("first", type=int, help="the first moment")
    parser.add_argument("every", type=int, help="moments from one to the next")
    args = parser.parse_args()
    main(args.folder, args.adapter, args.first, args.every)


if __name__ == "__main__":
    command(program)
