"""torch.nn modules as functions of a params tree, and which of their params to quantize."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from parq_fn.foundation.torch_private import flattened_by, no_recomputing, writes_to
from parq_fn.foundation.tree import matches
from parq_fn.foundation.value import briefly
from parq_fn.roles import EXPERTS, MADE, OTHER, WEIGHT, Role, made_by_hooks, roles

#: {class: why its modules cannot be called with other weights}.
_WRAPPERS = {
    "FSDPModule": "is sharded by fully_shard, which would ignore the weights it is called with; "
    "train it with a torch.optim adapter",
    "FullyShardedDataParallel": "is sharded by FSDP1, which flattens weights; shard it by "
    "torch.distributed.fsdp.fully_shard and train it with a torch.optim adapter",
    "DeepSpeedEngine": "is trained by DeepSpeed, by an optimizer of its own; give functional its "
    ".module, and average the gradients of the functional loop",
    "DistributedDataParallel": "averages gradients of its own weights alone; give functional its "
    ".module, and average the gradients of the functional loop",
    "DataParallel": "calls copies with its own weights; give functional its .module",
    "ScriptModule": "is a TorchScript program; give functional the module that it was made of",
}
_RECOMPUTING = (
    "functional: forward has its backward pass compute anew (torch.utils.checkpoint) or move what "
    "it saved, which would be with the module's own weights; turn that off in the module, and do "
    "so with the whole call: checkpoint(apply, weights, inputs, use_reentrant=False)"
)

Parts = list[tuple[str, nn.Module]]


def functional(module: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """(apply, params): apply(weights, *inputs) calls the module with those weights.

    params is a dict by name of detached copies, so that training them leaves the module alone;
    apply takes a dict with the same names, in the module's train or eval mode. Frozen parameters
    (requires_grad=False), which are not among params, are the module's own; of its buffers forward
    sees copies. Tied parameters appear once, and so do those of a submodule with several names.
    Calls from several threads wait for each other.

    apply raises ValueError for missing or unknown names, and where forward writes a parameter or a
    buffer, such as running statistics in train mode: what it wrote would be lost. Compiled, it
    finds those that are assigned and running statistics, and loses other writes to buffers. Other
    attributes that forward sets are the module's own. apply raises RuntimeError where forward is
    computed anew in the backward pass, by torch.utils.checkpoint, which would be with the module's
    own weights; checkpoint the whole call.

    Raises TypeError for what is no module, and for those whose forward does not call their own
    parts: under FSDP, DeepSpeed, DistributedDataParallel, DataParallel, TorchScript; ValueError
    for a lazy module that has seen no input, and for one whose parameters are all frozen.

    A mask made for the whole module names frozen parameters too: take what params has,
    {name: weight_mask(module)[name] for name in params}.

    >>> module = nn.Linear(2, 1)
    >>> apply, params = functional(module)
    >>> sorted(params), apply(params, torch.zeros(3, 2)).shape
    (['bias', 'weight'], torch.Size([3, 1]))
    """
    check_module("functional", module, "apply, params")
    for name, part in module.named_modules():
        for kind in type(part).__mro__:
            if kind.__name__ in _WRAPPERS:
                raise TypeError(
                    f"functional: module {name or 'itself'!r} {_WRAPPERS[kind.__name__]}"
                )
    own = dict(module.named_parameters())
    for name, p in own.items():
        if (what := flattened_by(p)) is not None:
            raise TypeError(
                f"functional: parameter {name!r} is flattened by {what}, which loses its rows; "
                "give functional the module as it was before"
            )
    names = {name for name, p in own.items() if p.requires_grad}
    if own and not names:
        raise ValueError(
            f"functional: all {len(own)} parameters of the module are frozen, so that there is "
            "nothing to train; call requires_grad_(True) on what is to be"
        )
    first = {id(p): name for name, p in own.items()}
    # Once for each submodule, whatever names it has: torch.func.functional_call puts back the
    # tensor that it finds at a second name, which is the one that it set at the first.
    places = {
        f"{above}.{local}" if above else local: first[id(p)]
        for above, part in module.named_modules()
        for local, p in part.named_parameters(recurse=False, remove_duplicate=False)
        if p.requires_grad
    }
    call = _Call(module)

    def apply(weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if weights.keys() != names:
            missing, unknown = sorted(names - weights.keys()), sorted(weights.keys() - names)
            raise ValueError(
                f"functional: weights without {missing or 'none'} of the module's parameters, "
                f"with {unknown or 'none'} unknown to it or frozen"
            )
        parts = list(call.module.named_modules())
        for name, part in parts:
            if part.training and getattr(part, "running_mean", None) is not None:
                raise ValueError(
                    f"functional: {name!r} ({type(part).__name__}) would change its running "
                    "statistics in place; call eval() on it to keep them as they are, carry them "
                    "(torch.func.functional_call(module, (weights, buffers), x) with buffers that "
                    "the loss copies and returns), or train with QuantOptimizer or "
                    "TransformOptimizer; the page on the functional loop shows it"
                )
        with _alone(parts):
            given = {place: weights[name] for place, name in places.items()} | _copies(parts)
            given = {f"module.{place}": got for place, got in given.items()}
            return torch.func.functional_call(call, given, (args, kwargs), tie_weights=False)

    return apply, {name: own[name].detach().clone() for name in own if name in names}


class _Call(nn.Module):
    """The module, and after its call a look at what forward wrote."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        parts = list(self.module.named_modules())
        held = _held(parts)  # while it is, no other tensor has the id of one of these
        before = _writes(held)
        found = self.module(*args, **kwargs)
        after = _writes(_held(parts))
        written = [place for place in {**before, **after} if before.get(place) != after.get(place)]
        if written:
            raise ValueError(
                f"functional: forward writes {', '.join(map(repr, written))}, where a function of "
                "weights writes nothing; call eval() on what does, or use a torch.optim adapter"
            )
        return found


def _held(parts: Parts) -> dict[str, Tensor]:
    """Parameters and buffers by their places."""
    return {
        f"{above}.{local}" if above else local: got
        for above, part in parts
        for found in (part.named_parameters, part.named_buffers)
        for local, got in found(recurse=False, remove_duplicate=False)
    }


def _copies(parts: Parts) -> dict[str, Tensor]:
    """Copies of the buffers by their places, one of a buffer that has several."""
    made: dict[int, Tensor] = {}
    found = {}
    for above, part in parts:
        for local, got in part.named_buffers(recurse=False, remove_duplicate=False):
            if id(got) not in made:
                made[id(got)] = got.clone()
            found[f"{above}.{local}" if above else local] = made[id(got)]
    return found


def _writes(held: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    """What tells that a tensor was written or exchanged; a compiler knows of exchanges alone."""
    counted = not torch.compiler.is_compiling()
    return {
        place: (id(got), writes_to(got) if counted and not got.is_inference() else 0)
        for place, got in held.items()
    }


_LOCK = threading.RLock()


@contextmanager
def _alone(parts: Parts) -> Iterator[None]:
    """Within it no other thread calls a module with other weights, and nothing is put off to the
    backward pass; after it, what older parametrizations make a weight of is as it was."""
    if torch.compiler.is_compiling():
        yield
        return
    with _LOCK, no_recomputing(_RECOMPUTING):
        made = [
            (part, name, getattr(part, name)) for _, part in parts for name in made_by_hooks(part)
        ]
        try:
            yield
        finally:
            for part, name, got in made:
                setattr(part, name, got)


def check_module(who: str, module: nn.Module, gives: str) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"{who}: expected a torch.nn.Module, got {briefly(module)}; it takes a module, and "
            f"gives {gives}"
        )
    for name, p in (*module.named_parameters(), *module.named_buffers()):
        if is_lazy(p):
            raise ValueError(
                f"{who}: {name!r} has no shape yet, for its module is lazy; call the module on a "
                "batch first"
            )


def excluded(who: str, exclude: Any, found: Sequence[Role]) -> set[str]:
    """The first names of the parameters that patterns match; TypeError for what is no pattern,
    ValueError for one that matches nothing."""
    one = isinstance(exclude, str) or not isinstance(exclude, Iterable)
    patterns = (exclude,) if one else tuple(exclude)
    for pattern in patterns:
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(
                f"{who}: expected exclude patterns such as 'head', or compiled ones, got "
                f"{pattern!r}"
            )
        if not any(matches(pattern, name) for role in found for name in role.names):
            raise ValueError(
                f"{who}: exclude pattern {pattern!r} matches no parameter of the module; they are: "
                f"{', '.join(name for role in found for name in role.names)}"
            )
    return {
        role.name
        for role in found  # a tied parameter has several names
        if any(matches(pattern, name) for pattern in patterns for name in role.names)
    }


def weight_mask(
    module: nn.Module, exclude: str | re.Pattern[str] | Sequence[str | re.Pattern[str]] = ()
) -> dict[str, bool]:
    """The params to quantize, by name: weight matrices and conv kernels.

    They are the parameters of two or more dimensions with "weight" in their own name, and those
    that hold the matrices of a mixture's experts, as in transformers' models. Biases, norms,
    embeddings (also where a layer's weight is tied to one), routers, which choose among experts,
    adapters such as LoRA's, and other parameters (class tokens, position embeddings) are left
    alone, and so is what `exclude` names: patterns for names or their parents, such as "head", or
    compiled regular expressions. `coverage(module, mask)` shows what was left, and why.

    Warns of matrices that it leaves alone and that may be weights: those with other names, and
    those that a parametrization, such as weight_norm, makes a weight of. mask[name] = True takes
    one, and exclude=name leaves it without a warning.

    Raises ValueError for a pattern that matches no parameter, and for a lazy module that has seen
    no input; TypeError for what is no module or no pattern.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    >>> [name for name, quantized in weight_mask(net, exclude="3").items() if quantized]
    ['0.weight']
    """
    check_module("weight_mask", module, "a dict of names")
    found = roles(module)
    left = excluded("weight_mask", exclude, found)
    mask, doubtful = {}, []
    for role in found:
        mask[role.name] = role.kind in (WEIGHT, EXPERTS) and role.name not in left
        if role.kind in (MADE, OTHER) and role.is_matrix and role.name not in left:
            doubtful.append(role.name)
    if doubtful:
        warnings.warn(
            f"weight_mask leaves alone {', '.join(map(repr, doubtful))}, which may be weights: "
            "they have other names, or a parametrization makes a weight of them; set "
            f"mask[{doubtful[0]!r}] = True to quantize one, or name it in exclude",
            stacklevel=2,
        )
    return mask
