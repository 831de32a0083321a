"""A link that is switched on and off by the step."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from parq_fn.foundation.checks import check_numbers
from parq_fn.foundation.scalar import Scalar, at, concrete, new_count
from parq_fn.foundation.traits import TransformationTraits, shared
from parq_fn.foundation.tree import PyTree, check_plain, select
from parq_fn.foundation.value import state_class, value
from parq_fn.transforms.transformation import (
    Rates,
    begun,
    check_state,
    identity,
    rates_of,
    updated,
)
from parq_fn.transforms.wrappers import Around


@state_class
class ConditionalState(NamedTuple):
    """State of `conditionally`."""

    calls: Tensor  # [], int64: updates so far, on and off
    inner: PyTree  # the inner state


@value
class conditionally(Around):
    """The inner update where condition(t) is not 0, t the updates before this one; elsewhere
    updates pass as they came and the inner state stands still.

    So put it around links that leave gradients what they are: where links that take a learning rate
    are off, gradients would be added to params as they are.

    What the inner transformation counts are the updates that it made: a schedule inside goes on
    where it stopped. Its weights and pullback are those of its state at every step, so that a prox
    link that is off maps by the levels that it has, and fits none.

    Raises TypeError for a condition that is neither a function of the step, a number nor a 0-d
    tensor.

    >>> import torch
    >>> from parq_fn import conditionally, scale
    >>> link, updates = conditionally(scale(2.0), lambda t: t % 2 == 1), {"w": torch.ones(1)}
    >>> state = link.init(updates)
    >>> for _ in range(3):
    ...     out, state = link.update(updates, state, updates)
    ...     print(out)
    {'w': tensor([1.])}
    {'w': tensor([2.])}
    {'w': tensor([1.])}
    """

    #: step -> whether it is on: a predicate or a schedule; a number or tensor for all steps.
    condition: Scalar

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.condition, bool):
            check_numbers("conditionally", schedules=True, condition=self.condition)

    @property
    def traits(self) -> TransformationTraits:
        """Those of the inner transformation."""
        return shared([self.inner])

    @property
    def rates(self) -> Rates:
        """Those of the inner transformation, or none where it is off."""
        return rates_of(self.inner, identity())

    def init(self, params: PyTree) -> ConditionalState:
        """The inner state, no update made."""
        check_plain(params, "conditionally")
        return ConditionalState(new_count(), begun(self.inner, params))

    def update(
        self, updates: PyTree, state: ConditionalState, params: PyTree, **extra: Any
    ) -> tuple[PyTree, ConditionalState]:
        check_state(self, state, ConditionalState)
        on = at(self.condition, state.calls) != 0
        calls, known = state.calls + 1, concrete(on)
        if known is False:  # the work of an update that would be thrown away
            return updates, ConditionalState(calls, state.inner)
        out, inner = updated(self.inner, updates, state.inner, params, **extra)
        if not known:
            out, inner = select(on, out, updates), select(on, inner, state.inner)
        return out, ConditionalState(calls, inner)
