"""A transformation for each kind of leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from parq_fn.foundation.traits import TransformationTraits, shared
from parq_fn.foundation.tree import (
    ByName,
    Labels,
    PyTree,
    check_match,
    check_plain,
    merge,
    names_of,
    pick,
    resolve_labels,
)
from parq_fn.foundation.value import changed, value
from parq_fn.transforms.transformation import (
    Link,
    Rates,
    Transformation,
    begun,
    check_transformation,
    handed,
    in_place,
    name_of,
    pinned,
    pull_back,
    pulls_back,
    rates_of,
    updated,
    wrong_state,
)


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

    #: {label: transformation}.
    transforms: Mapping[str, Transformation]
    #: {pattern: label}, a function of (name, leaf), or a tree of labels.
    labels: Labels

    def __post_init__(self) -> None:
        if not isinstance(self.transforms, Mapping):
            raise TypeError(
                "partition: expected transformations by label, such as "
                f'{{"train": sgd(0.1), "stop": freeze()}}, got a {name_of(self.transforms)}'
            )
        for label, link in self.transforms.items():
            where = "in partition(transforms, labels) the transformation of label"
            check_transformation(link, f"{where} {label!r}")
        if isinstance(self.labels, torch.nn.Module):
            raise TypeError(
                f"partition: got the module {type(self.labels).__name__} for the labels, expected "
                '{pattern: label} such as {"*.weight": "quantized", "*": "rest"}'
            )

    @property
    def traits(self) -> TransformationTraits:
        """What all its transformations declare, but that the names of all leaves count."""
        own = shared(self.transforms.values())
        return replace(own, leafwise=own.leafwise and isinstance(self.labels, ByName))

    @property
    def rates(self) -> Rates:
        """Those of any of its transformations."""
        return rates_of(*self.transforms.values())

    def _masks(self, params: PyTree) -> dict[str, list[bool]]:
        labels = resolve_labels(self.labels, params)
        unknown = {str(x): i for i, x in enumerate(labels) if x not in self.transforms}
        if unknown:
            first = names_of(params)[min(unknown.values())]
            raise ValueError(
                f"labels without a transformation: {sorted(unknown)}; there are transformations "
                f"for: {sorted(self.transforms)}; the first parameter of such a label is {first!r}"
            )
        return {name: [label == name for label in labels] for name in self.transforms}

    def _check_state(self, state: Any) -> None:
        if not isinstance(state, dict) or any(label not in state for label in self.transforms):
            labels = ", ".join(map(str, self.transforms))
            raise TypeError(wrong_state(self, state, f"a dict by the labels {labels}"))

    def init(self, params: PyTree) -> PyTree:
        """The inner states, a dict by label."""
        check_plain(params, "partition")
        return {
            label: begun(self.transforms[label], pick(mask, params, params))
            for label, mask in self._masks(params).items()
        }

    def update(
        self,
        updates: PyTree,
        state: PyTree,
        params: PyTree,
        *,
        pulled: Mapping[str, PyTree] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, PyTree]:
        """Every label's update on its own leaves.

        updates, state, params, extra: as of every link.
        pulled: the second result of `pullback`, where the updates are pulled back already.
        """
        self._check_state(state)
        try:
            masks = self._masks(params)
            picked = {label: pick(mask, params, updates) for label, mask in masks.items()}
        except ValueError:
            check_match(updates, params, "partition")
            raise
        states, out = {}, updates
        for label, mask in masks.items():
            own = {} if pulled is None else handed(pulled[label])
            chosen, states[label] = updated(
                self.transforms[label],
                picked[label],
                state[label],
                pick(mask, params, params),
                **own,
                **extra,
            )
            out = merge(mask, params, chosen, out)
        return out, states

    def weights(self, state: PyTree, params: PyTree) -> PyTree:
        """Every label's weights on its own leaves."""
        self._check_state(state)
        out = params
        for label, mask in self._masks(params).items():
            own = self.transforms[label].weights(state[label], pick(mask, params, params))
            out = merge(mask, params, own, out)
        return out

    def pullback(
        self, grads: PyTree, state: PyTree, params: PyTree, *, weights: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        """Every label's pullback on its own leaves, and the second results by label."""
        owns, out = {}, grads
        for label, mask in self._masks(params).items():
            made = None if weights is None else pick(mask, params, weights)
            inside = pick(mask, params, grads), state[label], pick(mask, params, params)
            chosen, owns[label] = pull_back(self.transforms[label], *inside, made)
            out = merge(mask, params, chosen, out)
        return out, owns

    @property
    def pulls_back(self) -> bool:
        """Whether one of its transformations does."""
        return any(map(pulls_back, self.transforms.values()))

    def children(self) -> dict[str, Transformation]:
        """The transformations by label."""
        return dict(self.transforms)

    def with_children(self, children: Mapping[str, Transformation]) -> Transformation:
        """Other transformations for the same labels."""
        transforms = dict(zip(self.transforms, in_place(self, children), strict=True))
        return changed(self, transforms=transforms)

    def child_states(self, state: PyTree) -> dict[str, PyTree]:
        """Its state is theirs by label."""
        self._check_state(state)
        return dict(state)

    def pinned(self, params: PyTree) -> Transformation:
        """With the labels by exact names; as it is where they are a function, which may look at
        values."""
        if callable(self.labels):
            return self
        transforms = {
            label: pinned(self.transforms[label], pick(mask, params, params))
            for label, mask in self._masks(params).items()
        }
        labels = resolve_labels(self.labels, params)
        by_name = ByName(dict(zip(names_of(params), labels, strict=True)))
        return changed(self, transforms=transforms, labels=by_name)
