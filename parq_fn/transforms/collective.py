"""Collectives of refits and of learning: where one fails, the error names the leaves whose qparams
ranks wait to fit or to learn.

A collective fails when a rank has ended, or when one does not come within the process group's
timeout. What it fails with says nothing of what was being done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_MOST = 5  # names in a message


class RanksError(RuntimeError):
    """Ranks refit different leaves, or one did not come to a collective."""


def listed(names: Sequence[str]) -> str:
    """Names for a message: a few, and how many more.

    >>> listed(["a", "b"]), listed(list("abcdefg"))
    ("'a', 'b'", "'a', 'b', 'c', 'd', 'e' and 2 more")
    """
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(map(repr, names[:_MOST])) + more


def not_come(names: Sequence[str], group: Any, error: Exception) -> RanksError:
    """What to raise where a collective of that group failed, which fits or learns these leaves."""
    return RanksError(
        f"rank {dist.get_rank()} waited for the ranks {dist.get_process_group_ranks(group)} to fit "
        f"or learn the levels of {listed(names)} together, and one of them has ended, or did not "
        "come within the process group's timeout, as where it has frozen these parameters alone; "
        f"their qparams are as before. What torch said: {error}"
    )


def from_all(mine: Tensor, mesh: Any, d: int, names: Sequence[str]) -> Tensor:
    """[ranks, ...]: that of each rank along a dimension of the mesh, which refit these leaves."""
    group = mesh.get_group(d)
    found = mine.new_empty((mesh.size(d), *mine.shape))
    try:
        dist.all_gather_single(found.view(-1), mine.reshape(-1), group=group)
    except RuntimeError as error:
        raise not_come(names, group, error) from error
    return found


def summed(mine: Tensor, mesh: Any, d: int, names: Sequence[str]) -> Tensor:
    """The sum over the ranks along a dimension of the mesh, into the memory of `mine`."""
    group, mine = mesh.get_group(d), mine.contiguous()
    try:
        dist.all_reduce(mine, group=group)
    except RuntimeError as error:
        raise not_come(names, group, error) from error
    return mine


def to_each(
    like: Tensor,
    out: Sequence[Sequence[Tensor]],
    lengths: Sequence[int],
    mesh: Any,
    d: int,
    names: Sequence[str],
) -> Tensor:
    """What all ranks along a dimension of the mesh send to this one, who sends them `out`."""
    group = mesh.get_group(d)
    flat = torch.cat([like.new_zeros(0), *(piece for pieces in out for piece in pieces)])
    got = like.new_empty(sum(lengths))
    splits = [sum(map(len, pieces)) for pieces in out]
    try:
        dist.all_to_all_single(got, flat, [*lengths], splits, group=group)
    except RuntimeError as error:
        raise not_come(names, group, error) from error
    return got
