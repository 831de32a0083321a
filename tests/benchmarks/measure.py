"""Medians of repeated runs, and tables of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


def seconds(work: Callable[[], Any], repeats: int, least: float = 0.05) -> list[float]:
    """The time of one call, `repeats` times over as many calls as take `least` seconds."""
    work()
    start = time.perf_counter()
    work()
    calls = max(1, round(least / max(time.perf_counter() - start, 1e-9)))
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        found.append((time.perf_counter() - start) / calls)
    return found


def ratio(of: Sequence[float], to: Sequence[float]) -> tuple[float, float]:
    """(ratio of the medians; its spread: half the distance of the quartiles of the ratios of runs
    that were next to each other)."""
    each = sorted(a / b for a, b in zip(of, to, strict=True))
    quarter = len(each) // 4
    spread = (each[-1 - quarter] - each[quarter]) / 2
    return statistics.median(of) / statistics.median(to), spread


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first the head, as aligned text; the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    return "\n".join(lines)
