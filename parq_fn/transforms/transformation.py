"""Gradient transformations: the contract, and how they compose.

params are the latent, full-precision weights; weights are what the model computes with. A
transformation is three pure functions over pytrees:

    init(params) -> state
    update(updates, state, params, **extra) -> updates, state    # increments to params
    weights(state, params) -> weights                            # identity for ordinary links

A link ignores the extra arguments it does not know. Links, like all values of this library,
are frozen dataclasses; states are NamedTuples of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import optree
import torch
from torch import Tensor

from parq_fn.foundation.traits import PER_LEAF, TransformationTraits, shared, traits_of
from parq_fn.foundation.tree import (
    Labels,
    Mask,
    PyTree,
    check_match,
    merge,
    pick,
    resolve_labels,
    resolve_mask,
    tree_leaves,
    tree_map,
)
from parq_fn.foundation.value import Value, show, value


@runtime_checkable
class Transformation(Protocol):
    """Any object with these three pure methods."""

    def init(self, params: PyTree) -> PyTree:
        """The state before the first update."""

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """The transformed updates and the next state."""

    def weights(self, state: PyTree, params: PyTree) -> PyTree:
        """The weights that the model computes with."""


class EmptyState(NamedTuple):
    """State of a link that keeps none."""


@value
class Link(Value):
    """Base of the links: no state, updates passed through, weights = params.

    >>> import torch
    >>> from parq_fn import Link
    >>> from parq_fn.foundation.tree import tree_map
    >>> class flip(Link):
    ...     def update(self, updates, state, params, **extra):
    ...         return tree_map(torch.neg, updates), state  # a missing gradient, None, stays one
    >>> flip().update({"w": torch.ones(1)}, flip().init({"w": torch.ones(1)}), None)
    ({'w': tensor([-1.])}, EmptyState())
    """

    @property
    def traits(self) -> TransformationTraits:
        """What it declares, for `parq_fn.testing`: of the base what every transformation must."""
        return TransformationTraits()

    def init(self, params: PyTree) -> PyTree:
        """The empty state."""
        del params
        return EmptyState()

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """(updates, state) after this link; of the base as they came."""
        del params, extra
        return updates, state

    def weights(self, state: PyTree, params: PyTree) -> PyTree:
        """The weights the model computes with; of the base the params."""
        del state
        return params


@value
class identity(Link):
    """updates -> updates.

    >>> identity()
    identity()
    """

    traits = replace(PER_LEAF, passes_updates=True)


@value
class freeze(Link):
    """updates -> 0: what it stands behind stays as it is; see `masked` and `partition`.

    >>> import torch
    >>> freeze().update({"w": torch.ones(1)}, EmptyState(), None)[0]
    {'w': tensor([0.])}
    """

    traits = PER_LEAF

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        return tree_map(torch.zeros_like, updates), state


@value
class stateless(Link):
    """updates -> function(updates, params), a pure function of trees.

    >>> import torch
    >>> double = stateless(lambda updates, params: {k: 2 * u for k, u in updates.items()})
    >>> double.update({"w": torch.ones(1)}, double.init(None), None)[0]
    {'w': tensor([2.])}
    """

    function: Callable[[PyTree, PyTree], PyTree]
    traits = TransformationTraits(plain_weights=True)

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        del extra
        return self.function(updates, params), state


def _same(state: PyTree, params: PyTree) -> PyTree:
    del state
    return params


@value
class GradientTransformation(Value):
    """A transformation from three functions; `weights` is the identity where it is not given.

    >>> halve = GradientTransformation(
    ...     init=lambda params: EmptyState(),
    ...     update=lambda updates, state, params, **_: (tree_map(lambda u: u / 2, updates), state),
    ... )
    >>> halve.update({"w": 1.0}, halve.init(None), None)[0]
    {'w': 0.5}
    """

    init: Callable[[PyTree], PyTree]
    update: Callable[..., tuple[PyTree, PyTree]]
    weights: Callable[[PyTree, PyTree], PyTree] = _same


def check_transformation(link: Any, where: str) -> None:
    """Raises TypeError unless the link is an object with init, update and weights."""
    if isinstance(link, type):
        raise TypeError(f"{where} is the class {link.__name__}; call it: {link.__name__}(...)")
    missing = [m for m in ("init", "update", "weights") if not callable(getattr(link, m, None))]
    if missing:
        raise TypeError(
            f"{where} is {show(link)}, expected a transformation; it lacks {', '.join(missing)}"
        )


# Composition


@value
class Chain(Value):
    """See `chain` and `named_chain`."""

    links: tuple[Transformation, ...]
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for i, link in enumerate(self.links):
            check_transformation(link, f"link {self.names[i] if self.names else i}")
        traits = [traits_of(link) or TransformationTraits() for link in self.links]
        fits = None  # the last link so far that does
        for link, own in zip(self.links, traits, strict=True):
            if fits is not None and not (own.passes_updates or own.last):
                raise ValueError(
                    f"{fits!r} fits its levels to params + updates as they reach it, and {link!r} "
                    "behind it may change them; put it last (a link that lets updates pass says "
                    "so in its traits: passes_updates=True)"
                )
            fits = link if own.last else fits

    def __repr__(self) -> str:
        if self.names is None:
            return f"chain({', '.join(map(repr, self.links))})"
        named = zip(self.names, self.links, strict=True)
        return f"named_chain({', '.join(f'{name}={link!r}' for name, link in named)})"

    @property
    def traits(self) -> TransformationTraits:
        """What all its links declare."""
        return shared(self.links)

    def _states(self, state: PyTree) -> list[PyTree]:
        if len(state) != len(self.links):
            raise ValueError(
                f"state of {len(state)} link(s) for a chain of {len(self.links)}; "
                "a state belongs to the transformation whose init made it"
            )
        return [state[name] for name in self.names] if self.names else list(state)

    def _pack(self, states: list[PyTree]) -> PyTree:
        return dict(zip(self.names, states, strict=True)) if self.names else tuple(states)

    def init(self, params: PyTree) -> PyTree:
        """The states of the links: a tuple, or a dict by their names."""
        return self._pack([link.init(params) for link in self.links])

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """Every link's update in turn, each seeing the updates of the one before it.

        Raises ValueError for updates of another structure or shape than the params.
        """
        if params is not None:
            check_match(updates, params, "chain" if self.names is None else "named_chain")
        states = []
        for link, old in zip(self.links, self._states(state), strict=True):
            updates, new = link.update(updates, old, params, **extra)
            states.append(new)
        return updates, self._pack(states)

    def weights(self, state: PyTree, params: PyTree) -> PyTree:
        """Every link's weights in turn."""
        for link, own in zip(self.links, self._states(state), strict=True):
            params = link.weights(own, params)
        return params


def chain(*links: Transformation) -> Chain:
    """Applies links in order: updates run through them from left to right.

    Raises TypeError for a link without init, update and weights, ValueError for a prox link in
    front of one that may change its updates.

    >>> from parq_fn import chain, clip, sgd
    >>> chain(clip(1.0), sgd(0.1))
    chain(clip(1.0), sgd(0.1))
    """
    return Chain(links)


def named_chain(**links: Transformation) -> Chain:
    """A chain whose state is a dict by the links' names, in the order given.

    >>> from parq_fn import hard_prox, lsbq, named_chain, sgd
    >>> named_chain(base=sgd(0.1), prox=hard_prox(lsbq(2)))
    named_chain(base=sgd(0.1), prox=hard_prox(lsbq(2)))
    """
    return Chain(tuple(links.values()), tuple(links))


@value
class Composite(Link):
    """Base of transformations that are a chain of others: `expand` gives it."""

    def expand(self) -> Transformation:
        """The chain that this is short for."""
        raise NotImplementedError(f"{type(self).__name__} must define expand")

    @property
    def traits(self) -> TransformationTraits:
        """What the chain declares."""
        return shared([self.expand()])

    def init(self, params: PyTree) -> PyTree:
        """The state of the chain."""
        return self.expand().init(params)

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """The update of the chain."""
        return self.expand().update(updates, state, params, **extra)

    def weights(self, state: PyTree, params: PyTree) -> PyTree:
        """The weights of the chain."""
        return self.expand().weights(state, params)


@value
class masked(Link):
    """Applies a transformation to the leaves of a mask; the others pass through untouched.

    The mask is a name pattern or several ("*.weight", "layer1", a compiled regular expression),
    a predicate of (name, leaf), or a tree of bools, possibly a prefix of the params. The inner
    transformation sees the leafless node `tree.Masked()` where the mask does not hold.

    Raises ValueError for a pattern or name that no parameter has.

    >>> import torch
    >>> from parq_fn import masked, scale
    >>> params = {"a": {"weight": torch.ones(1), "bias": torch.ones(1)}}
    >>> link = masked(scale(10.0), "*.weight")
    >>> link.update(params, link.init(params), params)[0]
    {'a': {'weight': tensor([10.]), 'bias': tensor([1.])}}
    """

    inner: Transformation
    mask: Mask

    def __post_init__(self) -> None:
        check_transformation(self.inner, "the inner transformation of masked")

    @property
    def traits(self) -> TransformationTraits:
        """What the inner transformation declares, but that names count."""
        return replace(shared([self.inner]), leafwise=False)

    def init(self, params: PyTree) -> PyTree:
        """The inner state, without leaves outside the mask."""
        return self.inner.init(pick(resolve_mask(self.mask, params), params, params))

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """The inner update on the mask, the updates as they came elsewhere."""
        mask = resolve_mask(self.mask, params)
        chosen, state = self.inner.update(
            pick(mask, params, updates), state, pick(mask, params, params), **extra
        )
        return merge(mask, params, chosen, updates), state

    def weights(self, state: PyTree, params: PyTree) -> PyTree:
        """The inner weights on the mask, the params elsewhere."""
        mask = resolve_mask(self.mask, params)
        own = self.inner.weights(state, pick(mask, params, params))
        return merge(mask, params, own, params)


@value
class partition(Link):
    """Applies to every leaf the transformation of its label.

    Labels are {pattern: label} (the first pattern that matches decides, "*" last), a function
    of (name, leaf), or a tree of labels, possibly a prefix of the params.

    Raises ValueError for a label without a transformation, and as `masked` does.

    >>> import torch
    >>> from parq_fn import freeze, partition, scale
    >>> params = {"weight": torch.ones(1), "bias": torch.ones(1)}
    >>> link = partition({"train": scale(2.0), "stop": freeze()}, {"bias": "stop", "*": "train"})
    >>> link.update(params, link.init(params), params)[0]
    {'weight': tensor([2.]), 'bias': tensor([0.])}
    """

    transforms: Mapping[str, Transformation]
    labels: Labels

    def __post_init__(self) -> None:
        for label, link in self.transforms.items():
            check_transformation(link, f"the transformation of label {label!r}")

    @property
    def traits(self) -> TransformationTraits:
        """What all its transformations declare, but that names count."""
        return replace(shared(self.transforms.values()), leafwise=False)

    def _masks(self, params: PyTree) -> dict[str, list[bool]]:
        labels = resolve_labels(self.labels, params)
        unknown = sorted({label for label in labels if label not in self.transforms})
        if unknown:
            raise ValueError(
                f"labels without a transformation: {unknown}; there are transformations "
                f"for: {sorted(self.transforms)}"
            )
        return {name: [label == name for label in labels] for name in self.transforms}

    def init(self, params: PyTree) -> PyTree:
        """The inner states, a dict by label."""
        return {
            label: self.transforms[label].init(pick(mask, params, params))
            for label, mask in self._masks(params).items()
        }

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """Every label's update on its own leaves."""
        states, out = {}, updates
        for label, mask in self._masks(params).items():
            chosen, states[label] = self.transforms[label].update(
                pick(mask, params, updates), state[label], pick(mask, params, params), **extra
            )
            out = merge(mask, params, chosen, out)
        return out, states

    def weights(self, state: PyTree, params: PyTree) -> PyTree:
        """Every label's weights on its own leaves."""
        out = params
        for label, mask in self._masks(params).items():
            own = self.transforms[label].weights(state[label], pick(mask, params, params))
            out = merge(mask, params, own, out)
        return out


# Using a transformation


def apply_updates(params: PyTree, updates: PyTree) -> PyTree:
    """params + updates, leaf by leaf, in each parameter's dtype; None leaves it as it is.

    >>> import torch
    >>> apply_updates({"a": torch.ones(1), "b": torch.ones(1)}, {"a": torch.ones(1), "b": None})
    {'a': tensor([2.]), 'b': tensor([1.])}
    """

    def add(param: Tensor, update: Tensor | None) -> Tensor:
        if update is None:
            return param
        if update.shape != param.shape:
            check_match(updates, params, "apply_updates")
        return (param + update).to(param.dtype)

    return tree_map(add, params, updates)


@value
class value_and_grad(Value):
    """(params, state, *args) -> (loss, grads), differentiated at the weights, not through them.

        loss = loss(w, *args) and grads = its gradient in w, at w = transform.weights(state, params)

    This is the straight way to train: the gradient is taken where the model computes, and the
    update moves the latent params. Leaves that are not floating get None for a gradient. With
    has_aux=True the loss returns (loss, aux), and the call ((loss, aux), grads).

    >>> import torch
    >>> from parq_fn import sgd, value_and_grad
    >>> params, transform = {"w": torch.tensor(3.0)}, sgd(0.1)
    >>> step = value_and_grad(lambda w, x: (w["w"] * x) ** 2, transform)
    >>> step(params, transform.init(params), 2.0)
    (tensor(36.), {'w': tensor(24.)})
    """

    loss: Callable[..., Any]
    transform: Transformation
    has_aux: bool = False

    def __post_init__(self) -> None:
        check_transformation(self.transform, "the transformation of value_and_grad")

    def __call__(self, params: PyTree, state: PyTree, /, *args: Any, **kwargs: Any) -> Any:
        """((loss or (loss, aux)), grads); grads in the structure of params.

        Raises TypeError for an nn.Parameter among the params: its graph would grow.
        """
        for leaf in tree_leaves(params):
            if isinstance(leaf, torch.nn.Parameter):
                raise TypeError(
                    "value_and_grad takes plain tensors, got an nn.Parameter; "
                    "use functional(module), or detach it"
                )
        weights = self.transform.weights(state, params)
        leaves, spec = optree.tree_flatten(weights)
        moves = [isinstance(w, Tensor) and w.is_floating_point() for w in leaves]

        def of_leaves(floating: list[Tensor]) -> Any:
            rest = iter(floating)
            filled = [next(rest) if m else w for m, w in zip(moves, leaves, strict=True)]
            return self.loss(optree.tree_unflatten(spec, filled), *args, **kwargs)

        chosen = [w for m, w in zip(moves, leaves, strict=True) if m]
        grads, out = torch.func.grad_and_value(of_leaves, has_aux=self.has_aux)(chosen)
        rest = iter(grads)
        return out, optree.tree_unflatten(spec, [next(rest) if m else None for m in moves])
