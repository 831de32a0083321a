"""Pytrees, on optree: maps that skip None, names of leaves, masks, labels, reading state.

A pytree is any nesting of dicts, lists, tuples and NamedTuples. None stands for a leaf that is
not there: a parameter without a gradient, or one outside a mask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NoReturn

import optree
import torch
from torch import Tensor

PyTree = Any
#: What picks leaves: a name pattern or several, a predicate of (name, leaf), or a tree of bools.
Mask = str | re.Pattern[str] | Sequence[str] | Callable[[str, Any], bool] | PyTree
#: What labels leaves: {pattern: label}, a function of (name, leaf), or a tree of labels.
Labels = Mapping[str, str] | Callable[[str, Any], str] | PyTree


def tree_map(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps `f` over the leaves of `tree` and what stands in their places in `rest`.

    None in the first tree gives None; None in a later one is passed to `f`. So a map that makes
    updates takes the gradients first, and one that makes state takes the state first.

    >>> tree_map(lambda g, p: g + p, {"a": 1, "b": None}, {"a": 10, "b": 20})
    {'a': 11, 'b': None}
    """

    leaves, spec = optree.tree_flatten(tree, none_is_leaf=True)
    try:
        columns = [spec.flatten_up_to(other) for other in rest]
    except ValueError:
        raise ValueError(_difference(tree, rest)) from None
    rows = zip(leaves, *columns, strict=True)
    return optree.tree_unflatten(spec, [None if r[0] is None else f(*r) for r in rows])


def _difference(tree: PyTree, rest: tuple[PyTree, ...]) -> str:
    own = set(tree_leaves(tree_names(tree)))
    for other in rest:
        names = set(tree_leaves(tree_names(other)))
        if own != names:
            return (
                f"trees differ in structure: leaves of the first alone: {sorted(own - names)}, "
                f"of the other alone: {sorted(names - own)}"
            )
    kinds = [type(t).__name__ for t in (tree, *rest)]
    return f"trees differ in structure: containers of other kinds or lengths ({', '.join(kinds)})"


def tree_leaves(tree: PyTree) -> list[Any]:
    """The leaves that are not None, in optree's order (dict keys sorted)."""
    return optree.tree_leaves(tree)


def tree_unzip(tree: PyTree, results: PyTree, width: int) -> tuple[PyTree, ...]:
    """Splits a tree whose leaves are `width`-tuples (in the structure of `tree`) into trees.

    >>> tree_unzip({"a": 0, "b": None}, {"a": (1, 2), "b": None}, 2)
    ({'a': 1, 'b': None}, {'a': 2, 'b': None})
    """
    return tuple(
        optree.tree_map(
            lambda leaf, result, i=i: None if leaf is None else result[i],
            tree,
            results,
            none_is_leaf=True,
        )
        for i in range(width)
    )


def tree_names(tree: PyTree) -> PyTree:
    """The tree of its leaves' names.

    >>> tree_names({"layer": [{"weight": 1.0}, {"weight": 2.0}], "none": None})
    {'layer': [{'weight': 'layer.0.weight'}, {'weight': 'layer.1.weight'}], 'none': None}
    """
    names = [
        ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor)
        for accessor in optree.tree_accessors(tree)
    ]
    return optree.tree_unflatten(optree.tree_structure(tree), names)


def select(condition: Tensor, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the 0-d condition holds, else `old`, leaf by leaf."""

    def where(n: Tensor, o: Tensor) -> Tensor:
        flag = condition.to(n.device, non_blocking=True)
        return torch.where(flag, n, o.to(n.dtype))

    return tree_map(where, new, old)


def check_floating(params: PyTree, what: str) -> None:
    """Raises TypeError, with the leaf's name, unless every leaf is a real floating tensor."""
    for name, leaf in zip(tree_leaves(tree_names(params)), tree_leaves(params), strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{what}: parameter {name!r} is a {type(leaf).__name__}, expected a tensor"
            )
        if not leaf.is_floating_point():
            raise TypeError(
                f"{what}: parameter {name!r} has dtype {leaf.dtype}, expected a floating one; "
                "leave it out with masked(...)"
            )


def check_match(updates: PyTree, params: PyTree, what: str) -> None:
    """Raises ValueError, with the leaf's name, unless shapes agree where updates are given."""

    def check(name: str, update: Any, param: Any) -> None:
        if update is not None and update.shape != param.shape:
            raise ValueError(
                f"{what}: the update of {name!r} has shape {tuple(update.shape)}, "
                f"its parameter {tuple(param.shape)}"
            )

    tree_map(check, tree_names(params), updates, params)


# Masks and labels


def matches(pattern: str | re.Pattern[str], name: str) -> bool:
    """Whether a leaf's name fits a pattern.

    A string is a shell pattern for the name or for one of its parents ("head" and "layer*" pick
    "head.weight" and "layer1.0.weight"); a compiled regular expression is searched for.

    >>> matches("head", "head.weight"), matches("head", "headless"), matches("*.bias", "a.b.bias")
    (True, False, True)
    """
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _is_patterns(spec: Any) -> bool:
    return isinstance(spec, list | tuple | set | frozenset) and all(
        isinstance(p, str | re.Pattern) for p in spec
    )


def _unmatched(what: str, pattern: Any, names: list[str]) -> NoReturn:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise ValueError(f"{what} {pattern!r} matches no parameter; the parameters are: {shown}")


def resolve_mask(mask: Mask, params: PyTree) -> PyTree:
    """The mask as a tree of bools in the structure of `params`.

    Raises ValueError for a pattern that matches nothing and for a tree that does not fit,
    TypeError for a tree with leaves other than bools.

    >>> resolve_mask("*.weight", {"a": {"weight": 1.0, "bias": 2.0}})
    {'a': {'weight': True, 'bias': False}}
    """
    names = tree_names(params)
    patterns: Any = (mask,) if isinstance(mask, str | re.Pattern) else mask
    if _is_patterns(patterns):
        flat = tree_leaves(names)
        for pattern in patterns:
            if not any(matches(pattern, name) for name in flat):
                _unmatched("mask pattern", pattern, flat)
        return tree_map(lambda name: any(matches(p, name) for p in patterns), names)
    if callable(mask):
        return tree_map(lambda name, leaf: bool(mask(name, leaf)), names, params)
    return _broadcast(mask, params, bool, "mask")


def resolve_labels(labels: Labels, params: PyTree) -> PyTree:
    """The labels as a tree of strings in the structure of `params`.

    In a flat dict of patterns the first that matches a leaf's name decides.

    >>> resolve_labels({"*.bias": "rest", "*": "quantized"}, {"a": {"weight": 1.0, "bias": 2.0}})
    {'a': {'weight': 'quantized', 'bias': 'rest'}}
    """
    names = tree_names(params)
    if isinstance(labels, Mapping) and all(isinstance(v, str) for v in labels.values()):
        flat = tree_leaves(names)
        for pattern in labels:
            if pattern != "*" and not any(matches(pattern, name) for name in flat):
                _unmatched("label pattern", pattern, flat)

        def first(name: str) -> str:
            for pattern, label in labels.items():
                if matches(pattern, name):
                    return str(label)
            raise ValueError(f"parameter {name!r} fits no label pattern of {list(labels)}")

        return tree_map(first, names)
    if callable(labels):
        return tree_map(labels, names, params)
    return _broadcast(labels, params, str, "labels")


def _broadcast(prefix: PyTree, params: PyTree, kind: type, what: str) -> PyTree:
    for name, leaf in zip(tree_leaves(tree_names(prefix)), tree_leaves(prefix), strict=True):
        if not isinstance(leaf, kind):
            raise TypeError(
                f"{what}: entry {name!r} is a {type(leaf).__name__}, expected {kind.__name__}"
            )
    try:
        return optree.tree_broadcast_prefix(prefix, params)
    except ValueError as error:
        known, given = set(tree_leaves(tree_names(params))), tree_leaves(tree_names(prefix))
        unknown = sorted(n for n in given if not any(matches(n, k) for k in known))
        missing = sorted(n for n in known if not any(matches(g, n) for g in given))
        raise ValueError(
            f"{what} does not fit the parameters: names no parameter has: {unknown or 'none'}; "
            f"parameters it leaves out: {missing or 'none'} ({error})"
        ) from None


def pick(mask: PyTree, tree: PyTree) -> PyTree:
    """The tree with None where the mask (a tree of bools) does not hold."""
    return tree_map(lambda chosen, leaf: leaf if chosen else None, mask, tree)


def merge(mask: PyTree, chosen: PyTree, rest: PyTree) -> PyTree:
    """`chosen` where the mask (a tree of bools) holds, else `rest`."""
    return tree_map(lambda take, c, r: c if take else r, mask, chosen, rest)


# Reading state


def read(state: PyTree, name: str) -> Any:
    """The one field of that name in a nested state.

    A name is a field of a state NamedTuple ("slope"), and may be made longer by what stands
    before it on the way down, in order: the state's kind ("prox.count" for a `ProxState`), a
    named chain's or partition's key, a position in a chain ("1.count").

    Raises KeyError when nothing has that name, with the names there are, and when more than one
    has it, with the longer names that tell them apart.

    >>> from parq_fn import adam, chain, hard_prox, lsbq
    >>> state = chain(adam(1e-3), hard_prox(lsbq(1))).init({"w": torch.ones(2, 3)})
    >>> read(state, "levels"), read(state, "prox.count")
    ({'w': tensor([[0., 0.]])}, tensor(0))
    """
    *above, last = name.split(".")
    fields = list(_fields(state, (), ()))
    found = [
        (path, leaf) for path, tags, leaf in fields if path[-1] == last and _within(above, tags)
    ]
    if len(found) == 1:
        return found[0][1]
    if not found:
        known = sorted({path[-1] for path, _, _ in fields})
        raise KeyError(f"no state is named {name!r}; there are: {', '.join(known) or 'none'}")
    paths = ", ".join(".".join(path) for path, _ in found)
    raise KeyError(f"{len(found)} states are named {name!r}: {paths}; give a longer name")


def _fields(
    node: Any, path: tuple[str, ...], tags: tuple[str, ...]
) -> Any:  # (path to the field, all names on the way, the field)
    if optree.is_namedtuple(node):
        kind = type(node).__name__.removesuffix("State").lower()
        for field in node._fields:
            child = getattr(node, field)
            yield (*path, kind, field), (*tags, kind), child
            yield from _fields(child, (*path, field), (*tags, kind, field))
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from _fields(child, (*path, str(key)), (*tags, str(key)))
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from _fields(child, (*path, str(i)), (*tags, str(i)))


def _within(wanted: list[str], tags: tuple[str, ...]) -> bool:
    rest = iter(tags)
    return all(any(tag == want for tag in rest) for want in wanted)
