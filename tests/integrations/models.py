"""A small model whose weights are on levels, packed, as the exporters take it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.export import Packed, pack_weight, unpack


class Net(nn.Module):
    """An embedding tied to the head, a kernel, linear layers, a norm."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lookup = nn.Embedding(12, 64)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.LayerNorm(64)
        self.linear = nn.Linear(64, 64)
        self.head = nn.Linear(64, 12, bias=False)
        self.head.weight = self.lookup.weight
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.lookup(tokens)
        x = x + self.conv(x.unsqueeze(1)).mean(1)
        out: Tensor = self.head(self.linear(self.norm(x)).tanh())
        return out


TOKENS = torch.arange(10).reshape(2, 5)


def on_levels(
    quantizer: Any, granularity: pf.Granularity, dtype: torch.dtype = torch.float32
) -> tuple[Net, Net, dict[str, Packed | Tensor]]:
    """(a fresh network; the same with its weights on their levels; those packed)."""
    net = Net(dtype).eval()
    quantized, packed = copy.deepcopy(net), {}
    with torch.no_grad():
        for name, p in quantized.named_parameters():
            if p.dim() < 2:
                packed[name] = p.detach()
                continue
            cut = pf.per_channel() if p.dim() > 2 else granularity
            rows = cut.rows(p)
            levels = quantizer(rows)
            p.copy_(cut.restore(pf.proxmaps.hard(rows, levels), p))
            packed[name] = pack_weight(p, levels, name=name)
    assert all(
        torch.equal(w, dict(quantized.named_parameters())[n]) for n, w in unpack(packed).items()
    )
    return net, quantized, packed
