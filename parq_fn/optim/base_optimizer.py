"""What QuantOptimizer must know of any torch.optim optimizer that it steps: the state that it will
make, in which dtype, and whether it may be stepped for some parameters at a time."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from parq_fn.foundation.torch_private import (
    drop_step_hooks,
    has_step_hooks,
    is_composed,
    own_attributes,
    parts_copied,
)
from parq_fn.foundation.value import briefly
from parq_fn.optim.adapter import Adapter
from parq_fn.optim.state import Entries, Group
from parq_fn.transforms.sharded import local

_UNFIT = (torch.optim.LBFGS, torch.optim.SparseAdam)
_PLACES = ("param_groups", "state")


# Which optimizers


def check_base(base: Any) -> None:
    """Raises TypeError for what is no optimizer, and for one that does not move the parameters of
    its groups by itself: a wrapper of another, and those that torch has for other gradients."""
    name, inner = type(base).__name__, _optimizer_in(base)
    if _is_of_deepspeed(base) or _is_of_deepspeed(inner):
        raise TypeError(
            f"QuantOptimizer: {name} is one of DeepSpeed's, which keeps flat parts of parameters, "
            "without the rows that levels are of; give the torch.optim optimizer itself, and "
            "shard with torch.distributed.fsdp.fully_shard in the place of ZeRO"
        )
    if inner is not None and not isinstance(base, Adapter):
        raise TypeError(
            f"QuantOptimizer: {name} is around another optimizer, {type(inner).__name__}, and "
            "would move parameters that are no latents; give the inner optimizer, or one that "
            f"does in its own step what {name} does"
        )
    if not isinstance(base, Optimizer) or isinstance(base, (*_UNFIT, Adapter)):
        raise TypeError(
            "QuantOptimizer: expected a torch.optim optimizer other than LBFGS and SparseAdam, "
            "such as torch.optim.AdamW(groups, lr=1e-3), got "
            f"{name if isinstance(base, Optimizer) else briefly(base)}"
        )
    if any(isinstance(getattr(type(base), key, None), property) for key in _PLACES):
        raise TypeError(
            f"QuantOptimizer: {name} has the param_groups or the state of another object, where "
            "no latents can be put; give the optimizer that moves the parameters itself"
        )


def _optimizer_in(base: Any) -> Any:
    """An optimizer that another has among its attributes; None where there is none."""
    for got in _attributes(base).values():
        for one in _members(got):
            if isinstance(one, Optimizer) or _is_of_deepspeed(one):
                return one
    return None


def _is_of_deepspeed(got: Any) -> bool:
    """Whether it is an engine of DeepSpeed's or one of its wrappers, which are no subclasses of
    torch's optimizers as its own Adam and Lion are."""
    kinds = () if isinstance(got, Optimizer) else type(got).__mro__
    return any(kind.__module__.partition(".")[0] == "deepspeed" for kind in kinds)


def _attributes(base: Any) -> dict[str, Any]:
    return (
        own_attributes(base) if isinstance(base, Optimizer) else dict(getattr(base, "__dict__", {}))
    )


def _members(got: Any) -> Iterable[Any]:
    if isinstance(got, dict):
        return (*got.keys(), *got.values())
    return got if isinstance(got, list | tuple | set | frozenset) else (got,)


def check_not_kept(base: Optimizer, names: dict[Tensor, str]) -> None:
    """Raises ValueError for a base that has parameters, by their names for messages, elsewhere
    than in its groups: it may move them there, and they are no latents."""
    for attribute, got in own_attributes(base).items():
        for one in _members(got):
            inner = one.parameters() if isinstance(one, nn.Module) else _members(one)
            kept = [p for p in inner if isinstance(p, Tensor) and p in names]
            if kept:
                raise ValueError(
                    f"QuantOptimizer: {type(base).__name__} keeps parameter {names[kept[0]]!r} in "
                    f"its attribute {attribute!r}, besides its groups, where no latent can take "
                    "its place; such an optimizer cannot train quantized parameters"
                )


def steps_apart(base: Optimizer) -> bool:
    """Whether a step may be made for some parameters, then for others: in torch's optimizers
    nothing but the parameters' own state knows of steps."""
    return type(base).__module__.startswith("torch.optim.") and not has_step_hooks(base)


# State


def widened(entries: Entries, p: Tensor, dtype: torch.dtype) -> Entries:
    """The entries of an optimizer of narrow parameters, in the dtype that latents move in."""
    return {
        key: got.to(dtype)
        if isinstance(got, Tensor) and got.is_floating_point() and got.shape == p.shape
        else got
        for key, got in entries.items()
    }


def template_of(base: Optimizer, group: Group, p: Tensor, like: Tensor, label: str) -> Entries:
    """The base optimizer's entries for a parameter p moved as `like`, as after no step.

    Optimizers make them in their first step, and a checkpoint is loaded into what is there
    before: so a twin of the base steps on a stand-in without a gradient to speak of.
    Raises ValueError where that step does.
    """
    if not like.is_floating_point() and not like.is_complex():
        return {}  # nothing steps on it
    try:
        try:
            made = _entries_after(1, base, group, p, like)
        except ZeroDivisionError:  # it divides by the gradient's norm
            made = _entries_after(1, base, group, p, like, gradient=1.0)
    except Exception as error:
        if like is p or not p.requires_grad:
            return {}  # it may step on the parameter itself, or never
        raise ValueError(
            f"QuantOptimizer: {type(base).__name__} cannot be wrapped; a step of it on a parameter "
            f"like {label!r}, with a gradient of zeros and no closure, raised "
            f"{type(error).__name__}: {error}"
        ) from error
    return {key: _placeholder(got) for key, got in made.items() if got is not None}


def varying(base: Optimizer, group: Group, p: Tensor, like: Tensor) -> Callable[[str], bool]:
    """Whether an entry is there, and of one shape, whatever the parameter holds and however many
    steps were taken; asked only where a saved state differs, for it takes some steps to tell."""
    seen: list[Entries] = []

    def varies(key: str) -> bool:
        if not seen:
            zeros, ones = torch.zeros_like(like), torch.ones_like(like)
            for count, start in ((1, like), (1, zeros), (1, ones), (3, like)):
                try:
                    seen.append(_entries_after(count, base, group, p, start, anew=True))
                except Exception:  # of the user's class; then nothing is known to vary
                    seen.append({})
        shapes = {_shape(entries.get(key)) for entries in seen}
        foreign = any(seen) and all(key not in entries for entries in seen)  # kept since a loading
        return foreign or len(shapes) > 1

    return varies


def _shape(got: Any) -> Any:
    return tuple(got.shape) if isinstance(got, Tensor) else type(got)


def _entries_after(
    count: int,
    base: Optimizer,
    group: Group,
    p: Tensor,
    start: Tensor,
    anew: bool = False,
    gradient: float = 0.0,
) -> Entries:
    """The entries of a twin of the base that took some steps on a stand-in that begins there.

    anew: whether as if the base had been built with the stand-in; gradient: of its first step.
    """
    with _undrawn(p):
        stand_in = start.detach().clone().requires_grad_()
        twin = object.__new__(type(base))
        left_out = ("step", "param_groups", "state")
        twin.__dict__.update({k: copied(v) for k, v in base.__dict__.items() if k not in left_out})
        drop_step_hooks(twin)
        shown = {k: copied(v) for k, v in group.items() if k != "params"}
        if shown.get("param_names"):
            shown["param_names"] = shown["param_names"][:1]
        twin.param_groups = []
        twin.state = defaultdict(dict, copy.deepcopy(beyond_parameters(base)))
        if type(base).add_param_group is Optimizer.add_param_group:
            twin.param_groups.append({**shown, "params": [stand_in]})
        else:  # which may make state
            twin.add_param_group({**shown, "params": [stand_in]})
        if base.state.get(p) and not anew:  # made when the base was
            learned = {k: copied(v) for k, v in base.state[p].items()}
            twin.state[stand_in] = widened(learned, p, start.dtype)
        train = getattr(twin, "train", None)
        if callable(train):  # it takes no step before
            train()
        for i in range(count):
            stand_in.grad = torch.full_like(stand_in, 1.0 if i else gradient)
            twin.step()
        return dict(twin.state.get(stand_in, {}))


def _placeholder(got: Any) -> Any:
    if isinstance(got, Tensor):
        return got if is_composed(local(got)) else torch.zeros_like(got)
    return type(got)(0) if isinstance(got, int | float) else got


@contextmanager
def _undrawn(p: Tensor) -> Iterator[None]:
    """Leaves the global random generators as they were."""
    kept, kept_of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 # the global one
    device = p.device
    others = [] if device.type in ("cpu", "meta") else [device]
    try:
        with torch.random.fork_rng(others, device_type=others[0].type if others else "cuda"):
            yield
    finally:
        random.setstate(kept)
        np.random.set_state(kept_of_numpy)  # noqa: NPY002 # the global one


def copied(attribute: Any, memo: dict[int, Any] | None = None) -> Any:
    """A copy of an attribute, which may count and draw; where there is none to be had, of its
    members, or the attribute. memo: of a deepcopy that this is part of."""
    if isinstance(attribute, Tensor) and is_composed(attribute):
        return parts_copied(attribute.detach(), torch.clone)
    try:
        return copy.deepcopy(attribute, memo)
    except Exception:  # whatever a class of the user's own raises
        if type(attribute) is dict:
            return {key: copied(got, memo) for key, got in attribute.items()}
        if type(attribute) in (list, tuple):
            return type(attribute)(copied(got, memo) for got in attribute)
        return attribute


def beyond_parameters(base: Optimizer) -> dict[Any, Any]:
    """What the state of an optimizer holds that is of no parameter, such as a count of steps."""
    state: dict[Any, Any] = base.state  # torch says that keys are tensors
    return {key: got for key, got in state.items() if not isinstance(key, Tensor)}
