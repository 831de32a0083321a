"""The laws of prox links: when levels are fitted, and what the weights are."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from parq_fn.foundation.checks import readable
from parq_fn.foundation.tree import PyTree, tree_leaves, tree_map
from parq_fn.testing.law import Claim, equal
from parq_fn.testing.laws.transformations import Point, Steps, last, law, train
from parq_fn.transforms.oscillation import with_held
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_state import ProxState, in_rows


def to_dtype(tree: PyTree, dtype: torch.dtype) -> PyTree:
    """The tree in another dtype."""
    return tree_map(lambda x: x.to(dtype), tree)


def seen(link: Prox, u: Tensor, state: ProxState) -> Tensor:
    """The rows that map and quantizer see: of the latent, or with shrink of a part of it."""
    if not link.shrink:
        return link.granularity.rows(u)
    gamma = link.normal_map
    divisor = state.lr_sum.clamp(min=1.0) if gamma is None else torch.as_tensor(gamma).double()
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    return link.granularity.rows((wide / divisor).to(wide.dtype))


def annealed(link: Prox, params: PyTree) -> ProxState | None:
    """A state just before a refit after the annealing; None where no number says when that is."""
    end, warmup, period = (readable(x) for x in (link.ends, link.warmup, link.period))
    if end is None or warmup is None or period is None:
        return None
    periods = -(-max(0, math.ceil(end) + 1 - warmup) // period)
    count = torch.tensor(warmup + periods * period)
    return link.init(params)._replace(count=count)


@law(
    "Until warmup and the annealing's start the weights are the params, bit for bit.",
    "t < max(warmup, start)  =>  w = u",
    needs=("prox",),
)
def waits(t: Prox, params: PyTree, steps: Steps) -> Iterator[Claim]:
    for i, here in enumerate(train(t, params, steps)):
        if i == 0 or i - 1 < max(float(t.warmup), float(t.begins)):
            yield equal(t.weights(here.state, here.params), here.params)


@law(
    "Weights are the map of the latent rows, their levels and the coefficient, bit for bit.",
    "w = f(u; Q, coefficient(t))  from warmup and the annealing's start on",
    needs=("prox",),
)
def weights_are_mapped(t: Prox, params: PyTree, steps: Steps) -> Iterator[Claim]:
    for i, here in enumerate(train(t, params, steps)):
        if i and i - 1 >= max(float(t.warmup), float(t.begins)):
            step = torch.tensor(i - 1)

            def weight(u: Tensor, q: Tensor, step: Tensor = step, here: Point = here) -> Tensor:
                levels = t.quantizer.levels_in(in_rows(q), u.dtype)
                rows = t.proxmap(seen(t, u, here.state), levels, t.coefficient(step))
                return rows.reshape(u.shape).to(u.dtype)

            mapped = tree_map(weight, here.params, here.state.qparams)
            if t.hold is not None:  # held weights are at their level
                mapped = with_held(t, here.state, mapped, here.params)
            yield equal(t.weights(here.state, here.params), mapped)


@law(
    "Qparams change on refits only, and are then the quantizer's of the latent as it will be.",
    "q_t = fit(u_t) where t >= warmup and (t - warmup) % period = 0, else q_{t-1}",
    needs=("prox",),
)
def refits_when_due(t: Prox, plain: PyTree, steps: Steps) -> Iterator[Claim]:
    for first in (0, max(0, t.warmup - 1), t.warmup + t.period - 1):
        state = t.init(plain)._replace(count=torch.tensor(first))
        old, *rest = train(t, plain, steps, state)
        for i, here in enumerate(rest, first):
            now = here.state
            fitted = tree_map(
                lambda q, u, now=now: t.quantizer.fit(seen(t, u, now)).reshape(q.shape),
                now.qparams,
                here.params,
            )
            due = i >= t.warmup and (i - t.warmup) % t.period == 0
            if t.learn is None or not t.active(old.state):  # else they are learned
                yield equal(now.qparams, fitted if due else old.state.qparams)
            old = here


@law(
    "Learned levels stay sorted and finite and scales above 0; what cannot be learned stays.",
    "q_t learned  =>  levels(q_t) sorted and finite, q_t > 0 where positive",
    needs=("prox",),
)
def learns_within_bounds(t: Prox, params: PyTree, steps: Steps, state: PyTree) -> Iterator[Claim]:
    if t.learn is None:
        return
    for first in (None, state):
        yield from _keeps_bounds(t, train(t, params, steps, first))


def _keeps_bounds(t: Prox, training: Iterator[Point]) -> Iterator[Claim]:
    old = next(training)
    for here in training:
        pairs = zip(tree_leaves(old.state.qparams), tree_leaves(here.state.qparams), strict=True)
        for before, q in pairs:
            levels = t.quantizer.levels(in_rows(q))
            yield equal((levels.isfinite() & (levels == levels.sort(-1).values)).all(), True)
            for i, (positive, learnable) in enumerate(
                zip(t.quantizer.positive, t.quantizer.learnable, strict=True)
            ):
                if positive:
                    yield equal(((q[..., i] > 0) | (before[..., i] <= 0)).all(), True)
                if not learnable and t.active(old.state) and bool((before[..., 0] > 0).all()):
                    yield equal(q[..., i], before[..., i])
        old = here


@law(
    "After the annealing every weight is one of its own levels, bit for bit, in every dtype.",
    "t >= end  =>  w in Q",
    needs=("prox", "hardens"),
)
def hard_in_the_end(t: Prox, plain: PyTree, steps: Steps, dtype: torch.dtype) -> Iterator[Claim]:
    params = to_dtype(plain, dtype)
    state = annealed(t, params)
    if state is None:
        return
    _, *rest = train(t, params, [to_dtype(g, dtype) for g in steps], state)
    for here in rest:
        weights = tree_leaves(t.weights(here.state, here.params))
        for w, q in zip(weights, tree_leaves(here.state.qparams), strict=True):
            rows, levels = t.granularity.rows(w), t.quantizer.levels_in(in_rows(q), w.dtype)
            on_level = (rows.unsqueeze(-1) == levels.unsqueeze(-2)).any(-1)
            yield equal(on_level, torch.ones_like(on_level))


@law(
    "Without updates nothing moves after the annealing: latents, qparams and weights stand.",
    "g = 0, t >= end  =>  (u, q, w)_{t+1} = (u, q, w)_t",
    needs=("prox", "hardens"),
)
def settles(t: Prox, plain: PyTree, steps: Steps) -> Iterator[Claim]:
    state = annealed(t, plain)
    if state is None or t.draws or t.shrink or t.learn is not None:
        return
    zeros = tree_map(torch.zeros_like, plain)
    once = last(t, plain, [zeros], state)
    later = last(t, plain, [zeros] * (1 + len(steps) + t.period), state)
    yield equal(
        (later.params, later.state.qparams, t.weights(later.state, later.params)),
        (once.params, once.state.qparams, t.weights(once.state, once.params)),
    )
