"""Schedule-free optimization: an average in the place of a learning rate that falls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import optree
import torch
from torch import Tensor

from parq_fn.foundation.checks import NOT_NEGATIVE, Interval, check_numbers
from parq_fn.foundation.scalar import Scalar, at, new_count, to_device
from parq_fn.foundation.traits import TransformationTraits, shared
from parq_fn.foundation.tree import Masked, PyTree, check_floating, tree_map
from parq_fn.foundation.value import state_class, value
from parq_fn.transforms.links import times
from parq_fn.transforms.transformation import begun, check_state, updated
from parq_fn.transforms.wrappers import Around, check_no_prox, copies, wide


@state_class
class ScheduleFreeState(NamedTuple):
    """State of `schedule_free`."""

    calls: Tensor  # [], int64: updates so far
    total: Tensor  # [], float64: the sum of the weights of the average
    fast: PyTree  # z, like params, in float32 or better
    inner: PyTree  # the inner state


@value
class schedule_free(Around):
    """The inner transformation moves z by gradients taken at y, between z and its average x:

        z <- z + u(g(y))
        x <- (1 - c) x + c z,    c = a_t / (a_1 + .. + a_t)
        y  = (1 - b1) z + b1 x

    params are y, where gradients are taken; `weights_of_average` gives the weights of x, to
    evaluate with. Prox links stand behind it: they map y, with levels of y, and x by the same.
    So `chain(schedule_free(sgd(lr)), parq_prox(...))` is schedule-free SGD and
    `schedule_free(adamw(lr, b1=0.0))` schedule-free AdamW, whose b1 has the momentum's place.

    The weight a_t is a number, a 0-d tensor or a schedule; of a learning rate that is warmed up
    give its square, `weight=lambda t: rate(t) ** 2`. x is not kept: it follows from y and z. A leaf
    without a gradient keeps all three.

    Raises ValueError where a prox link is inside, and for a b1 outside (0, 1].

    >>> import torch
    >>> from parq_fn import apply_updates, schedule_free, sgd, weights_of_average
    >>> transform, params = schedule_free(sgd(1.0), b1=0.5), {"w": torch.zeros(1)}
    >>> state = transform.init(params)
    >>> for _ in range(2):  # z is -2, then -4
    ...     updates, state = transform.update({"w": torch.tensor([2.0])}, state, params)
    ...     params = apply_updates(params, updates)
    >>> params, weights_of_average(transform, state, params)  # x is (-2 - 4) / 2
    ({'w': tensor([-3.5000])}, {'w': tensor([-3.])})

    Source: Defazio et al., The Road Less Scheduled, arXiv 2405.15682.
    """

    #: How near to the average gradients are taken.
    b1: float | Tensor = 0.9
    #: Of the next z in the average: a number, a 0-d tensor or a schedule.
    weight: Scalar = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_prox("schedule_free", self.inner)
        check_numbers("schedule_free", Interval(0.0, 1.0, open_low=True), b1=self.b1)
        check_numbers("schedule_free", NOT_NEGATIVE, schedules=True, weight=self.weight)

    @property
    def traits(self) -> TransformationTraits:
        """Those of the inner transformation, but that it looks at params + updates."""
        return replace(shared([self.inner]), passes_updates=False, last=True)

    def init(self, params: PyTree) -> ScheduleFreeState:
        """x = y = z = params."""
        check_floating(params, "schedule_free")
        count, fast = new_count(), tree_map(lambda p: p.to(wide(p), copy=True), params)
        return ScheduleFreeState(count, count.double(), fast, begun(self.inner, params))

    def update(
        self, updates: PyTree, state: ScheduleFreeState, params: PyTree, **extra: Any
    ) -> tuple[PyTree, ScheduleFreeState]:
        check_state(self, state, ScheduleFreeState)
        out, inner = updated(self.inner, updates, state.inner, params, **extra)
        weight = at(self.weight, state.calls).double()
        total = state.total + weight
        c = weight / total.where(total > 0, 1.0)
        b1, old = at(self.b1, state.calls), copies(state.fast, params, state.calls)

        def moved(u: Tensor, z: Tensor, y: Tensor) -> Tensor:
            # y - b1 x = (1 - b1) z, so that x need not be known
            return (times(z - y, c) + times(u, 1.0 - b1 * (1.0 - c))).to(y.dtype)

        fast = tree_map(lambda z, u: z if u is None else z + u.to(z.dtype), old, out)
        updates = tree_map(moved, out, old, params)
        return updates, ScheduleFreeState(state.calls + 1, total, fast, inner)

    def average_of(self, state: ScheduleFreeState, params: PyTree) -> PyTree:
        """x, for `weights_of_average`; `Masked()` for params that it does not see."""
        check_state(self, state, ScheduleFreeState)
        b1 = at(self.b1, state.calls)

        def average(z: Any, y: Tensor) -> Any:
            if isinstance(z, Masked):
                return z
            return torch.where(to_device(state.calls > 0, z), z + times(y - z, 1.0 / b1), y)

        return optree.tree_map(average, state.fast, params, is_leaf=lambda z: isinstance(z, Masked))
