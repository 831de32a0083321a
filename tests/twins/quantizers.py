"""Levels of one row x (a list of floats), from their definitions."""

from __future__ import annotations

import math
from itertools import combinations, pairwise, product

from tests.twins.formats import e8m0, minifloats, nearest_number


def mean(x: list[float]) -> float:
    """The arithmetic mean."""
    return sum(x) / len(x)


def lsbq_greedy(x: list[float], bits: int) -> list[float]:
    """All sums of +-v_i, v_i the mean magnitude of what is left; ternary for bits = 0."""
    if bits == 0:
        v = 1.1 * mean([abs(a) for a in x])
        return [-v, 0.0, v]
    rest, parts = list(x), []
    for _ in range(bits):
        v = mean([abs(a) for a in rest])
        rest = [a - v if a >= 0 else a + v for a in rest]
        parts.append(v)
    signs = product((-1.0, 1.0), repeat=bits)
    return sorted(sum(s * v for s, v in zip(row, parts, strict=True)) for row in signs)


def uniform(x: list[float], bits: int, scale: str) -> list[float]:
    """(j + 1/2) * step, j = -2^(b-1) .. 2^(b-1) - 1."""
    q_max = max(map(abs, x))
    if scale == "mean":
        q_max = min(bits * mean([abs(a) for a in x]), q_max)
    half = 2 ** (bits - 1)
    return [(j + 0.5) * q_max / (half - 0.5) for j in range(-half, half)]


def max_uniform(x: list[float], bits: int) -> list[float]:
    """j * step, |j| < 2^(b-1), the ends at +-max|x|."""
    top = 2 ** (bits - 1) - 1
    return [j * max(map(abs, x)) / top for j in range(-top, top + 1)]


def asymmetric(x: list[float], bits: int) -> list[float]:
    """(j - z) * scale from min to max, z an integer; a constant is one scale away from 0."""
    low, high, count = min(x), max(x), 2**bits
    scale = (high - low) / (count - 1) or abs(low)
    z = round(-low / scale) if low < high else int(low < 0)
    return [(j - z) * scale for j in range(count)]


def ternary_uniform(x: list[float]) -> list[float]:
    """-step, 0, step with step = max|x| / 1.5."""
    step = max(map(abs, x)) / 1.5
    return [-step, 0.0, step]


def integer(x: list[float], bits: int, scale: str) -> list[float]:
    """j * a, j = -2^(b-1) .. 2^(b-1) - 1."""
    half = 2 ** (bits - 1)
    if scale == "max":
        a = max(max(x) / (half - 1), -min(x) / half)
    elif scale == "max_symmetric":
        a = max(map(abs, x)) / ((2**bits - 1) / 2)
    else:
        a = 2 * mean([abs(v) for v in x]) / math.sqrt(half - 1)
    return [j * a for j in range(-half, half)]


def affine(x: list[float], bits: int) -> list[float]:
    """j * scale + minimum, j = 0 .. 2^b - 1, from min to max."""
    scale = (max(x) - min(x)) / (2**bits - 1)
    return [j * scale + min(x) for j in range(2**bits)]


def codebook(x: list[float], table: tuple[float, ...]) -> list[float]:
    """scale * table, the largest magnitudes of both the same."""
    scale = max(map(abs, x)) / max(map(abs, table))
    return [scale * number for number in table]


def gaussian(x: list[float], levels: int, outermost: float) -> list[float]:
    """Evenly spaced between +-outermost * rms(x)."""
    end = outermost * math.sqrt(mean([a * a for a in x]))
    return [end * (2 * i / (levels - 1) - 1) for i in range(levels)]


def mxfp4(x: list[float]) -> list[float]:
    """e2m1's numbers times 2^(floor(log2 max|x|) - 2)."""
    scale = e8m0(max(map(abs, x)) / 4)
    positive = minifloats(2, 1)
    return [scale * q for q in [*(-q for q in reversed(positive)), *positive[1:]]]


def nvfp4(rows: list[list[float]]) -> list[list[float]]:
    """e2m1's numbers times a scale of e4m3 for each row times one of all rows."""
    positive = minifloats(2, 1)
    whole = max(abs(a) for x in rows for a in x) / (6 * 448)
    found = []
    for x in rows:
        share = max(max(map(abs, x)) / 6 / whole, 2.0**-9) if whole else 0.0
        scale = nearest_number(share, 3, -6, 448.0) * whole
        found.append([scale * q for q in [*(-q for q in reversed(positive)), *positive[1:]]])
    return found


def error(x: list[float], q: list[float]) -> float:
    """Squared distance to the nearest levels."""
    return sum(min((a - level) ** 2 for level in q) for a in x)


def best_error(x: list[float], runs: int, *, zero: bool = False) -> float:
    """The least squared error of that many levels, over all partitions of the sorted row; with
    `zero`, one more level stands at 0."""
    values, least = sorted(x), float("inf")
    n = len(values)
    for m in range(1, min(runs + zero, n) + 1):
        for cuts in combinations(range(1, n), m - 1):
            parts = [values[a:b] for a, b in pairwise((0, *cuts, n))]
            own = [sum((a - mean(p)) ** 2 for a in p) for p in parts]
            if not zero:
                least = min(least, sum(own))
                continue
            if m <= runs:
                least = min(least, sum(own))
            for i, part in enumerate(parts):  # the run that the level 0 takes
                at_zero = sum(a * a for a in part)
                least = min(least, sum(own) - own[i] + at_zero)
    return least


def optimal_ternary_error(x: list[float]) -> float:
    """The least squared error of -v, 0, v."""
    return best_error([abs(a) for a in x], 1, zero=True)


def symmetric_error(x: list[float], levels: int) -> float:
    """The least squared error of levels in pairs of opposite sign."""
    return best_error([abs(a) for a in x], levels // 2)
