"""Gradient transformations: the contract, and the links that are nothing but it.

params are the latent, full-precision weights; weights are what the model computes with. A
transformation is three pure functions over pytrees:

    init(params) -> state
    update(updates, state, params, **extra) -> updates, state    # increments to params
    weights(state, params) -> weights                            # identity for ordinary links

A link ignores the extra arguments it does not know. Links, like all values of this library,
are frozen dataclasses; states are NamedTuples of tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from parq_fn.foundation.traits import PER_LEAF, TransformationTraits
from parq_fn.foundation.tree import PyTree, tree_map
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
