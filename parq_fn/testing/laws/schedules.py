"""The laws of schedules s(t), between a start and an end; x = (t - start) / (end - start)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.traits import ScheduleTraits
from parq_fn.testing.law import Claim, Collection, at_most, equal, vmapped

LAWS = Collection("schedule")
law = LAWS.law

ROUNDING = "float64 rounding of the formula"


def at(schedule: Any, step: float) -> Tensor:
    """The value at a step given as a float64 tensor."""
    value: Tensor = schedule(torch.tensor(step, dtype=torch.float64))
    return value


def number(value: float) -> Tensor:
    """A float64 tensor."""
    return torch.tensor(value, dtype=torch.float64)


@law("A schedule gives a finite float64 value of the step's shape.", "|s(t)| < inf")
def finite(schedule: Any, whole: int, step: float, every: Tensor) -> Iterator[Claim]:
    steps = torch.tensor([[whole, 0, 2**40]])
    for given in (torch.tensor(whole), steps, torch.tensor(step, dtype=torch.float64), every):
        got = schedule(given)
        yield equal((str(got.dtype), tuple(got.shape)), ("torch.float64", tuple(given.shape)))
        yield equal(got.isfinite(), torch.ones_like(got, dtype=torch.bool))


@law(
    "Numbers and tensors of any dtype, batched and vmapped give the same values.", "s(t) = s([t])_0"
)
def same_for_all_steps(schedule: Any, whole: int) -> Iterator[Claim]:
    alone = schedule(torch.tensor(whole))
    batch = torch.tensor([whole, 0, whole + 1])
    looped = torch.stack([schedule(t) for t in batch])
    yield equal(torch.as_tensor(schedule(whole)), alone)
    yield equal(torch.as_tensor(schedule(float(whole))), alone)
    yield equal(alone, at(schedule, float(whole)))
    for dtype in (torch.int32, torch.float32) if whole < 2**24 else ():
        yield equal(schedule(torch.tensor(whole, dtype=dtype)), alone)
    yield Claim(schedule(batch).round(decimals=14), "==", looped.round(decimals=14))
    yield Claim(vmapped(schedule)(batch).round(decimals=14), "==", looped.round(decimals=14))


@law("The step is not changed, and the same step gives the same bits.", "s(t) = s(t)")
def pure(schedule: Any, whole: int) -> Iterator[Claim]:
    for kind in (torch.int64, torch.float64):
        step = torch.tensor(whole, dtype=kind)
        first = schedule(step).clone()
        yield equal(step, torch.tensor(whole, dtype=kind))
        yield equal(schedule(step), first)


@law(
    "Values keep to their range.",
    "low <= s(t) <= high",
    needs=("low", "high"),
    tolerance=1e-14,
    reason=ROUNDING,
)
def in_range(
    schedule: Any, step: float, every: Tensor, offset: float, traits: ScheduleTraits
) -> Iterator[Claim]:
    assert traits.low is not None
    assert traits.high is not None
    for value in (at(schedule, step), schedule(every), schedule(every + offset)):
        yield at_most(number(traits.low).expand_as(value), value)
        yield at_most(value, number(traits.high).expand_as(value))


@law(
    "Up to the start the schedule has its first value, exactly.",
    "s(t) = first  for t <= start",
    needs=("first",),
)
def starts(schedule: Any, start: float, offset: float, traits: ScheduleTraits) -> Iterator[Claim]:
    assert traits.first is not None
    for step in (start, start - offset * abs(start)):
        yield equal(at(schedule, step), number(traits.first))


@law(
    "From the end on it has its last value, exactly.",
    "s(t) = last  for t >= end",
    needs=("last",),
)
def ends(schedule: Any, end: float, offset: float, traits: ScheduleTraits) -> Iterator[Claim]:
    assert traits.last is not None
    for step in (end, end + 100 * offset, end + 10 ** (12 * offset), end + 1e12):
        yield equal(at(schedule, step), number(traits.last))
    later = torch.tensor(math.ceil(end) + round(100 * offset))
    yield equal(schedule(later), number(traits.last))


@law(
    "It tends to its last value as the step tends to the end.",
    "s(end - d) -> last  as d -> 0",
    applies=lambda t: t.lands,
    needs=("last",),
    tolerance=1e-5,
    reason="taken at d = 1e-12 (end - start), in units of what it spans",
)
def lands(schedule: Any, start: float, end: float, traits: ScheduleTraits) -> Claim:
    assert traits.last is not None
    last, size = number(traits.last), (at(schedule, start) - traits.last).abs().clamp(min=1.0)
    return equal(at(schedule, end - 1e-12 * (end - start)) / size, last / size)


@law(
    "It never turns back.",
    "t <= t'  =>  s(t) >= s(t')   (or <=, as declared)",
    needs=("monotone",),
    tolerance=1e-14,
    reason=ROUNDING,
)
def monotone(
    schedule: Any,
    step: float,
    later: float,
    every: Tensor,
    offset: float,
    traits: ScheduleTraits,
) -> Iterator[Claim]:
    values = schedule(torch.cat([every.double(), every + offset]).sort().values)
    for sides in ((at(schedule, step), at(schedule, later)), (values[:-1], values[1:])):
        yield at_most(*(sides if traits.monotone == "nondecreasing" else reversed(sides)))


@law(
    "What it has left at a distance from the start, it has lost at that distance from the end.",
    "s(start + d) + s(end - d) = s(start) + s(end)",
    applies=lambda t: t.antisymmetric,
    tolerance=1e-9,
    reason=ROUNDING,
)
def antisymmetric(schedule: Any, start: float, end: float, offset: float) -> Claim:
    d = offset * (end - start)
    inner = at(schedule, start + d) + at(schedule, end - d)
    return equal(inner, at(schedule, start) + at(schedule, end))


@law(
    "It depends on progress only.",
    "s(start + x (end - start)) = s'(start' + x (end' - start'))",
    needs=("moved",),
    tolerance=1e-6,
    reason="the progress is rounded, and slopes go to 1e4",
)
def progress_only(
    schedule: Any,
    start: float,
    end: float,
    offset: float,
    factor: float,
    traits: ScheduleTraits,
) -> Claim:
    assert traits.moved is not None
    moved = traits.moved(7.0, 7.0 + 50 * factor)
    return equal(
        at(moved, 7.0 + 50 * factor * offset), at(schedule, start + offset * (end - start))
    )


def _between(traits: ScheduleTraits, share: float) -> Tensor:
    """first + (last - first) * share."""
    assert traits.first is not None
    assert traits.last is not None
    return number(traits.first + (traits.last - traits.first) * share)


@law(
    "The softest of its family is the straight line.",
    "s(t) -> first + (last - first) x",
    needs=("line", "first", "last"),
    tolerance=1e-6,
    reason="taken near the limit",
)
def soft_limit_is_line(
    schedule: Any, start: float, end: float, offset: float, traits: ScheduleTraits
) -> Claim:
    del schedule
    assert traits.line is not None
    return equal(at(traits.line, start + offset * (end - start)), _between(traits, offset))


@law(
    "The sharpest of its family is a step, at the declared progress.",
    "s(t) -> first for x < step_at, last for x > step_at",
    needs=("step", "first", "last"),
    tolerance=1e-6,
    reason="taken near the limit, and 1% away from the step",
)
def sharp_limit_is_step(
    schedule: Any, start: float, end: float, offset: float, traits: ScheduleTraits
) -> Claim:
    del schedule
    assert traits.step is not None
    x = offset if abs(offset - traits.step_at) > 0.01 else (0.0 if traits.step_at > 0.5 else 1.0)
    got = at(traits.step, start + x * (end - start))
    return equal(got, _between(traits, float(x > traits.step_at)))
