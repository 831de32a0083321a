"""What both adapters do with parameters and their saved state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]
Entries = dict[str, Any]


def wide(p: Tensor) -> torch.dtype:
    """The dtype of the parameter's latent: float32 or better."""
    return torch.promote_types(p.dtype, torch.float32)


def name_of(group: Group, index: int, i: int) -> str:
    """The name of a group's parameter, for messages."""
    names = group.get("param_names")
    return str(names[i]) if names else f"{i} of group {index}"


def value_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure gives, with gradients on; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def refuse_flat(who: str, p: Tensor, name: str) -> None:
    """Raises TypeError for a parameter of FSDP1."""
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        raise TypeError(
            f"{who}: parameter {name!r} is flattened by FSDP1, which loses its rows; "
            "shard with torch.distributed.fsdp.fully_shard"
        )


def matched(
    optimizer: Optimizer, state_dict: dict[str, Any], same: tuple[str, ...] = ()
) -> list[tuple[Tensor, Entries | None, str]]:
    """(parameter, its saved state or None, its name), matched by position.

    Raises ValueError where the groups do not fit, or differ in the entries named in `same`.
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
        for key in same:
            if other.get(key) != group.get(key):
                raise ValueError(
                    f"loaded state dict has {key}={other.get(key)} in group {index}, the "
                    f"optimizer {group.get(key)}"
                )
        for i, (p, name) in enumerate(zip(group["params"], other["params"], strict=True)):
            found.append((p, state_dict["state"].get(name), name_of(group, index, i)))
    return found


def check_shapes(mine: Entries, saved: Entries | None, name: str) -> None:
    """Raises ValueError for a saved tensor of another shape than the optimizer's own."""
    for key, own in mine.items():
        got = None if saved is None else saved.get(key)
        if isinstance(own, Tensor) and isinstance(got, Tensor) and own.shape != got.shape:
            raise ValueError(
                f"loaded state dict has {key} {tuple(got.shape)} for parameter {name!r}, the "
                f"optimizer {tuple(own.shape)}"
            )


def unshared(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with 0-d tensors copied, which parameters share: safetensors refuses that."""
    state = {
        key: {name: got.clone() if _is_scalar(got) else got for name, got in entries.items()}
        for key, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _is_scalar(got: Any) -> bool:
    return isinstance(got, Tensor) and got.dim() == 0


def load_groups(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Takes over all of the saved groups but their parameters."""
    for group, other in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        group.update({k: v for k, v in copy.deepcopy(other).items() if k != "params"})


def loaded(got: Any, mine: Any, p: Tensor) -> Any:
    """A saved entry: a copy in its own dtype, on the device where the optimizer keeps its own."""
    if not isinstance(got, Tensor):
        return copy.deepcopy(got)
    device = mine.device if isinstance(mine, Tensor) else p.device if got.dim() else got.device
    return got.detach().to(device, copy=True)
