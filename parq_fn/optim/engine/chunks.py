"""Work on many things in turns, so that what each needs is never there for all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def chunks(sizes: Mapping[Any, int], bound: int | None = None) -> list[list[Any]]:
    """The keys, in runs whose sizes sum to no more than the bound, by default the largest of them;
    one that is larger stands alone.

    >>> chunks({"a": 3, "b": 1, "c": 2, "d": 1})
    [['a'], ['b', 'c'], ['d']]
    """
    runs: list[list[Any]] = []
    total = 0
    if bound is None:
        bound = max(sizes.values(), default=0)
    for key, size in sizes.items():
        if not runs or total + size > bound:
            runs.append([])
            total = 0
        runs[-1].append(key)
        total += size
    return runs
