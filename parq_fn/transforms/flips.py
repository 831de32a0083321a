"""How many weights change their level in an update."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from parq_fn.foundation.scalar import to_device
from parq_fn.foundation.traits import TransformationTraits, shared
from parq_fn.foundation.tree import Masked, PyTree, tree_map
from parq_fn.foundation.value import show, state_class, value
from parq_fn.proxmaps.levels import bounds, search
from parq_fn.transforms.layout import Part, part_of
from parq_fn.transforms.levels_of import merged, prox_states
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_state import ProxState, rows_of, shrunk
from parq_fn.transforms.sharded import gathered, local, placed
from parq_fn.transforms.train import apply_updates
from parq_fn.transforms.transformation import begun, check_state, updated
from parq_fn.transforms.wrappers import Around


@state_class
class FlipsState(NamedTuple):
    """State of `monitor_flips`."""

    flips: PyTree  # [] for each quantized param, float32; `Masked()` for the others
    inner: PyTree  # the inner state


@value
class monitor_flips(Around):
    """The inner transformation, and in its state the share of each leaf's weights whose level
    changed in the last update:

        flips = #{i: k(u_i + updates_i; q') != k(u_i; q)} / n

    k the index of the level nearest to a latent, q and q' its levels before and after the update;
    0 until levels are fitted. A level that moves with all its weights is no flip. Read it for a
    log: `read(state, "flips")`. It costs two searches for levels an update; without it there are
    none.

    Raises ValueError where no prox link is inside.

    >>> import torch
    >>> from parq_fn import apply_updates, chain, hard_prox, lsbq, monitor_flips, read, sgd
    >>> transform = monitor_flips(chain(sgd(1.0), hard_prox(lsbq(1), period=1)))
    >>> params = {"w": torch.tensor([1.0, -3.0, 2.0, 2.0])}
    >>> state = transform.init(params)
    >>> for g in (0.0, 1.5):  # the first update fits levels, the second turns a weight's sign
    ...     grads = {"w": torch.full((4,), g)}
    ...     updates, state = transform.update(grads, state, params)
    ...     params = apply_updates(params, updates)
    ...     print(read(state, "flips"))
    {'w': tensor(0.)}
    {'w': tensor(0.2500)}
    """

    @property
    def traits(self) -> TransformationTraits:
        """Those of the inner transformation."""
        return shared([self.inner])

    def init(self, params: PyTree) -> FlipsState:
        """The inner state, no flips."""
        inner = begun(self.inner, params)
        found: Any = None
        for _, own in prox_states(self.inner, inner):
            none = tree_map(lambda q: q.new_zeros((), dtype=torch.float32), own.qparams)
            found = none if found is None else merged(none, found)
        if found is None:
            raise ValueError(
                f"monitor_flips: there is no prox link in {show(self.inner)}, and weights have no "
                "levels; put it around the whole chain"
            )
        return FlipsState(found, inner)

    def update(
        self, updates: PyTree, state: FlipsState, params: PyTree, **extra: Any
    ) -> tuple[PyTree, FlipsState]:
        check_state(self, state, FlipsState)
        out, inner = updated(self.inner, updates, state.inner, params, **extra)
        moved = apply_updates(params, out)
        found: Any = None
        for (link, old), (_, new) in zip(
            prox_states(self.inner, state.inner), prox_states(self.inner, inner), strict=True
        ):
            mine = _flips(link, old, new, params, moved)
            found = mine if found is None else merged(mine, found)
        return out, FlipsState(found, inner)


def _flips(link: Prox, old: ProxState, new: ProxState, before: PyTree, after: PyTree) -> PyTree:
    fitted = old.count > link.warmup

    def share(qparams: Any, others: Any, param: Tensor, moved: Tensor) -> Any:
        if isinstance(qparams, Masked):
            return qparams
        part = part_of(param, link.granularity)
        one, other = codes(link, old, qparams, param, part), codes(link, new, others, moved, part)
        turned = part.granularity.restore(one != other, local(param))
        count = gathered(placed(turned, param).sum(dtype=torch.float32))
        return torch.where(to_device(fitted, count), count / max(param.numel(), 1), 0.0)

    trees = old.qparams, new.qparams, before, after
    return optree.tree_map(share, *trees, is_leaf=lambda x: isinstance(x, Masked))


def codes(link: Prox, state: ProxState, qparams: Tensor, latent: Tensor, part: Part) -> Tensor:
    """The index of the nearest level of each weight that this rank has, [r, n]."""
    rows = part.granularity.rows(shrunk(local(latent), link.divisor(state)))
    levels = link.quantizer.levels_in(rows_of(link, qparams, latent, part), rows.dtype)
    return search(bounds(levels), rows)
