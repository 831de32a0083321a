"""Whole steps of QuantOptimizer(SGD) that fit levels and round to them, against the published
optimizer: `hard_prox` with a refit every step, for every quantizer, bits and granularity that both
have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import parq_fn as pf
from parq_fn.optim import QuantOptimizer
from tests.benchmarks import peer
from tests.benchmarks.measure import interleaved, ratio
from tests.benchmarks.report import Found
from tests.benchmarks.shapes import Shapes, resnet18
from tests.benchmarks.steps import check, parameters

EVEN: list[pf.Quantizer] = [pf.ternary_uniform(), *(pf.uniform(bits) for bits in (1, 2, 3, 4))]
LEAST_SQUARES: list[pf.Quantizer] = [pf.lsbq(bits) for bits in (0, 1, 2, 4)]
GRANULARITIES = {"tensor": pf.per_tensor(), "channel": pf.per_channel()}
#: Of the peer's time over ours, at least: (of levels evenly spaced, of others).
LIMITS = {"eager": (1.5, 1.0), "compiled": (3.0, 1.5)}


def _base(shapes: Shapes, bits: int) -> torch.optim.Optimizer:
    params = parameters(shapes)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.dim() > 1], "quant_bits": bits},
        {"params": [p for p in params if p.dim() < 2]},
    ]
    return torch.optim.SGD(groups, lr=1e-3)


def optimizers(
    quantizer: pf.Quantizer, channel: bool, shapes: Shapes, compiled: bool
) -> dict[str, Any]:
    """Each with parameters of its own, after two steps."""
    bits = getattr(quantizer, "bits", 0)
    granularity = GRANULARITIES["channel" if channel else "tensor"]
    link = pf.hard_prox(quantizer, period=1, granularity=granularity)
    made: dict[str, Any] = {"eager": QuantOptimizer(_base(shapes, bits), link)}
    if compiled:
        made["compiled"] = QuantOptimizer(_base(shapes, bits), link, compile=True)
    if peer.available:
        made["peer"] = peer.optimizer(_base(shapes, bits), quantizer, "hard", 1, channel=channel)
    for optimizer in made.values():
        for _ in range(2):
            optimizer.step()
    return made


def run(size: str, repeats: int) -> Iterator[Found]:
    """The peer's time over ours; where it is not installed, seconds."""
    tiny = size == "tiny"
    shapes: Shapes = [(8, 4, 3, 3), (64, 64), (64,)] if tiny else resnet18()
    for even, quantizers in ((True, EVEN), (False, LEAST_SQUARES)):
        for quantizer in quantizers:
            for name in GRANULARITIES:
                made = optimizers(quantizer, name == "channel", shapes, compiled=not tiny)
                times = interleaved({key: one.step for key, one in made.items()}, repeats)
                check(made)
                case = f"hard, {quantizer!r}, {name}"
                for form, limits in LIMITS.items():
                    if form not in times:
                        continue
                    if "peer" not in times:
                        yield Found("refits", case, f"{form}, seconds", min(times[form]))
                        continue
                    value, spread = ratio(times["peer"], times[form])
                    what, limit = f"{form} step, peer's time over ours", limits[0 if even else 1]
                    yield Found("refits", case, what, value, spread, limit, at_most=False)
