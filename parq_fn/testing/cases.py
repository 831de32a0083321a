"""The inputs that laws are checked on, by the names that laws call them.

What each is stands in the docstring of `parq_fn.testing`. Laws that share inputs are checked on the
same ones; `SETS` are the names that keep them apart.
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
from parq_fn.testing.law import Law
from parq_fn.transforms.prox_link import Prox

Case = dict[str, Any]
Names = Collection[str]

#: Laws that name the same of these can be checked on the same inputs.
SETS = {"any_levels", "short", "wild", "plain", "params"}

#: The names of inputs, by the kind of operator.
INPUTS = {
    "proxmap": ("levels", "any_levels", "u", "v", "c", "d", "any_c"),
    "quantizer": ("x", "short", "wild"),
    "schedule": ("start", "end", "step", "later", "whole", "every", "offset"),
    "transformation": ("params", "plain", "state", "steps"),
}

_COMMON: dict[str, st.SearchStrategy[Any]] = {
    "factor": own.numbers(0.01, 100.0),
    "power": st.integers(-10, 10).map(lambda n: 2.0**n),
    "shift": own.numbers(-8.0, 8.0),
    "dtype": own.dtypes(),
}


def check_inputs(law: Law) -> None:
    """Raises ValueError where a law names an input that its kind of operator has not."""
    known = (*INPUTS[law.kind], *_COMMON, "traits")
    unknown = [name for name in law.inputs if name not in known]
    if unknown:
        raise ValueError(
            f"the law {law.name!r} names the input {unknown[0]!r}; laws of a {law.kind} may name "
            f"{', '.join(known)}; see help(parq_fn.testing)"
        )
    if {"params", "plain"} <= {*law.inputs}:
        raise ValueError(f"the law {law.name!r} names params and plain; its steps are for one")


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
    transformation: Any,
) -> Case:
    """Inputs of these names for its laws; params from the strategy, if any."""
    case: Case = {"traits": traits}
    if "plain" in names:
        leaf = own.leaves(dtype=torch.float64, tame=True)
        case["plain"] = draw(st.fixed_dictionaries({"w0": leaf}) if params is None else params)
        case["steps"] = draw(own.training_steps(case["plain"], missing=False))
    else:
        case["params"] = draw(own.params() if params is None else params)
        case["steps"] = draw(own.training_steps(case["params"]))
    if "state" in names:
        learns = isinstance(transformation, Prox) and transformation.learn is not None
        tree = case["plain" if "plain" in names else "params"]
        states = own.learning_states(transformation, tree) if learns else None
        case["state"] = transformation.init(tree) if states is None else draw(states)
    return case | _draw_common(draw, names)
