"""Transformations: the laws of all, of prox links, and of random chains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

import parq_fn as pq
from parq_fn.testing import check_transformation, strategies
from tests.laws import some

SPAN: dict[str, Any] = {"anneal_start": 1, "anneal_end": 3}

PROX_LINKS = [
    pq.hard_prox(pq.lsbq(2), period=2, warmup=1),
    pq.hard_prox(
        pq.lsbq(1), period=1, granularity=pq.per_channel(), normal_map=1.0, learning_rate=0.1
    ),
    pq.hard_prox(pq.lsbq(0), period=1, shrink=True, learning_rate=2.0),
    pq.parq_prox(pq.lsbq(2), **SPAN, period=2),
    pq.parq_prox(pq.lsbq(0), **SPAN, period=1, warmup=1, clipped_start=True),
    pq.soft_prox(pq.uniform(2), **SPAN, period=1, granularity=pq.per_channel()),
    pq.binary_relax_prox(pq.lloyd_max(2), **SPAN, period=3),
    pq.proxquant_prox(pq.lsbq(1), **SPAN, period=1, strength=0.1),
    pq.hard_prox(
        pq.lsbq(2), period=2, shrink=True, learning_rate=2.0, gradient=pq.estimators.trust(0.5)
    ),
    pq.parq_prox(
        pq.lsbq(2),
        **SPAN,
        period=1,
        granularity=pq.per_channel(),
        gradient=pq.estimators.damped(0.3),
    ),
    pq.hard_prox(pq.uniform(2), warmup=1, period=2, gradient=pq.estimators.inside()),
    pq.hard_prox(pq.lsbq(0), period=1, gradient=pq.estimators.by_level()),
    pq.hard_prox(pq.uniform(2), period=2, warmup=1, learn=pq.sgd(0.1, momentum=0.5)),
    pq.parq_prox(
        pq.lsbq(2),
        **SPAN,
        period=1,
        granularity=pq.per_channel(),
        learn=pq.learn(pq.adam(0.1), gradient="map"),
    ),
    pq.soft_prox(pq.lloyd_max(1, symmetric=False), **SPAN, period=1, learn=pq.sgd(0.1)),
    pq.hard_prox(
        pq.integer(2),
        period=1,
        learn=pq.learn(pq.sgd(0.1), gradient="lsq"),
        gradient=pq.estimators.inside(),
    ),
    pq.hard_prox(pq.uniform(2), period=1, pull=0.5, learning_rate=0.1),
    pq.hard_prox(pq.uniform(2), period=1, hold=pq.oscillation(0.1, momentum=0.5)),
]

LEARNED = pq.chain(pq.sgd(0.1), pq.hard_prox(pq.uniform(2), period=1, learn=pq.sgd(0.1)))
DAMPED = pq.chain(
    pq.sgd(0.1, 0.9), pq.hard_prox(pq.lsbq(1), period=1, gradient=pq.estimators.damped(0.5))
)


@pytest.mark.rare
@pytest.mark.parametrize("link", PROX_LINKS, ids=repr)
@pytest.mark.laws
def test_prox_links(link: Any) -> None:
    check_transformation(link, max_examples=some(5))


LINKS = [
    pq.identity(),
    pq.freeze(),
    pq.sgd(0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    pq.adam(0.1, amsgrad=True),
    pq.adamw(0.1),
    pq.add_noise(0.1),
    pq.monitor_flips(DAMPED),
    pq.lookahead(pq.sgd(0.1), 2),
    pq.schedule_free(pq.sgd(0.1, weight_decay=0.1)),
    pq.lion(0.1, weight_decay=0.1),
    pq.partition(
        {"a": pq.muon(0.1), "b": pq.identity()}, lambda _, leaf: "a" if leaf.dim() == 2 else "b"
    ),
    pq.chain(pq.clip_by_global_norm(1.0), pq.clip(0.5), pq.sgd(0.1)),
    pq.accumulate(pq.chain(pq.sgd(0.1, 0.9), pq.hard_prox(pq.lsbq(1), period=1)), 2),
    pq.apply_if_finite(pq.chain(pq.adam(0.1), pq.hard_prox(pq.lsbq(1), period=1))),
    pq.named_chain(base=pq.sgd(0.1), prox=pq.parq_prox(pq.lsbq(2), **SPAN, period=1)),
    pq.partition({"a": pq.adam(0.1), "b": pq.freeze()}, lambda n, _: "a" if n == "w0" else "b"),
    pq.masked(pq.hard_prox(pq.lsbq(1), period=1), lambda name, _: name == "w0"),
    pq.as_link(torch.optim.RMSprop, lr=0.1, momentum=0.9),
    pq.averaged(DAMPED, 0.9),
    pq.apply_if_finite(pq.sgd(0.1, 0.9), limit=1),
    pq.conditionally(DAMPED, lambda t: t % 3 != 1),
    pq.averaged(pq.adam(0.1), lambda t: t / (t + 1)),
    pq.accumulate(DAMPED, 2),
    pq.apply_if_finite(DAMPED),
    LEARNED,
    pq.accumulate(LEARNED, 2),
    pq.apply_if_finite(pq.chain(pq.clip(0.5), LEARNED)),
    pq.chain(pq.clip(0.5), pq.masked(DAMPED, lambda name, _: name == "w0")),
    pq.partition({"a": DAMPED, "b": pq.freeze()}, lambda n, _: "a" if n == "w0" else "b"),
]


@pytest.mark.rare
@pytest.mark.parametrize("link", LINKS, ids=lambda link: type(link).__name__)
@pytest.mark.laws
def test_links(link: Any) -> None:
    check_transformation(link, max_examples=some(5))


@given(strategies.transformations())
def test_random_chains(transform: Any) -> None:
    check_transformation(transform, max_examples=1)


@pytest.mark.slow
@pytest.mark.laws
def test_blocks() -> None:
    """A granularity that cannot cut every leaf: the params are given."""
    link = pq.hard_prox(pq.lsbq(1), granularity=pq.per_block(2), period=1)
    leaf = strategies.numbers().map(lambda x: torch.tensor([[x, 1.0], [2.0, -x]]).double())
    params = leaf.map(lambda w: {"w0": w})
    check_transformation(link, params=params, max_examples=some(5))
