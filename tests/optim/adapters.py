"""Both adapters around the same parameters, and gradients for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer

LATE = pf.parq_prox(pf.lsbq(2), anneal_start=1000, anneal_end=2000)


SOON = pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=5)


def parameters(count: int = 2, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 4, dtype=dtype)) for _ in range(count)]


def ones_for(*params: Tensor) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def quantized(params: list[Any], prox: pf.Prox = SOON, base: Any = None, **options: Any):
    base = torch.optim.AdamW if base is None else base
    return QuantOptimizer(base([{"params": params, "quant_bits": 2}], lr=0.05), prox, **options)


def transformed(params: list[Any], prox: pf.Prox = SOON) -> TransformOptimizer:
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    return TransformOptimizer(named, pf.chain(pf.adamw(0.05), prox))


ADAPTERS = {"QuantOptimizer": quantized, "TransformOptimizer": transformed}


def saved_with_a_frozen_layer(adapter: str) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    return net, ADAPTERS[adapter]([net[0].weight, net[1].weight])
