"""The laws of pullback: from gradients at the weights to gradients at the params, once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.traits import TransformationTraits, traits_of
from parq_fn.foundation.tree import PyTree, tree_map
from parq_fn.foundation.value import changed, value
from parq_fn.testing.law import Claim, equal
from parq_fn.testing.laws.transformations import Point, Steps, copied, form, last, law, train
from parq_fn.transforms.chain import chain
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.train import apply_updates
from parq_fn.transforms.transformation import (
    Link,
    children_of,
    handed,
    in_place,
    pull_back,
)


@law("pullback is pure: its inputs unchanged, the same bits again.", "pullback(g, s, p) = the same")
def pullback_is_pure(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    for here, grads in zip(train(t, params, steps), steps, strict=False):
        before = copied((grads, here.state, here.params))
        first = copied(pull_back(t, grads, here.state, here.params))
        yield equal((grads, here.state, here.params), before)
        yield equal(pull_back(t, grads, here.state, here.params), first)


@law(
    "Gradients that are pulled back are like those given: structure, dtypes, shapes, None.",
    "form(pullback(g, s, p)) = form(g)",
)
def pullback_keeps_form(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    for here, grads in zip(train(t, params, steps), steps, strict=False):
        yield equal(form(pull_back(t, grads, here.state, here.params)[0]), form(grads))


@law(
    "Where weights are the params, gradients at them are those at the params.",
    "pullback(g, s, p) = g",
    applies=lambda t: t.plain_weights,
)
def plain_pullback(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    for here, grads in zip(train(t, params, steps), steps, strict=False):
        yield equal(pull_back(t, grads, here.state, here.params)[0], grads)


@law(
    "Weights that the caller hands over are those that pullback would compute.",
    "pullback(g, s, p, weights(s, p)) = pullback(g, s, p)",
)
def pullback_takes_weights(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    for here, grads in zip(train(t, params, steps), steps, strict=False):
        weights = t.weights(here.state, here.params)
        given = pull_back(t, grads, here.state, here.params, weights)
        yield equal(given, pull_back(t, grads, here.state, here.params))


@law(
    "Gradients are pulled back once, however chains are nested.",
    "train(chain(chain(t))) = train(chain(t))",
)
def nested_once(t: Any, params: PyTree, steps: Steps) -> Claim:
    one, two = chain(t), chain(chain(t))
    end, nested = last(one, params, steps), last(two, params, steps)
    return equal(
        (nested.params, two.weights(nested.state, nested.params)),
        (end.params, one.weights(end.state, end.params)),
    )


@value
class _Watched(Link):
    """A part of a transformation; notes what its pullbacks gave and its updates were given."""

    inner: Any
    gave: list[Tensor]
    given: list[Tensor | None]

    @property
    def traits(self) -> TransformationTraits:
        return traits_of(self.inner) or TransformationTraits()

    def init(self, params: PyTree) -> PyTree:
        return self.inner.init(params)

    def pullback(
        self, grads: PyTree, state: PyTree, params: PyTree, *, weights: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        self.gave.append(torch.tensor(float(len(self.gave))))
        grads, own = pull_back(self.inner, grads, state, params, weights)
        return grads, {"call": self.gave[-1], "own": own}

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, *, pulled: Any = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        self.given.append(None if pulled is None else pulled["call"])
        own = {} if pulled is None else handed(pulled["own"])
        updates, state = self.inner.update(updates, state, params, **own, **extra)
        return updates, state

    def weights(self, state: PyTree, params: PyTree) -> PyTree:
        return self.inner.weights(state, params)

    # a link around it may look for what is inside

    def children(self) -> dict[str, Any]:
        return {"inner": self.inner}

    def with_children(self, children: Mapping[str, Any]) -> Any:
        (inner,) = in_place(self, children)
        return changed(self, inner=inner)

    def child_states(self, state: PyTree) -> dict[str, PyTree]:
        return {"inner": state}


def _inside(t: Any) -> dict[str, Any]:
    """The transformations inside one, by name, of one that does not tell by attribute."""
    methods = ("init", "update", "weights")
    if isinstance(t, Prox):  # what moves its qparams is no part of it
        return {}
    return children_of(t) or {
        name: got
        for name, got in getattr(t, "__dict__", {}).items()
        if not isinstance(got, type) and all(hasattr(got, method) for method in methods)
    }


@law(
    "What is inside a transformation is pulled back before it is updated, and given the result.",
    "(g', own) = pullback(g, s, p);  update(g', s, p, pulled=own)  for every one inside",
)
def hands_pullback_on(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    parts = {name: _Watched(part, [], []) for name, part in _inside(t).items()}
    if not parts:
        return
    link = chain(t.with_children(parts) if children_of(t) else changed(t, **parts))
    here = Point(params, link.init(params))
    for grads in steps:
        for part in parts.values():
            part.gave.clear()
            part.given.clear()
        updates, state = link.update(grads, here.state, here.params)
        for part in parts.values():
            yield equal(part.given, part.gave[: len(part.given)])
        here = Point(apply_updates(here.params, updates), state)


@law(
    "Until the map makes the weights, gradients at them are those at the params, bit for bit.",
    "t < max(warmup, start)  =>  pullback(g, s, u) = g",
    needs=("prox",),
)
def waits_to_pull_back(t: Prox, params: PyTree, steps: Steps) -> Iterator[Claim]:
    for i, (here, grads) in enumerate(zip(train(t, params, steps), steps, strict=False)):
        if i == 0 or i - 1 < max(float(t.warmup), float(t.begins)):
            yield equal(t.pullback(grads, here.state, here.params)[0], grads)


@law(
    "A gradient is pulled back from itself, its latent and the levels of its row alone.",
    "pullback(m ? g : h, s, m ? u : v) = m ? pullback(g, s, u) : pullback(h, s, v)  for any mask m",
    needs=("prox",),
)
def pullback_is_elementwise(t: Prox, params: PyTree, steps: Steps) -> Iterator[Claim]:
    def mixed(one: PyTree, other: PyTree) -> PyTree:
        def of(x: Tensor, y: Tensor) -> Tensor:
            first = torch.arange(x.numel()).reshape(x.shape) % 2 == 0
            return torch.where(first, x, y)

        return tree_map(of, one, other)

    for here, grads in zip(train(t, params, steps), steps, strict=False):
        others = tree_map(lambda g: 1 - 2 * g, grads)
        latents = tree_map(lambda u: -u, here.params) if t.elementwise else here.params
        one, _ = t.pullback(grads, here.state, here.params)
        other, _ = t.pullback(others, here.state, latents)
        both, _ = t.pullback(mixed(grads, others), here.state, mixed(here.params, latents))
        yield equal(both, mixed(one, other))
