"""What QuantOptimizer costs in memory: a latent and levels a parameter, and in a step what the
largest parameter needs, however many there are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import parq_fn as pf
from parq_fn.optim import QuantOptimizer

SPAN: dict[str, Any] = {"anneal_start": 0, "anneal_end": 20, "period": 2}
LARGEST = 256 * 128
#: (link, the largest parameters that a step may hold besides the state, in its latent's dtype)
LINKS: dict[str, tuple[pf.Prox, float]] = {
    "hard": (pf.hard_prox(pf.uniform(2), period=2), 7),
    "parq": (pf.parq_prox(pf.lsbq(2), **SPAN), 9),
    "channel": (pf.parq_prox(pf.lsbq(2), **SPAN, granularity=pf.per_channel()), 9),
    "normal_map": (pf.parq_prox(pf.lsbq(2), **SPAN, normal_map=3.0), 9),
    "soft": (pf.soft_prox(pf.lsbq(2), **SPAN), 11),
    "optimal": (pf.parq_prox(pf.lsbq(2, "optimal"), **SPAN), 22),
    "lloyd_max": (pf.binary_relax_prox(pf.lloyd_max(2), **SPAN), 26),
}


def peak(work: Callable[[], Any]) -> int:
    """The most bytes held at once by tensors made during the work."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def training(link: pf.Prox, count: int, dtype: torch.dtype) -> tuple[QuantOptimizer, list[Tensor]]:
    torch.manual_seed(0)
    shapes = [(256, 128), *[(64, 128)] * count]
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    base = torch.optim.AdamW([{"params": params, "quant_bits": 2}], lr=0.01, foreach=False)
    return QuantOptimizer(base, link), params


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LINKS)
def test_a_step_holds_what_the_largest_parameter_needs(name: str, dtype: torch.dtype) -> None:
    link, bound = LINKS[name]
    most = []
    for count in (4, 24):
        optimizer, params = training(link, count, dtype)
        steps = []
        for _ in range(4):  # with and without a fit; base state is made in the first
            for p in params:
                p.grad = torch.ones_like(p)
            steps.append(peak(optimizer.step))
        most.append(max(steps[1:]))
    assert most[1] <= 1.05 * most[0]
    assert most[1] <= bound * LARGEST * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_is_the_base_optimizers_and_one_latent_and_levels(dtype: torch.dtype) -> None:
    optimizer, params = training(LINKS["channel"][0], 3, dtype)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for p in params:
        entries = dict(optimizer.state[p])
        latent, levels = entries.pop("latent"), entries.pop("levels")
        assert latent.shape == p.shape
        assert latent.dtype == torch.float32
        assert levels.shape == (p.shape[0], 4)
        assert levels.dtype == dtype
        assert optimizer.base.state[optimizer._latents[p]] is optimizer.state[p]
        whole = {key for key, entry in entries.items() if entry.numel() > 1}
        assert whole == {"exp_avg", "exp_avg_sq"}
