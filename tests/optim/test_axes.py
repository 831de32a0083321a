"""Rows along any dimensions in the adapters: the functional loop, compiled, and sharded."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from tests.helpers import every_other, sampled
from tests.processes import on_processes

RATE = 0.125  # a product with which is exact, however steps are written
SPAN: dict[str, Any] = {"anneal_start": 1, "anneal_end": 5, "period": 2}
CUTS = [
    pf.per_channel(1),
    pf.per_channel((0, 1)),
    pf.per_channel((0, -1)),
    pf.per_block(2, along=0),
    pf.per_block(4, along=(1, 2)),
    pf.per_block(4, along=(2, 1)),
    pf.per_block(3, along=1),
]


def weights(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]


def functional(prox: pf.Prox, params: list[Tensor], steps: int) -> tuple[Any, Any]:
    """(weights, qparams) after steps of SGD on latents in float32 or better."""
    link, tree = (
        pf.chain(pf.sgd(RATE), prox),
        [p.to(torch.promote_types(p.dtype, torch.float32)) for p in params],
    )
    state = link.init(tree)
    for _ in range(steps):
        updates, state = link.update([torch.sin(p) for p in tree], state, tree)
        tree = pf.apply_updates(tree, updates)
    return link.weights(state, tree), pf.read(state, "qparams")


def trained(optimizer: Any, params: list[Any], steps: int) -> None:
    """Steps whose gradients are the sines of the latents, which no weight enters."""
    for _ in range(steps):
        for p in params:
            entries = optimizer.state[p]
            latent = entries.get("latent", entries.get("prox.latent"))
            p.grad = torch.sin(p.detach() if latent is None else latent).to(p.dtype)
        optimizer.step()


def quant(params: Any, prox: pf.Prox, **options: Any) -> QuantOptimizer:
    groups = [{"params": params, "quant_bits": 2, "lr": RATE, **options.pop("group", {})}]
    return QuantOptimizer(torch.optim.SGD(groups), prox, **options)


@pytest.mark.rare
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cut", CUTS, ids=repr)
def test_adapters_equal_the_functional_loop(cut, dtype: torch.dtype) -> None:
    """Small parameters, which are mapped together, and large ones, piece by piece."""
    prox = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=cut)
    given = weights(dtype, (4, 6, 8), (2, 12, 4), (40, 24, 16), (300, 12, 200))
    for steps in (3, 7):
        expected, qparams = functional(prox, given, steps)
        params = [nn.Parameter(p.clone()) for p in given]
        optimizer = quant(params, prox)
        trained(optimizer, params, steps)
        for p, weight, own in zip(params, expected, qparams, strict=True):
            assert torch.equal(p, weight)
            assert torch.equal(optimizer.state[p]["qparams"], own)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("cut", CUTS, ids=repr)
def test_both_adapters_agree(cut, dtype: torch.dtype) -> None:
    prox = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=cut)
    given = weights(dtype, (4, 6, 8), (2, 12, 4))
    runs = []
    for adapter in ("QuantOptimizer", "TransformOptimizer"):
        params = [nn.Parameter(p.clone()) for p in given]
        if adapter == "QuantOptimizer":
            optimizer: Any = quant(params, prox)
        else:
            optimizer = TransformOptimizer(params, pf.chain(pf.sgd(RATE), prox))
        for _ in range(7):
            for p in params:
                p.grad = torch.sin(p.detach())
            optimizer.step()
        runs.append(params)
    assert all(map(torch.equal, *runs))


def test_conv1d_and_transposed_kernels_are_those_of_axis_0_transposed() -> None:
    prox = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=pf.per_channel(axis=1))
    of_first = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=pf.per_channel())
    given = weights(torch.float64, (12, 8), (8, 6, 3, 3))
    mine = [nn.Parameter(p.clone()) for p in given]
    other = [nn.Parameter(p.transpose(0, 1).contiguous()) for p in given]
    for params, link in ((mine, prox), (other, of_first)):
        optimizer = quant(params, link)
        trained(optimizer, params, 7)
    for p, q in zip(mine, other, strict=True):
        assert torch.equal(p, q.transpose(0, 1))
        assert p.is_contiguous()


@pytest.mark.parametrize("form", ["transposed", "channels_last"])
def test_memory_formats_change_nothing(form: str) -> None:
    prox = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=pf.per_channel(axis=1))
    (given,) = weights(torch.float32, (16, 32, 3, 3))
    runs = []
    for own in (given, None):
        if own is None:
            own = given.to(memory_format=torch.channels_last)
            own = (
                own
                if form == "channels_last"
                else given.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)
            )
        p = nn.Parameter(own.clone())
        trained(quant([p], prox), [p], 7)
        assert p.stride() == own.stride()
        runs.append(p)
    assert torch.equal(*runs)


@pytest.mark.rare
@pytest.mark.usefixtures("graphs_alone")
def test_compiled_weights_are_those_of_eager_mode() -> None:
    for cut in (pf.per_channel(1), pf.per_block(16, along=0)):
        prox = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=cut)
        given = weights(torch.float32, (64, 48), (512, 96), (16, 32))
        runs = []
        for compile in (False, True):
            params = [nn.Parameter(p.clone()) for p in given]
            optimizer = quant(params, prox, compile=compile)
            trained(optimizer, params, 7)
            runs.append(params)
        assert all(map(torch.equal, *runs))


def test_a_group_s_block_size_keeps_the_dimensions_of_the_link_s() -> None:
    (given,) = weights(torch.float64, (12, 8))
    for link, expected in (
        (pf.per_block(2, along=0), pf.per_block(4, along=0)),
        (pf.per_channel(1), pf.per_block(4)),
    ):
        prox = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=link)
        p = nn.Parameter(given.clone())
        optimizer = quant([p], prox, group={"quant_block_size": 4})
        assert optimizer.link(optimizer.param_groups[0]).granularity == expected
        trained(optimizer, [p], 7)
        own = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=expected)
        assert torch.equal(p, functional(own, [given], 7)[0][0])


def whole(got: Any) -> Any:
    return got.full_tensor() if isinstance(got, DTensor) else got


#: (shape, cuts): even and uneven shards of dimension 0, empty ones, blocks that shards cut.
SHARDED: list[tuple[tuple[int, ...], list[Any]]] = [
    ((6, 4), [pf.per_channel(1), pf.per_block(2, 0), pf.per_block(3, 0), pf.per_block(6, 0)]),
    ((5, 4), [pf.per_channel(1), pf.per_channel((0, 1)), pf.per_block(5, 0)]),
    ((1, 4), [pf.per_channel(1), pf.per_block(2, (1, 0))]),
    ((10, 3), [pf.per_block(2, 0), pf.per_block(6, (0, 1)), pf.per_block(6, (1, 0))]),
    ((3, 4, 5), [pf.per_channel((0, 1)), pf.per_channel((0, 2)), pf.per_channel((1, 2))]),
    ((4, 6, 3), [pf.per_block(2, 1), pf.per_block(4, (0, 2)), pf.per_block(6, (2, 1))]),
    ((4, 6, 3), [pf.per_block(8, (1, 0)), pf.per_block(3, (2, 0, 1)), pf.per_block(4, (0, 1))]),
    ((4, 2, 3, 3), [pf.per_block(9, (1, 2, 3)), pf.per_channel(1), pf.per_channel(-1)]),
]


def equal_to_one_process(adapters: tuple[str, ...]) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cycle = itertools.cycle([torch.float64, torch.bfloat16])
    for (shape, cuts), adapter in itertools.product(SHARDED, adapters):
        for cut, dtype, pulled in zip(
            cuts, cycle, itertools.cycle([False, True, True]), strict=False
        ):
            prox = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=cut)
            if pulled:
                prox = pf.hard_prox(pf.lsbq(2), granularity=cut, period=1, normal_map=2.0)
            runs = []
            for split in (False, True):
                module = nn.Module()
                module.weight = nn.Parameter(weights(dtype, shape)[0])
                if split:
                    fully_shard(module, mesh=mesh)
                if adapter == "QuantOptimizer":
                    optimizer: Any = quant([module.weight], prox)
                else:
                    link = pf.chain(pf.sgd(RATE), replace(prox, learning_rate=RATE))
                    optimizer = TransformOptimizer(module.named_parameters(), link)
                for _ in range(6):
                    module.weight.grad = torch.sin(module.weight.detach())
                    optimizer.step()
                runs.append([whole(module.weight), whole(optimizer.levels(module.weight))])
            assert all(map(torch.equal, *runs)), (shape, cut, adapter)
    module = nn.Linear(4, 6, bias=False)
    fully_shard(module, mesh=mesh)
    prox = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=every_other())
    with pytest.raises(ValueError, match=r"it is sharded, and every_other\(\) makes rows in a way"):
        quant(list(module.named_parameters()), prox)


@pytest.mark.rare
@pytest.mark.parametrize(
    ("world", "adapters"),
    sampled([(2, ("QuantOptimizer",)), (2, ("TransformOptimizer",)), (3, ("QuantOptimizer",))], 1),
)
def test_sharded_along_dimension_0_equals_one_process(
    world: int, adapters: tuple[str, ...], tmp_path: Path
) -> None:
    """On three ranks one of them may hold nothing. Rows made in a way of their own are refused."""
    on_processes(equal_to_one_process, world, tmp_path, adapters)


def test_rows_made_in_a_way_of_their_own_are_mapped_on_one_process() -> None:
    (given,) = weights(torch.float64, (4, 6))
    prox = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=every_other())
    p = nn.Parameter(given.clone())
    trained(quant([p], prox), [p], 7)
    assert torch.equal(p, functional(prox, [given], 7)[0][0])
