"""Runs a function on several processes, gloo on 127.0.0.1; a hung collective fails the test."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing


def _main(rank: int, work: Callable[..., None], world: int, folder: str, args: Any) -> None:
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
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # gloo's threads may abort a process that unwinds while they end


def on_processes(work: Callable[..., None], world: int, folder: Path, *args: Any) -> None:
    """Runs work(*args) on `world` ranks; raises what one of them raised, or after four minutes."""
    running = multiprocessing.start_processes(
        _main, args=(work, world, str(folder), args), nprocs=world, join=False
    )
    end = time.monotonic() + 240
    try:
        while not running.join(timeout=1):
            if time.monotonic() > end:
                raise TimeoutError(f"{work.__name__} on {world} processes took four minutes")
    finally:
        for process in running.processes:
            if process.is_alive():
                process.kill()
