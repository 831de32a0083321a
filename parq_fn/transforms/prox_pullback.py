"""The pullback of a prox link: gradients at its weights become those at its latents and qparams.

    (estimator(g, u / shrink, w, levels, count), own)

own: the gradients of the qparams where the link learns, else (). Where the map did not make the
weights, gradients are handed on as they came, and those of the qparams are 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor

from parq_fn.foundation.scalar import concrete, to_device
from parq_fn.foundation.tree import PyTree, columns_of, names_of, tree_map
from parq_fn.transforms.layout import part_of
from parq_fn.transforms.learn import gradient_of
from parq_fn.transforms.prox_state import ProxState, part_for, rows_of, shrunk
from parq_fn.transforms.sharded import is_dtensor, local, placed

if TYPE_CHECKING:
    from parq_fn.transforms.prox_link import Prox


def pulled_back(
    link: Prox, grads: PyTree, state: ProxState, params: PyTree, weights: PyTree | None
) -> tuple[PyTree, PyTree]:
    """(gradients at the latents, own), of gradients at the weights.

    Weights that are not given are mapped where the estimator looks at them.
    """
    active = link.active(state)
    like = params if weights is None else weights  # to whose dtype levels are rounded
    own = () if link.learn is None else _own(link, grads, state, params, like)
    if concrete(active) is False or not link.bends:
        return grads, own
    if not getattr(link.gradient, "uses_weights", True):
        weights = params
    elif weights is None:
        weights = link.weights(state, params)

    def bent(grad: Tensor, param: Tensor, weight: Tensor, like: Tensor, qparams: Tensor) -> Tensor:
        part, mine, g = part_of(param, link.granularity), local(param), own_part(grad, param)
        if not mine.numel():
            return grad
        rows = part.granularity.rows
        u = rows(shrunk(mine, link.divisor(state)))
        levels = link.quantizer.levels_in(rows_of(link, qparams, param, part), like.dtype)
        found = link.gradient(rows(g), u, rows(local(weight)), levels, state.count)
        found = part.granularity.restore(found, mine).to(g.dtype)
        if not concrete(active):
            found = torch.where(to_device(active, g), found, g)
        return placed(found, param)

    return tree_map(bent, grads, params, weights, like, state.qparams), own


def _own(link: Prox, grads: PyTree, state: ProxState, params: PyTree, like: PyTree) -> PyTree:
    """The gradients [..., m] of the qparams."""
    active = link.active(state)

    def own(
        name: str, param: Tensor, grad: Tensor, like: Tensor, qparams: Tensor, *held: Tensor
    ) -> Tensor:
        if concrete(active) is False:
            return torch.zeros_like(qparams)
        part = part_for(link, param, params)
        of_leaf = qparams, like.dtype, (local(held[0]), local(held[1])) if held else None
        found = gradient_of(link, own_part(grad, param), param, part, state, of_leaf, name=name)
        return found if concrete(active) else torch.where(to_device(active, found), found, 0.0)

    holds: Any = getattr(state, "oscillation", ())
    held = (holds.held, holds.code) if holds else ()
    spec, *columns = columns_of(params, grads, like, state.qparams, *held)
    leaves = zip(names_of(params), *columns, strict=True)
    return optree.tree_unflatten(spec, [None if leaf[2] is None else own(*leaf) for leaf in leaves])


def own_part(grad: Tensor, param: Tensor) -> Tensor:
    """This rank's part of a gradient, which torch may have placed otherwise than the param, with
    all its elements; that of an embedding may be sparse."""
    if is_dtensor(grad) and is_dtensor(param) and grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    mine = local(grad)
    return mine if mine.layout == torch.strided else mine.to_dense()
