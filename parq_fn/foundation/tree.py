"""Pytrees, on optree: maps that skip None, names of leaves, masks, labels.

A pytree is any nesting of dicts, lists, tuples and NamedTuples. None stands for a leaf that is
not there, such as the gradient of a parameter that has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, NoReturn, TypeVar

import optree
import torch
from torch import Tensor

from parq_fn.foundation.reading import read as read  # names of this module
from parq_fn.foundation.reading import write as write
from parq_fn.foundation.torch_private import constant_result

PyTree = Any
#: Of functions that give trees of the type that they take.
Params = TypeVar("Params")
Updates = TypeVar("Updates")
#: What picks leaves: a name pattern or several, a predicate of (name, leaf), or a tree of bools.
Mask = str | re.Pattern[str] | Sequence[str] | Callable[[str, Any], bool] | PyTree
#: What labels leaves: {pattern: label}, a function of (name, leaf), or a tree of labels.
Labels = Mapping[str, str] | Callable[[str, Any], str] | PyTree


def tree_map(f: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """Maps `f` over the leaves of `tree` and what stands in their places in `rest`.

    None in the first tree gives None; None in a later one is passed to `f`. So a map that makes
    updates takes the gradients first, and one that makes state takes the state first.
    Raises ValueError, with the names of the leaves, where the structures differ.

    >>> tree_map(lambda g, p: g + p, {"a": 1, "b": None}, {"a": 10, "b": 20})
    {'a': 11, 'b': None}
    """
    spec, leaves, *columns = columns_of(tree, *rest, none_is_leaf=True)
    rows = zip(leaves, *columns, strict=True)
    return optree.tree_unflatten(spec, [None if r[0] is None else f(*r) for r in rows])


def columns_of(tree: PyTree, *rest: PyTree, none_is_leaf: bool = False) -> tuple[Any, ...]:
    """(structure, leaves of the tree, what stands in their places in each of the rest)."""
    leaves, spec = optree.tree_flatten(tree, none_is_leaf=none_is_leaf)
    try:
        return spec, leaves, *(spec.flatten_up_to(other) for other in rest)
    except ValueError:
        raise ValueError(_difference(tree, rest)) from None


def _difference(tree: PyTree, rest: tuple[PyTree, ...]) -> str:
    own = set(names_of(tree))
    for other in rest:
        names = set(names_of(other))
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


def names_of(tree: PyTree) -> list[str]:
    """The names of the leaves, in the order of `tree_leaves`.

    >>> names_of({"layer": [{"weight": 1.0}, {"weight": 2.0}], "none": None})
    ['layer.0.weight', 'layer.1.weight']
    """
    return _names(optree.tree_accessors(tree))


def _names(accessors: list[Any]) -> list[str]:
    return [".".join(str(getattr(e, "field", e.entry)) for e in accessor) for accessor in accessors]


def tree_names(tree: PyTree) -> PyTree:
    """The tree of its leaves' names.

    >>> tree_names({"layer": [{"weight": 1.0}], "none": None})
    {'layer': [{'weight': 'layer.0.weight'}], 'none': None}
    """
    return optree.tree_unflatten(optree.tree_structure(tree), names_of(tree))


def by_name(values: Mapping[str, Any], params: PyTree) -> PyTree:
    """The tree of the values of its leaves' names. Raises ValueError for a leaf without one.

    >>> by_name({"a": 1, "b.0": 2, "c": 3}, {"a": 0.5, "b": [0.5]})
    {'a': 1, 'b': [2]}
    """
    return optree.tree_unflatten(optree.tree_structure(params), values_of(values, params))


def values_of(values: Mapping[str, Any], params: PyTree) -> list[Any]:
    """The values of its leaves' names, in their order. Raises ValueError for a leaf without one."""
    names = names_of(params)
    if missing := [name for name in names if name not in values]:
        raise ValueError(
            f"values by name lack those of {_few(missing)}; give None for a leaf without its own"
        )
    return [values[name] for name in names]


def select(condition: Tensor, new: PyTree, old: PyTree) -> PyTree:
    """`new` where the 0-d condition holds, else `old`, leaf by leaf.

    Leaves of two shapes, as of a state of another version that finds its new form, need a
    condition that can be read.
    """

    def where(n: Tensor, o: Tensor) -> Tensor:
        if n.shape != o.shape:
            return n if bool(condition) else o
        flag = condition.to(n.device, non_blocking=True)
        return torch.where(flag, n, o.to(n.dtype))

    return tree_map(where, new, old)


def check_tree(params: PyTree, what: str) -> None:
    """Raises TypeError for a module, or an iterator of its parameters, in the place of a tree; does
    not look at leaves."""
    if isinstance(params, torch.nn.Module | Iterator):
        raise TypeError(
            f"{what}: got a {type(params).__name__}, expected a tree of tensors; use "
            "functional(module): apply, params = functional(module)"
        )


def check_plain(params: PyTree, what: str) -> None:
    """Raises TypeError, with the leaf's name, for a module, nn.Parameters or an iterator of them in
    the place of params."""
    check_tree(params, what)
    for i, leaf in enumerate(tree_leaves(params)):
        if isinstance(leaf, torch.nn.Module | Iterator):
            raise TypeError(
                f"{what}: parameter {names_of(params)[i]!r} is a {type(leaf).__name__}, expected "
                "a tensor; use functional(module): apply, params = functional(module)"
            )
        if isinstance(leaf, torch.nn.Parameter):
            raise TypeError(
                f"{what} takes plain tensors, got an nn.Parameter: parameter "
                f"{names_of(params)[i]!r} is an nn.Parameter, whose graph would grow with every "
                "step; use functional(module), or detach it"
            )


def check_floating(params: PyTree, what: str) -> None:
    """Raises TypeError, with the leaf's name, unless every leaf is a dense floating tensor."""
    check_plain(params, what)
    for name, leaf in zip(names_of(params), tree_leaves(params), strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{what}: parameter {name!r} is a {type(leaf).__name__}, expected a tensor"
            )
        if not leaf.is_floating_point():
            raise TypeError(
                f"{what}: parameter {name!r} has dtype {leaf.dtype}, expected a floating one; "
                "leave it out with masked(...)"
            )
        if leaf.dtype.itemsize < 2 or leaf.layout != torch.strided:
            raise TypeError(
                f"{what}: parameter {name!r} is {leaf.dtype} and {leaf.layout}, expected 16 bits "
                "or more, and dense; leave it out with masked(...)"
            )


def check_match(updates: PyTree, params: PyTree, what: str) -> None:
    """Raises an error, with the leaf's name, unless updates are None or fit their params.

    ValueError for a leaf too many or too few and for another shape, TypeError for what is no
    floating tensor.
    """
    try:
        _, leaves, given = columns_of(params, updates)
    except ValueError:
        raise ValueError(_misfit(updates, params, what)) from None
    for i, (param, update) in enumerate(zip(leaves, given, strict=True)):
        if not isinstance(param, Tensor):
            check_plain(params, what)
        if update is None or not isinstance(param, Tensor):
            continue
        if not isinstance(update, Tensor):
            raise TypeError(
                f"{what}: the update of {names_of(params)[i]!r} is a {type(update).__name__}, "
                "expected a tensor, or None where there is no gradient"
            )
        if update.shape != param.shape:
            raise ValueError(
                f"{what}: the update of {names_of(params)[i]!r} has shape "
                f"{tuple(update.shape)}, its parameter {tuple(param.shape)}"
            )
        if param.is_floating_point() and not update.is_floating_point():
            raise TypeError(
                f"{what}: the update of {names_of(params)[i]!r} has dtype {update.dtype}, its "
                f"parameter {param.dtype}; expected a floating dtype"
            )


def _misfit(updates: PyTree, params: PyTree, what: str) -> str:
    own, given = (
        dict.fromkeys(_names(optree.tree_accessors(tree, none_is_leaf=True)))
        for tree in (params, updates)
    )
    missing, unknown = [n for n in own if n not in given], [n for n in given if n not in own]
    if not missing and not unknown:
        kinds = f"{type(updates).__name__} and {type(params).__name__}"
        return (
            f"{what}: trees differ in structure: updates and params have containers of other kinds "
            f"or lengths ({kinds})"
        )
    order = "; the order is (updates, state, params)" if len(missing) == len(own) else ""
    return (
        f"{what}: trees differ in structure: updates lack leaves that params have: "
        f"{_few(missing)} (None stands for a missing gradient); they have leaves that params lack: "
        f"{_few(unknown)}{order}"
    )


def _few(names: list[str]) -> str:
    return ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "") or "none"


# Masks and labels: lists along the leaves of the params, for a compiler traces lists of
# constants, and trees of them it does not.


@constant_result
def matches(pattern: str | re.Pattern[str], name: str) -> bool:
    """Whether a leaf's name fits a pattern.

    A string is a shell pattern for the name or for one of its parents ("head" and "layer*" pick
    "head.weight" and "layer1.0.weight"), or one of these as it is written, brackets and all; a
    compiled regular expression is searched for.

    >>> matches("head", "head.weight"), matches("head", "headless"), matches("*.bias", "a.b.bias")
    (True, False, True)
    """
    if isinstance(pattern, re.Pattern):
        return pattern.search(name) is not None
    if f"{name}.".startswith(f"{pattern}."):
        return True
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _is_patterns(spec: Any) -> bool:
    return isinstance(spec, list | tuple | set | frozenset) and all(
        isinstance(p, str | re.Pattern) for p in spec
    )


def _unmatched(what: str, pattern: Any, names: list[str]) -> NoReturn:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    raise ValueError(f"{what} {pattern!r} matches no parameter; the parameters are: {shown}")


@dataclass(frozen=True)
class ByName:
    """A mask or labels that say of every leaf, by its exact name, what they say, whatever other
    leaves there are. (A dict is one of patterns, or has to fit all leaves.)"""

    values: Mapping[str, Any]

    def of(self, names: list[str]) -> list[Any]:
        """What it says of the leaves of these names; ValueError for one that it does not know."""
        for name in names:
            if name not in self.values:
                _unmatched("the name", name, list(self.values))
        return [self.values[name] for name in names]


def resolve_mask(mask: Mask, params: PyTree) -> list[bool]:
    """Whether the mask holds, for each leaf of `params`.

    Raises ValueError for a pattern that matches nothing and for a tree that does not fit,
    TypeError for a tree with leaves other than bools.

    >>> resolve_mask("*.weight", {"a": {"weight": 1.0, "bias": 2.0}})
    [False, True]
    """
    names = names_of(params)
    if isinstance(mask, ByName):
        return mask.of(names)
    patterns: Any = (mask,) if isinstance(mask, str | re.Pattern) else mask
    if _is_patterns(patterns):
        if not patterns:
            raise ValueError("an empty mask picks no parameter; leave the masked link out instead")
        for pattern in patterns:
            if not any(matches(pattern, name) for name in names):
                _unmatched("mask pattern", pattern, names)
        return [any(matches(p, name) for p in patterns) for name in names]
    if callable(mask):
        chosen = [bool(mask(n, x)) for n, x in zip(names, tree_leaves(params), strict=True)]
        if names and not any(chosen):
            _unmatched("mask predicate", mask, names)
        return chosen
    return _broadcast(mask, names, bool, "mask")


def resolve_labels(labels: Labels, params: PyTree) -> list[str]:
    """The label of each leaf of `params`.

    In a flat dict of patterns the first that matches a leaf's name decides.

    >>> resolve_labels({"*.bias": "rest", "*": "quantized"}, {"a": {"weight": 1.0, "bias": 2.0}})
    ['rest', 'quantized']
    """
    names = names_of(params)
    if isinstance(labels, ByName):
        return labels.of(names)
    if isinstance(labels, Mapping) and all(isinstance(v, str) for v in labels.values()):
        for pattern in labels:
            if pattern != "*" and not any(matches(pattern, name) for name in names):
                _unmatched("label pattern", pattern, names)
        return [_first(labels, name) for name in names]
    if callable(labels):
        return [labels(n, leaf) for n, leaf in zip(names, tree_leaves(params), strict=True)]
    return _broadcast(labels, names, str, "labels")


def _first(labels: Mapping[str, str], name: str) -> str:
    for pattern, label in labels.items():
        if matches(pattern, name):
            return label
    raise ValueError(f"parameter {name!r} fits no label pattern of {list(labels)}")


def _broadcast(prefix: PyTree, names: list[str], kind: type, what: str) -> list[Any]:
    """For each name the leaf of `prefix` that stands at it or above it."""
    entries = _entries(prefix, "")
    given = dict(entries)
    if len(given) < len(entries) or len(set(names)) < len(names):
        raise ValueError(f"{what}: two leaves have one name; keys with dots collide with paths")
    for entry, leaf in given.items():
        if not isinstance(leaf, kind):
            raise TypeError(
                f"{what}: entry {entry!r} is a {type(leaf).__name__}, expected {kind.__name__}"
            )
    found = [[e for e in given if e in ("", n) or n.startswith(f"{e}.")] for n in names]
    missing = [n for n, above in zip(names, found, strict=True) if not above]
    unknown = [e for e in given if not any(e in above for above in found)]
    if missing or unknown:
        raise ValueError(
            f"{what} does not fit the parameters: names no parameter has: {unknown or 'none'}; "
            f"parameters it leaves out: {missing or 'none'}"
        )
    return [given[max(above, key=len)] for above in found]


def _entries(tree: PyTree, name: str) -> list[tuple[str, Any]]:
    """(name, leaf) of a tree of constants, in plain Python, which a compiler traces."""
    if isinstance(tree, dict):
        children = [(str(key), child) for key, child in tree.items()]
    elif isinstance(tree, list | tuple):
        keys = getattr(tree, "_fields", range(len(tree)))
        children = [(str(key), child) for key, child in zip(keys, tree, strict=True)]
    else:
        return [] if tree is None else [(name, tree)]
    made: list[tuple[str, Any]] = []
    for key, child in children:
        made.extend(_entries(child, f"{name}.{key}" if name else key))
    return made


class Masked(NamedTuple):
    """Stands for a leaf outside a mask: a node without leaves.

    Not None, which torch's own pytrees take for a leaf and `vmap` refuses to return.
    """


def pick(mask: list[bool], params: PyTree, tree: PyTree) -> PyTree:
    """The tree, in the structure of `params`, with `Masked()` where the mask does not hold."""
    spec, _, leaves = columns_of(params, tree)
    kept = [leaf if take else Masked() for take, leaf in zip(mask, leaves, strict=True)]
    return optree.tree_unflatten(spec, kept)


def merge(mask: list[bool], params: PyTree, chosen: PyTree, rest: PyTree) -> PyTree:
    """`chosen` where the mask holds, else `rest`, in the structure of `params`."""
    spec, _, one, other = columns_of(params, chosen, rest)
    merged = [c if take else r for take, c, r in zip(mask, one, other, strict=True)]
    return optree.tree_unflatten(spec, merged)
