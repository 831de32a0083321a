"""Prox maps of one weight u, levels q (a sorted list), from their definitions."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise


def hard(u: float, q: list[float]) -> float:
    """The nearest level, the lower one in a tie."""
    return min(q, key=lambda level: (abs(level - u), level))


def cell(u: float, q: list[float]) -> tuple[float, float] | None:
    """The cell [q_i, q_{i+1}] of u, None outside all."""
    for lo, hi in pairwise(q):
        if lo <= u <= hi:
            return lo, hi
    return None


def clip(u: float, q: list[float]) -> float:
    """u held to [q_1, q_k]."""
    return min(max(u, q[0]), q[-1])


def parq(u: float, q: list[float], s: float) -> float:
    """clamp(c + (u - c) / s) to the cell, the end level outside; hard at s = 0."""
    ends = cell(u, q)
    if ends is None:
        return clip(u, q)
    if s == 0:
        return hard(u, q)
    lo, hi = ends
    c = (lo + hi) / 2
    return min(max(c + (u - c) / s, lo), hi)


def soft(u: float, q: list[float], temperature: float) -> float:
    """The sigmoid of the position in the cell, scaled to run from end to end."""
    ends = cell(u, q)
    if ends is None or temperature == 0:
        return clip(u, q)
    if temperature == math.inf:
        return hard(u, q)
    lo, hi = ends

    def sigma(z: float) -> float:
        return 1 / (1 + math.exp(-z))

    x = (u - lo) / (hi - lo)
    share = (sigma(temperature * (x - 0.5)) - 0.5) / (sigma(temperature / 2) - 0.5)
    return (lo + hi) / 2 + (hi - lo) / 2 * share


def binary_relax(u: float, q: list[float], theta: float) -> float:
    """(1 - theta) u + theta * nearest level."""
    return (1 - theta) * u + theta * hard(u, q)


def proxquant(u: float, q: list[float], strength: float) -> float:
    """u moved toward the nearest level by at most `strength`."""
    near = hard(u, q)
    if abs(near - u) <= strength:
        return near
    return u + strength if near > u else u - strength


def paper_par(u: float, q: list[float], a: list[float]) -> float:
    """Equations (4) to (6) of PARQ: levels 0 = q_0 < q_1 < ... of |w|, slopes a_0 < a_1 < ...,
    one for each level, the last reaching to infinity."""
    size, sign = abs(u), math.copysign(1.0, u)
    before = 0.0
    for i, (level, slope) in enumerate(zip(q, a, strict=True)):
        if before + level <= size <= slope + level:
            return sign * level
        above = q[i + 1] if i + 1 < len(q) else math.inf
        if slope + level <= size <= slope + above:
            return u - sign * slope
        before = slope
    raise AssertionError(f"{u} lies on no piece")


# Penalties


def distance(w: float, q: list[float]) -> float:
    """To the nearest level."""
    return min(abs(level - w) for level in q)


def within(penalty: Callable[[float, float, float], float]) -> Callable[..., float]:
    """penalty(w, lo, hi) on every cell, infinite outside all."""

    def everywhere(w: float, q: list[float]) -> float:
        ends = cell(w, q)
        if ends is None:
            return 0.0 if w == q[0] else math.inf
        return penalty(w, *ends)

    return everywhere


def parq_penalty(w: float, q: list[float], s: float) -> float:
    """(1 - s) / 2 (w - lo) (hi - w) on the cell."""
    return within(lambda w, lo, hi: (1 - s) / 2 * (w - lo) * (hi - w))(w, q)


def clip_penalty(w: float, q: list[float]) -> float:
    """0 in the range."""
    return 0.0 if q[0] <= w <= q[-1] else math.inf


def binary_relax_penalty(w: float, q: list[float], theta: float) -> float:
    """lam / 2 dist^2, theta = lam / (1 + lam) < 1."""
    return theta / (1 - theta) / 2 * distance(w, q) ** 2


def proxquant_penalty(w: float, q: list[float], strength: float) -> float:
    """strength * dist."""
    return strength * distance(w, q)


def paper_par_penalty(w: float, q: list[float], a: list[float]) -> float:
    """max_i a_i (|w| - q_i) + b_i, b_i = b_{i-1} + a_{i-1} (q_i - q_{i-1}), b_0 = 0."""
    b, best = 0.0, a[0] * (abs(w) - q[0])
    for i in range(1, len(q)):
        b += a[i - 1] * (q[i] - q[i - 1])
        best = max(best, a[i] * (abs(w) - q[i]) + b)
    return best


def minimum(f: Callable[[float], float], low: float, high: float, marks: list[float]) -> float:
    """The least value of f on [low, high]: a dense scan, the marks too, then golden section."""
    step = (high - low) / 400
    points = sorted([low + i * step for i in range(401)] + [m for m in marks if low <= m <= high])
    at = min(range(len(points)), key=lambda i: f(points[i]))
    a, b = points[max(at - 1, 0)], points[min(at + 1, len(points) - 1)]
    best, ratio = f(points[at]), (math.sqrt(5) - 1) / 2
    for _ in range(80):
        c, d = b - ratio * (b - a), a + ratio * (b - a)
        best = min(best, f(c), f(d))
        a, b = (a, d) if f(c) < f(d) else (c, b)
    return best
