"""The inverse slope in 80 decimal digits, straight from its definition."""

from __future__ import annotations

from decimal import Context, Decimal, localcontext


def inverse_slope(step: int, start: int, end: int, steepness: float, center: float) -> float:
    """(h(x) - h(1)) / (h(0) - h(1)), h(x) = 1 / (1 + exp(k (x - m))); 1 before, 0 from end on."""
    if step < start:
        return 1.0
    if step >= end:
        return 0.0
    with localcontext(Context(prec=80, Emin=-(10**9), Emax=10**9)):
        k, m = Decimal(steepness), Decimal(center)

        def h(x: Decimal) -> Decimal:
            return 1 / (1 + (k * (x - m)).exp())

        x, zero, one = Decimal(step - start) / Decimal(end - start), Decimal(0), Decimal(1)
        return float((h(x) - h(one)) / (h(zero) - h(one)))
