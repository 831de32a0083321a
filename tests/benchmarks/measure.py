"""Medians of repeated runs, ratios of them, what work holds in memory, and tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

Work = Callable[[], Any]


def seconds(work: Work, repeats: int, least: float = 0.05) -> list[float]:
    """The time of one call, `repeats` times over as many calls as take `least` seconds."""
    return interleaved({"": work}, repeats, least)[""]


def interleaved(
    works: Mapping[str, Work], repeats: int, least: float = 0.05, before: Work | None = None
) -> dict[str, list[float]]:
    """The time of one call of each work, taken in turns, so that what else the machine does falls
    on all alike. `before` runs untimed before each call, and then each call is timed alone."""
    calls = {}
    for name, work in works.items():
        _once(work, before)
        took = _once(work, before)
        calls[name] = 1 if before is not None else max(1, round(least / max(took, 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            if before is not None:
                found[name].append(_once(work, before))
                continue
            start = time.perf_counter()
            for _ in range(calls[name]):
                work()
            found[name].append((time.perf_counter() - start) / calls[name])
    return found


def _once(work: Work, before: Work | None) -> float:
    if before is not None:
        before()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ratio(of: Sequence[float], to: Sequence[float]) -> tuple[float, float]:
    """(ratio of the medians; its spread: half the distance of the quartiles of the ratios of runs
    that were next to each other)."""
    each = sorted(a / b for a, b in zip(of, to, strict=True))
    quarter = len(each) // 4
    spread = (each[-1 - quarter] - each[quarter]) / 2
    return statistics.median(of) / statistics.median(to), spread


def peak(prepare: Callable[[], Work]) -> int:
    """The most bytes held at once during the work that was prepared, besides those from before.

    What is freed is known only if it was made under the same profiler.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work = prepare()
        with record_function("work"):
            work()
    events = seen.profiler.kineto_results.events()
    begin = next(e.start_ns() for e in events if e.name() == "work")
    held = before = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        if event.start_ns() < begin:
            before = most = held
        most = max(most, held)
    return most - before


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first the head, as aligned text; the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    return "\n".join(lines)
