"""The fit of a prox link: qparams of the updated latents, in the rows that are due."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parq_fn.foundation.scalar import concrete, to_device
from parq_fn.foundation.tree import PyTree, tree_leaves, tree_map
from parq_fn.quantizers.base import fitted
from parq_fn.transforms.prox_state import ProxState, shrunk
from parq_fn.transforms.sharded import gathered

if TYPE_CHECKING:
    from parq_fn.transforms.prox_link import Prox


def refitted(link: Prox, state: ProxState, latents: PyTree, learns: Tensor | None) -> ProxState:
    """The state with qparams fitted to the latents, where they are due and the fit is finite; at
    the first fit all are taken.

    learns: whether qparams were learned in this update; then rows that can learn keep them: those
    that are finite, with scales above 0.
    """
    due, first = link.due(state), state.count - 1 == link.warmup
    if learns is not None and concrete(learns) is False:
        learns = None
    quantizer, m, known = link.quantizer, link.quantizer.num_qparams, learns is None
    if learns is not None and concrete(learns):
        rows = tree_leaves(state.qparams)
        if all(concrete(can_learn(quantizer, one).all()) for one in rows):
            return state

    def fit(old: Tensor, latent: Tensor) -> Tensor:
        shape = link.granularity.row_shape(latent)
        new = fitted(
            quantizer, link.granularity.rows(shrunk(gathered(latent), link.divisor(state)))
        )
        new = new.reshape(*shape, m).to(old.dtype)
        if known and concrete(due) and concrete(new.sum().isfinite()):  # as then each of them is
            return new
        take = new.isfinite().all(-1, keepdim=True) | to_device(first, old)
        take = to_device(due, old) & take
        if learns is not None:
            take = take & ~(to_device(learns, old) & can_learn(quantizer, old))
        if old.shape[-1] != m:  # levels of a version that kept them
            if concrete(take.all()):
                return new
            levels = old[..., -quantizer.num_levels :].reshape(*shape, -1)
            old = quantizer.with_levels(torch.zeros_like(new), levels)
            new = quantizer.with_levels(new, quantizer.levels(new))
        return torch.where(take, new, old)

    return state._replace(qparams=tree_map(fit, state.qparams, latents))


def can_learn(quantizer: Any, qparams: Tensor) -> Tensor:
    """[..., 1]: whether qparams [..., m] of a row are finite, and its scales above 0."""
    positive = torch.tensor(quantizer.positive, device="cpu")
    some = (qparams > 0) | ~to_device(positive, qparams)
    return (qparams.isfinite() & some).all(-1, keepdim=True)
