"""Networks, links and comparisons that the tests of both adapters share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LinearLR

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer

_SPAN: dict[str, Any] = {"anneal_start": 2, "anneal_end": 9}

#: A link of each kind, with each option, quantizer and granularity in one of them.
PROXES = {
    "hard": pf.hard_prox(pf.lsbq(2), period=3, warmup=1),
    "parq": pf.parq_prox(pf.lsbq(2), **_SPAN, period=1),
    "parq_shrink": pf.parq_prox(pf.lsbq(2, "optimal"), **_SPAN, period=2, shrink=True),
    "parq_normal_map": pf.parq_prox(pf.lsbq(2), **_SPAN, period=4, normal_map=3.0),
    "both": pf.parq_prox(pf.uniform(2), **_SPAN, shrink=True, normal_map=3.0),
    "soft": pf.soft_prox(pf.uniform(2), **_SPAN, granularity=pf.per_channel()),
    "binary_relax": pf.binary_relax_prox(pf.lloyd_max(2), **_SPAN, period=2),
    "proxquant": pf.proxquant_prox(pf.lsbq(2), **_SPAN, strength=0.2, granularity=pf.per_block(3)),
    "trusted": pf.hard_prox(pf.lsbq(2), period=2, gradient=pf.estimators.trust(0.9)),
    "damped": pf.parq_prox(
        pf.lsbq(2),
        **_SPAN,
        period=2,
        granularity=pf.per_channel(),
        gradient=pf.estimators.damped(pf.schedules.linear(0.0, 0.5, 0, 9)),
    ),
}

#: What checkpoints are saved of: warmup, annealing, the normal map.
SAVED = pf.parq_prox(pf.lsbq(2), **_SPAN, period=3, warmup=2, normal_map=5.0)


# A network that shards cut unevenly


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


#: What is quantized, and with how many bits.
BITS = {"conv.weight": 2, "linear.weight": 2, "head.weight": 2, "norm.weight": 1}


def quantized(net: Net, prox: pf.Prox, average: float | None = None) -> QuantOptimizer:
    by_bits: dict[Any, list[Any]] = {}
    for name, p in net.named_parameters():
        by_bits.setdefault(BITS.get(name, 32), []).append((name, p))
    groups = [{"params": params, "quant_bits": bits} for bits, params in by_bits.items()]
    return QuantOptimizer(torch.optim.AdamW(groups, lr=0.05), prox, average=average)


def transformed(net: Net, prox: pf.Prox, average: float | None = None) -> TransformOptimizer:
    two = replace(prox, learning_rate=0.05)
    kinds = {"2": two, "1": replace(two, quantizer=pf.lsbq(1)), "32": pf.identity()}
    labels = {name: str(bits) for name, bits in BITS.items()} | {"*": "32"}
    transform = pf.chain(pf.adamw(0.05), pf.partition(kinds, labels))
    transform = transform if average is None else pf.averaged(transform, average)
    return TransformOptimizer(net.named_parameters(), transform)


ADAPTERS: dict[str, Callable[..., Any]] = {
    "QuantOptimizer": quantized,
    "TransformOptimizer": transformed,
}


def begin(adapter: str, dtype: str, split: bool) -> tuple[Net, Any]:
    """A network and its optimizer before the first step, sharded over all ranks if it is split."""
    net = Net(getattr(torch, dtype))
    if split:
        sharded(net, (dist.get_world_size(),))
    return net, ADAPTERS[adapter](net, SAVED)


def scheduled(adapter: str, steps: int) -> tuple[Net, Any, LinearLR]:
    """A network, its optimizer and a scheduler after so many steps on one process."""
    net, optimizer = begin(adapter, "bfloat16", split=False)
    scheduler = LinearLR(optimizer, start_factor=1.0, end_factor=0.1, total_iters=20)
    for _ in range(steps):
        train(net, optimizer, 1)
        scheduler.step()
    return net, optimizer, scheduler


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    dtype = next(net.parameters()).dtype
    x = torch.randn(4, 2, 6, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def sharded(net: Net, shape: tuple[int, ...], **policy: Any) -> Net:
    """The network under fully_shard, on a mesh of this shape."""
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    fully_shard(net.linear, mesh=mesh, **policy)
    fully_shard(net, mesh=mesh, **policy)
    return net


def whole(got: Any) -> Any:
    """The gathered tensor of a DTensor, anything else as it is."""
    return got.full_tensor() if isinstance(got, DTensor) else got


def state_of(net: nn.Module, optimizer: Any) -> list[Tensor]:
    """All that a step may change, in a fixed order."""
    entries = [optimizer.state[p] for p in net.parameters()]
    values = [entry[key] for entry in entries for key in sorted(entry)]
    return [*net.parameters(), *(got for got in values if isinstance(got, Tensor))]


def check_same(alone: nn.Module, one: Any, net: nn.Module, other: Any, at: Any) -> None:
    """Parameters and states are equal, bit for bit."""
    for (name, p), q in zip(alone.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(p, whole(q)), (at, name, p, whole(q))
        mine, theirs = one.state[p], other.state[q]
        assert mine.keys() == theirs.keys(), (at, name)
        for key, own in mine.items():
            got = whole(theirs[key])
            assert own.dtype == got.dtype, (at, name, key)
            assert torch.equal(own, got), (at, name, key)
