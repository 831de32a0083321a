"""Links: what moves an update on its way from a gradient to an increment.

Hyperparameters are numbers, 0-d tensors, or schedules of the count of updates so far. A leaf
without a gradient (None) keeps its state. State has each leaf's dtype and shape unless said.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.checks import DECAY, NOT_NEGATIVE, check_numbers
from parq_fn.foundation.scalar import Scalar, at, is_number, new_count, to_device
from parq_fn.foundation.traits import PER_LEAF
from parq_fn.foundation.tree import (
    PyTree,
    by_name,
    check_floating,
    check_match,
    check_plain,
    tree_map,
)
from parq_fn.foundation.value import state_class, value
from parq_fn.transforms.transformation import (
    NO_RATE,
    EmptyState,
    Link,
    check_state,
    name_of,
)


@state_class
class StepState(NamedTuple):
    """State of a link whose hyperparameter may be a schedule."""

    step: Tensor  # [], int64: updates so far


def times(leaf: Tensor, scalar: Tensor) -> Tensor:
    """leaf * scalar in the leaf's dtype; a float64 scalar is not rounded first."""
    return (leaf * to_device(scalar, leaf)).to(leaf.dtype)


@value
class scale(Link):
    """updates -> factor * updates.

    >>> import torch
    >>> scale(2.0).update({"w": torch.ones(1)}, scale(2.0).init(None), None)[0]
    {'w': tensor([2.])}
    """

    #: Of every update.
    factor: float | Tensor
    traits = PER_LEAF

    def __post_init__(self) -> None:
        check_numbers("scale", factor=self.factor)

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        check_state(self, state, EmptyState)
        factor = at(self.factor, new_count())
        return tree_map(lambda u: times(u, factor), updates), state


@value
class _Counting(Link):
    """Base of the links that keep nothing but the count of their updates."""

    def init(self, params: PyTree) -> StepState:
        """A count of 0."""
        check_plain(params, name_of(self))
        return StepState(new_count())


@value
class scale_by_schedule(_Counting):
    """updates -> schedule(count) * updates, count the updates before this one."""

    #: step -> factor.
    schedule: Scalar
    traits = PER_LEAF

    def __post_init__(self) -> None:
        check_numbers("scale_by_schedule", schedules=True, schedule=self.schedule)

    def update(
        self, updates: PyTree, state: StepState, params: PyTree, **extra: Any
    ) -> tuple[PyTree, StepState]:
        del params, extra
        check_state(self, state, StepState)
        factor = at(self.schedule, state.step)
        return tree_map(lambda u: times(u, factor), updates), StepState(state.step + 1)


def each(
    own: Scalar,
    given: Scalar | Mapping[str, Scalar | None] | None,
    step: Tensor,
    updates: PyTree,
    params: PyTree,
) -> PyTree:
    """A scalar for each leaf of the updates: what is given, for all or by name, or the own."""

    def scalar(one: Scalar | None) -> Tensor:
        return at(own if one is None else one, step)

    if isinstance(given, Mapping):
        return by_name({name: scalar(one) for name, one in given.items()}, params)
    whole = scalar(given)
    return tree_map(lambda _: whole, updates)


@value
class scale_by_learning_rate(_Counting):
    """updates -> -learning_rate * updates, so that adding them descends.

    An extra argument `learning_rate` of `update` overrides the link's own: a scalar, or one
    for each leaf's name, None where it is the link's.
    """

    #: A number, a 0-d tensor or a schedule.
    learning_rate: Scalar
    traits = PER_LEAF
    rates = (1, 1)

    def __post_init__(self) -> None:
        rate = {"learning_rate": self.learning_rate}
        check_numbers("scale_by_learning_rate", NOT_NEGATIVE, schedules=True, **rate)

    def update(
        self,
        updates: PyTree,
        state: StepState,
        params: PyTree,
        *,
        learning_rate: Scalar | Mapping[str, Scalar | None] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, StepState]:
        del extra
        check_state(self, state, StepState)
        rates = each(self.learning_rate, learning_rate, state.step, updates, params)
        return tree_map(lambda u, r: times(u, -r), updates, rates), StepState(state.step + 1)


@value
class add_decayed_weights(_Counting):
    """updates -> updates + weight_decay * params: the gradient of weight_decay / 2 |params|^2.

    Before the other links it is an L2 penalty (sgd, adam), after them decoupled decay (adamw).
    It acts on the latent params. An extra argument `weight_decay` of `update` overrides the link's
    own: a scalar, or one for each leaf's name, None where it is the link's.
    """

    #: A number, a 0-d tensor or a schedule.
    weight_decay: Scalar
    traits = PER_LEAF
    rates = NO_RATE

    def __post_init__(self) -> None:
        decay = {"weight_decay": self.weight_decay}
        check_numbers("add_decayed_weights", NOT_NEGATIVE, schedules=True, **decay)

    def update(
        self,
        updates: PyTree,
        state: StepState,
        params: PyTree,
        *,
        weight_decay: Scalar | Mapping[str, Scalar | None] | None = None,
        **extra: Any,
    ) -> tuple[PyTree, StepState]:
        del extra
        check_state(self, state, StepState)

        def add(u: Tensor, p: Tensor, decay: Tensor) -> Tensor:
            if u.shape != p.shape:
                check_match(updates, params, "add_decayed_weights")
            return u + times(p, decay).to(u.dtype)

        decays = each(self.weight_decay, weight_decay, state.step, updates, params)
        return tree_map(add, updates, params, decays), StepState(state.step + 1)


@state_class
class TraceState(NamedTuple):
    """State of `trace`."""

    step: Tensor  # [], int64: updates so far
    trace: PyTree  # like params: the accumulated updates


@value
class trace(Link):
    """Momentum: m <- decay * m + (1 - dampening) * u; updates -> m, nesterov: u + decay * m.

    As in torch.optim.SGD the first update fills m undampened: m = u.
    """

    #: Momentum.
    decay: Scalar
    #: 1 less the share of a new gradient.
    dampening: Scalar = 0.0
    #: Whether Nesterov's momentum is taken.
    nesterov: bool = False
    traits = PER_LEAF
    rates = NO_RATE

    def __post_init__(self) -> None:
        check_numbers("trace", NOT_NEGATIVE, schedules=True, decay=self.decay)
        check_numbers("trace", schedules=True, dampening=self.dampening)
        if self.nesterov and is_number(self.dampening) and self.dampening != 0:
            raise ValueError(
                f"trace: nesterov momentum takes no dampening, got dampening={self.dampening}"
            )

    def init(self, params: PyTree) -> TraceState:
        """Zeros."""
        check_floating(params, "trace")
        return TraceState(new_count(), tree_map(torch.zeros_like, params))

    def update(
        self, updates: PyTree, state: TraceState, params: PyTree, **extra: Any
    ) -> tuple[PyTree, TraceState]:
        del params, extra
        check_state(self, state, TraceState)
        decay = at(self.decay, state.step)
        share = torch.where(state.step == 0, 1.0, 1.0 - at(self.dampening, state.step))

        def accumulate(m: Tensor, u: Tensor | None) -> Tensor:
            if u is None:
                return m
            if u.shape != m.shape:
                check_match(updates, state.trace, "trace")
            return times(m, decay) + times(u, share).to(m.dtype)

        traced = tree_map(accumulate, state.trace, updates)
        if self.nesterov:
            out = tree_map(lambda u, m: u + times(m, decay).to(u.dtype), updates, traced)
        else:
            out = tree_map(lambda u, m: m.to(u.dtype), updates, traced)
        return out, TraceState(state.step + 1, traced)


@state_class
class AdamState(NamedTuple):
    """State of `scale_by_adam`."""

    step: Tensor  # [], int64: updates so far
    first: PyTree  # like params: running mean of the updates
    second: PyTree  # like params: running mean of their squares
    largest: PyTree  # like params: the largest `second` so far with amsgrad, else ()


@value
class scale_by_adam(Link):
    """m <- b1 m + (1 - b1) u, v <- b2 v + (1 - b2) u^2;
    updates -> m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps), t the count with this update.

    With amsgrad the largest v so far takes the place of v.

    Source: Kingma and Ba, Adam, arXiv 1412.6980; Reddi et al., AMSGrad, arXiv 1904.09237.
    """

    #: Decay of the mean of gradients.
    b1: Scalar = 0.9
    #: Decay of the mean of their squares.
    b2: Scalar = 0.999
    #: Added to the root.
    eps: Scalar = 1e-8
    #: Whether the largest mean square so far is taken.
    amsgrad: bool = False
    traits = PER_LEAF
    rates = NO_RATE

    def __post_init__(self) -> None:
        check_numbers("scale_by_adam", DECAY, schedules=True, b1=self.b1, b2=self.b2)
        check_numbers("scale_by_adam", NOT_NEGATIVE, schedules=True, eps=self.eps)

    def init(self, params: PyTree) -> AdamState:
        """Zeros."""
        check_floating(params, "scale_by_adam")
        # trees of their own: one tree in two places would make a compiled step compile again
        first, second, largest = (tree_map(torch.zeros_like, params) for _ in range(3))
        return AdamState(new_count(), first, second, largest if self.amsgrad else ())

    def update(
        self, updates: PyTree, state: AdamState, params: PyTree, **extra: Any
    ) -> tuple[PyTree, AdamState]:
        del params, extra
        check_state(self, state, AdamState)
        count = state.step + 1
        b1, b2, eps = (at(c, count) for c in (self.b1, self.b2, self.eps))
        one, two = (1.0 - _power(b, count) for b in (b1, b2))

        def mean(m: Tensor, u: Tensor | None) -> Tensor:
            if u is None:
                return m
            if u.shape != m.shape:
                check_match(updates, state.first, "scale_by_adam")
            return times(m, b1) + times(u, 1.0 - b1).to(m.dtype)

        def square(v: Tensor, u: Tensor | None) -> Tensor:
            return v if u is None else times(v, b2) + times(u.square(), 1.0 - b2).to(v.dtype)

        first = tree_map(mean, state.first, updates)
        second = tree_map(square, state.second, updates)
        largest = tree_map(torch.maximum, state.largest, second) if self.amsgrad else ()

        def direction(u: Tensor, m: Tensor, v: Tensor) -> Tensor:
            v = (v / to_device(two, v)).to(v.dtype)
            # sqrt has no derivative at 0, which gradients through `update` would meet
            root = torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), v) + to_device(eps, v)
            return (m / to_device(one, m) / root).to(u.dtype)

        out = tree_map(direction, updates, first, largest if self.amsgrad else second)
        return out, AdamState(count, first, second, largest)


def _power(b: Tensor, count: Tensor) -> Tensor:
    """b^t, t >= 1, by exp, which a compiler takes once a step and not once an element; with the
    derivative at b = 0 too."""
    b = b if b.is_floating_point() else b.to(torch.float64)
    return b * ((count - 1) * b.clamp(min=torch.finfo(b.dtype).tiny).log()).exp()
