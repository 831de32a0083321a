"""The quantized parameters of either adapter, with the links and states that map them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from parq_fn.foundation.tree import names_of, tree_leaves
from parq_fn.foundation.value import briefly
from parq_fn.optim.base_owner import prox_state
from parq_fn.optim.quantized import QuantOptimizer
from parq_fn.optim.transformed import TransformOptimizer
from parq_fn.transforms.levels_of import prox_states
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_state import ProxState


class Quantized(NamedTuple):
    """A parameter that a prox link maps."""

    name: str
    parameter: Tensor
    latent: Tensor
    link: Prox
    state: ProxState  # of the link, without qparams
    qparams: Tensor


def quantized_parameters(who: str, optimizer: Any) -> list[Quantized]:
    """All of an optimizer, in the order of its groups, each with the link that sees it last.

    Raises TypeError, which names the caller, for what is neither adapter.
    """
    if isinstance(optimizer, QuantOptimizer):
        return _of_groups(optimizer)
    if isinstance(optimizer, TransformOptimizer):
        return _of_tree(optimizer)
    raise TypeError(
        f"{who}: expected a QuantOptimizer or a TransformOptimizer, got {briefly(optimizer)}"
    )


def _of_groups(optimizer: QuantOptimizer) -> list[Quantized]:
    found = []
    for name, p in optimizer.named_parameters():
        entries = optimizer.state[p]
        if "qparams" in entries and (link := optimizer.prox_of(p)) is not None:
            state, qparams = prox_state(entries)._replace(qparams=()), entries["qparams"]
            found.append(Quantized(name, p, entries["latent"], link, state, qparams))
    return found


def _of_tree(optimizer: TransformOptimizer) -> list[Quantized]:
    last: dict[str, tuple[Prox, ProxState, Tensor]] = {}
    for link, own in prox_states(optimizer.transformation, optimizer.transformation_state):
        state = ProxState(own.count, own.slope, own.lr_sum, ())
        named = zip(names_of(own.qparams), tree_leaves(own.qparams), strict=True)
        last |= {name: (link, state, qparams) for name, qparams in named}
    found = []
    for name, p in optimizer.named_parameters():
        if name in last:
            latent = optimizer.state[p].get("latent", p.detach())
            found.append(Quantized(name, p, latent, *last[name]))
    return found
