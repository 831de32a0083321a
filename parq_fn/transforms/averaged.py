"""Averages of latents, whose weights are on the levels as those of the latents are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from parq_fn.foundation.checks import SHARE, check_numbers
from parq_fn.foundation.scalar import Scalar, at, new_count, to_device
from parq_fn.foundation.traits import TransformationTraits, shared
from parq_fn.foundation.tree import Masked, Params, PyTree, check_floating, tree_map
from parq_fn.foundation.value import show, state_class, value
from parq_fn.transforms.chain import every_state
from parq_fn.transforms.levels_of import merged
from parq_fn.transforms.sharded import local, placed
from parq_fn.transforms.train import apply_updates
from parq_fn.transforms.transformation import (
    Transformation,
    begun,
    check_state,
    check_transformation,
    updated,
)
from parq_fn.transforms.wrappers import Around, wide


@state_class
class AveragedState(NamedTuple):
    """State of `averaged`."""

    samples: Tensor  # [], int64: updates so far, after each of which the params were averaged
    total: Tensor  # [], float64: the sum of their weights, 1 - decay ** samples for a fixed decay
    average: PyTree  # like params, in float32 or better
    inner: PyTree  # the inner state


def share_of(total: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """(what the average moves to the next sample, the new sum of weights), from the sum so far."""
    decay = decay.to(torch.float64)
    new = decay * total + (1.0 - decay)
    return (1.0 - decay) / torch.where(new > 0, new, 1.0), new


def moved(average: Tensor, latent: Tensor, share: Tensor) -> Tensor:
    """average + share * (latent - average), the latent itself for a share of 1."""
    mine = local(average)
    end, weight = local(latent).to(mine.dtype), to_device(share, mine).to(mine.dtype)
    return placed(torch.lerp(mine, end, weight), average)


@value
class averaged(Around):
    """The inner transformation, and beside it a weighted mean of the params after each update:

        average = sum_i a_i p_i / sum_i a_i,    a_i = (1 - decay_i) decay_(i+1) ... decay_t

    With a fixed decay that is the exponential average with Adam's correction of its bias, so that
    the first update gives p_1 and not nearly zero; with decay = schedules of the count of updates,
    such as t / (t + 1) for the plain mean, it is right too, for the sum of weights is kept.

    Params are the latents: `weights_of_average` maps their average by the current qparams, so that
    its weights are on the levels as others are. Updates, weights and pullback are the inner
    transformation's. Put it around the whole chain, and inside `accumulate`, whose calls between
    updates would be averaged too.

    Raises ValueError for a decay outside [0, 1].

    >>> import torch
    >>> from parq_fn import apply_updates, averaged, sgd, weights_of_average
    >>> transform, params = averaged(sgd(1.0), 0.5), {"w": torch.zeros(1)}
    >>> state = transform.init(params)
    >>> for _ in range(2):  # params are -3, then -6
    ...     updates, state = transform.update({"w": torch.tensor([3.0])}, state, params)
    ...     params = apply_updates(params, updates)
    >>> weights_of_average(transform, state, params)  # (0.25 * -3 + 0.5 * -6) / 0.75
    {'w': tensor([-5.])}

    Source: Polyak and Juditsky, SIAM J. Control Optim. 30 (1992); with correction of the bias as in
    Kingma and Ba, Adam, arXiv 1412.6980, section 7.2.
    """

    #: Of what was averaged before: a number, a 0-d tensor or a schedule.
    decay: Scalar

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("averaged", SHARE, schedules=True, decay=self.decay)

    @property
    def traits(self) -> TransformationTraits:
        """Those of the inner transformation, but that it looks at params + updates."""
        return replace(shared([self.inner]), last=True)

    def init(self, params: PyTree) -> AveragedState:
        """The params for their average, with weight 0."""
        check_floating(params, "averaged")
        average = tree_map(lambda p: p.to(wide(p), copy=True), params)
        count = new_count()
        return AveragedState(count, count.to(torch.float64), average, begun(self.inner, params))

    def update(
        self, updates: PyTree, state: AveragedState, params: PyTree, **extra: Any
    ) -> tuple[PyTree, AveragedState]:
        check_state(self, state, AveragedState)
        updates, inner = updated(self.inner, updates, state.inner, params, **extra)
        share, total = share_of(state.total, at(self.decay, state.samples))

        latents = apply_updates(params, updates)
        average = tree_map(lambda a, p: moved(a, p, share), state.average, latents)
        return updates, AveragedState(state.samples + 1, total, average, inner)

    def average_of(self, state: AveragedState, params: PyTree) -> PyTree:
        """The average, for `weights_of_average`, the params while nothing has weight in it;
        `Masked()` for params that it does not see."""
        check_state(self, state, AveragedState)

        def average(kept: Any, param: Tensor) -> Any:
            if isinstance(kept, Masked):
                return kept
            begun = to_device(state.total > 0, kept)
            return torch.where(begun, kept, param)

        return optree.tree_map(
            average, state.average, params, is_leaf=lambda x: isinstance(x, Masked)
        )


def weights_of_average(transformation: Transformation, state: PyTree, params: Params) -> Params:
    """transformation.weights of the averages of the params: averaged first, then mapped by the
    current qparams, so that no weight is off the levels on account of the average.

    transformation: any with `averaged` or `schedule_free` in it, however deep; of several on one
        leaf the last counts.
    state: its state.
    params: the latents; leaves that nothing averages have the weights of these.

    Before the first update the average is the params. Raises ValueError where nothing averages.

    >>> import torch
    >>> from parq_fn import averaged, chain, hard_prox, lsbq, sgd, weights_of_average
    >>> transform = averaged(chain(sgd(0.1), hard_prox(lsbq(1), period=1)), 0.99)
    >>> params = {"w": torch.tensor([1.0, -3.0])}
    >>> _, state = transform.update(params, transform.init(params), params)
    >>> weights_of_average(transform, state, params)["w"].unique().numel()
    2
    """
    check_transformation(transformation, "weights_of_average: the transformation")
    found: Any = None
    for link, own in every_state(transformation, state):
        if hasattr(link, "average_of"):
            mine = link.average_of(own, params)
            found = mine if found is None else merged(mine, found)
    if found is None:
        raise ValueError(
            f"weights_of_average: nothing averages in {show(transformation)}; put it into "
            "averaged(transformation, decay)"
        )
    average: Params = tree_map(lambda p, a: a.to(p.dtype), params, merged(found, params))
    return transformation.weights(state, average)
