"""Nested states: their fields by name, read and exchanged, and what they must be made of."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, overload

import optree
from torch import Tensor

from parq_fn.foundation.value import Value


@overload
def read(state: Any, name: Literal["count", "step", "slope", "lr_sum"]) -> Tensor: ...
@overload
def read(state: Any, name: str) -> Any: ...
def read(state: Any, name: str) -> Any:
    """The one field of that name in a nested state.

    A name is a field of a state NamedTuple ("slope") or a key of a state that is a dict, and may be
    made longer by what stands before it on the way down, in order: the state's kind ("prox.count"
    for a `ProxState`), a named chain's or partition's key, a position in a chain ("1.count").
    What stands higher goes first; last come the keys of what a field holds, such as the names of
    parameters.

    Raises KeyError when nothing has that name, with the names there are, and when more than one
    has it, with the longer names that tell them apart; TypeError for what is no state, and for one
    that holds a dataclass.

    >>> import torch
    >>> from parq_fn import adam, chain, hard_prox, lsbq
    >>> state = chain(adam(1e-3), hard_prox(lsbq(1))).init({"w": torch.ones(2, 3)})
    >>> read(state, "qparams"), read(state, "prox.count"), read(state, "qparams.w")
    ({'w': tensor([0.])}, tensor(0), tensor([0.]))
    """
    return _entry_of(state, name, "read").leaf


def write(state: Any, name: str, value: Any) -> Any:
    """The nested state with another value for the one field that `read(state, name)` gives; the
    state that is given is left as it is.

    The value has the field's structure, and its tensors the shapes and dtypes of the field's, so
    that the next update takes it. Raises KeyError as `read` does, ValueError for another structure,
    TypeError and ValueError for tensors that do not fit, each with its name.

    >>> import torch
    >>> from parq_fn import adam, chain, hard_prox, lsbq
    >>> state = chain(adam(1e-3), hard_prox(lsbq(1))).init({"w": torch.ones(2, 3)})
    >>> read(write(state, "qparams.w", torch.tensor([0.5])), "qparams")
    {'w': tensor([0.5000])}
    """
    entry = _entry_of(state, name, "write")
    _check_fits(value, entry.leaf, name)
    return _with(state, entry.keys, value)


def _check_fits(value: Any, old: Any, name: str) -> None:
    (leaves, spec), (mine, own) = optree.tree_flatten(value), optree.tree_flatten(old)
    if spec != own:
        raise ValueError(
            f"write: {name!r} has the structure {own}, the value {spec}; give the field's structure"
        )
    for accessor, leaf, known in zip(optree.tree_accessors(old), leaves, mine, strict=True):
        path = ".".join([name, *(str(getattr(e, "field", e.entry)) for e in accessor)])
        if type(leaf) is not type(known) and not (
            isinstance(leaf, Tensor) and isinstance(known, Tensor)
        ):
            raise TypeError(
                f"write: {path!r} is a {type(known).__name__}, got a {type(leaf).__name__}"
            )
        if isinstance(known, Tensor) and leaf.shape != known.shape:
            raise ValueError(
                f"write: {path!r} has shape {tuple(known.shape)}, got {tuple(leaf.shape)}"
            )
        if isinstance(known, Tensor) and leaf.dtype != known.dtype:
            raise TypeError(f"write: {path!r} has dtype {known.dtype}, got {leaf.dtype}")


def _with(node: Any, keys: tuple[Any, ...], value: Any) -> Any:
    """The node with the value at the end of the keys, made anew on the way there."""
    if not keys:
        return value
    key, *rest = keys
    if isinstance(node, dict):
        changed = copy.copy(node)
        changed[key] = _with(node[key], tuple(rest), value)
        return changed
    if optree.is_namedtuple(node):
        return node._replace(**{key: _with(getattr(node, key), tuple(rest), value)})
    items = [_with(x, tuple(rest), value) if i == key else x for i, x in enumerate(node)]
    return items if isinstance(node, list) else tuple(items)


def _entry_of(state: Any, name: str, who: str) -> _Entry:
    """The one entry of that name."""
    order = "state, name" if who == "read" else "state, name, value"
    if not isinstance(name, str):
        raise TypeError(f"{who} takes ({order}), got a {type(name).__name__} for the name")
    if not isinstance(state, dict | list | tuple):
        check_nodes(state, f"{who}: the state")
        hint = ""
        if hasattr(state, "transformation_state"):
            hint = "; use its transformation_state"
        elif hasattr(state, "param_groups"):
            hint = "; an optimizer's entries of a parameter are in optimizer.state[p], by name"
        raise TypeError(
            f"{who} takes the state that a transformation's init or update gave, got a "
            f"{type(state).__name__}{hint}"
        )
    entries = list(_entries_of(state))
    for kind in ("field", "link", "inner"):
        found = [e for e in entries if e.kind == kind and _is_named(name, e)]
        places = [e.path[:-1] for e in found]  # a name there goes before one further down
        found = [e for e in found if not any(_is_below(e.path[:-1], place) for place in places)]
        if len(found) == 1:
            return found[0]
        if found:
            paths = ", ".join(".".join(e.path) for e in found)
            raise KeyError(f"{len(found)} states are named {name!r}: {paths}; give a longer name")
    check_nodes(state, f"{who}: the state")
    last = name.rpartition(".")[2]
    for there in _elsewhere(state):
        if last in there:
            raise KeyError(f"no state is named {name!r}; {there[last]}")
    by_depth = sorted((e for e in entries if e.kind != "inner"), key=lambda e: len(e.path))
    names = [*dict.fromkeys(e.path[-1] for e in by_depth)]
    known = ", ".join(sorted(names[:20])) + (", ..." if len(names) > 20 else "")
    raise KeyError(f"no state is named {name!r}; there are: {known or 'none'}")


def check_nodes(state: Any, what: str) -> None:
    """Raises TypeError where a state holds a dataclass, whose tensors no function finds.

    (One that is registered with optree is a node like others.)
    """
    for leaf in optree.tree_leaves(state):
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, Tensor | Value):
            name = type(leaf).__name__
            raise TypeError(
                f"{what} is or holds the dataclass {name}, expected NamedTuples, dicts, lists and "
                f"tuples of tensors; write class {name}(NamedTuple) with the same fields, and "
                "@state_class above it"
            )


class _Entry(NamedTuple):
    kind: str  # "field" or key of a state; "link": key of a tuple; "inner": key within a field
    path: tuple[str, ...]  # to it
    tags: tuple[str, ...]  # all names on the way
    keys: tuple[Any, ...]  # to it in the state: fields, keys of dicts, positions
    leaf: Any


def _entries_of(
    node: Any,
    path: tuple[str, ...] = (),
    tags: tuple[str, ...] = (),
    keys: tuple[Any, ...] = (),
    within: bool = False,
) -> Iterator[_Entry]:
    if optree.is_namedtuple(node):
        kind = type(node).__name__.removesuffix("State").lower()
        for field in node._fields:
            child = getattr(node, field)
            here = (*keys, field)
            yield _Entry("field", (*path, kind, field), (*tags, kind), here, child)
            yield from _entries_of(child, (*path, field), (*tags, kind, field), here, True)
    elif isinstance(node, dict):
        for key, child in node.items():
            kind = "link" if isinstance(child, list | tuple) else "field"
            place, here = (*path, str(key)), (*keys, key)
            yield _Entry("inner" if within else kind, place, tags, here, child)
            yield from _entries_of(child, place, (*tags, str(key)), here, within)
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from _entries_of(child, (*path, str(i)), (*tags, str(i)), (*keys, i), within)


def _is_below(path: tuple[str, ...], place: tuple[str, ...]) -> bool:
    return len(path) > len(place) and path[: len(place)] == place


def _is_named(name: str, entry: _Entry) -> bool:
    *_, last = entry.path
    if name == last:
        return True
    above = name.removesuffix(f".{last}")  # keys may have dots in them
    return above != name and _within(above.split("."), entry.tags)


def _elsewhere(node: Any) -> Iterator[dict[str, str]]:
    """What states say of names that they do not have."""
    if hasattr(node, "elsewhere"):
        yield node.elsewhere()
    if isinstance(node, dict | list | tuple):
        for child in node.values() if isinstance(node, dict) else node:
            yield from _elsewhere(child)


def _within(wanted: list[str], tags: tuple[str, ...]) -> bool:
    rest = iter(tags)
    return all(any(tag == want for tag in rest) for want in wanted)
