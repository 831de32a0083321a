"""A transformation of some of the leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from parq_fn.foundation.traits import TransformationTraits, shared
from parq_fn.foundation.tree import (
    ByName,
    Mask,
    PyTree,
    check_match,
    check_plain,
    merge,
    names_of,
    pick,
    resolve_mask,
)
from parq_fn.foundation.value import changed, value
from parq_fn.transforms.transformation import (
    Link,
    Rates,
    Transformation,
    begun,
    check_transformation,
    identity,
    in_place,
    pinned,
    pull_back,
    pulls_back,
    rates_of,
    updated,
)


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

    #: What the leaves of the mask are given to.
    inner: Transformation
    #: Name patterns, a predicate of (name, leaf), or a tree of bools.
    mask: Mask

    def __post_init__(self) -> None:
        check_transformation(self.inner, "the transformation of masked(transformation, mask)")
        if isinstance(self.mask, torch.nn.Module):
            raise TypeError(
                f"masked: got the module {type(self.mask).__name__} for the mask; "
                "weight_mask(module) is the mask of what is to be quantized in it"
            )

    @property
    def traits(self) -> TransformationTraits:
        """What the inner transformation declares, but that the names of all leaves count."""
        inner = shared([self.inner])
        return replace(inner, leafwise=inner.leafwise and isinstance(self.mask, ByName))

    @property
    def rates(self) -> Rates:
        """Those of the inner transformation, or none where the mask does not hold."""
        return rates_of(self.inner, identity())

    def init(self, params: PyTree) -> PyTree:
        """The inner state, without leaves outside the mask."""
        check_plain(params, "masked")
        return begun(self.inner, pick(resolve_mask(self.mask, params), params, params))

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        """The inner update on the mask, the updates as they came elsewhere."""
        try:
            mask = resolve_mask(self.mask, params)
            own = pick(mask, params, updates)
        except ValueError:
            check_match(updates, params, "masked")
            raise
        chosen, state = updated(self.inner, own, state, pick(mask, params, params), **extra)
        return merge(mask, params, chosen, updates), state

    def weights(self, state: PyTree, params: PyTree) -> PyTree:
        """The inner weights on the mask, the params elsewhere."""
        mask = resolve_mask(self.mask, params)
        own = self.inner.weights(state, pick(mask, params, params))
        return merge(mask, params, own, params)

    def pullback(
        self, grads: PyTree, state: PyTree, params: PyTree, *, weights: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        """The inner pullback on the mask, the gradients as they came elsewhere."""
        mask = resolve_mask(self.mask, params)
        made = None if weights is None else pick(mask, params, weights)
        inside = pick(mask, params, grads), state, pick(mask, params, params)
        chosen, own = pull_back(self.inner, *inside, made)
        return merge(mask, params, chosen, grads), own

    @property
    def pulls_back(self) -> bool:
        """Whether the inner transformation does."""
        return pulls_back(self.inner)

    def children(self) -> dict[str, Transformation]:
        """The inner transformation."""
        return {"inner": self.inner}

    def with_children(self, children: Mapping[str, Transformation]) -> Transformation:
        """The same mask for another transformation."""
        (inner,) = in_place(self, children)
        return changed(self, inner=inner)

    def child_states(self, state: PyTree) -> dict[str, PyTree]:
        """Its state is the inner one."""
        return {"inner": state}

    def pinned(self, params: PyTree) -> Transformation:
        """With the mask by exact names; as it is where that is a function, which may look at
        values."""
        if callable(self.mask):
            return self
        mask = resolve_mask(self.mask, params)
        inner = pinned(self.inner, pick(mask, params, params))
        by_name = ByName(dict(zip(names_of(params), mask, strict=True)))
        return changed(self, inner=inner, mask=by_name)
