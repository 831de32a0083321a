"""What the stacks train: a small network, its data and its optimizers, the same every time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer

BATCHES = 12
PROX = pf.parq_prox(pf.lsbq(2), anneal_start=2, anneal_end=10, period=2, warmup=1)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data() -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(1)
    inputs = torch.randn(4 * BATCHES, 6, generator=draw)
    return DataLoader(TensorDataset(inputs, inputs[:, :3].tanh()), batch_size=4)


def loss_of(net: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return (net(inputs) - targets).square().mean()


def quantized(net: nn.Module) -> QuantOptimizer:
    named = list(net.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if n.endswith("weight")], "quant_bits": 2},
        {"params": [(n, p) for n, p in named if not n.endswith("weight")]},
    ]
    return QuantOptimizer(torch.optim.AdamW(groups, lr=0.05), PROX)


def transformed(net: nn.Module) -> TransformOptimizer:
    transform = pf.chain(pf.adamw(0.05), pf.masked(PROX, "*.weight"))
    return TransformOptimizer(net.named_parameters(), transform)


ADAPTERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "QuantOptimizer": quantized,
    "TransformOptimizer": transformed,
}


def schedule(optimizer: Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * BATCHES)


def plain_loop(adapter: str, clip: float | None = None, every: int = 1) -> tuple[nn.Module, Any]:
    """The stacks' task without a stack: an epoch, gradients of `every` batches added up."""
    net = network()
    optimizer = ADAPTERS[adapter](net)
    scheduler = schedule(optimizer)
    for i, (inputs, targets) in enumerate(data()):
        (loss_of(net, inputs, targets) / every).backward()
        if (i + 1) % every == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return net, optimizer


def check_on_levels(net: nn.Module, optimizer: Any) -> None:
    for name, p in net.named_parameters():
        if name.endswith("weight"):
            levels = optimizer.levels(p).reshape(-1, optimizer.levels(p).shape[-1])
            assert bool((p.detach()[..., None] == levels[0]).any(-1).all()), name


def check_same(one: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name
