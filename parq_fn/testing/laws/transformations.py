"""The laws of transformations: init, update and weights, pure functions over trees."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from parq_fn.foundation.tree import PyTree, tree_map
from parq_fn.testing.law import Claim, Collection, equal, vmapped
from parq_fn.transforms.masked import masked
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.train import apply_updates, value_and_grad
from parq_fn.transforms.transformation import handed, pull_back

LAWS = Collection("transformation")
law = LAWS.law

Steps = list[PyTree]  # gradient trees


class Point(NamedTuple):
    """Where a training is: the latent params, the state, and the updates that led there."""

    params: PyTree
    state: PyTree
    updates: PyTree = None


def train(t: Any, params: PyTree, steps: Steps, state: PyTree = None) -> Iterator[Point]:
    """The beginning, and where every step leads."""
    here = Point(params, t.init(params) if state is None else state)
    yield here
    for grads in steps:
        updates, state = step(t, grads, here)
        here = Point(apply_updates(here.params, updates), state, updates)
        yield here


def step(t: Any, grads: PyTree, here: Point) -> tuple[PyTree, PyTree]:
    """(updates, state) of a transformation; of a link that learns with what its pullback gives for
    it, as in a chain."""
    inner = t.inner if isinstance(t, masked) else t
    learns = isinstance(inner, Prox) and inner.learn is not None
    own = pull_back(t, grads, here.state, here.params)[1] if learns else ()
    updated: tuple[PyTree, PyTree] = t.update(grads, here.state, here.params, **handed(own))
    return updated


def last(t: Any, params: PyTree, steps: Steps, state: PyTree = None) -> Point:
    """Where the training ends."""
    *_, end = train(t, params, steps, state)
    return end


def copied(tree: PyTree) -> PyTree:
    """A copy of every tensor."""
    return optree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, tree)


def form(tree: PyTree) -> PyTree:
    """Every leaf's dtype and shape, in the tree's structure."""

    def of(x: Any) -> str:
        if not isinstance(x, Tensor):
            return type(x).__name__
        return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"

    return tree_map(of, tree)


def first_leaf(name: str, leaf: Any) -> bool:
    """The mask of the leaf 'w0' alone."""
    del leaf
    return name == "w0"


def without_first(tree: PyTree) -> PyTree:
    """The tree but for 'w0'."""
    return {k: v for k, v in tree.items() if k != "w0"}


@law("init is pure: params unchanged, the same bits again.", "init(p) = init(p)")
def init_is_pure(t: Any, params: PyTree) -> Iterator[Claim]:
    before = copied(params)
    first = copied(t.init(params))
    yield equal(params, before)
    yield equal(t.init(params), first)


@law("update is pure: its inputs unchanged, the same bits again.", "update(g, s, p) = update(...)")
def update_is_pure(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    here = Point(params, t.init(params))
    for grads in steps:
        before = copied((grads, here.state, here.params))
        first = copied(step(t, grads, here))
        yield equal((grads, here.state, here.params), before)
        updates, state = step(t, grads, here)
        yield equal((updates, state), first)
        here = Point(apply_updates(here.params, updates), state)


@law("weights is pure: its inputs unchanged, the same bits again.", "weights(s, p) = weights(s, p)")
def weights_are_pure(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    for here in train(t, params, steps):
        before = copied((here.state, here.params))
        first = copied(t.weights(here.state, here.params))
        yield equal((here.state, here.params), before)
        yield equal(t.weights(here.state, here.params), first)


@law(
    "Looking at the weights changes nothing: they depend on state and params alone.",
    "weights(s_n, p_n) is the same whether or not weights(s_i, p_i) was asked for, i < n",
)
def call_order(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    end = last(t, params, steps)
    unseen = copied(t.weights(end.state, end.params))
    points = []
    for here in train(t, params, steps):
        points.append((here, copied(t.weights(here.state, here.params))))
    yield equal((here.params, here.state), (end.params, end.state))
    yield equal(points[-1][1], unseen)
    for point, seen in reversed(points):
        yield equal(t.weights(point.state, point.params), seen)


@law("The state keeps its structure, dtypes and shapes.", "form(s_n) = form(s_0)")
def state_keeps_form(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    start, *rest = train(t, params, steps)
    for here in rest:
        yield equal(form(here.state), form(start.state))


@law(
    "Updates are like the params: structure, dtypes, shapes.",
    "form(u) = form(p), where there is a gradient",
)
def updates_fit_params(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    _, *rest = train(t, params, steps)
    for grads, here in zip(steps, rest, strict=True):
        wanted = tree_map(lambda p, g: None if g is None else p, params, grads)
        given = tree_map(lambda p, u, g: None if g is None else u, params, here.updates, grads)
        yield equal(form(given), form(wanted))


@law(
    "A leaf without a gradient gets no update.",
    "g = None  =>  u = None",
    applies=lambda t: t.keeps_none,
)
def none_stays_none(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    _, *rest = train(t, params, steps)
    for grads, here in zip(steps, rest, strict=True):
        missing = tree_map(lambda p, g: g is None, params, grads)
        yield equal(tree_map(lambda p, u: u is None, params, here.updates), missing)


@law("Weights are like the params: structure, dtypes, shapes.", "form(w) = form(p)")
def weights_fit_params(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    for here in train(t, params, steps):
        yield equal(form(t.weights(here.state, here.params)), form(params))


@law(
    "Masked: leaves outside the mask pass through untouched.",
    "masked(t): u = g and w = p outside the mask",
)
def masked_leaves_rest(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    link = masked(t, first_leaf)
    _, *rest = train(link, params, steps)
    for grads, here in zip(steps, rest, strict=True):
        yield equal(without_first(here.updates), without_first(grads))
        weights = link.weights(here.state, here.params)
        yield equal(without_first(weights), without_first(here.params))


@law(
    "Masked: leaves inside the mask are treated as if they were alone.",
    "masked(t)(p) = t(p inside the mask)",
)
def masked_is_alone(t: Any, params: PyTree, steps: Steps) -> Claim:
    link, own = masked(t, first_leaf), {"w0": params["w0"]}
    inside = last(link, params, steps)
    alone = last(t, own, [{"w0": grads["w0"]} for grads in steps])
    return equal(
        (inside.params["w0"], link.weights(inside.state, inside.params)["w0"]),
        (alone.params["w0"], t.weights(alone.state, alone.params)["w0"]),
    )


@law(
    "A saved and loaded state resumes bit for bit.",
    "train(p, load(save(s))) = train(p, s)",
)
def resumes(t: Any, params: PyTree, steps: Steps) -> Claim:
    half = len(steps) // 2
    middle = last(t, params, steps[:half])
    saved = pickle.loads(pickle.dumps(middle.state))
    resumed = last(t, copied(middle.params), steps[half:], saved)
    straight = last(t, params, steps)
    return equal(
        (resumed.params, resumed.state, t.weights(resumed.state, resumed.params)),
        (straight.params, straight.state, t.weights(straight.state, straight.params)),
    )


@law("The order of a dict's entries does not matter.", "train(reordered p) = reordered train(p)")
def dict_order(t: Any, params: PyTree, steps: Steps) -> Claim:
    def turned(tree: PyTree) -> PyTree:
        return dict(reversed(tree.items()))

    end, other = last(t, params, steps), last(t, turned(params), [turned(g) for g in steps])
    return equal(
        (dict(other.params), t.weights(other.state, other.params)),
        (dict(end.params), t.weights(end.state, end.params)),
    )


@law(
    "A leaf is treated alike whatever other leaves there are.",
    "t(p)_i = t(p_i)",
    applies=lambda t: t.leafwise,
)
def leafwise(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    end = last(t, params, steps)
    weights = t.weights(end.state, end.params)
    for name in params:
        alone = last(t, {name: params[name]}, [{name: grads[name]} for grads in steps])
        own = t.weights(alone.state, alone.params)
        yield equal((end.params[name], weights[name]), (alone.params[name], own[name]))


@law(
    "torch.vmap over params and gradients is the loop.",
    "vmap(train)((p, p')) = (train(p), train(p'))",
    applies=lambda t: t.batches,
    tolerance=1e-9,
    reason="sums over a batched leaf are taken in another order",
)
def vmap_is_loop(t: Any, plain: PyTree, steps: Steps) -> Claim:
    def run(params: PyTree, steps: Steps) -> PyTree:
        end = last(t, params, steps)
        return end.params, t.weights(end.state, end.params)

    def second(tree: PyTree) -> PyTree:
        return tree_map(lambda x: x.flip(0) / 2 if x.dim() else x / 2, tree)

    def stacked(a: PyTree, b: PyTree) -> PyTree:
        return tree_map(lambda x, y: torch.stack([x, y]), a, b)

    other, others = second(plain), second(steps)
    batched = vmapped(run)(stacked(plain, other), stacked(steps, others))
    return equal(batched, stacked(run(plain, steps), run(other, others)))


@law(
    "The gradient is taken at the weights, not through them.",
    "value_and_grad(loss)(p, s) = (loss(w), loss'(w)),  w = weights(s, p)",
)
def gradient_at_weights(t: Any, params: PyTree, steps: Steps) -> Claim:
    def loss(weights: PyTree) -> Tensor:
        leaves = [w.double() for w in optree.tree_leaves(weights)]
        return torch.stack([(w * w.detach().cos()).sum() for w in leaves]).sum()

    end = last(t, params, steps)
    weights = t.weights(end.state, end.params)
    grads = tree_map(lambda w: w.double().cos().to(w.dtype), weights)
    return equal(value_and_grad(loss, t)(end.params, end.state), (loss(weights), grads))


@law(
    "Ordinary links compute with the params themselves.",
    "weights(s, p) = p",
    applies=lambda t: t.plain_weights,
)
def plain_weights(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    for here in train(t, params, steps):
        yield equal(t.weights(here.state, here.params), here.params)


@law(
    "Updates pass through bit for bit: the base optimizer's own trajectory of the latent.",
    "update(g, s, p) = g",
    applies=lambda t: t.passes_updates,
)
def passes_updates(t: Any, params: PyTree, steps: Steps) -> Iterator[Claim]:
    _, *rest = train(t, params, steps)
    for grads, here in zip(steps, rest, strict=True):
        yield equal(here.updates, grads)
