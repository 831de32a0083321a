"""Functions and programs on processes of their own, gloo on 127.0.0.1.

Processes are forked from a server that has imported torch, the library and the examples, and has
started no thread: a group of them begins in tenths of a second, where imports alone take six.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

from tests import plugin

#: What processes import, once for all of them.
_PRELOAD = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "examples.qat_fsdp2",
    "examples.recipe.training",
    "tests.optim.helpers",
    "tests.processes",
]
_SECONDS = "seconds-of-processor-time"


def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _charged(folder: Path) -> None:
    """Counts the processor time of processes that ended, for they are the server's children."""
    for file in folder.glob(f"{_SECONDS}-*"):
        plugin.charge(float(file.read_text() or 0))
        file.unlink()


def _leave_seconds(folder: str) -> None:
    Path(folder, f"{_SECONDS}-{os.getpid()}").write_text(str(time.process_time()))


# Ranks of a process group


def _rank(
    rank: int, work: Callable[..., None], world: int, folder: str, apart: bool, args: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{world}-{work.__name__}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=30),
    )
    try:
        work(*args)
        if not apart:
            dist.barrier()
    finally:
        if not apart:
            dist.destroy_process_group()
        _leave_seconds(folder)
    os._exit(0)  # gloo's threads may abort a process that unwinds while they end


def on_processes(
    work: Callable[..., None], world: int, folder: Path, *args: Any, apart: bool = False
) -> None:
    """Runs work(*args) on `world` ranks; raises what one of them raised, or after two minutes.

    A collective that hangs is an error after thirty seconds.
    apart: ranks may end before the others, by os._exit(0).
    """
    _server()
    running = start_processes(
        _rank, (work, world, str(folder), apart, args), world, join=False, start_method="forkserver"
    )
    end = time.monotonic() + 120
    try:
        while not running.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"{work.__name__} on {world} processes took two minutes")
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()
        _charged(folder)


# Programs


def _program(module: str, flags: list[str], told: dict[str, str], shown: str, folder: str) -> None:
    """What `python -m module flags` does, as the leader of a process group of its own."""
    os.setsid()
    signal.pthread_sigmask(signal.SIG_SETMASK, [])  # a recipe may have started the server
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(told)
    file = os.open(shown, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2)
    )
    leave = os._exit

    def leave_seconds(status: int) -> None:  # programs on several processes leave by it
        _leave_seconds(folder)
        leave(status)

    os._exit = leave_seconds  # type: ignore[assignment]
    sys.argv = [module, *flags]
    ended = importlib.import_module(module).main(flags)
    sys.stdout.flush()
    if isinstance(ended, int):
        sys.exit(ended)
    os._exit(0)  # as the program does under torchrun


class Program:
    """A program on some processes, told of each other as torchrun tells them.

    module: which has main(flags); folder: for what they print, and what else is kept of them.
    """

    def __init__(self, module: str, flags: Sequence[str], world: int, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        # as if a process for each core were here: then a recipe takes one thread
        here = max(world, os.cpu_count() or 1)
        shared |= {"LOCAL_WORLD_SIZE": str(here), "OMP_NUM_THREADS": "1"}
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        number = len(list(folder.glob("shown-*-0")))
        self.files = [folder / f"shown-{number}-{rank}" for rank in range(world)]
        self.processes = []
        for rank, file in enumerate(self.files):
            file.touch()
            told = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            args = module, list(flags), told, str(file), str(folder)
            self.processes.append(_server().Process(target=_program, args=args))
            self.processes[-1].start()

    @property
    def shown(self) -> str:
        """What the first process has printed so far."""
        return self.files[0].read_text()

    @property
    def running(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def until(self, text: str) -> None:
        """Waits for the first process to print this."""
        end = time.monotonic() + 90
        while text not in self.shown:
            assert self.processes[0].is_alive(), self.shown
            assert time.monotonic() < end, f"no {text!r} in 90 s:\n{self.shown}"
            time.sleep(0.005)

    def signal(self, number: int) -> None:
        """To all processes, and to those that they started."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def end(self, status: int = 0) -> str:
        """What the first process printed; all are to end with this status."""
        end = time.monotonic() + 120
        while self.running:
            wrong = {process.exitcode for process in self.processes} - {None, status}
            if wrong or time.monotonic() > end:  # the others would wait for one that failed
                self.signal(signal.SIGKILL)
            time.sleep(0.01)
        _charged(self.folder)
        texts = [file.read_text() for file in self.files]
        codes = [process.exitcode for process in self.processes]
        assert codes == [status] * len(texts), (codes, texts)
        return texts[0]
