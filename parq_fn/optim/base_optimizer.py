"""What QuantOptimizer must know of any torch.optim optimizer that it steps: the state that it will
make, in which dtype, and whether it may be stepped for some parameters at a time."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.torch_private import drop_step_hooks, has_step_hooks
from parq_fn.optim.state import Entries, Group


def steps_apart(base: Optimizer) -> bool:
    """Whether a step may be made for some parameters, then for others: in torch's optimizers
    nothing but the parameters' own state knows of steps."""
    return type(base).__module__.startswith("torch.optim.") and not has_step_hooks(base)


def widened(entries: Entries, p: Tensor, latent: Tensor) -> Entries:
    """The entries of an optimizer of narrow parameters, in the dtype of the latent."""
    return {
        key: got.to(latent.dtype)
        if isinstance(got, Tensor) and got.is_floating_point() and got.shape == p.shape
        else got
        for key, got in entries.items()
    }


def template_of(base: Optimizer, group: Group, p: Tensor, like: Tensor) -> Entries:
    """The base optimizer's entries for a parameter p moved as `like`, as after no step.

    Optimizers make them in their first step, and a checkpoint is loaded into what is there
    before: so a twin of the base steps on a stand-in without a gradient to speak of.
    """
    if not like.is_floating_point() and not like.is_complex():
        return {}  # nothing steps on it
    stand_in = torch.zeros_like(like.detach()).requires_grad_()
    stand_in.grad = torch.zeros_like(stand_in)
    twin = object.__new__(type(base))
    left_out = ("step", "param_groups", "state")
    twin.__dict__.update({k: _copied(v) for k, v in base.__dict__.items() if k not in left_out})
    drop_step_hooks(twin)
    shown = {k: _copied(v) for k, v in group.items() if k != "params"}
    twin.param_groups = [{**shown, "params": [stand_in]}]
    twin.state = defaultdict(dict)
    if base.state.get(p):  # made when the base was
        twin.state[stand_in] = widened({k: _copied(v) for k, v in base.state[p].items()}, p, like)
    twin.step()
    entries: Entries = {}
    for key, got in twin.state.get(stand_in, {}).items():
        if isinstance(got, Tensor):
            entries[key] = torch.zeros_like(got)
        elif got is not None:
            entries[key] = type(got)(0) if isinstance(got, int | float) else got
    return entries


def _copied(attribute: Any) -> Any:
    """A copy for the twin, which may count; where there is none to be had, the attribute."""
    try:
        return copy.deepcopy(attribute)
    except Exception:  # whatever a class of the user's own raises
        return attribute
