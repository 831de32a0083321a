"""A transformation of many parameters as several, each of a few of them.

A pure function of the whole tree holds old and new tensors of all parameters at once. Where every
link treats a leaf alike whatever others there are, the same numbers come from a few leaves at a
time; masks and labels, which go by the names of all, are resolved before the tree is cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import optree
from torch import Tensor

from parq_fn.foundation.traits import traits_of
from parq_fn.foundation.tree import PyTree, names_of, pick, resolve_labels, resolve_mask
from parq_fn.optim.engine.chunks import chunks
from parq_fn.transforms.chain import Chain, Composite
from parq_fn.transforms.masked import masked
from parq_fn.transforms.partition import partition
from parq_fn.transforms.transformation import Transformation
from parq_fn.transforms.wrappers import accumulate

_METHODS = ("traits", "init", "update", "weights")


class Part:
    """Some of the parameters, the transformation of them alone, and where its state is kept: as
    entries of parameters, "0.trace" of each, and "1.count" that all share."""

    def __init__(self, transformation: Transformation, names: list[str]) -> None:
        self.transformation, self.names = transformation, names
        self._spec: Any = None
        self.places: list[tuple[str | None, str]] = []  # of the leaves: parameter or None, key

    def take_apart(self, state: PyTree) -> list[tuple[str | None, str, Any]]:
        """(parameter, or None of what all share; key; leaf) of every leaf of a state."""
        leaves, spec = optree.tree_flatten(state)
        if spec != self._spec:
            own = set(self.names)
            places = [_place(accessor, own) for accessor in optree.tree_accessors(state)]
            _check_places(places)
            self._spec, self.places = spec, places
        return [(*place, leaf) for place, leaf in zip(self.places, leaves, strict=True)]

    def put_together(self, entry: Callable[[str | None, str], Any]) -> PyTree:
        """The state whose leaves are entry(parameter or None, key)."""
        return optree.tree_unflatten(self._spec, [entry(*place) for place in self.places])


def _check_places(places: list[tuple[str | None, str]]) -> None:
    keys = [key for _, key in places]
    if "latent" in keys:
        raise ValueError(
            "TransformOptimizer: the transformation's state has a field named 'latent', which is "
            "the name of the optimizer's own entry; give it another name"
        )
    twice = sorted({key for (_, key), n in Counter(places).items() if n > 1})
    if twice:
        raise ValueError(
            f"TransformOptimizer: two fields of the transformation's state are both {twice[0]!r}; "
            "names of links and labels with dots in them may run into others' fields"
        )


def _place(accessor: Any, names: set[str]) -> tuple[str | None, str]:
    *above, last = accessor
    own = isinstance(last, optree.MappingEntry) and last.entry in names
    path = above if own else [*above, last]
    key = ".".join(str(getattr(entry, "field", entry.entry)) for entry in path)
    return (str(last.entry) if own else None), key


def parts_of(transformation: Transformation, params: Mapping[str, Tensor]) -> list[Part]:
    """The transformation in parts of no more elements than the largest parameter, or in one
    where a link looks at several leaves together or does not say that it does not.

    Without params there is none.

    Raises ValueError as the masks and labels do.
    """
    whole = Part(transformation, list(params))
    if not params or not _is_separable(transformation):
        return [whole] if params else []
    cut = chunks({name: p.numel() for name, p in params.items()})
    parts = [Part(_among(transformation, dict(params), set(own)), own) for own in cut]
    common = _common(whole, params)
    return parts if all(_common(part, params) == common for part in parts) else [whole]


def _common(part: Part, params: Mapping[str, Tensor]) -> list[str]:
    """What a part's parameters share: more of it for more of them is no dict by name."""
    state = part.transformation.init({name: params[name] for name in part.names})
    return [key for name, key, _ in part.take_apart(state) if name is None]


def joined(states: list[PyTree]) -> PyTree:
    """The state of all parameters from those of the parts: dicts by name together, what the
    parts share from the first."""
    first = states[0]
    if isinstance(first, dict):
        keys = {key: None for state in states for key in state}
        return {key: joined([state[key] for state in states if key in state]) for key in keys}
    if isinstance(first, tuple | list):
        items = [joined(list(column)) for column in zip(*states, strict=True)]
        return type(first)(*items) if optree.is_namedtuple(first) else type(first)(items)
    return first


def _is_separable(transformation: Any) -> bool:
    """Whether leaves are treated each alone, under their names."""
    kind = type(transformation)  # a subclass may do anything
    if _is_short(transformation):
        return _is_separable(transformation.expand())
    if kind is Chain:
        return all(map(_is_separable, transformation.links))
    if kind is accumulate:
        return _is_separable(transformation.inner)
    if kind is masked:  # a predicate may look at values, and so change
        return not callable(transformation.mask) and _is_separable(transformation.inner)
    if kind is partition:
        links = transformation.transforms.values()
        return not callable(transformation.labels) and all(map(_is_separable, links))
    return bool(getattr(traits_of(transformation), "leafwise", False)) and _speaks_of_itself(kind)


def _speaks_of_itself(kind: type) -> bool:
    """Whether the class that says what a link does also has its traits: they are inherited."""
    said = [next(i for i, c in enumerate(kind.__mro__) if name in vars(c)) for name in _METHODS]
    return said[0] <= min(said[1:])


def _is_short(transformation: Any) -> bool:
    """Whether it is a Composite, and that alone."""
    kind = type(transformation)
    return isinstance(transformation, Composite) and all(
        getattr(kind, name) is getattr(Composite, name) for name in _METHODS
    )


def _among(transformation: Any, params: PyTree, own: set[str]) -> Any:
    """The transformation of a few of the params: its masks and labels say of those what they
    say of all."""
    kind = type(transformation)
    if _is_short(transformation):
        return _among(transformation.expand(), params, own)
    if kind is Chain:
        links = tuple(_among(link, params, own) for link in transformation.links)
        return replace(transformation, links=links)
    if kind is accumulate:
        return replace(transformation, inner=_among(transformation.inner, params, own))
    if kind is masked:
        mask = resolve_mask(transformation.mask, params)
        inner = _among(transformation.inner, pick(mask, params, params), own)
        return masked(inner, _of(own, params, mask))
    if kind is partition:
        labels = resolve_labels(transformation.labels, params)
        transforms = {
            label: _among(one, pick([at == label for at in labels], params, params), own)
            for label, one in transformation.transforms.items()
        }
        return partition(transforms, _Known(_of(own, params, labels)))
    return transformation


@dataclass(frozen=True)
class _Known:
    """Labels by exact name: a dict of them would be one of patterns."""

    labels: dict[str, str]

    def __call__(self, name: str, leaf: Any) -> str:
        del leaf
        return self.labels[name]


def _of(own: set[str], params: PyTree, values: list[Any]) -> dict[str, Any]:
    named = zip(names_of(params), values, strict=True)
    return {name: value for name, value in named if name in own}
