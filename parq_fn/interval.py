"""Intervals of numbers: where a coefficient may lie, and what a hyperparameter is held to."""

from __future__ import annotations

from parq_fn.value import Value, value


@value
class Interval(Value):
    """The numbers from low to high, each end among them unless `open_low` or `open_high`.

    >>> share = Interval(0.0, 1.0, open_low=True)
    >>> 0.0 in share, 1.0 in share, str(share)
    (False, True, '(0, 1]')
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below

    def __str__(self) -> str:
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"
