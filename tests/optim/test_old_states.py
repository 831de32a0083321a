"""States that kept a row's levels load, with the weights that they were saved with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from parq_fn.optim.old_states import qparams_of
from tests.helpers import sampled

QUANTIZERS = [
    pf.uniform(1), pf.uniform(4), pf.uniform(8), pf.max_uniform(3), pf.ternary_uniform(),
    pf.lsbq(0), pf.lsbq(1), pf.lsbq(3), pf.lsbq(2, "optimal"), pf.lloyd_max(2),
    pf.lloyd_max(2, symmetric=False), pf.asymmetric(1), pf.uniform(2, center=True),
    pf.lsbq(1, center=True),
]  # fmt: skip
CUTS = [pf.per_tensor(), pf.per_channel(), pf.per_block(4)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LEVELS = {id(q): q for q in QUANTIZERS}


@given(
    st.sampled_from([q for q in QUANTIZERS if q.num_qparams == 1]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**20),
    st.integers(-8, 3),
)
def test_a_scale_is_solved_from_its_levels(quantizer: Any, dtype, seed: int, power: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 9, generator=generator, dtype=torch.float64) * 2.0**power
    rows[1] = 0
    levels = quantizer.levels_in(quantizer.fit(rows.to(dtype)), dtype)
    qparams = qparams_of(levels, quantizer)
    assert qparams.shape == (5, 1)
    assert torch.equal(quantizer.levels_in(qparams, dtype), levels)


def saved_before(optimizer: Any) -> dict[str, Any]:
    """The state dict that a version which kept levels would have saved."""
    state = optimizer.state_dict()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, entries in zip(params, state["state"].values(), strict=True):
        for key in [key for key in entries if key.endswith("qparams")]:
            dtype = p.dtype if isinstance(optimizer, QuantOptimizer) else entries["latent"].dtype
            own = optimizer.prox if isinstance(optimizer, QuantOptimizer) else link_of(optimizer)
            levels = own.quantizer.levels_in(entries.pop(key).unsqueeze(0).flatten(0, -2), dtype)
            entries[key.replace("qparams", "levels")] = levels
    return state


def link_of(optimizer: TransformOptimizer) -> Any:
    return optimizer.transformation.links[-1]


def step(optimizer: Any, p: Tensor, t: int) -> None:
    p.grad = torch.sin(torch.arange(p.numel()) + t).reshape(p.shape).to(p.dtype)
    optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["quantized", "transformed"])
@pytest.mark.parametrize(
    ("quantizer", "cut", "dtype"),
    sampled([(q, c, d) for q in QUANTIZERS for c in CUTS for d in DTYPES], 28),
    ids=str,
)
def test_weights_are_the_same_after_loading_as_before_saving(
    adapter, quantizer, cut, dtype
) -> None:
    """Until the next fit, and from then on as of one that was never saved."""
    link = pf.parq_prox(quantizer, anneal_start=1, anneal_end=9, period=3, granularity=cut)

    def made(p: nn.Parameter) -> Any:
        if adapter == "quantized":
            group = {"params": [p], "quant_bits": getattr(quantizer, "bits", 0)}
            return QuantOptimizer(torch.optim.SGD([group], lr=0.1), link)
        return TransformOptimizer([("w", p)], pf.chain(pf.sgd(0.1), link))

    first = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    one, other = nn.Parameter(first.clone()), nn.Parameter(torch.zeros_like(first))
    before, after = made(one), made(other)
    for t in range(5):
        step(before, one, t)
    if adapter == "quantized":
        assert before.link(before.param_groups[0]).quantizer == quantizer
    other.data.copy_(one.detach())
    after.load_state_dict(saved_before(before))
    assert torch.equal(after.levels(other), before.levels(one))
    again = made(nn.Parameter(first.clone()))
    again.load_state_dict(after.state_dict())  # saved once more before the next fit
    for t in range(5, 9):
        for optimizer, p in ((before, one), (after, other)):
            step(optimizer, p, t)
        assert torch.equal(other, one)
        assert torch.equal(after.levels(other), before.levels(one))
    kept = next(got for key, got in after.state[other].items() if key.endswith("qparams"))
    assert kept.shape == (*cut.row_shape(other), quantizer.num_qparams)
