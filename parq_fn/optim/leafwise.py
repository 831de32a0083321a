"""A transformation of many parameters as several, each of a few of them.

A pure function of the whole tree holds old and new tensors of all parameters at once. Where every
link treats a leaf alike whatever others there are, the same numbers come from a few leaves at a
time; masks and labels, which go by the names of all, are resolved before the tree is cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import optree
from torch import Tensor

from parq_fn.foundation.traits import tells_of, traits_of
from parq_fn.foundation.tree import PyTree
from parq_fn.optim.engine.chunks import chunks
from parq_fn.transforms.learn import learner
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.transformation import Transformation, children_of, pinned


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
    if not params or not _tells_all(transformation):
        return [whole] if params else []
    alone = pinned(transformation, dict(params))
    if not getattr(traits_of(alone), "leafwise", False):
        return [whole]
    parts = [Part(alone, own) for own in chunks({name: p.numel() for name, p in params.items()})]
    common = _common(whole, params)
    return parts if all(_common(part, params) == common for part in parts) else [whole]


def _common(part: Part, params: Mapping[str, Tensor]) -> list[str]:
    """Keys of the state that all leaves share; where they differ between parts, a state is no dict
    by name, and the transformation is not split."""
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


def _tells_all(transformation: Any) -> bool:
    """Whether its own traits, and those of what is inside it, say what it does."""
    inside = [*children_of(transformation).values()]
    if isinstance(transformation, Prox) and transformation.learn is not None:
        inside.append(learner(transformation.learn).transformation)
    own = tells_of(transformation, "init", "update", "weights", "pullback")
    return own and all(map(_tells_all, inside))
