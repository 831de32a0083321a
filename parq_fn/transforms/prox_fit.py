"""The fit of a prox link: qparams of the updated latents, in the rows that are due.

A rank fits the rows that it has whole, with no communication. Those that ranks have pieces of are
fitted whole, each by one rank (`parq_fn.transforms.exchange`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import optree
import torch
from torch import Tensor

from parq_fn.foundation.scalar import concrete, to_device
from parq_fn.foundation.tree import PyTree, names_of, tree_leaves
from parq_fn.quantizers.base import fitted, nan_rows
from parq_fn.transforms.agreement import check_alike, finite, log_not_finite
from parq_fn.transforms.exchange import extremes_of, fitted_whole, largest_of_all
from parq_fn.transforms.layout import across, local_row_shape, to_rows
from parq_fn.transforms.lines import lines_of
from parq_fn.transforms.prox_state import ProxState, held_rows, shrunk
from parq_fn.transforms.sharded import is_dtensor, local

if TYPE_CHECKING:
    from parq_fn.transforms.prox_link import Prox


def refitted(
    link: Prox,
    state: ProxState,
    latents: PyTree,
    learns: Tensor | None,
    *,
    frozen: Collection[str] = (),
    parts: Sequence[tuple[str, int]] = (),
) -> ProxState:
    """The state with qparams fitted to the latents, where they are due and the fit is finite; at
    the first fit all are taken.

    learns: whether qparams were learned in this update; then rows that can learn keep them: those
    that are finite, with scales above 0.
    frozen: names of leaves whose new qparams the caller does not take; the same on all ranks.
    parts: (name, rows) of the parameters whose rows those of the only leaf are.
    Raises RanksError where ranks refit different leaves together, or one of them does not come.
    """
    check_alike(link, state, latents, frozen)
    if learns is not None and concrete(learns) is False:
        learns = None
    leaves, spec = optree.tree_flatten(state.qparams)
    weights = tree_leaves(latents)
    known = [held_rows(link, *pair) for pair in zip(leaves, weights, strict=True)]
    asked = _num_whole(link.quantizer) > 0  # all ranks are, whatever rows they have
    todo = [
        i
        for i, (old, weight) in enumerate(zip(known, weights, strict=True))
        if (asked and is_dtensor(weight)) or not _learns_whole(link, old, learns)
    ]
    names = names_of(latents) if any(is_dtensor(weights[i]) for i in todo) else [""] * len(weights)
    own = fits(link, state, {i: weights[i] for i in todo}, names)
    new = {i: found.to(known[i].dtype) for i, found in own.items()}
    whole = finite(new, weights)
    odd = {i: new[i] for i, usable in whole.items() if usable is False}
    if odd and concrete(link.due(state)):
        log_not_finite(link, state, latents, odd, parts)
    made = []
    for i, (old, weight) in enumerate(zip(known, weights, strict=True)):
        taken = _taken(link, state, old, new[i], whole[i], learns) if i in new else old
        made.append(to_rows(taken, weight, link.granularity))
    return state._replace(qparams=optree.tree_unflatten(spec, made))


def _learns_whole(link: Prox, qparams: Tensor, learns: Tensor | None) -> bool:
    """Whether all rows are known to learn, so that a fit would be thrown away. The same on all
    ranks that have pieces of the rows."""
    if learns is None or not concrete(learns):
        return False
    return bool(concrete(can_learn(link.quantizer, qparams).all()))


def _taken(
    link: Prox,
    state: ProxState,
    old: Tensor,
    new: Tensor,
    whole: bool | None,
    learns: Tensor | None,
) -> Tensor:
    """The new qparams [..., m] of a leaf in the rows that take them, the old ones in the others.

    whole: whether the new ones are known to be finite.
    """
    due, first, quantizer = link.due(state), state.count - 1 == link.warmup, link.quantizer
    if learns is None and concrete(due) and whole:
        return new
    take = new.isfinite().all(-1, keepdim=True) | to_device(first, old)
    take = to_device(due, old) & take
    if learns is not None:
        take = take & ~(to_device(learns, old) & can_learn(quantizer, old))
    if old.shape[-1] != quantizer.num_qparams:  # levels of a version that kept them
        if concrete(take.all()):
            return new
        levels = old[..., -quantizer.num_levels :].reshape(*new.shape[:-1], -1)
        old = quantizer.with_levels(torch.zeros_like(new), levels)
        new = quantizer.with_levels(new, quantizer.levels(new))
    return torch.where(take, new, old)


def fits(
    link: Prox, state: ProxState, weights: Mapping[int, Tensor], names: Sequence[str]
) -> dict[int, Tensor]:
    """Qparams [..., m] of the rows that this rank has, or has pieces of, of leaves by their places
    among the names."""
    quantizer, granularity, divisor = link.quantizer, link.granularity, link.divisor(state)
    found: dict[int, Tensor] = {}
    apart: dict[int, Any] = {}
    for i, weight in weights.items():
        mine = shrunk(local(weight), divisor)
        if across(weight, granularity):
            lines = lines_of(weight, mine, granularity, names[i])
            if getattr(quantizer, "extremes", False) and lines.rows == 1 and lines.size:
                ends = _with_whole(quantizer, extremes_of(lines))
                found[i] = lines.in_rows(ends.unsqueeze(1))
            else:
                apart[i] = lines
        else:
            rows, shape = granularity.rows(mine), local_row_shape(weight, granularity)
            own = _with_whole(quantizer, rows) if is_dtensor(weight) else fitted(quantizer, rows)
            found[i] = own.reshape(*shape, own.shape[-1])
    m = quantizer.num_qparams + _num_whole(quantizer)
    fitted_there = fitted_whole(
        [*apart.values()],
        lambda rows: _with_whole(quantizer, rows),
        m,
        together=not _num_whole(quantizer),
    )
    found.update(zip(apart, fitted_there, strict=True))
    return {i: _in_common(quantizer, found[i], weights[i], names[i]) for i in weights}


# Of quantizers with qparams that all rows of a weight have in common, [r, m + num_whole] are what
# stands in for qparams until all ranks are asked: the last are of these rows alone.


def _num_whole(quantizer: Any) -> int:
    return int(getattr(quantizer, "num_whole", 0))


def _with_whole(quantizer: Any, rows: Tensor) -> Tensor:
    found, count = fitted(quantizer, rows), _num_whole(quantizer)
    if not count:
        return found
    some = rows.shape[1] > 0  # else a fit gives zeros
    whole = quantizer.whole(rows.to(found.dtype)) if some else found.new_zeros(1, count)
    return torch.cat([found, whole.expand(len(rows), -1)], -1)


def _in_common(quantizer: Any, found: Tensor, weight: Tensor, name: str) -> Tensor:
    count = _num_whole(quantizer)
    if not count or not is_dtensor(weight):
        return found
    whole = found[..., -count:].reshape(-1, count)
    qparams = found[..., :-count]
    whole = torch.cat([whole.new_zeros(1, count), whole]).amax(0)
    own = qparams[..., :-count]
    common = largest_of_all(whole, weight, name).expand(*own.shape[:-1], -1)
    return torch.cat([own, nan_rows(common, own)], -1)


def can_learn(quantizer: Any, qparams: Tensor) -> Tensor:
    """[..., 1]: whether qparams [..., m] of a row are finite, and its scales above 0."""
    positive = torch.tensor(quantizer.positive, device="cpu")
    some = (qparams > 0) | ~to_device(positive, qparams)
    return (qparams.isfinite() & some).all(-1, keepdim=True)
