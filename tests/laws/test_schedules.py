"""Schedules: every declared law, and the slow twin of the inverse slope."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from parq_fn import schedules as sched
from parq_fn.testing import Violation, check_schedule, laws, strategies
from tests.laws import some
from tests.twins import schedules as twins

OPERATORS = [
    sched.inverse_slope(0, 100),
    sched.inverse_slope(3, 4, 1.0),
    sched.inverse_slope(5, 50, 100.0, 0.2),
    sched.inverse_slope(5, 50, 2000.0, 0.0),
    sched.inverse_slope(0, 7, 2000.0, 1.0),
    sched.inverse_slope(0, 50, 1e-6, 0.3),
    sched.linear(1.0, 0.0, 0, 9),
    sched.linear(-0.1, 3.0, 2, 9),
    sched.cosine(1.0, 0.0, 3, 10),
    sched.cosine(0.0, 2.0, 0, 10),
    sched.exponential(1.0, 0.01, 0, 10),
    sched.exponential(-2.0, -0.3, 3, 11),
    sched.polynomial(1.0, 0.0, 0, 10, power=3.0),
    sched.polynomial(1.0, 1000.0, 1, 10),
    sched.constant(0.3),
    sched.piecewise((1.0, 0.1), (10,)),
    sched.join((sched.constant(1.0), sched.linear(1.0, 0.0, 0, 5)), (4,)),
    sched.warmup(sched.cosine(1.0, 0.0, 0, 10), 5),
    sched.anneal_decay(0.1, sched.inverse_slope(0, 10), 0.5),
]


@pytest.mark.parametrize("schedule", OPERATORS, ids=repr)
@pytest.mark.laws
def test_every_declared_law(schedule: Any) -> None:
    check_schedule(schedule, max_examples=some(10))


@given(strategies.schedules())
def test_random_schedules(schedule: Any) -> None:
    check_schedule(schedule, max_examples=3)


@given(
    st.integers(0, 30),
    st.integers(1, 40),
    st.floats(1e-4, 5000.0),
    st.floats(0.0, 1.0),
    st.floats(-0.2, 1.2),
)
@example(0, 10, 5000.0, 0.0, 0.5)
@example(0, 10, 1e-4, 1.0, 0.5)
def test_inverse_slope_equals_its_twin(
    start: int, span: int, steepness: float, center: float, share: float
) -> None:
    step = start + round(share * span)
    got = sched.inverse_slope(start, start + span, steepness, center)(step).item()
    want = twins.inverse_slope(step, start, start + span, steepness, center)
    assert got == pytest.approx(want, rel=1e-9, abs=1e-15)


def test_compiled_steps_give_the_same_values() -> None:
    schedule = sched.inverse_slope(2, 12, 10.0, 0.3)
    compiled = torch.compile(schedule, backend="eager", fullgraph=True)
    steps = torch.arange(15)
    assert torch.equal(compiled(steps), schedule(steps))


def test_a_law_that_must_not_hold_does_not() -> None:
    off_center = sched.inverse_slope(0, 10, 10.0, 0.3)
    with pytest.raises(Violation, match="antisymmetric"):
        check_schedule(off_center, laws={"antisymmetric"}, max_examples=200)


def test_all_laws_are_declared_by_some_schedule() -> None:
    declared = {law.name for s in OPERATORS for law in laws.for_schedule(s)}
    assert declared == {law.name for law in laws.ALL["schedule"]}
