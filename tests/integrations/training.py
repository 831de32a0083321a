"""What the stacks train: a small network, its data and its optimizers, the same every time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer, param_groups
from tests.helpers import python_blocks, run_blocks

BATCHES = 12
PROX = pf.parq_prox(pf.lsbq(2), anneal_start=2, anneal_end=10, period=2, warmup=1)
#: Of the first layer, where links are mixed.
FIRST = replace(PROX, quantizer=pf.integer(4), granularity=pf.per_channel())


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
    """Each weight by a link of its own."""
    groups = param_groups(net, {"*0.weight": FIRST, "*": 2})
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


def plain_loop(
    adapter: str, clip: float | None = None, every: int = 1, epochs: int = 1
) -> tuple[nn.Module, Any]:
    """The stacks' task without a stack: gradients of `every` batches are added up."""
    net = network()
    optimizer = ADAPTERS[adapter](net)
    scheduler = schedule(optimizer)
    for i, (inputs, targets) in enumerate([*data()] * epochs):
        (loss_of(net, inputs, targets) / every).backward()
        if (i + 1) % every == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return net, optimizer


def of_the_page(engine: str, change: Callable[[str], str] = str, **given: Any) -> dict[str, Any]:
    """Runs the code of the page on engines for one of them, and gives the names it defines.

    change: of the code; given: names that it may use then.
    """
    page = Path(__file__).parents[2] / "notebooks" / "howto" / "engines.md"
    first, *blocks = python_blocks(page.read_text())
    (own,) = (b for b in blocks if re.search(rf"^(from|import) {engine}\b", b, re.M))
    return run_blocks([first, change(own)], {"__name__": "__main__", **given})


def as_torchrun_tells() -> None:
    """What torchrun has in a rank's environment, which stacks read."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}


def check_on_levels(net: nn.Module, optimizer: Any) -> None:
    for name, p in net.named_parameters():
        if name.endswith("weight"):
            levels = optimizer.levels(p).unsqueeze(0).flatten(0, -2)
            rows = optimizer.prox_of(p).granularity.rows(p.detach())
            assert bool((rows.unsqueeze(-1) == levels.unsqueeze(-2)).any(-1).all()), name


def check_same(one: nn.Module, other: nn.Module) -> None:
    """In all bits, those of a sharded one gathered."""
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        p, q = (t.full_tensor() if isinstance(t, DTensor) else t for t in (p, q))
        assert torch.equal(p, q), name
