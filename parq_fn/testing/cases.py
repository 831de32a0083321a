"""The inputs that laws are checked on, by the names that laws call them.

Laws that share inputs are checked on the same ones; `SETS` are the names that keep them apart.

prox maps
    levels      sorted, [r, k], gaps of at least 1e-3; any_levels: duplicates too
    u, v        weights [r, n] for those levels; both of one shape
    c, d        coefficients from what the map declares; None for a map without one
    any_c       one of those, or nearer than 1e-3 to an open end of what it declares, or huge
quantizers
    x           rows [r, n], now and then of more than 64; wild: of any magnitude too; short: at
                most 7 entries
schedules
    start, end  the steps between which it changes
    step, later two steps, step <= later, before, between and beyond those
    whole       a whole step
    every       int64 [n]: all whole steps from start to end and two beyond either, of many 300
    offset      a share of the way, in [0, 1]
transformations
    params      a tree; steps: gradient trees for it
    plain       a dict of float64 leaves of ordinary size, for vmap
all
    factor      a positive number; power: a power of two; shift: a number
    dtype       a floating dtype
    traits      what the operator declares; not drawn
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from hypothesis import strategies as st

from parq_fn.foundation.traits import (
    ProxTraits,
    QuantizerTraits,
    ScheduleTraits,
    TransformationTraits,
)
from parq_fn.testing import strategies as own

Case = dict[str, Any]
Names = Collection[str]

#: Laws that name the same of these can be checked on the same inputs.
SETS = {"any_levels", "short", "wild", "plain", "params"}

_COMMON: dict[str, st.SearchStrategy[Any]] = {
    "factor": own.numbers(0.01, 100.0),
    "power": st.integers(-10, 10).map(lambda n: 2.0**n),
    "shift": own.numbers(-8.0, 8.0),
    "dtype": own.dtypes(),
}


def _draw_common(draw: st.DrawFn, names: Names) -> Case:
    return {name: draw(_COMMON[name]) for name in names if name in _COMMON}


@st.composite
def proxmap_case(draw: st.DrawFn, names: Names, traits: ProxTraits, coefficient: Any) -> Case:
    """Inputs of these names for laws of prox maps; the coefficient a value, a strategy or None."""
    kinds = (*own.LEVEL_KINDS, "duplicated") if "any_levels" in names else own.LEVEL_KINDS
    q, u, *v = draw(own.problems(count=2 if "v" in names else 1, kinds=kinds))
    case: Case = {"traits": traits, "levels": q, "any_levels": q, "u": u, "v": v[0] if v else None}
    for name in ("c", "d", "any_c"):
        if name in names:
            if isinstance(coefficient, st.SearchStrategy):
                case[name] = draw(coefficient)
            elif coefficient is not None:
                case[name] = coefficient
            else:
                wide = name == "any_c"
                case[name] = draw(own.coefficients(traits.coefficients, q, extreme=wide))
    return case | _draw_common(draw, names)


@st.composite
def quantizer_case(draw: st.DrawFn, names: Names, traits: QuantizerTraits) -> Case:
    """Inputs of these names for laws of quantizers."""
    case: Case = {"traits": traits}
    if "x" in names:
        case["x"] = draw(own.rows(longer=True))
    if "short" in names:
        case["short"] = draw(own.rows(length=(1, 7)))
    if "wild" in names:
        case["wild"] = draw(own.rows(magnitudes=(1.0, 1e-30, 1e-4, 1e4, 1e30)))
    return case | _draw_common(draw, names)


def _every(start: float, end: float) -> torch.Tensor:
    first, last = max(0, math.floor(start) - 2), max(0, math.ceil(end) + 2)
    stretch = max(1, -(-(last - first) // 300))
    steps = [*range(first, last + 1, stretch), first + 1, first + 2, first + 3]
    steps += [last - i for i in range(5)]
    return torch.tensor(sorted({step for step in steps if step >= 0}))


@st.composite
def schedule_case(draw: st.DrawFn, names: Names, traits: ScheduleTraits) -> Case:
    """Inputs of these names for laws of schedules."""
    start = 0.0 if traits.start is None else traits.start
    end = start + 10.0 if traits.end is None else traits.end
    span = end - start
    share = st.one_of(st.integers(-10, 60).map(lambda i: i / 40), own.numbers(-0.5, 1.5))
    case: Case = {"traits": traits, "start": start, "end": end}
    shares = sorted(draw(st.tuples(share, share)))
    case["step"], case["later"] = (max(0.0, start + s * span) for s in shares)
    case["whole"] = round(case["step"])
    case["every"] = _every(start, end)
    case["offset"] = draw(own.numbers(0.0, 1.0))
    return case | _draw_common(draw, names)


@st.composite
def transformation_case(
    draw: st.DrawFn,
    names: Names,
    traits: TransformationTraits,
    params: st.SearchStrategy[Any] | None,
) -> Case:
    """Inputs of these names for laws of transformations; params from the strategy, if any."""
    case: Case = {"traits": traits}
    if "plain" in names:
        leaf = own.leaves(dtype=torch.float64, tame=True)
        case["plain"] = draw(st.fixed_dictionaries({"w0": leaf}) if params is None else params)
        case["steps"] = draw(own.training_steps(case["plain"], missing=False))
    else:
        case["params"] = draw(own.params() if params is None else params)
        case["steps"] = draw(own.training_steps(case["params"]))
    return case | _draw_common(draw, names)
