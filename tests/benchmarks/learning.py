"""Whole compiled steps of QuantOptimizer(AdamW) that learn their levels, against steps that keep
them: parq between its ends, where no step fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import parq_fn as pf
from parq_fn.optim import QuantOptimizer
from tests.benchmarks.measure import interleaved, ratio
from tests.benchmarks.report import Found
from tests.benchmarks.shapes import Shapes, transformer
from tests.benchmarks.steps import NEVER, SPAN, adamw, parameters

CASES: list[tuple[pf.Quantizer, pf.Granularity]] = [
    (pf.lsbq(2), pf.per_tensor()),
    (pf.uniform(4), pf.per_channel()),
]
#: Of the time of a step that learns, over that of one that does not.
LIMITS = {"code": 1.5, "map": 2.5}


def run(size: str, repeats: int) -> Iterator[Found]:
    """The time of a step that learns, over that of one that does not."""
    tiny = size == "tiny"
    shapes: Shapes = [(64, 64), (64,)] if tiny else transformer()
    for quantizer, granularity in CASES:
        plain = pf.parq_prox(quantizer, period=NEVER, granularity=granularity, **SPAN)
        links: dict[str, Any] = {"none": plain}
        for kind in LIMITS:
            links[kind] = replace(plain, learn=pf.learn(pf.sgd(1e-6), gradient=kind))
        made = {}
        for kind, link in links.items():
            base = adamw(parameters(shapes), fused=False)
            made[kind] = QuantOptimizer(base, link, compile=not tiny)
            for _ in range(3):
                made[kind].step()
        times = interleaved({kind: one.step for kind, one in made.items()}, repeats, least=0)
        for kind, limit in LIMITS.items():
            value, spread = ratio(times[kind], times["none"])
            name = f"{'tiny' if tiny else 'transformer'}, {quantizer!r}, {granularity!r}"
            what = f"{kind}, time over a step's that learns nothing"
            yield Found("learning", name, what, value, spread, None if tiny else limit)
