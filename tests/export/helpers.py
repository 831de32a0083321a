"""A small network with a buffer and tied weights, trained until its weights are on levels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.export import Packed, pack_weight
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from parq_fn.transforms.prox_state import in_rows

#: Quantizers of evenly spaced levels.
EVEN = [
    *(pf.uniform(bits, scale) for bits in (1, 2, 3, 4, 8) for scale in ("mean", "max")),
    *(pf.max_uniform(bits) for bits in (2, 3, 4, 8)),
    *(pf.asymmetric(bits) for bits in (1, 2, 4, 8)),
    *(pf.integer(bits, scale) for bits in (2, 4, 8) for scale in ("max", "mean")),
    pf.stored(pf.integer(4), torch.float16),
    pf.gaussian(2),
    pf.lsbq(1),
    pf.lsbq(0),
    pf.lsbq(0, "optimal"),
    pf.ternary_uniform(),
]
SOON: dict[str, Any] = {"anneal_start": 0, "anneal_end": 3, "period": 1}


class Net(nn.Module):
    """A kernel, a norm with buffers, an embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lookup = nn.Embedding(12, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(32, 8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.lookup.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.lookup(tokens).unsqueeze(1)  # [n, 1, t, 8]
        x = self.norm(self.conv(x)).relu().mean(2).flatten(1)
        return self.head(self.linear(x).tanh())


def trained(adapter: str, steps: int = 6) -> tuple[Net, Any]:
    net = Net()
    masked = ["conv.weight", "linear.weight", "lookup.weight"]
    named = dict(net.named_parameters())
    if adapter == "QuantOptimizer":
        groups = [
            {"params": [named[name] for name in masked[:2]], "quant_bits": 2},
            {"params": [named[masked[2]]], "quant_bits": 0},
            {"params": [p for name, p in named.items() if name not in masked]},
        ]
        prox = pf.parq_prox(pf.lsbq(2), granularity=pf.per_channel(), **SOON)
        optimizer: Any = QuantOptimizer(torch.optim.AdamW(groups, lr=0.01), prox)
    else:
        prox = pf.parq_prox(pf.lsbq(2), **SOON)
        transform = pf.chain(pf.adamw(0.01), pf.masked(prox, masked))
        optimizer = TransformOptimizer(net.named_parameters(), transform)
    tokens = torch.arange(20).reshape(4, 5) % 12
    for _ in range(steps):
        optimizer.zero_grad()
        net(tokens).square().sum().backward()
        optimizer.step()
    return net.eval(), optimizer


def fitted(quantizer: Any, cut: Any, weight: Tensor) -> tuple[Packed, Tensor, Tensor]:
    """(a weight's packed form; what it packs; the qparams [r, m] that the state holds)"""
    params = {"weight": weight}
    transform = pf.chain(pf.sgd(0.0), pf.hard_prox(quantizer, granularity=cut))
    _, state = transform.update({"weight": 0 * weight}, transform.init(params), params)
    (qparams,) = pf.tree.tree_leaves(pf.read(state, "qparams"))
    packed: Any = pf.export.pack(params, transform, state)["weight"]
    return packed, transform.weights(state, params)["weight"], in_rows(qparams)


def on_levels(shape: tuple[int, ...], cut: Any, quantizer: Any = None) -> tuple[Tensor, Tensor]:
    """(a weight on its levels, the levels)"""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = cut.rows(weight)
    levels = (quantizer or pf.lsbq(2))(rows)
    return cut.restore(pf.proxmaps.hard(rows, levels), weight), levels


def signs(module: nn.Module) -> dict[str, Any]:
    """A module's matrices set to +-1/4, packed."""
    packed: dict[str, Any] = {}
    for name, p in module.named_parameters():
        if p.dim() > 1:
            p.data = torch.where(p >= 0, 0.25, -0.25)
            packed[name] = pack_weight(p, torch.tensor([[-0.25, 0.25]]))
        else:
            packed[name] = p.detach()
    return packed
