"""The training step against its scalar twin, and the laws of trajectories that need one."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import parq_fn as pq
from parq_fn.testing import strategies
from tests.twins import proxmaps as maps
from tests.twins import quantizers as levels
from tests.twins import schedules
from tests.twins.training import aprox

STEPS, START, END = 12, 2, 9


def gradient(weights: list[float], t: int) -> list[float]:
    """Of a quadratic whose center drifts."""
    return [w - (0.3 * (i + 1) - 0.05 * t) for i, w in enumerate(weights)]


def ours(transform: Any, start: list[float]) -> Any:
    params = {"w": torch.tensor(start, dtype=torch.float64)}
    state = transform.init(params)
    for t in range(STEPS):
        w = transform.weights(state, params)["w"].tolist()
        grads = {"w": torch.tensor(gradient(w, t), dtype=torch.float64)}
        updates, state = transform.update(grads, state, params)
        params = pq.apply_updates(params, updates)
        q = pq.levels_of(transform, state)["w"]
        yield params["w"].tolist(), q.tolist(), transform.weights(state, params)["w"].tolist()


def linear(t: int) -> float:
    return min(max((t - START) / (END - START), 0.0), 1.0)


def hard_after(map_: Any, u: float, q: list[float], c: float) -> float:
    return maps.hard(u, q) if c == float("inf") else map_(u, q, c)


SPAN: dict[str, Any] = {"anneal_start": START, "anneal_end": END}
SLOPE = partial(schedules.inverse_slope, start=START, end=END, steepness=7.0, center=0.4)
CASES = [
    (
        partial(pq.parq_prox, **SPAN, steepness=7.0, center=0.4),
        {"proxmap": maps.parq, "schedule": SLOPE, "start": START},
    ),
    (
        partial(pq.binary_relax_prox, **SPAN),
        {"proxmap": maps.binary_relax, "schedule": linear, "start": START},
    ),
    (
        partial(pq.proxquant_prox, **SPAN, strength=0.2),
        {
            "proxmap": partial(hard_after, maps.proxquant),
            "schedule": lambda t: float("inf") if t >= END else 0.2 * linear(t),
            "start": START,
        },
    ),
    (
        partial(pq.soft_prox, **SPAN, end_temperature=20.0),
        {
            "proxmap": maps.soft,
            "schedule": lambda t: float("inf") if t >= END else 1 + 19 * linear(t),
            "start": START,
        },
    ),
    (
        pq.hard_prox,
        {"proxmap": lambda u, q, _: maps.hard(u, q), "schedule": lambda _: 0.0, "start": 0},
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("link", "twin"), CASES, ids=["parq", "relax", "proxquant", "soft", "hard"]
)
@given(
    start=st.lists(strategies.numbers(-2.0, 2.0), min_size=2, max_size=4),
    period=st.integers(1, 4),
    warmup=st.integers(0, 4),
    bits=st.integers(0, 2),
    gamma=st.sampled_from((None, 0.5, 10.0)),
)
def test_equals_the_scalar_training(
    link: Any, twin: dict[str, Any], start: Any, period: int, warmup: int, bits: int, gamma: Any
) -> None:
    rate, momentum, decay = 0.17, 0.6, 0.01
    prox = link(
        pq.lsbq(bits),
        period=period,
        warmup=warmup,
        normal_map=gamma,
        learning_rate=None if gamma is None else rate,
    )
    transform = pq.chain(pq.sgd(rate, momentum=momentum, weight_decay=decay), prox)
    expected = aprox(
        start,
        gradient,
        STEPS,
        quantizer=partial(levels.lsbq_greedy, bits=bits),
        period=period,
        warmup=warmup,
        rate=rate,
        momentum=momentum,
        decay=decay,
        gamma=gamma,
        **twin,
    )
    for (u, q, w), (u_twin, q_twin, w_twin) in zip(ours(transform, start), expected, strict=True):
        assert u == pytest.approx(u_twin, abs=1e-9)
        if q_twin:
            assert q == pytest.approx(q_twin, abs=1e-9)
        tied = [near_tie(x, q_twin) for x in u_twin]
        if any(tied):  # from here on the trajectories may part
            return
        assert w == pytest.approx(w_twin, abs=1e-7)


def near_tie(u: float, q: list[float]) -> bool:
    middles = [(a + b) / 2 for a, b in pairwise(q)]
    return any(abs(u - c) < 1e-9 for c in middles)


@given(st.lists(strategies.numbers(-2.0, 2.0), min_size=2, max_size=4), st.integers(0, 2))
def test_normal_map_with_gamma_the_rate_is_proximal_sgd(start: list[float], bits: int) -> None:
    """u <- w - lr g: the step is taken from the weights, as ProxQuant takes it."""
    rate = 0.1
    prox = pq.hard_prox(pq.lsbq(bits), period=1, normal_map=rate, learning_rate=rate)
    w_before = start
    for t, (u, _, w) in enumerate(ours(pq.chain(pq.sgd(rate), prox), start)):
        grads = gradient(w_before, t)
        stepped = [a - rate * g for a, g in zip(w_before, grads, strict=True)]
        assert u == pytest.approx(stepped, abs=1e-12)
        w_before = w


@given(st.lists(strategies.numbers(-2.0, 2.0), min_size=2, max_size=4))
def test_normal_map_with_a_large_gamma_is_aprox(start: list[float]) -> None:
    span = {**SPAN, "steepness": 3.0}  # a gentle slope: parq alone is continuous in u
    rate = 0.1
    plain = pq.parq_prox(pq.lsbq(1), **span, period=100)
    far = pq.parq_prox(pq.lsbq(1), **span, period=100, normal_map=1e12, learning_rate=rate)
    pairs = zip(
        ours(pq.chain(pq.sgd(rate), plain), start),
        ours(pq.chain(pq.sgd(rate), far), start),
        strict=True,
    )
    for t, ((u, _, _), (other, _, _)) in enumerate(pairs):
        if t < END - 2:
            assert u == pytest.approx(other, abs=1e-6)
