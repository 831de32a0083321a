"""What a benchmark found, against what it is held to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from tests.benchmarks.measure import table


class Found(NamedTuple):
    """A figure."""

    group: str
    case: str
    what: str  # and its unit
    value: float
    spread: float = 0.0  # half the distance of the quartiles of repeats, or of all rounds
    limit: float | None = None  # None: not held to any
    at_most: bool = True  # else at least
    slow: bool = False  # the cores ran slow in all of its repeats

    @property
    def met(self) -> bool | None:
        """Whether it keeps its limit; None without one."""
        if self.limit is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def cells(self) -> list[str]:
        """The row of a table."""
        shown = f"{self.value:.3g}" if self.value < 100 else f"{self.value:.0f}"
        spread = f"+- {self.spread:.2g}" if self.spread else ""
        limit = ""
        if self.limit is not None:
            limit = f"{'<=' if self.at_most else '>='} {self.limit:g}"
        verdict = {None: "", True: "met", False: "MISSED"}[self.met]
        return [self.case, self.what, shown, spread, limit, verdict]


def show(found: Iterable[Found]) -> str:
    """A table of one group's figures."""
    return table([["case", "figure", "value", "", "limit", ""], *(one.cells for one in found)])


def combined(rounds: Sequence[Sequence[Found]]) -> list[Found]:
    """The median of the rounds, and half the distance of the most apart, or a round's own spread
    where that is more. Rounds in which the cores ran slow count where there are no others.
    """
    made = []
    for of_case in zip(*rounds, strict=True):
        if len({(one.case, one.what) for one in of_case}) > 1:
            raise ValueError(f"rounds differ: {of_case}")
        counted = [one for one in of_case if not one.slow] or of_case
        values = [one.value for one in counted]
        spreads = [(max(values) - min(values)) / 2, *(one.spread for one in counted)]
        value, spread = statistics.median(values), max(spreads)
        made.append(counted[0]._replace(value=value, spread=spread))
    return made


def overall(found: Iterable[Found]) -> list[Found]:
    """The geometric means over all passes on a CPU that were held against the peer's, refits among
    them."""
    made = []
    for form, limit in (("eager", 2.0), ("compiled", 10.0)):
        on_cpu = [one for one in found if one.group != "gpu"]
        values = [one.value for one in on_cpu if one.what == f"{form}, peer's time over ours"]
        if values:
            what = f"{form}, peer's time over ours, geometric mean"
            case = f"all {len(values)} passes against the peer"
            made.append(Found("all", case, what, geometric_mean(values), 0.0, limit, False))
    return made


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log))."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
