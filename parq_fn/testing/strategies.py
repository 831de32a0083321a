"""Hypothesis strategies: rows, levels, qparams, coefficients, operators, states, parameter trees,
gradients.

All shrink toward small integers and short rows. Numbers are finite and, but for `magnitudes`,
of ordinary size, so that laws of exact arithmetic can be held to small tolerances in float64.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

import parq_fn as pq
from parq_fn import proxmaps as maps
from parq_fn import schedules as sched
from parq_fn.foundation.traits import traits_of
from parq_fn.testing.rows import (
    FLOATING,
    LEVEL_KINDS,
    MIN_GAP,
    Draw,
    Strategy,
    coefficients,
    dtypes,
    latents,
    levels,
    numbers,
    problems,
    rows,
)

__all__ = [
    "ESTIMATORS",
    "FLOATING",
    "LEVEL_KINDS",
    "MAPS",
    "MIN_GAP",
    "Pair",
    "coefficients",
    "dtypes",
    "latents",
    "learning_states",
    "leaves",
    "levels",
    "numbers",
    "params",
    "problems",
    "prox_links",
    "proxmaps",
    "qparams",
    "quantizers",
    "rows",
    "schedules",
    "training_steps",
    "transformations",
]

# Operators


def quantizers() -> Strategy[pq.Quantizer]:
    """The quantizers of this library, with 1 to 4 bits where they take any."""
    bits, center = st.integers(1, 4), st.booleans()
    return st.one_of(
        st.builds(pq.lsbq, st.integers(0, 4), center=center),
        st.builds(pq.lsbq, st.integers(0, 2), st.just("optimal"), center),
        st.builds(pq.lsbq, st.integers(0, 4), st.just("alternating")),
        st.builds(pq.lloyd_max, bits, st.booleans()),
        st.builds(pq.uniform, bits, st.sampled_from(("mean", "max")), center),
        st.builds(pq.max_uniform, st.integers(2, 4), center),
        st.builds(pq.asymmetric, bits),
        st.builds(pq.ternary_uniform, center),
        st.builds(pq.integer, st.integers(2, 4), st.sampled_from(("max", "max_symmetric", "mean"))),
        st.builds(pq.affine, bits),
        st.builds(pq.gaussian, st.integers(0, 4)),
        st.sampled_from((pq.codebook.nf4, pq.codebook.fp4, pq.codebook.iq4_nl)),
        st.sampled_from((pq.mxfp4(), pq.nvfp4())),
        st.builds(pq.centered, st.builds(pq.integer, st.integers(2, 4))),
        st.builds(pq.stored, st.builds(pq.affine, bits), st.sampled_from(FLOATING[2:])),
        st.builds(pq.stored, st.builds(pq.integer, st.integers(2, 4)), st.just("e8m0")),
    )


#: All maps of the library.
MAPS = maps.MAPS


@st.composite
def proxmaps(draw: Draw) -> tuple[Any, Tensor, Any]:
    """(map, levels [r, k], coefficient): a map of this library and what it takes."""
    map_, q = draw(st.sampled_from(MAPS)), draw(levels())
    return map_, q, draw(coefficients(traits_of(map_).coefficients, q))


@st.composite
def schedules(draw: Draw) -> sched.Schedule:
    """Schedules from 1 to 0 (or nearly: exponential) between whole steps."""
    start = draw(st.integers(0, 20))
    end = start + draw(st.integers(1, 50))
    steepness, center = draw(numbers(0.01, 200.0)), draw(numbers(0.0, 1.0))
    return draw(
        st.sampled_from(
            (
                sched.linear(1.0, 0.0, start, end),
                sched.inverse_slope(start, end, steepness, center),
                sched.cosine(1.0, 0.0, start, end),
                sched.polynomial(1.0, 0.0, start, end, power=2.0),
                sched.exponential(1.0, 0.001, start, end),
            )
        )
    )


#: Estimators that prox links are drawn with.
ESTIMATORS = (
    pq.estimators.straight_through(),
    pq.estimators.inside(),
    pq.estimators.trust(0.75),
    pq.estimators.by_level(),
    pq.estimators.damped(sched.linear(0.0, 0.5, 0, 4)),
)


def prox_links() -> Strategy[pq.Prox]:
    """Prox links with short periods, warmups and annealings."""
    options = {
        "quantizer": st.sampled_from((pq.lsbq(1), pq.lsbq(2), pq.lsbq(0), pq.uniform(2))),
        "granularity": st.sampled_from((pq.per_tensor(), pq.per_channel())),
        "period": st.integers(1, 3),
        "warmup": st.integers(0, 2),
        "gradient": st.sampled_from(ESTIMATORS),
    }
    span = {"anneal_start": st.integers(0, 2), "anneal_end": st.integers(3, 5)}
    return st.one_of(
        st.builds(pq.hard_prox, **options),
        st.builds(pq.parq_prox, **options, **span, clipped_start=st.booleans()),
        st.builds(pq.soft_prox, **options, **span),
        st.builds(pq.binary_relax_prox, **options, **span),
        st.builds(pq.proxquant_prox, **options, **span, strength=st.just(0.25)),
    )


@st.composite
def transformations(draw: Draw, *, prox: bool = True) -> Any:
    """A chain of random links, ending in a prox link half of the time unless prox=False."""
    before = st.sampled_from(
        (
            pq.clip(1.0),
            pq.clip_by_global_norm(1.0),
            pq.add_decayed_weights(0.1),
            pq.scale(0.5),
            pq.trace(0.9),
            pq.trace(0.5, nesterov=True),
            pq.scale_by_adam(),
            pq.scale_by_lion(),
            pq.conditionally(pq.trace(0.9), lambda t: t % 3 != 1),
        )
    )
    links = draw(st.lists(before, max_size=2))
    links.append(pq.scale_by_learning_rate(draw(st.sampled_from((0.1, 1.0)))))
    if prox and draw(st.booleans()):
        links.append(draw(prox_links()))
    whole = pq.chain(*links)
    wrap = draw(st.sampled_from(("none", "masked", "apply_if_finite", "accumulate", "averaged")))
    if wrap == "masked":
        return pq.masked(whole, lambda name, _: not name.endswith("1"))
    if wrap == "averaged":
        return pq.averaged(whole, 0.9)
    if wrap == "apply_if_finite":
        return pq.apply_if_finite(whole)
    return pq.accumulate(whole, 2) if wrap == "accumulate" else whole


# Qparams, and states of links that learn them


@functools.cache
def _qparams_row(positive: tuple[bool, ...]) -> Strategy[tuple[float, ...]]:
    return st.tuples(*[numbers(2.0**-6, 8.0) if above else numbers() for above in positive])


@st.composite
def qparams(
    draw: Draw,
    quantizer: pq.Quantizer,
    *,
    count: int | tuple[int, int] = (1, 3),
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Qparams [r, m] of a quantizer as learning may have left them: finite, above 0 where it keeps
    them so, free levels in order; what it does not learn is that of a fit."""
    low, high = (count, count) if isinstance(count, int) else count
    r = draw(st.integers(low, high))
    few = draw(st.lists(_qparams_row(quantizer.positive), min_size=min(r, 3), max_size=min(r, 3)))
    values = torch.tensor((few * r)[:r], dtype=dtype).reshape(r, quantizer.num_qparams)
    x = torch.cat([draw(rows(count=r, length=(1, 3), dtype=dtype)), values.new_ones(r, 1)], -1)
    learnable = torch.tensor(quantizer.learnable)
    return quantizer.ordered(torch.where(learnable, values, quantizer.fit(x)))


@st.composite
def learning_states(draw: Draw, link: pq.Prox, params: Any) -> Any:
    """States of a prox link that learns, of those params, in which its map makes the weights:
    `qparams` as above, and what moves them as it begins."""
    begins = max(float(link.warmup), float(link.begins))
    step = torch.tensor(math.ceil(begins) + draw(st.integers(0, 6)))
    begun = link.init(params)

    def of_leaf(zeros: Tensor) -> Tensor:
        r = zeros.shape[:-1].numel()
        return draw(qparams(link.quantizer, count=r, dtype=zeros.dtype)).reshape(zeros.shape)

    return begun._replace(
        count=step + 1,
        slope=link.coefficient(step).double(),
        lr_sum=torch.tensor(draw(numbers(0.0, 4.0)), dtype=torch.float64),
        qparams=pq.tree.tree_map(of_leaf, begun.qparams),
    )


# Parameters and gradients


class Pair(NamedTuple):
    """A node of random parameter trees."""

    first: Any  # a leaf, or a tree
    second: Any  # likewise


SHAPES = ((2,), (), (3,), (2, 3), (1, 2), (2, 1, 3), (2, 2, 1, 2), (0,), (2, 0), (2, 70))


def _laid_out(x: Tensor, how: str) -> Tensor:
    if how == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if how == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == "strided" and x.dim() >= 1 and x.numel():
        return torch.stack([x, x], -1)[..., 0]
    return x


@st.composite
def leaves(draw: Draw, *, dtype: torch.dtype | None = None, tame: bool = False) -> Tensor:
    """A parameter of 0 to 4 dimensions, every floating dtype and layout, perhaps empty, zero,
    huge or tiny (within 2^+-10 for tame=True)."""
    kind = dtype or draw(dtypes())
    shape = draw(st.sampled_from(SHAPES))
    pattern = draw(st.lists(numbers(-4.0, 4.0), min_size=1, max_size=6))
    size = math.prod(shape)
    values = torch.tensor((pattern * size)[:size], dtype=torch.float64).reshape(shape)
    powers = (0, -10, 10) if tame or kind == torch.float16 else (0, -10, 10, -60, 60)
    values = values * 2.0 ** draw(st.sampled_from(powers))
    how = draw(st.sampled_from(("contiguous", "channels_last", "transposed", "strided")))
    return _laid_out(values.to(kind), how)


def params(leaf: Strategy[Tensor] | None = None) -> Strategy[Any]:
    """Parameter trees: nested dicts, lists, tuples, NamedTuples and None, of 1 to 5 leaves."""
    single = leaves() if leaf is None else leaf
    nodes = st.recursive(
        st.one_of(single, single, st.none()),
        lambda inner: st.one_of(
            st.lists(inner, min_size=1, max_size=2),
            st.tuples(inner, inner),
            st.builds(Pair, inner, inner),
            st.dictionaries(st.sampled_from(("a", "b")), inner, min_size=1, max_size=2),
        ),
        max_leaves=4,
    )
    return st.builds(
        lambda first, rest: {"w0": first} | rest,
        single,
        st.dictionaries(st.sampled_from(("w1", "w2")), nodes, max_size=2),
    )


@st.composite
def training_steps(draw: Draw, params: Any, *, max_steps: int = 4, missing: bool = True) -> Any:
    """A list of gradient trees for those params, leaves missing (None) here and there."""
    steps = []
    count = draw(st.integers(1, max_steps) | st.just(3 * max_steps))  # some things show late
    for _ in range(count):
        pattern = draw(st.lists(numbers(-2.0, 2.0), min_size=1, max_size=4))

        def gradient(param: Tensor, pattern: list[float] = pattern) -> Tensor | None:
            if missing and draw(st.sampled_from((False, False, False, True))):
                return None
            n = param.numel()
            values = torch.tensor((pattern * n)[:n], dtype=torch.float64)
            return values.reshape(param.shape).to(param.dtype)

        steps.append(pq.tree.tree_map(gradient, params))
    return steps
