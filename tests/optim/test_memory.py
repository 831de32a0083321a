"""What the adapters cost in memory: a latent and levels a parameter, and in a step what the
largest parameter needs, however many there are."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from tests.benchmarks.measure import peak
from tests.helpers import sampled

SPAN: dict[str, Any] = {"anneal_start": 0, "anneal_end": 20, "period": 2}
LARGEST = 1024 * 512
#: (link, the largest parameters that a step may hold besides the state, in its latent's dtype)
LINKS: dict[str, tuple[pf.Prox, float]] = {
    "hard": (pf.hard_prox(pf.uniform(2), period=2), 3.5),
    "parq": (pf.parq_prox(pf.lsbq(2), **SPAN), 3.5),
    "channel": (pf.parq_prox(pf.lsbq(2), **SPAN, granularity=pf.per_channel()), 3.5),
    "normal_map": (pf.parq_prox(pf.lsbq(2), **SPAN, normal_map=3.0), 4.5),
    "soft": (pf.soft_prox(pf.lsbq(2), **SPAN), 3.5),
    "optimal": (pf.parq_prox(pf.lsbq(2, "optimal"), **SPAN), 9),
    "lloyd_max": (pf.binary_relax_prox(pf.lloyd_max(2), **SPAN), 20.5),
    "trusted": (pf.hard_prox(pf.lsbq(2), period=2, gradient=pf.estimators.trust()), 6.5),
    "damped": (pf.hard_prox(pf.lsbq(2), period=2, gradient=pf.estimators.damped(0.1)), 3.75),
}


def training(
    link: pf.Prox, count: int, dtype: torch.dtype, **options: Any
) -> tuple[QuantOptimizer, list[Tensor]]:
    torch.manual_seed(0)
    shapes = [(1024, 512), *[(256, 512)] * count]
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    base = torch.optim.AdamW([{"params": params, "quant_bits": 2}], lr=0.01, foreach=False)
    return QuantOptimizer(base, link, **options), params


def stepping(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> Callable[[], None]:
    """Three steps, with and without a fit, after the first, in which torch makes state."""
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()

    def work() -> None:
        for _ in range(3):
            optimizer.step()

    return work


DTYPES = [torch.float32, torch.bfloat16]
NARROW = {"latent_dtype": torch.bfloat16}
#: (link, dtype of parameters, options)
CASES = [
    *sampled([(name, dtype, {}) for name in LINKS for dtype in DTYPES], 2),
    *sampled([(name, torch.bfloat16, NARROW) for name in LINKS], 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "options"), CASES)
def test_a_step_holds_what_the_largest_parameter_needs(
    name: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    link, bound = LINKS[name]
    bound += bool(options)  # the latent in float32
    most = []
    for count in (4, 24):

        def prepare(count: int = count) -> Callable[[], None]:
            optimizer, params = training(link, count, dtype, **options)
            return stepping(optimizer, params)

        most.append(peak(prepare))
    assert most[1] <= 1.05 * most[0]
    assert most[1] <= bound * LARGEST * 4


def steps_of(transform: Any, count: int, dtype: torch.dtype) -> int:
    """The most that a TransformOptimizer's steps hold."""

    def prepare() -> Callable[[], None]:
        torch.manual_seed(0)
        shapes = {"large": (1024, 512), **{f"small{i}": (256, 512) for i in range(count)}}
        params = {name: nn.Parameter(torch.randn(s, dtype=dtype)) for name, s in shapes.items()}
        optimizer = TransformOptimizer(params.items(), transform)
        return stepping(optimizer, list(params.values()))

    return peak(prepare)


TRANSFORMS: dict[str, tuple[Any, float]] = {
    "adamw": (pf.adamw(0.01), 8),
    "masked": (pf.chain(pf.adamw(0.01), pf.masked(LINKS["channel"][0], "small*")), 8),
    "partition": (
        pf.partition(
            {"q": pf.chain(pf.sgd(0.1, momentum=0.9), LINKS["parq"][0]), "rest": pf.sgd(0.1)},
            {"large": "q", "small1*": "q", "*": "rest"},
        ),
        13,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), sampled(itertools.product(TRANSFORMS, DTYPES), 1))
def test_so_does_a_step_of_a_transformation_that_takes_leaves_apart(
    name: str, dtype: torch.dtype
) -> None:
    transform, bound = TRANSFORMS[name]
    most = [steps_of(transform, count, dtype) for count in (4, 24)]
    assert most[1] <= 1.05 * most[0]
    assert most[1] <= bound * LARGEST * 4


@pytest.mark.slow
def test_one_that_looks_at_all_leaves_together_needs_them_together() -> None:
    transform = pf.chain(pf.clip_by_global_norm(1.0), pf.adamw(0.01))
    few, many = (steps_of(transform, count, torch.float32) for count in (4, 24))
    assert many > 3 * few


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.bfloat16, {}), (torch.bfloat16, NARROW)],
    ids=["float32", "bfloat16", "latents in bfloat16"],
)
def test_state_is_the_base_optimizers_and_one_latent_and_qparams(
    dtype: torch.dtype, options: dict[str, Any]
) -> None:
    optimizer, params = training(LINKS["channel"][0], 3, dtype, **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in params:
        entries = dict(optimizer.state[p])
        latent, qparams = entries.pop("latent"), entries.pop("qparams")
        assert latent.shape == p.shape
        assert latent.dtype == options.get("latent_dtype", torch.float32)
        assert qparams.shape == (p.shape[0], 2)
        assert qparams.dtype == torch.float32
        assert optimizer.levels(p).dtype == dtype
        assert optimizer.base.state[optimizer._latents[p]] is optimizer.state[p]
        whole = {key for key, entry in entries.items() if entry.numel() > 1}
        assert whole == {"exp_avg", "exp_avg_sq"}
