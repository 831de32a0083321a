"""Lookahead: slow params behind fast ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.checks import SHARE, check_numbers, check_whole
from parq_fn.foundation.scalar import Scalar, at, concrete, new_count
from parq_fn.foundation.traits import TransformationTraits, shared
from parq_fn.foundation.tree import PyTree, check_floating, select, tree_map
from parq_fn.foundation.value import state_class, value
from parq_fn.transforms.links import times
from parq_fn.transforms.train import increment
from parq_fn.transforms.transformation import begun, check_state, updated
from parq_fn.transforms.wrappers import Around, check_no_prox, copies, wide


@state_class
class LookaheadState(NamedTuple):
    """State of `lookahead`."""

    waiting: Tensor  # [], int64: updates since fast and slow params were last the same
    calls: Tensor  # [], int64: updates so far
    slow: PyTree  # like params, in float32 or better
    inner: PyTree  # the inner state


@value
class lookahead(Around):
    """The inner update, and after every `sync_period` of them params go back towards the slow ones:

        slow <- slow + slow_step_size (params + updates - slow);  params <- slow

    A leaf without a gradient keeps its params and its slow ones. It stands before prox links, which
    fit levels to the params that come out of it. Raises ValueError where one is inside, for a
    sync_period that is no whole number from 1 on, and for a slow_step_size outside [0, 1].

    >>> import torch
    >>> from parq_fn import apply_updates, lookahead, sgd
    >>> transform, params = lookahead(sgd(1.0), 2, 0.5), {"w": torch.zeros(1)}
    >>> state = transform.init(params)
    >>> for _ in range(2):
    ...     updates, state = transform.update({"w": torch.tensor([-3.0])}, state, params)
    ...     params = apply_updates(params, updates)
    ...     print(params)
    {'w': tensor([3.])}
    {'w': tensor([3.])}

    Source: Zhang et al., Lookahead Optimizer: k steps forward, 1 step back, arXiv 1907.08610.
    """

    #: Updates from one return to the slow params to the next.
    sync_period: int = 6
    #: The share of the way that slow params go: a number, a 0-d tensor or a schedule.
    slow_step_size: Scalar = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_prox("lookahead", self.inner)
        check_whole("lookahead", 1, sync_period=self.sync_period)
        size = {"slow_step_size": self.slow_step_size}
        check_numbers("lookahead", SHARE, schedules=True, **size)

    @property
    def traits(self) -> TransformationTraits:
        """Those of the inner transformation, but that it looks at params + updates."""
        return replace(shared([self.inner]), passes_updates=False, last=True)

    def init(self, params: PyTree) -> LookaheadState:
        """The params for the slow ones."""
        check_floating(params, "lookahead")
        slow = tree_map(lambda p: p.to(wide(p), copy=True), params)
        return LookaheadState(new_count(), new_count(), slow, begun(self.inner, params))

    def update(
        self, updates: PyTree, state: LookaheadState, params: PyTree, **extra: Any
    ) -> tuple[PyTree, LookaheadState]:
        check_state(self, state, LookaheadState)
        out, inner = updated(self.inner, updates, state.inner, params, **extra)
        waiting, calls = state.waiting + 1, state.calls + 1
        due, old = waiting >= self.sync_period, copies(state.slow, params, state.calls)
        if concrete(due) is False:
            return out, LookaheadState(waiting, calls, old, inner)
        size = at(self.slow_step_size, state.calls)

        def moved(slow: Tensor, u: Tensor | None, p: Tensor) -> Tensor:
            return slow if u is None else slow + times(p + u - slow, size)

        slow = tree_map(moved, old, out, params)
        back = tree_map(lambda u, p, s: increment(p, s.to(p.dtype)), out, params, slow)
        return select(due, back, out), LookaheadState(
            torch.where(due, 0, waiting), calls, select(due, slow, old), inner
        )
