"""torch.nn modules as functions of a params tree, and which of their params to quantize."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from parq_fn.foundation.torch_private import BATCH_NORM
from parq_fn.foundation.tree import matches
from parq_fn.foundation.value import briefly

_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (BATCH_NORM, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def functional(module: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """(apply, params): apply(weights, *inputs) calls the module with those weights.

    params is a dict by name of detached copies, so that training them leaves the module alone;
    apply takes a dict with the same names, in the module's train or eval mode. Buffers and frozen
    parameters (requires_grad=False), which are not among params, are the module's own. Tied
    parameters appear once, and so do those of a submodule with several names. apply raises
    ValueError for missing or unknown names, and for running statistics in train mode, which would
    change in place.

    Raises TypeError for what is no module, and for one under FSDP2, which ignores tensors it is
    given in this way; ValueError for a module that has parameters and all of them frozen.

    A mask made for the whole module names frozen parameters too: take what params has,
    {name: weight_mask(module)[name] for name in params}.

    >>> module = nn.Linear(2, 1)
    >>> apply, params = functional(module)
    >>> sorted(params), apply(params, torch.zeros(3, 2)).shape
    (['bias', 'weight'], torch.Size([3, 1]))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"functional: expected a torch.nn.Module, got {briefly(module)}; it takes a module, "
            "and gives apply, params"
        )
    for name, part in module.named_modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(part).__mro__):
            raise TypeError(
                f"functional: module {name or 'itself'!r} is sharded by fully_shard, which would "
                "ignore the weights it is called with; train it with a torch.optim adapter"
            )

    own = dict(module.named_parameters())
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

    def apply(weights: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if weights.keys() != names:
            missing, unknown = sorted(names - weights.keys()), sorted(weights.keys() - names)
            raise ValueError(
                f"functional: weights without {missing or 'none'} of the module's parameters, "
                f"with {unknown or 'none'} unknown to it or frozen"
            )
        for name, part in module.named_modules():
            if part.training and getattr(part, "running_mean", None) is not None:
                raise ValueError(
                    f"functional: {name!r} ({type(part).__name__}) would change its running "
                    "statistics in place; call eval() on it, use a norm without them, or see "
                    "torch.func.replace_all_batch_norm_modules_"
                )
        given = {place: weights[name] for place, name in places.items()}
        return torch.func.functional_call(module, given, args, kwargs, tie_weights=False)

    return apply, {name: own[name].detach().clone() for name in own if name in names}


def weight_mask(
    module: nn.Module, exclude: str | re.Pattern[str] | Sequence[str | re.Pattern[str]] = ()
) -> dict[str, bool]:
    """The params to quantize, by name: weight matrices and conv kernels.

    They are the parameters of two or more dimensions with "weight" in their own name. Biases,
    norms, embeddings (also where a layer's weight is tied to one), and other parameters (class
    tokens, position embeddings) are left alone, and so is what `exclude` names: patterns for
    names or their parents, such as "head", or compiled regular expressions.

    Raises ValueError for a pattern that matches no parameter, TypeError for what is no module or no
    pattern.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    >>> [name for name, quantized in weight_mask(net, exclude="3").items() if quantized]
    ['0.weight']
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"weight_mask: expected a torch.nn.Module, got {briefly(module)}")
    given: Any = exclude
    one = isinstance(given, str) or not isinstance(given, Iterable)
    patterns = (given,) if one else tuple(given)
    for pattern in patterns:
        if not isinstance(pattern, str | re.Pattern):
            raise TypeError(
                f"weight_mask: expected exclude patterns such as 'head', or compiled ones, got "
                f"{pattern!r}"
            )
    names: dict[int, list[str]] = {}  # a tied parameter has several
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    every = [name for tied in names.values() for name in tied]
    for pattern in patterns:
        if not any(matches(pattern, name) for name in every):
            raise ValueError(
                f"exclude pattern {pattern!r} matches no parameter of the module; they are: "
                f"{', '.join(every)}"
            )
    looked_up = {id(p) for m in module.modules() if isinstance(m, _LOOKUPS) for p in m.parameters()}
    mask = {}
    for name, parameter in module.named_parameters():
        parent, _, local = name.rpartition(".")
        mask[name] = (
            parameter.is_floating_point()
            and parameter.dim() >= 2
            and "weight" in local
            and id(parameter) not in looked_up
            and not isinstance(module.get_submodule(parent), _NORMS)
            and not any(matches(p, tied) for p in patterns for tied in names[id(parameter)])
        )
    return mask
