"""The published package, torchao.prototype.parq, doing what is measured. Without it installed
`available` is False and nothing here may be called."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import parq_fn as pf

available = importlib.util.find_spec("torchao") is not None

STEPS = {"anneal_start": 0, "anneal_end": 1000}
STEP = 400


def version() -> str:
    """Its version, or why there is none."""
    return importlib.metadata.version("torchao") if available else "not installed"


def prox_map(kind: str) -> Any:
    """Its map of that name."""
    from torchao.prototype.parq import optim

    made: dict[str, Callable[[], Any]] = {
        "hard": lambda: optim.ProxHardQuant(),
        "parq": lambda: optim.ProxPARQ(**STEPS),
        "binary_relax": lambda: optim.ProxBinaryRelax(**STEPS),
    }
    return made[kind]()


KINDS = ("hard", "parq", "binary_relax")


def quantizer(ours: pf.Quantizer) -> tuple[Any, int]:
    """(its quantizer for ours, the bits that it is called with)."""
    from torchao.prototype.parq import quant

    if isinstance(ours, pf.uniform):
        return quant.UnifQuantizer(), ours.bits
    if isinstance(ours, pf.ternary_uniform):
        return quant.TernaryUnifQuantizer(), 0
    assert isinstance(ours, pf.lsbq), ours
    return quant.LSBQuantizer(optimal=ours.method == "optimal"), ours.bits


def rows_of(weight: Tensor, granularity: pf.Granularity) -> tuple[Tensor, int | None]:
    """(the weight as its step shapes it, the dimension that it quantizes along)."""
    if granularity == pf.per_tensor():
        return weight, None
    return granularity.rows(weight), -1


def optimizer(base: Any, ours: pf.Quantizer, kind: str, period: int, channel: bool) -> Any:
    """Its optimizer around a base optimizer."""
    from torchao.prototype.parq.optim import QuantOptimizer

    return QuantOptimizer(
        base,
        quantizer(ours)[0],
        prox_map(kind),
        quant_period=period,
        quant_per_channel=channel,
    )


@torch.no_grad()
def fit(ours: pf.Quantizer, rows: list[Tensor], dim: int | None) -> list[Tensor]:
    """Its levels."""
    made, bits = quantizer(ours)
    return [made.quantize(p, bits, dim=dim)[1] for p in rows]
