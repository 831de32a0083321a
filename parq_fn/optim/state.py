"""What both adapters do with parameters and their saved state."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.torch_private import (
    flattened_by,
    hooks_after_load,
    hooks_before_load,
    inner_shard,
    is_composed,
    parts_copied,
    writes_to,
)
from parq_fn.transforms.sharded import is_dtensor, local

Group = dict[str, Any]
Entries = dict[str, Any]

#: Where the first group of a saved state holds what a base optimizer keeps that is of no parameter.
BEYOND = "base_state"
#: In messages about groups that it may have changed.
ZERO = (
    "ZeRO of DeepSpeed flattens the parameters of a group and steps groups apart; shard with "
    "torch.distributed.fsdp.fully_shard in its place"
)


def wide(p: Tensor) -> torch.dtype:
    """The dtype of the parameter's latent: float32 or better; that of whole numbers their own."""
    if not (p.is_floating_point() or p.is_complex()):
        return p.dtype
    if p.dtype is torch.float32:  # without asking torch at every step
        return p.dtype
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


def check_dtype(who: str, p: Tensor, latent: Tensor, expected: torch.dtype, name: str) -> None:
    """Raises ValueError for a parameter that was converted to a dtype its latent does not fit."""
    if latent.dtype != expected:
        raise ValueError(
            f"{who}: parameter {name!r} is {p.dtype} now and its latent {latent.dtype}; convert "
            "the module before the optimizer is built"
        )


def refuse_flat(who: str, p: Tensor, name: str) -> None:
    """Raises TypeError for a parameter of FSDP1 or of DeepSpeed's ZeRO."""
    what = flattened_by(p)
    if what is not None:
        raise TypeError(
            f"{who}: parameter {name!r} is flattened by {what}, which loses its rows; "
            "shard with torch.distributed.fsdp.fully_shard"
        )


def refuse_meta(who: str, p: Tensor, name: str) -> None:
    """Raises ValueError for a parameter on the meta device."""
    if p.is_meta:
        raise ValueError(
            f"{who}: parameter {name!r} is on the meta device, which holds no weights that latents "
            "could begin as; build the optimizer after the module has its weights, as after "
            "module.to_empty(...) and their initialization or loading"
        )


def refuse_inference(who: str, p: Tensor, name: str) -> None:
    """Raises ValueError for a parameter that torch.inference_mode has made."""
    if p.is_inference():
        raise ValueError(
            f"{who}: parameter {name!r} was made in torch.inference_mode(), of whose tensors torch "
            "counts no writes and which no gradient reaches; make the module outside of it"
        )


def refuse_reshaped(
    who: str, shape: tuple[int, ...], p: Tensor, name: str, kept: bool = False
) -> None:
    """Raises ValueError for a parameter that had this shape and has other dimensions now, or
    another shape, where its state is kept."""
    if len(shape) != p.dim():
        raise ValueError(
            f"{who}: parameter {name!r} had the shape {shape} and has {tuple(p.shape)} now, which "
            f"lost what its rows are; exchange it for one of as many dimensions. {ZERO}"
        )
    if kept and shape != p.shape:
        raise ValueError(
            f"{who}: parameter {name!r} had the shape {shape} and has {tuple(p.shape)} now, which "
            "its state does not fit; build another optimizer"
        )


def versions(p: Tensor) -> tuple[int, ...]:
    """What tells that a parameter was written since: torch's counts of writes to it and to the
    local tensor of a sharded one, and where that lies."""
    mine = inner_shard(p) if is_dtensor(p) else p
    return writes_to(p), writes_to(mine), mine.data_ptr()


def beside(p: Tensor, entries: Entries) -> Entries:
    """The entries that are on another device than the parameter, which may have been moved, on
    its own; scalars stay where they are."""
    return {
        key: loaded(got, got, p)
        for key, got in entries.items()
        if isinstance(got, Tensor) and got.dim() and got.device != p.device
    }


def taken_over(latent: Tensor, weight: Tensor, wrote: Tensor, between: bool = False) -> Tensor:
    """The latent, but the weight where it is not, to some rounding, what was written.

    The same map on another machine may differ by its own rounding, some last places of the largest
    weight in the latent's dtype, and so by one last place of the weight. What remains: an element
    that is edited by less keeps its latent, as one does that is what was written in a narrower
    dtype, which the module was in for a while; that is taken to be so where all elements are
    numbers of that dtype, and last places are then those of it. Where more than half of the
    elements of one index of the first dimension (of all, where there is no second) are edited, all
    of those are.

    between: what was written may be the weights of an earlier step: those on the way from the
    latent to the weights of now.
    """
    narrow = wrote.to(weight.dtype)
    largest = torch.where(wrote.isfinite(), wrote.abs(), 0.0).amax()

    def near(dtype: torch.dtype) -> Tensor:
        """How far apart weights are that were made, and rounded, in this dtype."""
        own = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * largest
        return (own + torch.finfo(dtype).eps * narrow.abs()).to(weight.dtype)

    off = torch.where(narrow.isfinite(), (weight - narrow).abs(), torch.nan)
    kept = off <= near(weight.dtype)
    kept = kept | (weight == narrow) | (weight.isnan() & narrow.isnan())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # that the module was in
        was = (weight == weight.to(dtype).to(weight.dtype)).all()
        kept = kept | (weight == wrote.to(dtype).to(weight.dtype)) | (was & (off <= near(dtype)))
    if between:
        start = latent.to(weight.dtype)
        low, high = torch.minimum(start, narrow), torch.maximum(start, narrow)
        some = near(weight.dtype)
        kept = kept | ((weight >= low - some) & (weight <= high + some))
    rows = kept.flatten(1) if kept.dim() > 1 else kept.reshape(1, -1)
    few = 2 * rows.sum(1, keepdim=True) >= rows.shape[1]
    return torch.where((rows & few).view_as(kept), latent, weight.to(latent.dtype))


def before_load(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict as the optimizer's hooks before loading leave it."""
    state_dict = state_dict.copy()  # hooks may change it
    for hook in hooks_before_load(optimizer):
        given = hook(optimizer, state_dict)
        state_dict = state_dict if given is None else given
    return state_dict


def after_load(optimizer: Optimizer) -> None:
    """Runs the optimizer's hooks after loading."""
    for hook in hooks_after_load(optimizer):
        hook(optimizer)


def unshared(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with 0-d tensors copied, which parameters share: safetensors refuses that."""
    state = {
        key: {name: got.clone() if _is_scalar(got) else got for name, got in entries.items()}
        for key, entries in state_dict["state"].items()
    }
    return {**state_dict, "state": state}


def _is_scalar(got: Any) -> bool:
    return isinstance(got, Tensor) and got.dim() == 0


def loaded_groups(
    optimizer: Optimizer, state_dict: dict[str, Any], kept: tuple[str, ...]
) -> list[Group]:
    """Copies of what saved groups hold: all but parameters, their names, what prints a link and
    what is kept, and a learning rate only where the optimizer's group has one."""
    found = []
    for group, other in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        left_out = {"params", "param_names", "quant_prox", BEYOND, *kept}
        left_out |= {"lr"} - group.keys()
        found.append({k: copy.deepcopy(v) for k, v in other.items() if k not in left_out})
    return found


def loaded(got: Any, mine: Any, p: Tensor) -> Any:
    """A saved entry: a copy; scalars in their own dtype, on the device where the optimizer keeps
    its own, the rest on the parameter's, floating numbers in the dtype of the optimizer's own: the
    module may be wider, or narrower, than the one that was saved."""
    if not isinstance(got, Tensor):
        is_scalar = isinstance(mine, Tensor) and isinstance(got, int | float)
        return torch.full_like(mine, got) if is_scalar else copy.deepcopy(got)
    device = mine.device if isinstance(mine, Tensor) and not got.dim() else got.device
    device = p.device if got.dim() else device
    if is_composed(local(got)):
        return parts_copied(got.detach(), lambda inner: inner.to(device, copy=True))
    dtype = got.dtype
    if isinstance(mine, Tensor) and not is_composed(local(mine)):
        numbers = got.is_floating_point() and mine.is_floating_point()
        dtype = mine.dtype if numbers and (got.dim() or not p.dim()) else dtype
        dtype = dtype if mine.is_floating_point() else mine.dtype
    return got.detach().to(device, dtype, copy=True)
