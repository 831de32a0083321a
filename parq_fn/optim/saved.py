"""What a saved state is to be: checked whole before anything of it is taken over."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.torch_private import is_composed
from parq_fn.optim.state import BEYOND, Entries, Group
from parq_fn.transforms.sharded import is_dtensor, local

#: Entries that count, by the last part of their keys.
_COUNTS = ("count", "updates")
#: Other numbers of prox links.
_NUMBERS = ("slope", "lr_sum")


def check_state_dict(who: str, state_dict: Any) -> None:
    """Raises TypeError for what is no dict, ValueError for one that is of no optimizer."""
    expected = f"expected what {who}.state_dict() gives, with state and param_groups"
    if not isinstance(state_dict, dict):
        raise TypeError(f"{who}.load_state_dict: got {type(state_dict).__name__}, {expected}")
    lacking = sorted({"state", "param_groups"} - state_dict.keys())
    if lacking:
        has = ", ".join(map(str, [*state_dict][:5])) or "nothing"
        raise ValueError(
            f"loaded state dict has no {' and no '.join(lacking)}: it has {has}"
            f"{', ...' if len(state_dict) > 5 else ''}; {expected}"
        )
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(state, dict) or not isinstance(groups, list | tuple):
        raise ValueError(
            f"loaded state dict has a {type(state).__name__} for state and a "
            f"{type(groups).__name__} for param_groups, expected a dict and a list; {expected}"
        )
    for index, group in enumerate(groups):
        _check_group(group, f"loaded state dict, group {index}")
    params = [name for group in groups for name in group["params"]]
    for name, count in Counter(params).items():
        if count > 1:
            raise ValueError(
                f"loaded state dict: parameter {name!r} is in its groups {count} times"
            )
        if not isinstance(state.get(name, {}), dict | None):
            raise ValueError(
                f"loaded state dict: parameter {name!r} has a {type(state[name]).__name__} for its "
                f"state, expected a dict; {expected}"
            )
    unknown = [key for key in state if isinstance(key, int) and key not in {*params}]
    if unknown:
        raise ValueError(
            f"loaded state dict has state of parameter {unknown[0]}, which is in none of its groups"
        )


def _check_group(group: Any, where: str) -> None:
    if not isinstance(group, dict) or "params" not in group:
        raise ValueError(f"{where} is a {type(group).__name__}, expected a dict with params")
    params, names = group["params"], group.get("param_names")
    if not isinstance(params, list | tuple) or not all(map(_is_hashable, params)):
        raise ValueError(f"{where} has params={params!r}, expected a list of numbers or names")
    if names is not None and (
        not isinstance(names, list | tuple)
        or not all(isinstance(name, str) for name in names)
        or len(names) not in (0, len(params))
    ):
        raise ValueError(
            f"{where} has param_names={names!r}, expected a name for each of {len(params)} "
            "parameters"
        )
    if not isinstance(group.get(BEYOND, {}), dict):
        raise ValueError(f"{where} has a {type(group[BEYOND]).__name__} for {BEYOND}, not a dict")


def _is_hashable(got: Any) -> bool:
    return isinstance(got, Hashable) and not isinstance(got, Tensor) and not isinstance(got, tuple)


def check_values(own: Group, saved: Group, index: int) -> None:
    """Raises ValueError for what a group cannot be loaded with: no numbers where it has numbers."""
    for key, mine in own.items():
        got = saved.get(key)
        is_number = isinstance(mine, int | float | Tensor) and not isinstance(mine, bool)
        if key == "params" or key not in saved or not is_number:
            continue
        if got is None and key != "lr":
            continue
        fits = isinstance(got, int | float) or (
            isinstance(got, Tensor) and not got.is_complex() and not got.is_meta
        )
        shape = mine.shape if isinstance(mine, Tensor) else ()
        number = got.item() if isinstance(got, Tensor) and got.numel() == 1 and fits else got
        wrong = isinstance(number, float) and not math.isfinite(number)
        if not fits or (isinstance(got, Tensor) and got.shape != shape) or (key == "lr" and wrong):
            raise ValueError(
                f"loaded state dict, group {index}: {key} is {got!r}, expected a number; give it "
                "the one that it was saved with"
            )


def matched(
    optimizer: Optimizer, state_dict: dict[str, Any], same: Callable[[Group], tuple[str, ...]]
) -> list[tuple[Tensor, Entries | None]]:
    """(parameter, its saved state or None), matched by position.

    same: the entries of a saved group that are to be those of the optimizer's.
    Raises ValueError where the groups do not fit, differ in those entries, or have the same names
    in another order.
    """
    saved, groups = state_dict["param_groups"], optimizer.param_groups
    if len(saved) != len(groups):
        raise ValueError(
            f"loaded state dict has {len(saved)} parameter groups, the optimizer {len(groups)}"
        )
    found = []
    for index, (group, other) in enumerate(zip(groups, saved, strict=True)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"loaded state dict has {len(other['params'])} parameters in group {index}, "
                f"the optimizer {len(group['params'])}"
            )
        own, names = (list(one.get("param_names") or ()) for one in (group, other))
        if own != names and _all_names(groups) == _all_names(saved):
            raise ValueError(
                f"loaded state dict has the parameters of group {index} in another order: "
                f"{', '.join(names)}, the optimizer {', '.join(own)}; they are matched by "
                "position: build the optimizer with its parameters in that order"
            )
        check_values(group, other, index)
        for key in same(other):
            if key in other and not _is_same(other[key], group.get(key)):
                # a plain optimizer has none
                raise ValueError(
                    f"loaded state dict has {key}={other.get(key)} in group {index}, the "
                    f"optimizer {group.get(key)}"
                )
        for p, name in zip(group["params"], other["params"], strict=True):
            found.append((p, state_dict["state"].get(name)))
    return found


def _all_names(groups: list[Group]) -> list[str]:
    """The names of all parameters of all groups, sorted."""
    return sorted(str(name) for group in groups for name in group.get("param_names") or ())


def _is_same(one: Any, other: Any) -> bool:
    one, other = (tuple(got) if isinstance(got, list) else got for got in (one, other))
    return type(one) is type(other) and bool(one == other)


#: Of entries that are missing.
FOREIGN = (
    "it was saved by another optimizer, or changed since; load what this one's state_dict() gave"
)


def check_keys(needed: Iterable[str], entries: Entries, where: str, what: str) -> None:
    """Raises ValueError for entries that are missing. where, and what to do, begin and end what it
    says."""
    missing = sorted(set(needed) - entries.keys())
    if missing:
        raise ValueError(f"{where}: {', '.join(missing)} missing; {what}")


def check_entries(mine: Entries, saved: Entries, where: str, varies: Callable[[str], bool]) -> None:
    """Raises ValueError unless saved entries are tensors or numbers, and of the shape of mine.

    where: begins what it says; varies: whether an entry that differs may be of any shape.
    """
    for key, got in saved.items():
        own = mine.get(key)
        if not isinstance(own, Tensor):
            continue
        alike = isinstance(got, Tensor) and own.shape == got.shape
        if not alike and (isinstance(got, Tensor) or own.dim()) and varies(key):
            continue
        wrong = _unlike(key, own, got)
        if wrong:
            raise ValueError(f"{where}: {key} {wrong}")


def _unlike(key: str, own: Tensor, got: Any) -> str | None:
    """What keeps an entry from standing in for one's own; None where nothing does."""
    if not isinstance(got, Tensor | int | float) or (own.dim() and not isinstance(got, Tensor)):
        return f"is a {type(got).__name__}, expected a tensor"
    if not isinstance(got, Tensor):
        return _unlike_number(key, own, got)
    if own.shape != got.shape:
        return f"has shape {tuple(got.shape)}, expected {tuple(own.shape)}"
    if got.is_complex() and not own.is_complex():
        return f"is complex, expected {own.dtype}"
    if got.is_meta and not own.is_meta:
        return "is on the meta device, which holds no numbers; load it with its values"
    if got.layout != own.layout:
        return f"is of {got.layout}, expected {own.layout}"
    if is_dtensor(own) != is_dtensor(got):
        return (
            f"is a {type(got).__name__}, expected a {type(own).__name__}; "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict shards a whole state"
        )
    if own.dim():
        same = own.is_floating_point() == got.is_floating_point()
        return (
            None if same or is_composed(local(own)) else f"is of {got.dtype}, expected {own.dtype}"
        )
    return None if got.is_meta else _unlike_number(key, own, got.item())


def _unlike_number(key: str, own: Tensor, got: Any) -> str | None:
    if own.is_complex():
        return None
    name = key.rpartition(".")[2]
    try:
        number = float(got)
    except OverflowError:
        return f"is {got!r}, expected {own.dtype}"
    whole = own.dtype != torch.bool and not own.is_floating_point()
    if whole and not (number.is_integer() and _fits(got, own.dtype)):
        return f"is {got!r}, expected a whole number, {own.dtype}"
    if name in _COUNTS and whole and number < 0:
        return f"is {got!r}, expected 0 or more"
    if name in _NUMBERS and not math.isfinite(number):
        return f"is {got!r}, expected a finite number"
    return None


def _fits(got: Any, dtype: torch.dtype) -> bool:
    info = torch.iinfo(dtype)
    return info.min <= int(got) <= info.max
