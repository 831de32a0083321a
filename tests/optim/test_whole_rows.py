"""Maps that couple the weights of a row give the same weights on every way from latents to weights:
functional loops, both adapters, compiled, in pieces, and on the ranks of a sharded module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import parq_fn as pf
from parq_fn import proxmaps
from parq_fn.foundation.traits import ProxTraits, declares
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from parq_fn.optim.engine import passes
from parq_fn.transforms.layout import part_of
from parq_fn.transforms.sharded import local
from tests.helpers import every_other, sampled
from tests.optim.helpers import whole
from tests.processes import on_processes

LR = 0.125  # times a gradient it is exact, so that all ways move latents alike
SPAN: dict[str, Any] = {"period": 1}


def block_soft_threshold(u: Tensor, levels: Tensor, c: Tensor) -> Tensor:
    norm = u.norm(dim=-1, keepdim=True)
    return u * (1 - c.to(u.dtype) / norm.clamp(min=1e-12)).clamp(min=0)


@declares(ProxTraits(monotone=True, continuous=True))
def mean_removed(u: Tensor, levels: Tensor, c: Tensor) -> Tensor:
    return u - u.mean(-1, keepdim=True)


def two_kept(u: Tensor, levels: Tensor, c: Tensor) -> Tensor:
    """The two largest of a row, at their levels."""
    top = u.abs().topk(min(2, u.shape[-1]), -1).indices
    kept = proxmaps.hard(u, levels)
    return torch.zeros_like(u).scatter(-1, top, kept.gather(-1, top))


COUPLING: dict[str, Callable[..., Tensor]] = {
    "block_soft_threshold": block_soft_threshold,
    "mean_removed": mean_removed,
    "two_kept": proxmaps.prox_map(ProxTraits(in_range=True))(two_kept),
}
CUTS = {
    "tensor": pf.per_tensor(),
    "channel": pf.per_channel(),
    "columns": pf.per_channel(1),
    "both": pf.per_channel((0, 1)),
    "block": pf.per_block(4),
    "upright": pf.per_block(2, along=0),
    "kernel": pf.per_block(8, along=(1, 0)),
}
SHAPES = {"a": (4, 8), "b": (6, 8), "c": (4, 8, 4), "d": (2, 4, 8)}


def link_of(map: str, cut: str) -> pf.Prox:
    return pf.custom_prox(pf.lsbq(2), COUPLING[map], 0.5, granularity=CUTS[cut], **SPAN)


def latents(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, dtype=torch.float64, generator=draw).to(dtype)
        for name, shape in SHAPES.items()
    }


def gradients(params: dict[str, Any], step: int) -> dict[str, Tensor]:
    return {
        name: torch.sin(torch.arange(p.numel()) + step).to(p.dtype).reshape(p.shape)
        for name, p in params.items()
    }


def functional_loop(link: pf.Prox, params: dict[str, Tensor], steps: int = 3) -> dict[str, Tensor]:
    transform = pf.chain(pf.sgd(LR), link)
    state = transform.init(params)
    for step in range(steps):
        grads = gradients({name: whole(p) for name, p in params.items()}, step)
        grads = {name: like(grad, params[name]) for name, grad in grads.items()}
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
    found: dict[str, Tensor] = transform.weights(state, params)
    return found


def like(grad: Tensor, p: Tensor) -> Tensor:
    if not hasattr(p, "device_mesh"):
        return grad
    return distribute_tensor(grad, p.device_mesh, p.placements)


def by_base(link: pf.Prox, net: nn.ParameterDict, **options: Any) -> Any:
    groups = [{"params": [*net.named_parameters()], "quant_bits": 2}]
    return QuantOptimizer(torch.optim.SGD(groups, lr=LR), link, **options)


ADAPTERS: dict[str, Callable[[pf.Prox, nn.ParameterDict], Any]] = {
    "QuantOptimizer": by_base,
    "compiled": lambda link, net: by_base(link, net, compile=True),
    "TransformOptimizer": lambda link, net: TransformOptimizer(
        net.named_parameters(), pf.chain(pf.sgd(LR), link)
    ),
    "whole_tree": lambda link, net: TransformOptimizer(
        net.named_parameters(), pf.apply_if_finite(pf.chain(pf.sgd(LR), link))
    ),
}


def trained(adapter: str, link: pf.Prox, net: nn.ParameterDict, steps: int = 3) -> dict[str, Any]:
    optimizer = ADAPTERS[adapter](link, net)
    for step in range(steps):
        grads = gradients({name: whole(p) for name, p in net.items()}, step)
        for name, p in net.items():
            p.grad = like(grads[name], p)
        optimizer.step()
    return {name: p.detach() for name, p in net.items()}


def close(weight: Tensor, wanted: Tensor) -> None:
    """To the rounding of a row's norm, which depends on the memory that rows lie in."""
    torch.testing.assert_close(weight, wanted, rtol=1e-12, atol=1e-12)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few elements, so that small rows would be cut, filled up and put together."""
    monkeypatch.setattr(passes, "_PIECE", 8)
    monkeypatch.setattr(passes, "_WIDTH", 4)


@pytest.mark.parametrize("adapter", ["QuantOptimizer", "TransformOptimizer", "whole_tree"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("map", COUPLING)
@pytest.mark.usefixtures("small_pieces")
def test_adapters_give_the_weights_of_the_functional_loop(map: str, cut: str, adapter: str) -> None:
    link = link_of(map, cut)
    wanted = functional_loop(link, latents())
    net = nn.ParameterDict({name: nn.Parameter(p) for name, p in latents().items()})
    for name, weight in trained(adapter, link, net).items():
        assert torch.equal(weight, wanted[name]), name


@pytest.mark.parametrize("cut", ["tensor", "columns", "block"])
@pytest.mark.usefixtures("small_pieces", "graphs_alone")
def test_compiled_passes_give_the_weights_of_the_functional_loop(cut: str) -> None:
    link = link_of("block_soft_threshold", cut)
    wanted = functional_loop(link, latents())
    net = nn.ParameterDict({name: nn.Parameter(p) for name, p in latents().items()})
    for name, weight in trained("compiled", link, net).items():
        close(weight, wanted[name])


# Ranks


def on_ranks(map: str) -> None:
    """Equal weights where all ranks hold whole rows, else one error that names the parameter."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    for cut in CUTS:
        link = link_of(map, cut)
        for name, latent in latents().items():
            wanted = functional_loop(link, {name: latent})[name]
            split = distribute_tensor(latent, mesh, [Shard(0)])
            refused = has_pieces(split, link.granularity)
            assert part_of(split, link.granularity).cut == refused, (cut, name)
            for adapter in ("QuantOptimizer", "TransformOptimizer"):
                net = nn.ParameterDict({name: nn.Parameter(latent.clone())})
                fully_shard(net, mesh=mesh)
                if refused:
                    with pytest.raises(ValueError, match=f"'{name}': .*pieces of its rows .*whole"):
                        ADAPTERS[adapter](link, net)
                else:
                    weight = trained(adapter, link, net)[name]
                    close(whole(weight), wanted)
            if not refused:
                found = functional_loop(link, {name: split})
                close(whole(found[name]), wanted)
    # begun before it was sharded
    link = link_of(map, "tensor")
    transform, params = pf.chain(pf.sgd(LR), link), {"a": latents()["a"]}
    _, state = transform.update(gradients(params, 0), transform.init(params), params)
    split = {"a": distribute_tensor(params["a"], mesh, [Shard(0)])}
    with pytest.raises(ValueError, match=r"parameter 'a': .*pieces of its rows"):
        transform.weights(state, split)


def has_pieces(weight: Tensor, granularity: pf.Granularity) -> bool:
    """Whether a rank holds some and not all of a row, from which rank holds which element."""
    mine: Any = torch.full_like(local(weight), dist.get_rank())
    ranks = distribute_tensor(torch.zeros(weight.shape), weight.device_mesh, [Shard(0)])
    holders = type(ranks).from_local(
        mine, weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
    )
    rows = granularity.rows(whole(holders))
    return bool((rows != rows[:, :1]).any())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("map", "world"), sampled([("block_soft_threshold", 2), ("two_kept", 4)], 1)
)
def test_ranks_give_the_weights_of_one_process_or_refuse(
    map: str, world: int, tmp_path: Path
) -> None:
    on_processes(on_ranks, world, tmp_path, map)


def elementwise_on_ranks() -> None:
    """Maps of single weights are cut as before."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    link = pf.custom_prox(pf.lsbq(2), proxmaps.binary_relax, 0.5, **SPAN)
    latent = latents()["a"]
    found = functional_loop(link, {"a": distribute_tensor(latent, mesh, [Shard(0)])})
    assert torch.equal(whole(found["a"]), functional_loop(link, {"a": latent})["a"])
    with pytest.raises(ValueError, match="makes rows in a way of its own"):
        pf.hard_prox(pf.lsbq(1), granularity=every_other()).init(
            {"a": distribute_tensor(latent, mesh, [Shard(0)])}
        )


@pytest.mark.slow
def test_maps_of_single_weights_are_mapped_in_pieces_of_rows(tmp_path: Path) -> None:
    on_processes(elementwise_on_ranks, 2, tmp_path)
