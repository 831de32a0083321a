"""Medians of repeated runs, ratios of them, what work holds in memory, and tables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

Work = Callable[[], Any]


class Cores:
    """Whether the processor runs as fast as it can, by a calculation that is always the same.

    The cores of a virtual machine slow down for seconds or minutes as others use theirs. What
    computes then takes up to twice as long beside a copy, which only waits for memory. A slow
    stretch is known by this calculation alone, whatever the works take in it.
    """

    slow = 1.15  # times the least that the calculation has taken
    most = 100  # works made again in all: where cores are slow for long, waiting does not help

    def __init__(self) -> None:
        self.patience = 0  # times that a work may be made again; with none, nothing is asked
        self.again = 0  # works made again so far
        self.were_slow = False  # in all repeats of the works measured last
        self.least = float("inf")
        self.x = torch.rand(1 << 16)  # half of it for each of two cores, next to them

    def seconds(self) -> float:
        """The calculation's time, the median of nine."""
        took = []
        for _ in range(9):
            start = time.perf_counter()
            for _ in range(10):
                self.x.exp()
            took.append(time.perf_counter() - start)
        found = statistics.median(took)
        self.least = min(self.least, found)
        return found

    def steady(self, work: Callable[[], Any]) -> tuple[Any, bool]:
        """(what the work gives, whether the cores were slow just before it or after); it is made
        again while they were, as long as patience lasts."""
        left = self.patience
        while True:
            slow = self._are_slow()
            result = work()
            slow = self._are_slow() or slow
            if not slow or not left or self.again >= self.most:
                return result, slow
            left, self.again = left - 1, self.again + 1
            time.sleep(0.2)

    def _are_slow(self) -> bool:
        return self.patience > 0 and self.seconds() > self.slow * self.least


_AHEAD = 60_000_000  # cycles that a GPU waits while work is handed to it, some 30 ms
CORES = Cores()  # without patience, everything is measured once


def finished(work: Work, device: str) -> Work:
    """The work, and what it has started on a GPU done."""
    if device == "cpu":
        return work

    def waited() -> None:
        work()
        torch.cuda.synchronize()

    return waited


def on_device(works: Mapping[str, Work], repeats: int, before: Work) -> dict[str, list[float]]:
    """Milliseconds that a GPU takes for each work, by its own clock, where all of it waits to be
    begun: as in training, where the host is ahead. `before` runs untimed."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            before()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_AHEAD)
            begin.record()
            work()
            end.record()
            end.synchronize()
            found[name].append(begin.elapsed_time(end))
    return found


def seconds(work: Work, repeats: int, least: float = 0.05) -> list[float]:
    """The time of one call, `repeats` times over as many calls as take `least` seconds."""
    return interleaved({"": work}, repeats, least)[""]


def interleaved(
    works: Mapping[str, Work], repeats: int, least: float = 0.05, before: Work | None = None
) -> dict[str, list[float]]:
    """The time of one call of each work, taken in turns, so that what else the machine does falls
    on all alike. `before` runs untimed before each call, and then each call is timed alone.
    Repeats in which the cores ran slow are left out, unless they did in all of them."""
    calls = {}
    for name, work in works.items():
        _once(work, before)
        took = _once(work, before)
        calls[name] = 1 if before is not None else max(1, round(least / max(took, 1e-9)))

    def timed(name: str) -> float:
        if before is not None:
            return _once(works[name], before)
        start = time.perf_counter()
        for _ in range(calls[name]):
            works[name]()
        return (time.perf_counter() - start) / calls[name]

    fast, slow = [], []
    for _ in range(repeats):
        found = {name: CORES.steady(partial(timed, name)) for name in works}
        row = {name: took for name, (took, _) in found.items()}
        (slow if any(bad for _, bad in found.values()) else fast).append(row)
    CORES.were_slow = not fast
    return {name: [row[name] for row in fast or slow] for name in works}


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
