"""QuantOptimizer under fully_shard: levels and weights are those of one process, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

import parq_fn as pf
from parq_fn.optim import QuantOptimizer
from tests.optim.processes import on_processes

SPAN: dict[str, Any] = {"anneal_start": 1, "anneal_end": 6, "period": 2}


class Net(nn.Module):
    """Uneven rows, a kernel, vectors, and a weight with fewer rows than there are ranks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 5, 3, padding=1, dtype=dtype)
        self.norm = nn.GroupNorm(1, 5, dtype=dtype)
        self.linear = nn.Linear(5, 7, dtype=dtype)
        self.head = nn.Linear(7, 1, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.head(self.linear(x).tanh())


def optimizer_of(net: Net, prox: pf.Prox) -> QuantOptimizer:
    groups = [
        {"params": [net.conv.weight, net.linear.weight, net.head.weight], "quant_bits": 2},
        {"params": [net.norm.weight], "quant_bits": 1},
        {"params": [net.conv.bias, net.norm.bias, net.linear.bias, net.head.bias]},
    ]
    return QuantOptimizer(torch.optim.AdamW(groups, lr=0.05), prox)


def train(net: Net, optimizer: QuantOptimizer, steps: int) -> None:
    dtype = net.head.weight.dtype
    x = torch.randn(4, 2, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def whole(got: Any) -> Any:
    return got.full_tensor() if isinstance(got, DTensor) else got


PROXES = {
    "tensor": pf.parq_prox(pf.lsbq(2), **SPAN),
    "channel": pf.parq_prox(pf.lsbq(2), **SPAN, granularity=pf.per_channel()),
    "shrink": pf.parq_prox(pf.uniform(2), **SPAN, granularity=pf.per_channel(), shrink=True),
    "normal_map": pf.hard_prox(pf.lsbq(2, "optimal"), period=1, normal_map=2.0),
    "soft": pf.soft_prox(pf.lloyd_max(2), **SPAN),
}


def same_as_alone(shape: tuple[int, ...], offload: bool, dtypes: tuple[str, ...]) -> None:
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    for dtype in (getattr(torch, name) for name in dtypes):
        for name, prox in PROXES.items():
            alone, net = Net(dtype), Net(dtype)
            policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
            fully_shard(net.linear, mesh=mesh, **policy)
            fully_shard(net, mesh=mesh, **policy)
            one, other = optimizer_of(alone, prox), optimizer_of(net, prox)
            for _ in range(8):
                train(alone, one, 1)
                train(net, other, 1)
                for (path, p), q in zip(alone.named_parameters(), net.parameters(), strict=True):
                    assert torch.equal(p, whole(q)), (name, path, p, whole(q))
                    assert one.state[p].keys() == other.state[q].keys()
                    for key, own in one.state[p].items():
                        assert torch.equal(own, whole(other.state[q][key])), (name, path, key)
            weight = whole(net.linear.weight)
            if name != "shrink":
                levels = other.state[net.linear.weight]["levels"]
                rows = weight.reshape(levels.shape[0], -1)
                assert (rows.unsqueeze(-1) == levels.unsqueeze(-2)).any(-1).all()


@pytest.mark.parametrize(
    ("shape", "offload", "dtypes"),
    [
        ((2,), False, ("float64", "bfloat16")),
        ((4,), False, ("float64",)),
        ((2, 2), False, ("bfloat16",)),
        ((2,), True, ("float32",)),
    ],
)
def test_r17_levels_and_weights_equal_those_of_one_process(
    shape: tuple[int, ...], offload: bool, dtypes: tuple[str, ...], tmp_path: Path
) -> None:
    world = int(torch.tensor(shape).prod())
    on_processes(same_as_alone, world, tmp_path, shape, offload, dtypes)


def blocks_cut_by_shards() -> None:
    """1-D parameters in blocks that begin on one rank and end on another."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    prox = pf.parq_prox(pf.lsbq(2), **SPAN)
    for length, block in ((10, 5), (14, 7), (4, 2), (2, 1), (12, 12)):
        values = torch.randn(
            length, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        runs = []
        for sharded in (False, True):
            module = nn.Module()
            module.weight = nn.Parameter(values.clone())
            if sharded:
                fully_shard(module, mesh=mesh)
            group = {"params": [module.weight], "quant_bits": 2, "quant_block_size": block}
            optimizer = QuantOptimizer(torch.optim.SGD([group], lr=0.1), prox)
            for _ in range(4):
                module.weight.grad = torch.ones_like(module.weight)
                optimizer.step()
            runs.append([whole(module.weight), optimizer.state[module.weight]["levels"]])
        assert all(map(torch.equal, *runs)), (length, block)


@pytest.mark.parametrize("world", [2, 4])
def test_r19_blocks_that_shards_cut(world: int, tmp_path: Path) -> None:
    on_processes(blocks_cut_by_shards, world, tmp_path)


def collectives() -> None:
    """Counts the collectives of a step beyond those of the forward and backward pass."""
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2,))
    net = Net(torch.float64)
    fully_shard(net, mesh=mesh)
    optimizer = optimizer_of(net, pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=9, period=3))
    for t in range(7):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        mode = CommDebugMode()
        with mode:
            optimizer.step()
        assert mode.get_total_counts() == (4 if t % 3 == 0 else 0), (t, mode.get_comm_counts())


def test_collectives_are_one_gather_a_parameter_on_refits_and_none_else(tmp_path: Path) -> None:
    on_processes(collectives, 2, tmp_path)
