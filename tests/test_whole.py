"""Qparams of a whole tensor: nvfp4, and that what is fitted together is all of one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from parq_fn.optim.engine.passes import refit
from parq_fn.testing import Violation, check_quantizer
from tests.processes import on_processes

NVFP4 = pf.nvfp4()
BLOCKS = {"granularity": pf.per_block(16), "period": 1}


def weights(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    """Of sizes that differ from one to the next, and in each from row to row."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    return [10.0**-i * w * torch.logspace(-1, 1, len(w))[:, None] for i, w in enumerate(found)]


def test_the_scale_of_a_tensor_is_of_all_of_its_rows() -> None:
    (w,) = weights((8, 32))
    rows = pf.per_block(16).rows(w)
    qparams = NVFP4.fit(rows)
    top = w.abs().max() / (6 * 448)
    assert torch.equal(qparams[:, 1], top.expand(16))
    scale = (rows.abs().amax(-1) / 6 / top).clamp(min=2**-9).to(torch.float8_e4m3fn).float()
    assert torch.equal(NVFP4.block_scale(qparams)[:, 0], scale)
    table = torch.tensor(pf.codebook.fp4.table)
    assert torch.equal(NVFP4(rows), (scale * top)[:, None] * table)
    assert NVFP4(rows).abs().max() <= w.abs().max() * (1 + 2**-20)


def test_some_rows_are_fitted_with_the_scale_of_all() -> None:
    (rows,) = weights((6, 16))
    whole = torch.maximum(NVFP4.whole(rows[:2]), NVFP4.whole(rows[2:]))
    assert torch.equal(whole, NVFP4.whole(rows))
    assert torch.equal(NVFP4.fit(rows[:2], whole), NVFP4.fit(rows)[:2])
    assert not torch.equal(NVFP4.fit(rows[:2]), NVFP4.fit(rows)[:2])


def test_rows_that_are_not_finite_leave_the_others_alone() -> None:
    (rows,) = weights((5, 16))
    bad = rows.clone()
    bad[4, 3], bad[1, 0] = torch.nan, torch.inf
    left = torch.tensor([0, 2, 3])
    assert torch.equal(NVFP4.fit(bad)[left], NVFP4.fit(rows[left]))
    assert bool(NVFP4.fit(bad)[[1, 4]].isnan().all())
    assert torch.equal(NVFP4.whole(bad[[1, 4]]), torch.zeros(1, 1))


def test_no_rows_and_rows_of_zeros() -> None:
    assert NVFP4.fit(torch.zeros(0, 16)).shape == (0, 2)
    assert not NVFP4(torch.zeros(3, 16)).any()
    rows = torch.tensor([[0.0] * 16, [3.0] * 16])
    levels = NVFP4(rows)
    assert bool((levels == 0).any(-1).all())
    assert levels[0, -1] > 0  # the least scale of eight bits
    assert not NVFP4.nearest(rows, levels)[0].any()


def test_quantizers_of_rows_alone_have_nothing_of_the_whole() -> None:
    rows = torch.ones(2, 3)
    for quantizer in (pf.lsbq(2), pf.mxfp4(), pf.centered(pf.uniform(2))):
        assert quantizer.num_whole == 0
        assert quantizer.whole(rows).shape == (1, 0)
        assert torch.equal(quantizer.fit(rows, quantizer.whole(rows)), quantizer.fit(rows))
    with pytest.raises(ValueError, match=r"centered: nvfp4\(\) has qparams of the whole tensor"):
        pf.centered(NVFP4)
    with pytest.raises(ValueError, match="rounds its qparams already"):
        pf.stored(NVFP4, torch.float16)


@pytest.mark.slow
def test_a_quantizer_of_ones_own_with_a_scale_of_the_tensor() -> None:
    class shared(pf.Quantizer):
        num_levels, num_qparams, num_whole = 2, 2, 1

        def qparams(self, x: Tensor) -> Tensor:
            return x.mean(-1, keepdim=True)

        def whole(self, x: Tensor) -> Tensor:
            return x.abs().amax().reshape(1, 1)

        def levels(self, qparams: Tensor) -> Tensor:
            mean, top = qparams[:, :1], qparams[:, 1:]
            return torch.cat([mean - top, mean + top], -1)

    class wrong(shared):
        def qparams(self, x: Tensor) -> Tensor:
            return torch.cat([x, x], -1)[:, :2]

    assert shared()(torch.tensor([[1.0, 3.0], [0.0, -8.0]])).tolist() == [[-6, 10], [-12, 4]]
    rows = torch.tensor([[1.0, 3.0], [0.0, -8.015625]])  # rounded: -8.0, and a mean of -4.0
    assert pf.stored(shared(), torch.bfloat16)(rows).tolist() == [[-6, 10], [-12, 4]]
    with pytest.raises(ValueError, match=r"expected \(1, 1\): \[r, num_qparams - num_whole\]"):
        wrong()(torch.ones(1, 2))
    with pytest.raises(Violation, match="rows_alone"):
        check_quantizer(NVFP4, laws={"rows_alone"}, max_examples=100)


# In training


def test_parameters_that_are_fitted_together_keep_their_own() -> None:
    latents = weights((4, 32), (2, 16), (4, 16))
    link = pf.hard_prox(NVFP4, **BLOCKS)
    state = link.advance(link.init(latents), torch.zeros(()))
    found = refit(link, state, latents, state.qparams)
    for latent, got in zip(latents, found, strict=True):
        assert got.shape == (latent.shape[0], latent.shape[1] // 16, 2)
        assert torch.equal(got.flatten(0, -2), NVFP4.fit(pf.per_block(16).rows(latent)))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(32, 6), nn.Tanh(), nn.Linear(6, 16), nn.Linear(16, 3)).double()
    with torch.no_grad():
        made[2].weight.mul_(5)
    return made


LINK = pf.hard_prox(NVFP4, period=2, granularity=pf.per_channel(), learning_rate=0.05)


def adapter(model: nn.Module, **options: Any) -> QuantOptimizer:
    matrices = {"params": [p for p in model.parameters() if p.dim() > 1], "quant_bits": 4}
    rest = {"params": [p for p in model.parameters() if p.dim() < 2]}
    return QuantOptimizer(torch.optim.SGD([matrices, rest], lr=0.05), LINK, **options)


def losses(model: nn.Module, optimizer: Any, steps: int = 6) -> list[Tensor]:
    x = torch.randn(4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def in_shards() -> None:
    """Each rank maps its own rows with the scale that all of them have."""
    mesh = init_device_mesh("cpu", (2,))
    params = {"w": weights((5, 32))[0]}
    split = {"w": distribute_tensor(params["w"], mesh, [Shard(0)])}
    step = pf.chain(pf.sgd(0.1), pf.parq_prox(NVFP4, anneal_start=0, anneal_end=3, **BLOCKS))
    ours, theirs = step.init(params), step.init(split)
    for _ in range(5):
        grads = {"w": torch.cos(step.weights(ours, params)["w"])}
        update, ours = step.update(grads, ours, params)
        params = pf.apply_updates(params, update)
        grads = {"w": torch.cos(step.weights(theirs, split)["w"])}
        update, theirs = step.update(grads, theirs, split)
        split = pf.apply_updates(split, update)
        whole = step.weights(theirs, split)["w"].full_tensor()
        assert torch.equal(whole, step.weights(ours, params)["w"])
    assert torch.equal(pf.read(ours, "qparams")["w"], pf.read(theirs, "qparams")["w"].full_tensor())


def under_fsdp2() -> None:
    alone, split = net(), net()
    fully_shard(split, mesh=init_device_mesh("cpu", (2,)))
    for p, q in zip(losses(alone, adapter(alone)), losses(split, adapter(split)), strict=True):
        whole = q.full_tensor() if isinstance(q, DTensor) else q
        assert torch.equal(p, whole)


@pytest.mark.slow
def test_shards_have_the_scale_of_the_whole(tmp_path: Path) -> None:
    on_processes(in_shards, 2, tmp_path)
    on_processes(under_fsdp2, 2, tmp_path)


@pytest.mark.rare
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapters_equal_the_functional_loop(compile: bool) -> None:
    one, other = net(), net()
    mine = adapter(one, compile=compile)
    transform = pf.chain(pf.sgd(0.05), pf.masked(LINK, pf.weight_mask(other)))
    theirs = TransformOptimizer(other.named_parameters(), transform)
    for p, q in zip(losses(one, mine), losses(other, theirs), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9)
    for p in (p for p in one.parameters() if p.dim() > 1):
        levels = mine.levels(p)
        assert bool((p.unsqueeze(-1) == levels.unsqueeze(-2)).any(-1).all())


def test_a_batch_is_a_tensor_each() -> None:
    """vmap over params: each has a scale of its own."""
    several = torch.stack(weights((4, 16), (4, 16), (4, 16)))
    link = pf.hard_prox(NVFP4, **BLOCKS)

    def trained(w: Tensor) -> tuple[Tensor, Tensor]:
        state = link.init(w)
        _, state = link.update(torch.zeros_like(w), state, w)
        return state.qparams, link.weights(state, w)

    together = torch.vmap(trained)(several)
    alone = [trained(w) for w in several]
    for i, found in enumerate(together):
        assert torch.equal(found, torch.stack([each[i] for each in alone]))
    assert len(set(together[0][:, 0, 0, 1].tolist())) == 3


def test_gradients_are_finite() -> None:
    (rows,) = weights((4, 16))
    rows[1] = 0
    for x in (rows, torch.zeros(2, 16)):
        slope = torch.func.grad(lambda x: NVFP4.levels(NVFP4.fit(x)).square().sum())(x)
        assert bool(slope.isfinite().all())
