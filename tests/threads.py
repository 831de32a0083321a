"""Functions on ranks that are threads of this process: they begin at once, and run the modules that
this process has imported, such as one that was changed on purpose."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

T = TypeVar("T")
_SECONDS = 60


def on_threads(work: Callable[[], T], world: int) -> list[T]:
    """What work() gives on each of the ranks; raises what the first of them raised."""
    isolate: Any = torch._C._distributed_c10d._set_thread_isolation_mode
    store, found, errors = dist.HashStore(), {}, dict[int, BaseException]()

    def run(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
        try:
            found[rank] = work()
        except BaseException as error:  # of any rank, of which the others are told
            errors[rank] = error
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    isolate(True)
    threaded._install_threaded_pg()
    try:
        ranks = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(world)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(_SECONDS)
            if rank.is_alive():
                raise TimeoutError(f"a rank took {_SECONDS} seconds")
        threaded.ProcessLocalGroup.reset()
    finally:
        threaded._uninstall_threaded_pg()
        isolate(False)
    real = [error for error in errors.values() if not isinstance(error, SystemExit)]
    if errors:
        raise (real or [*errors.values()])[0]
    return [found[rank] for rank in range(world)]
