"""Schedules: step -> value, tensor in, tensor out.

A schedule takes an integer step or a tensor of steps and gives float64 of the same shape (a
0-d tensor for one step). Every field may be a number or a 0-d tensor, batched by `vmap` too.
Progress between two steps is x = (step - start) / (end - start), held to [0, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.checks import (
    POSITIVE,
    SHARE,
    check_annealing,
    check_before,
    check_boundaries,
    check_kind,
    check_numbers,
    readable,
)
from parq_fn.foundation.scalar import Scalar, as_scalar, at, is_number
from parq_fn.foundation.traits import ScheduleTraits
from parq_fn.foundation.value import Value, attribute, value

Number = float | Tensor


def _steps(step: int | Tensor) -> Tensor:
    return as_scalar(step).to(torch.float64)


def progress(step: int | Tensor, start: Number, end: Number) -> Tensor:
    """clamp((step - start) / (end - start), 0, 1), in float64.

    >>> progress(15, 10, 20)
    tensor(0.5000, dtype=torch.float64)
    """
    return ((_steps(step) - start) / (end - start)).clamp(0.0, 1.0)


_UNDECLARED = ScheduleTraits(low=None, high=None, first=None, last=None, monotone=None)


def _path(path: Any, **more: Any) -> ScheduleTraits:
    """What a schedule from init at start_step to end at end_step declares, fields permitting."""
    fields = path.init, path.end, path.start_step, path.end_step
    if not all(map(is_number, fields)):
        return _UNDECLARED
    first, last, start, end = map(float, fields)
    return ScheduleTraits(
        start=start,
        end=end,
        low=min(first, last),
        high=max(first, last),
        first=first,
        last=last,
        monotone="nonincreasing" if first >= last else "nondecreasing",
        moved=lambda start, end: replace(path, start_step=start, end_step=end),
        **more,
    )


@value
class Schedule(Value):
    """Base of the schedules; any function of a step tensor will do where one is expected."""

    @attribute
    def traits(self) -> ScheduleTraits:
        """What it declares, for `parq_fn.testing`: of the base nothing."""
        return _UNDECLARED

    def __call__(self, step: int | Tensor) -> Tensor:
        """The value at the step: float64, of the step's shape."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__")


@value
class constant(Schedule):
    """value at every step.

    >>> constant(0.1)(5)
    tensor(0.1000, dtype=torch.float64)
    """

    #: The value at every step.
    value: Number

    def __post_init__(self) -> None:
        check_numbers("constant", value=self.value)

    @property
    def traits(self) -> ScheduleTraits:
        if not is_number(self.value):
            return _UNDECLARED
        level = float(self.value)
        return ScheduleTraits(low=level, high=level, first=level, last=level)

    def __call__(self, step: int | Tensor) -> Tensor:
        return as_scalar(self.value) + torch.zeros_like(_steps(step))


@value
class _Path(Schedule):
    """Base of the paths from init at start_step to end at end_step."""

    #: The value up to start_step.
    init: Number
    #: The value from end_step on.
    end: Number
    #: Where the path begins.
    start_step: Number
    #: Where it ends.
    end_step: Number

    def __post_init__(self) -> None:
        who = type(self).__name__
        check_numbers(who, init=self.init, end=self.end)
        check_before(who, start_step=self.start_step, end_step=self.end_step)

    @property
    def traits(self) -> ScheduleTraits:
        return _path(self, antisymmetric=True)


@value
class linear(_Path):
    """init + (end - init) * x.

    Raises ValueError unless start_step < end_step.

    >>> linear(1.0, 0.0, 0, 10)(torch.tensor([0, 5, 10, 20]))
    tensor([1.0000, 0.5000, 0.0000, 0.0000], dtype=torch.float64)
    """

    def __call__(self, step: int | Tensor) -> Tensor:
        x = progress(step, self.start_step, self.end_step)
        return (1 - x) * self.init + x * self.end


@value
class cosine(_Path):
    """end + (init - end) * (1 + cos(pi x)) / 2.

    Raises ValueError unless start_step < end_step.

    >>> cosine(1.0, 0.0, 0, 10)(5).round(decimals=6)
    tensor(0.5000, dtype=torch.float64)
    """

    def __call__(self, step: int | Tensor) -> Tensor:
        x = progress(step, self.start_step, self.end_step)
        share = (1 + torch.cos(math.pi * x)) / 2
        return share * self.init + (1 - share) * self.end


@value
class exponential(_Path):
    """init * (end / init) ** x: the geometric path from init to end.

    Raises ValueError unless start_step < end_step and init and end are of one sign, not 0.

    >>> exponential(1.0, 0.01, 0, 10)(5)
    tensor(0.1000, dtype=torch.float64)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        init, end = readable(self.init), readable(self.end)
        if (
            init is not None
            and end is not None
            and (init == 0 or end == 0 or (init < 0) != (end < 0))
        ):
            raise ValueError(
                "exponential: init and end must have one sign and not be 0, "
                f"got init={init}, end={end}"
            )

    @property
    def traits(self) -> ScheduleTraits:
        return _path(self)

    def __call__(self, step: int | Tensor) -> Tensor:
        x = progress(step, self.start_step, self.end_step)
        ratio = as_scalar(self.end) / as_scalar(self.init)
        return as_scalar(self.init) * ratio**x


@value
class piecewise(Schedule):
    """values[i] for boundaries[i-1] <= step < boundaries[i]: one more value than boundaries.

    Raises ValueError when the lengths do not fit or the boundaries do not increase.

    >>> piecewise((0.1, 0.01), (100,))(torch.tensor([99, 100]))
    tensor([0.1000, 0.0100], dtype=torch.float64)
    """

    #: One for each piece.
    values: Sequence[Number]
    #: The first step of each piece but the first, increasing.
    boundaries: Sequence[Number]

    def __post_init__(self) -> None:
        check_boundaries("piecewise", "values", len(self.values), self.boundaries)

    def __call__(self, step: int | Tensor) -> Tensor:
        steps = _steps(step)
        out = as_scalar(self.values[0]) + torch.zeros_like(steps)
        for boundary, following in zip(self.boundaries, self.values[1:], strict=True):
            out = torch.where(steps >= boundary, following, out)
        return out


@value
class join(Schedule):
    """schedules[i](step - boundaries[i-1]) for boundaries[i-1] <= step < boundaries[i].

    Every schedule counts from its own beginning. Raises ValueError as `piecewise` does.

    >>> join((constant(1.0), linear(1.0, 0.0, 0, 10)), (100,))(torch.tensor([99, 105]))
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """

    #: One for each piece.
    schedules: Sequence[Callable[[Tensor], Tensor]]
    #: The first step of each piece but the first, increasing.
    boundaries: Sequence[Number]

    def __post_init__(self) -> None:
        check_boundaries("join", "schedules", len(self.schedules), self.boundaries)
        for schedule in self.schedules:
            check_kind("join", schedule, "schedules such as constant(0.1)", "__call__")

    def __call__(self, step: int | Tensor) -> Tensor:
        steps = _steps(step)
        out = self.schedules[0](steps)
        for boundary, following in zip(self.boundaries, self.schedules[1:], strict=True):
            out = torch.where(steps >= boundary, following(steps - boundary), out)
        return out


@value
class warmup(Schedule):
    """Linear from init to schedule(0) over the first `steps`, then schedule(step - steps).

    Raises ValueError unless steps > 0.

    >>> warmup(constant(0.1), 10)(torch.tensor([0, 5, 10]))
    tensor([0.0000, 0.0500, 0.1000], dtype=torch.float64)
    """

    #: What follows.
    schedule: Callable[[Tensor], Tensor]
    #: How many steps lead to it.
    steps: Number
    #: The value at step 0.
    init: Number = 0.0

    def __post_init__(self) -> None:
        check_kind("warmup", self.schedule, "a schedule such as constant(0.1)", "__call__")
        check_numbers("warmup", POSITIVE, steps=self.steps)
        check_numbers("warmup", init=self.init)

    def __call__(self, step: int | Tensor) -> Tensor:
        steps = _steps(step)
        peak = self.schedule(torch.zeros_like(steps))
        x = progress(step, 0, self.steps)
        rising = (1 - x) * self.init + x * peak
        return torch.where(steps < self.steps, rising, self.schedule(steps - self.steps))


@value
class inverse_slope(Schedule):
    """PARQ's annealing: s = (h(x) - h(1)) / (h(0) - h(1)), h(x) = 1 / (1 + exp(k (x - m))).

    k is the steepness, m the center, x the progress from anneal_start to anneal_end; s = 1
    before the one and 0 from the other on. It runs from exactly 1 to exactly 0 for every center
    and steepness: a small k gives the straight line 1 - x, a large one a step at m held to [0, 1].

    Raises ValueError unless anneal_start < anneal_end and steepness > 0.

    >>> inverse_slope(0, 100, steepness=10)(torch.tensor([0, 50, 100]))
    tensor([1.0000, 0.5000, 0.0000], dtype=torch.float64)

    Source: Jin et al., PARQ, arXiv 2503.15748, section 5; normalised here by its own end values.
    """

    #: The last step of s = 1.
    anneal_start: Number
    #: The first step of s = 0.
    anneal_end: Number
    #: k, of the sigmoid.
    steepness: Number = 10.0
    #: m, as a share of the annealing.
    center: Number = 0.5

    def __post_init__(self) -> None:
        who = "inverse_slope"
        check_annealing(who, anneal_start=self.anneal_start, anneal_end=self.anneal_end)
        check_numbers(who, POSITIVE, steepness=self.steepness)
        check_numbers(who, center=self.center)

    @property
    def traits(self) -> ScheduleTraits:
        fields = self.anneal_start, self.anneal_end, self.steepness, self.center
        if not all(map(is_number, fields)):
            return _UNDECLARED
        return ScheduleTraits(
            start=float(self.anneal_start),
            end=float(self.anneal_end),
            antisymmetric=bool(self.center == 0.5),
            moved=lambda start, end: replace(self, anneal_start=start, anneal_end=end),
            line=replace(self, steepness=1e-7),
            step=replace(self, steepness=1e5),
            step_at=min(max(float(self.center), 0.0), 1.0),
        )

    def __call__(self, step: int | Tensor) -> Tensor:
        # With sigma(a) - sigma(b) = sinh((a-b)/2) / (2 cosh(a/2) cosh(b/2)),
        #     s = sinh(a) cosh(b0) / (sinh(a0) cosh(b)),
        # a = k (1-x) / 2, b = k (x-m) / 2, and a0, b0 the same at x = 0. Taking out the growing
        # exponentials leaves exp(k (|m| - x - |x-m|) / 2) <= 1, so nothing overflows, and expm1
        # keeps small k exact.
        x = progress(step, self.anneal_start, self.anneal_end)
        k, m = as_scalar(self.steepness), as_scalar(self.center)
        zero = torch.zeros_like(x)

        def sinh(x: Tensor) -> Tensor:  # sinh(a) exp(-a), but for a factor -2
            return torch.expm1(-k * (1 - x))

        def cosh(x: Tensor) -> Tensor:  # cosh(b) exp(-|b|), but for a factor 2
            return 1 + torch.exp(-k * (x - m).abs())

        growth = torch.exp(k / 2 * (m.abs() - x - (x - m).abs()))
        return growth * (sinh(x) / sinh(zero)) * (cosh(zero) / cosh(x))


@value
class polynomial(_Path):
    """init + (end - init) * x ** power: linear where the power is 1.

    Raises ValueError unless start_step < end_step and power > 0.

    >>> polynomial(1.0, 1000.0, 0, 10, power=2.0)(5)
    tensor(250.7500, dtype=torch.float64)
    """

    #: Of the progress from start_step to end_step, positive.
    power: Number = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("polynomial", POSITIVE, power=self.power)

    @property
    def traits(self) -> ScheduleTraits:
        return _path(self)

    def __call__(self, step: int | Tensor) -> Tensor:
        x = progress(step, self.start_step, self.end_step) ** self.power
        return (1 - x) * self.init + x * self.end


@value
class anneal_decay(Schedule):
    """Annealed weight decay: weight_decay * (f * s(step - 1) + 1 - f), f the fraction.

    The decay of a step follows the inverse slope s that the step before it left, so the first
    step takes the whole weight decay. Raises ValueError unless 0 <= fraction <= 1.

    >>> decay = anneal_decay(0.1, inverse_slope(0, 10), fraction=1.0)
    >>> decay(torch.tensor([0, 11]))
    tensor([0.1000, 0.0000], dtype=torch.float64)
    """

    #: Where s is 1 or the fraction 0.
    weight_decay: Scalar
    #: step -> inverse slope.
    slope: Callable[[Tensor], Tensor]
    #: f, how much of the decay is annealed.
    fraction: Number

    def __post_init__(self) -> None:
        check_numbers("anneal_decay", SHARE, fraction=self.fraction)
        check_numbers("anneal_decay", schedules=True, weight_decay=self.weight_decay)

    def __call__(self, step: int | Tensor) -> Tensor:
        steps = _steps(step)
        f = as_scalar(self.fraction)
        slope = torch.where(steps < 1, 1.0, self.slope(steps - 1))
        return at(self.weight_decay, steps) * (f * slope + 1 - f)
