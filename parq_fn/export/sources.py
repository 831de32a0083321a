"""Which tensors of a model are quantized, by which prox link, and with which qparams."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from parq_fn.foundation.tree import names_of, tree_leaves
from parq_fn.foundation.value import show
from parq_fn.optim.quantized import QuantOptimizer
from parq_fn.optim.transformed import TransformOptimizer
from parq_fn.transforms.levels_of import prox_states
from parq_fn.transforms.prox_link import Prox


def of_module(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and kept buffers by name, tied ones once."""
    kept, seen = module.state_dict(keep_vars=True), set()
    for name, entry in kept.items():
        if isinstance(entry, Tensor) and id(entry) not in seen:
            seen.add(id(entry))
            yield name, entry


def of_optimizer(
    module: nn.Module, optimizer: QuantOptimizer | TransformOptimizer
) -> dict[str, tuple[Prox, Tensor]]:
    """(link, qparams) of the quantized parameters, by their names in the module.

    Raises ValueError where there is none of them; warns of those that the module has not.
    """
    given = {name: id(p) for name, p in optimizer.named_parameters()}
    if isinstance(optimizer, QuantOptimizer):
        own = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        quantized = {
            id(p): (optimizer.link(group), optimizer.state[p]["qparams"])
            for p, group in own
            if "qparams" in optimizer.state[p]
        }
        check_some(quantized, "an optimizer whose groups have no quant_bits below 16")
    else:
        found = of_transformation(optimizer.transformation, optimizer.transformation_state)
        check_some(found, optimizer.transformation)
        quantized = {given[name]: pair for name, pair in found.items()}
    names = {id(p): name for name, p in module.named_parameters()}
    left = [name for name, p in given.items() if p in quantized and p not in names]
    if len(left) == len(quantized):
        raise ValueError(
            "pack: the module has none of the parameters that the optimizer quantizes; a copy of "
            "the module has parameters of its own"
        )
    if left:
        warnings.warn(
            f"pack: the optimizer quantizes {', '.join(left)}, which the module has not; what "
            "is in their place is kept as it is",
            stacklevel=4,
        )
    return {names[p]: pair for p, pair in quantized.items() if p in names}


def of_transformation(transformation: Any, state: Any) -> dict[str, tuple[Prox, Tensor]]:
    """(link, qparams) of the quantized leaves of params, by their names."""
    found = {}
    for link, own in prox_states(transformation, state):
        for name, qparams in zip(names_of(own.qparams), tree_leaves(own.qparams), strict=True):
            found[name] = link, qparams
    return found


def check_some(found: dict[Any, Any], transformation: Any) -> None:
    """Raises ValueError where no parameter is quantized."""
    if not found:
        where = transformation if isinstance(transformation, str) else show(transformation)
        raise ValueError(
            f"pack: packs nothing: no prox link quantizes a parameter in {where}; "
            "put one behind the optimizer, such as chain(adamw(1e-3), parq_prox(...)), or save the "
            "state dict of weights that are not quantized"
        )
