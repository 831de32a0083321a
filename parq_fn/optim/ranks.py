"""The ranks of torch's process group, or the one process where there is none."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def many() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if many() else (0, 1)


def together(work: Callable[[], T]) -> T:
    """What the work gives; raises on all ranks where it failed on one."""
    got: Any = None
    failed: Exception | None = None
    try:
        got = work()
    except Exception as error:
        failed = error
    others = gathered(_sendable(failed))
    if failed is not None:
        raise failed
    for other in others:
        if other is not None:
            raise other
    result: T = got
    return result


def gathered(got: T) -> list[T]:
    """That of each rank. Raises RuntimeError where one has ended or does not come."""
    found: list[Any] = [got]
    if many():
        rank, world = rank_and_world()
        found = [None] * world
        try:
            dist.all_gather_object(found, got)
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {rank} waited for the other {world - 1}, and one has ended, or did not come "
                f"within the process group's timeout. What torch said: {error}"
            ) from error
    return found


def _sendable(error: Exception | None) -> Exception | None:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of someone's own raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
