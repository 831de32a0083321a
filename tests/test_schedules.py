"""Schedules: what they refuse, and their values at and around their boundaries."""

from __future__ import annotations

import math

import pytest
import torch

import parq_fn as pf
from parq_fn import schedules as sched

PATHS = [sched.linear, sched.cosine, sched.exponential, sched.polynomial]


@pytest.mark.parametrize("path", PATHS)
def test_paths_name_what_is_wrong_with_their_fields(path) -> None:
    who = path.__name__
    for name in ("init", "end"):
        fields = {"init": 1.0, "end": 0.5, "start_step": 0, "end_step": 10}
        with pytest.raises(ValueError, match=f"{who}: {name} must lie in .* got nan"):
            path(**{**fields, name: math.nan})
    for start, end in [(5, 5), (5, 4)]:
        with pytest.raises(ValueError, match=f"{who}: start_step must come before end_step"):
            path(1.0, 0.5, start, end)
    assert path(1.0, 0.5, 5, 6).end_step == 6


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sched.constant(math.nan), "constant: value must lie in"),
        (lambda: sched.exponential(0.0, 1.0, 0, 1), "one sign and not be 0, got init=0.0, end=1.0"),
        (lambda: sched.exponential(1.0, 0.0, 0, 1), "one sign and not be 0, got init=1.0, end=0.0"),
        (lambda: sched.exponential(0.0, -1.0, 0, 1), "one sign and not be 0"),
        (lambda: sched.exponential(-1.0, 0.0, 0, 1), "one sign and not be 0"),
        (lambda: sched.exponential(0.0, 0.0, 0, 1), "one sign and not be 0"),
        (lambda: sched.exponential(-1.0, 1.0, 0, 1), "one sign and not be 0"),
        (lambda: sched.exponential(1.0, -1.0, 0, 1), "one sign and not be 0"),
        (lambda: sched.piecewise((1.0,), (1,)), "one more of values than of boundaries, got 1"),
        (lambda: sched.piecewise((1.0, 2.0, 3.0), (1,)), "got 3 values and 1 boundaries"),
        (lambda: sched.piecewise((1.0, 2.0, 3.0), (1, 1)), r"must increase, got \(1, 1\)"),
        (lambda: sched.piecewise((1.0, 2.0, 3.0), (2, 1)), r"must increase, got \(2, 1\)"),
        (lambda: sched.join((sched.constant(1.0),), (1,)), "one more of schedules"),
        (lambda: sched.join((sched.constant(1.0),) * 3, (1, 1)), "must increase"),
        (lambda: sched.warmup(sched.constant(1.0), 0), "warmup: steps must lie in"),
        (lambda: sched.warmup(sched.constant(1.0), 5, math.nan), "warmup: init must lie in"),
        (lambda: sched.inverse_slope(5, 5), "anneal_start must come before anneal_end"),
        (lambda: sched.inverse_slope(0, 5, 0.0), "inverse_slope: steepness must lie in"),
        (lambda: sched.inverse_slope(0, 5, 1.0, math.nan), "inverse_slope: center must lie in"),
        (lambda: sched.polynomial(1.0, 0.0, 0, 1, 0.0), "polynomial: power must lie in"),
        (lambda: sched.anneal_decay(0.1, sched.constant(1.0), 1.5), "fraction must lie in"),
        (lambda: sched.anneal_decay(0.1, sched.constant(1.0), -0.1), "fraction must lie in"),
        (lambda: sched.anneal_decay(math.nan, sched.constant(1.0), 0.5), "weight_decay must lie"),
    ],
)  # fmt: skip
def test_bad_fields(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_bounds_that_hold() -> None:
    sched.anneal_decay(sched.constant(0.1), sched.constant(1.0), 0.0)
    sched.anneal_decay(torch.tensor(0.1), sched.constant(1.0), 1.0)
    sched.exponential(-1.0, -0.5, 0, 1)
    sched.piecewise((1.0,), ())


def test_a_schedule_must_define_its_value() -> None:
    with pytest.raises(NotImplementedError, match="Schedule must define __call__"):
        sched.Schedule()(0)


def test_a_boundary_belongs_to_what_follows() -> None:
    steps = torch.tensor([0, 9, 10, 11, 19, 20, 21])
    values = sched.piecewise((1.0, 2.0, 3.0), (10, 20))(steps)
    assert values.tolist() == [1, 1, 2, 2, 2, 3, 3]
    ramp = sched.linear(0.0, 1.0, 0, 1)
    joined = sched.join((sched.constant(7.0), ramp, ramp), (10, 20))(steps)
    assert joined.tolist() == [7, 7, 0, 1, 1, 0, 1]


def test_warmup_rises_to_the_first_value_and_continues_from_it() -> None:
    schedule = sched.warmup(sched.linear(8.0, 0.0, 0, 4), 4, init=2.0)
    values = schedule(torch.arange(10))
    assert values.tolist() == [2, 3.5, 5, 6.5, 8, 6, 4, 2, 0, 0]
    assert sched.warmup(sched.constant(0.1), 10).init == 0


def test_the_first_step_takes_the_whole_weight_decay() -> None:
    slope = sched.linear(0.5, 0.0, 0, 2)
    decay = sched.anneal_decay(0.1, slope, 0.5)(torch.arange(5))
    torch.testing.assert_close(decay / 0.1, torch.tensor([1, 0.75, 0.625, 0.5, 0.5]).double())


@pytest.mark.parametrize("path", PATHS)
def test_the_ends_are_met_exactly(path) -> None:
    values = path(0.7, 0.1, 3, 10)(torch.tensor([0, 3, 10, 99]))
    torch.testing.assert_close(values, torch.tensor([0.7, 0.7, 0.1, 0.1]).double())


def test_defaults() -> None:
    assert sched.inverse_slope(0, 1) == sched.inverse_slope(0, 1, 10.0, 0.5)
    assert sched.polynomial(1.0, 0.0, 0, 1) == sched.polynomial(1.0, 0.0, 0, 1, 1.0)


@pytest.mark.parametrize("center", [-0.4, 1.4])
def test_centers_beyond_the_window(center: float) -> None:
    """The formula as it is defined, where it does not overflow."""

    def h(x: float) -> float:
        return 1 / (1 + math.exp(8 * (x - center)))

    values = sched.inverse_slope(0, 10, 8.0, center)(torch.arange(11))
    expected = [(h(t / 10) - h(1)) / (h(0) - h(1)) for t in range(11)]
    assert values.tolist() == pytest.approx(expected, abs=1e-12)


def test_boundaries_that_cannot_be_read_are_not_compared() -> None:
    def value(boundary):
        return sched.piecewise((1.0, 2.0, 3.0), (boundary, 5))(torch.tensor([2, 4, 6]))

    values = torch.vmap(value)(torch.tensor([3.0, 5.0]))
    assert values.tolist() == [[1, 2, 3], [1, 1, 3]]


# Found by attack, each with the input that showed it.


def test_a_schedule_may_return_a_number() -> None:
    optimizer = pf.sgd(lambda step: 0.5)
    params = {"w": torch.ones(1)}
    assert optimizer.update(params, optimizer.init(params), params)[0]["w"] == -0.5


def test_small_exponential_paths_do_not_underflow_in_the_check() -> None:
    path = pf.schedules.exponential(1e-200, 1e-300, 0, 2)
    assert float(path(1)) == pytest.approx(1e-250)


def test_a_step_that_is_a_python_float_is_not_rounded_to_float32() -> None:
    """As torch.as_tensor rounds it: 0.1, and whole steps beyond 2^24."""
    for step in (0.1, 2.0**24 + 1, 250_000_000_000.0):
        for schedule in (sched.linear(1.0, 0.0, 0, 10**12), sched.inverse_slope(0, 10**12)):
            want = schedule(torch.tensor(step, dtype=torch.float64))
            assert torch.equal(schedule(step), want)
