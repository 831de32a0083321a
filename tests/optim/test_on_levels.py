"""share_on_levels: against its definition, over groups, cuts and dtypes."""

from __future__ import annotations

import pytest
import torch

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, share_on_levels
from tests.helpers import sampled

CUTS = {
    "tensor": pf.per_tensor(),
    "channel": pf.per_channel(),
    "inputs": pf.per_channel(axis=1),
    "block": pf.per_block(4),
}


@pytest.mark.parametrize("cut", sampled(CUTS, 2))
@pytest.mark.parametrize("dtype", sampled([torch.float32, torch.bfloat16, torch.float64], 1))
def test_it_counts_the_weights_that_are_equal_to_a_level(cut: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q, bias = (
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape in ((6, 8), (4, 8), (6,))
    )
    groups = [{"params": [p, q], "quant_bits": 2}, {"params": [bias]}]
    link = pf.soft_prox(pf.lsbq(2), anneal_start=0, anneal_end=9, granularity=CUTS[cut])
    optimizer = QuantOptimizer(torch.optim.SGD(groups, lr=0.1), link)
    assert share_on_levels(optimizer) == 0.0  # none are fitted yet
    for _ in range(3):
        for one in (p, q, bias):
            one.grad = torch.ones_like(one)
        optimizer.step()
    with torch.no_grad():  # some of p's weights are put on a level
        rows = CUTS[cut].rows(p)
        rows[:, 0] = optimizer.levels(p).unsqueeze(0).flatten(0, -2)[:, -1]
        p.copy_(CUTS[cut].restore(rows, p))
    on = total = 0
    for one in (p, q):
        rows = CUTS[cut].rows(one.detach())
        levels = optimizer.levels(one).unsqueeze(0).flatten(0, -2)
        on += sum(int(w in own) for row, own in zip(rows, levels, strict=True) for w in row)
        total += one.numel()
    assert 0 < on < total
    assert share_on_levels(optimizer) == on / total


def test_what_has_no_share_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(2, 2))
    base = torch.optim.SGD([p], lr=0.1)
    with pytest.raises(TypeError, match=r"expected a QuantOptimizer or a .*, got SGD"):
        share_on_levels(base)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the optimizer quantizes no weights"):
        share_on_levels(QuantOptimizer(base))
