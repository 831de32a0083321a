"""Strategies of rows, levels, latents and coefficients; `strategies` gives them out."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from parq_fn.foundation.checks import Interval
from parq_fn.foundation.traits import Slopes

Strategy = st.SearchStrategy
Draw = st.DrawFn

#: The dtypes that operators are checked in.
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: The least distance between neighbouring levels that are drawn.
MIN_GAP = 1e-3


@functools.cache
def numbers(low: float = -8.0, high: float = 8.0) -> Strategy[float]:
    """Floats from low to high, those below 1e-6 in magnitude rounded to 0."""
    floats = st.floats(low, high, allow_nan=False, allow_infinity=False)
    return floats.map(lambda x: x if abs(x) >= 1e-6 else 0.0)


def dtypes() -> Strategy[torch.dtype]:
    """float64, float32, bfloat16, float16."""
    return st.sampled_from(FLOATING)


# Rows and levels

#: By how many weights that are not drawn a row is longer.
_LONGER = st.one_of(*[st.just(0)] * 7, st.sampled_from((62, 66, 130)))


@functools.cache
def _row(n: int) -> Strategy[tuple[str, list[float], list[int]]]:
    floats, ints = (st.lists(x, min_size=n, max_size=n) for x in (numbers(), st.integers(-4, 4)))
    return st.one_of(
        st.tuples(st.sampled_from(("ties", "zeros")), st.just([0.0] * n), ints),
        st.tuples(st.sampled_from(("free", "constant", "outlier")), floats, st.just([0] * n)),
    )


@st.composite
def rows(
    draw: Draw,
    *,
    count: int | tuple[int, int] = (1, 3),
    length: tuple[int, int] = (1, 8),
    dtype: torch.dtype = torch.float64,
    magnitudes: Sequence[float] = (1.0,),
    longer: bool = False,
) -> Tensor:
    """Rows [r, n] of weights: arbitrary, tied, constant, zero, or with an outlier.

    Every row is multiplied by one of the magnitudes; longer: one in eight has 62 to 130 numbers
    more, spread over [-4, 4].
    """
    low, high = (count, count) if isinstance(count, int) else count
    n = draw(st.integers(*length))
    made = []
    more = draw(_LONGER) if longer else 0
    beside = [8 * ((i + 1) * 0.618034 % 1) - 4 for i in range(more)]
    for kind, floats, ints in draw(st.lists(_row(n), min_size=low, max_size=high)):
        size = draw(st.sampled_from(tuple(magnitudes))) if len(magnitudes) > 1 else magnitudes[0]
        row = {
            "ties": [float(x) for x in ints],
            "zeros": [0.0] * n,
            "free": floats,
            "constant": floats[:1] * n,
            "outlier": [*floats[:-1], 1000.0],
        }[kind]
        made.append([size * x for x in row + beside])
    return torch.tensor(made, dtype=torch.float64).reshape(len(made), n + more).to(dtype)


#: The kinds of levels that are drawn.
LEVEL_KINDS = ("irregular", "symmetric", "single")


#: How many levels: mostly 2 to 5, now and then many.
_COUNT = st.one_of(*[st.integers(2, 5)] * 7, st.sampled_from((16, 17, 33, 40)))
_DRAWN = 6  # numbers of a row that are drawn; of more, these are repeated


def _some(single: Strategy[float], n: int) -> Strategy[list[float]]:
    few = st.lists(single, min_size=min(n, _DRAWN), max_size=min(n, _DRAWN))
    return few if n <= _DRAWN else few.map(lambda x: (x * n)[:n])


@functools.cache
def _level_row(kind: str, k: int) -> Strategy[list[float]]:
    gap = numbers(MIN_GAP, 4.0)
    if kind == "symmetric":

        def both_signs(steps: list[float]) -> list[float]:
            half = list(itertools.accumulate(steps))
            return [-x for x in reversed(half)] + [0.0] * (k % 2) + half

        return _some(gap, k // 2).map(both_signs)
    gaps = st.one_of(st.just(0.0), gap) if kind == "duplicated" else gap
    steps = _some(gaps, k - 1)
    return st.builds(
        lambda first, steps: list(itertools.accumulate([first, *steps])), numbers(-4.0, 4.0), steps
    )


def _kind_and_count(draw: Draw, kinds: Sequence[str]) -> tuple[str, int]:
    kind = draw(st.sampled_from(tuple(kinds)))
    return kind, 1 if kind == "single" else draw(_COUNT)


def _float64(rows: list[list[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1)


@st.composite
def levels(
    draw: Draw,
    *,
    count: int | tuple[int, int] = (1, 3),
    kinds: Sequence[str] = LEVEL_KINDS,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Sorted levels [r, k], k from 1 to 5 or up to 40, of one of the kinds.

    "irregular": gaps from 1e-3 to 4. "symmetric": Q = -Q, with or without 0. "single": k = 1.
    "duplicated": gaps that may be 0.
    """
    low, high = (count, count) if isinstance(count, int) else count
    row = _level_row(*_kind_and_count(draw, kinds))
    return _float64(draw(st.lists(row, min_size=low, max_size=high))).to(dtype)


_FAR = (1e7, -1e7, 1e5, -1e9)

#: A weight: a number, or (which level or midpoint, how far beside it).
_WEIGHT = st.one_of(
    numbers(), st.tuples(st.integers(0, 8), st.sampled_from((0.0, 1e-6, -1e-6, 0.01, -0.01)))
)


def _placed(weights: list[Any], levels: list[float]) -> list[float]:
    marks = levels + [0.5 * a + 0.5 * b for a, b in itertools.pairwise(levels)]
    return [w if isinstance(w, float) else marks[w[0] % len(marks)] + w[1] for w in weights]


@functools.cache
def _weights(n: int) -> Strategy[list[Any]]:
    return st.lists(_WEIGHT, min_size=n, max_size=n)


@st.composite
def latents(draw: Draw, levels: Tensor, *, length: int | None = None) -> Tensor:
    """Weights [r, n], n from 1 to 4, for those levels [r, k]: anywhere, on a level, on a
    midpoint, or a little beside either."""
    n = length or draw(st.integers(1, 4))
    return _float64([_placed(draw(_weights(n)), q) for q in levels.double().tolist()])


@functools.cache
def _problem(kind: str, k: int, count: int) -> Strategy[list[Any]]:
    column = st.tuples(*[_WEIGHT] * count)
    row = st.tuples(_level_row(kind, k), st.lists(column, min_size=1, max_size=4))
    return st.lists(row, min_size=1, max_size=3)


def _spread(levels: list[float], n: int, seed: int) -> list[float]:
    """n weights spread over the levels' range and a quarter beside it, some far from it."""
    low, width = levels[0] - 1, levels[-1] - levels[0] + 2
    near = [low + width * (1.5 * ((i + 1) * (0.618034 + seed / 7) % 1) - 0.25) for i in range(n)]
    return [x if i % 16 else _FAR[i // 16 % len(_FAR)] for i, x in enumerate(near)]


@st.composite
def problems(
    draw: Draw, *, count: int = 1, kinds: Sequence[str] = LEVEL_KINDS
) -> tuple[Tensor, ...]:
    """(levels [r, k], weights [r, n], ...) with so many tensors of weights, as `levels` and
    `latents` draw them; whole rows and columns drop out as it shrinks."""
    made = draw(_problem(*_kind_and_count(draw, kinds), count))
    longer = draw(_LONGER)
    n = min(len(columns) for _, columns in made)
    latent = (
        [
            _placed([column[i] for column in columns[:n]], q) + _spread(q, longer, i)
            for q, columns in made
        ]
        for i in range(count)
    )
    return _float64([q for q, _ in made]), *map(_float64, latent)


@functools.cache
def _in_interval(domain: Interval, extreme: bool) -> Strategy[float]:
    ends = [x for x in (domain.low, domain.high) if x in domain]
    low = domain.low if math.isfinite(domain.low) else min(-1000.0, domain.high - 1000.0)
    high = domain.high if math.isfinite(domain.high) else max(1000.0, domain.low + 1000.0)
    margin = min(1e-3, (high - low) / 4)
    nearer: list[float] = []
    if extreme:  # at both ends, geometrically
        beside = [
            x
            for p in (1e-12, 1e-9, 1e-7, 1e-5, 1e-4, 0.03, 0.3, 0.9)
            for x in (low + p * margin, high - p * margin)
            if x in domain
        ]
        far = [1e6] * math.isinf(domain.high) + [-1e6] * math.isinf(domain.low)
        ends, nearer = ends + beside[:10] + far, beside[10:]
    inside = numbers(max(low + margin, low), min(high - margin, high))
    return st.one_of(inside, *(st.sampled_from(some) for some in (ends, nearer) if some))


_SLOPE_STEP = st.one_of(st.just(0.0), numbers(0.0, 2.0))


@st.composite
def coefficients(
    draw: Draw, domain: Interval | Slopes | None, levels: Tensor, *, extreme: bool = False
) -> Any:
    """A coefficient of the domain that a map declares, for those levels.

    From an interval: an end that belongs to it, or a number at least 1e-3 (or a quarter of its
    length) from its ends, up to 1,000 where it has no end; extreme: nearer ones too, and 1e6.
    Slopes: [r, k-1], nondecreasing.
    """
    if domain is None:
        return None
    if isinstance(domain, Interval):
        return draw(_in_interval(domain, extreme))
    r, k = levels.shape
    made = []
    for _ in range(r if k > 1 else 0):
        steps = draw(st.lists(_SLOPE_STEP, min_size=k - 2, max_size=k - 2))
        made.append(list(itertools.accumulate([draw(numbers(-3.0, 3.0)), *steps])))
    return torch.tensor(made, dtype=torch.float64).reshape(r, k - 1)
