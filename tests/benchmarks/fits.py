"""Fits of levels: of millions of weights, and of a network's in a step that refits.

Levels are held to those of the same weights in float64, and where they are the optimum their
error to that of the published ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import parq_fn as pf
from parq_fn.optim.engine.passes import Job, Pass
from parq_fn.quantizers import relative_error
from tests.benchmarks import peer
from tests.benchmarks.measure import finished, interleaved, ratio
from tests.benchmarks.prox_pass import GRANULARITIES, LINKS, flat, state_of
from tests.benchmarks.report import Found, geometric_mean
from tests.benchmarks.shapes import quantized, resnet18

SORTED = {
    "lsbq(2, 'optimal')": pf.lsbq(2, "optimal"),
    "lsbq(0, 'optimal')": pf.lsbq(0, "optimal"),
    "lloyd_max(2)": pf.lloyd_max(2),
    "lloyd_max(4)": pf.lloyd_max(4),
    "lloyd_max(4, symmetric=False)": pf.lloyd_max(4, symmetric=False),
}


def check(quantizer: pf.Quantizer, rows: Tensor) -> None:
    """Levels in float32 are those in float64, to rounding; Lloyd-Max's as good."""
    levels, twin = quantizer.fit(rows), quantizer.fit(rows.double())
    if not isinstance(quantizer, pf.lloyd_max):
        torch.testing.assert_close(levels.double(), twin, rtol=1e-5, atol=1e-6)
        return
    ours, best = (
        float((rows - quantizer.nearest(rows, q)).double().square().sum())
        for q in (levels, twin.float())
    )
    assert ours <= 1.001 * best, quantizer


def large(elements: int, repeats: int, device: str = "cpu") -> Iterator[Found]:
    """One tensor of so many weights, and the same number in channels."""
    torch.manual_seed(0)
    x = torch.randn(1, elements).to(device)
    copied = torch.empty_like(x)
    held = 1.0 if elements >= 1 << 24 else None
    for name, quantizer in SORTED.items():
        fit = finished(partial(quantizer.fit, x), device)
        times = interleaved({"fit": fit}, repeats, least=0)["fit"]
        check(quantizer, x)
        value, spread = statistics.median(times), (max(times) - min(times)) / 2
        yield Found("fits", f"{name}, one tensor", "seconds", value, spread, held)
    for bits in (1, 2, 4):
        works = {
            "fit": finished(partial(pf.lsbq(bits).fit, x), device),
            "copy": finished(partial(copied.copy_, x), device),
        }
        times_of = interleaved(works, repeats)
        check(pf.lsbq(bits), x)
        value, spread = ratio(times_of["fit"], times_of["copy"])
        what = "time a bit over a copy's"
        yield Found("fits", f"lsbq({bits}), one tensor", what, value / bits, spread / bits, 3.0)
    channels = x.view(1 << (elements.bit_length() // 2), -1)
    for name in ("lsbq(2, 'optimal')", "lloyd_max(2)"):
        fit = finished(partial(SORTED[name].fit, channels), device)
        times = interleaved({"fit": fit}, 2, least=0)["fit"]
        check(SORTED[name], channels)
        case = f"{name}, {len(channels)} channels"
        yield Found("fits", case, "seconds", statistics.median(times), 0.0, held)


def optimal_against_peer(elements: int) -> Iterator[Found]:
    """The published optimum, one run of it, for it takes minutes."""
    torch.manual_seed(0)
    x = torch.randn(1, elements)
    for name in ("lsbq(2, 'optimal')", "lsbq(0, 'optimal')"):
        quantizer = SORTED[name]
        ours = interleaved({"fit": partial(quantizer.fit, x)}, 5)["fit"]
        start = time.perf_counter()
        (levels,) = peer.fit(quantizer, [x[0]], None)
        theirs = time.perf_counter() - start
        gap = x - quantizer.nearest(x, levels.sort().values[None])
        assert relative_error(x, quantizer) <= float(gap.square().sum() / x.square().sum()) + 1e-6
        value = theirs / statistics.median(ours)
        case = f"{name}, {elements} weights"
        yield Found("fits", case, "seconds, peer", theirs)
        yield Found("fits", case, "peer's time over ours", value, 0.0, 100.0, False)


QUANTIZERS = [pf.uniform(b) for b in (1, 2, 4)] + [pf.lsbq(b) for b in (1, 2, 4, 0)]


def refits(shapes: list[tuple[int, ...]], repeats: int, compiled: bool = True) -> Iterator[Found]:
    """Fit and map of all weights of a network, against the published fit and map."""
    fast = {"eager": Pass(), "compiled": Pass(compile=True)}
    if not compiled:
        del fast["compiled"]
    found: dict[str, list[float]] = {name: [] for name in fast}
    chosen = [(q, where) for q in QUANTIZERS for where in GRANULARITIES]
    chosen.append((pf.lsbq(2, "optimal"), "channel"))
    for quantizer, where in chosen:
        granularity = GRANULARITIES[where]
        link = LINKS["parq"](quantizer, granularity=granularity)
        torch.manual_seed(0)
        latents = [torch.randn(shape) for shape in flat(shapes, granularity)]
        weights = [torch.empty_like(u) for u in latents]
        state, prox_map = state_of(link), peer.prox_map("parq")
        theirs = [u.clone() for u in latents]
        shaped = [peer.rows_of(p, granularity) for p in theirs]

        def ours(
            one: Pass, link: Any = link, state: Any = state, pairs: Any = (latents, weights)
        ) -> list[Tensor]:
            levels = [link.quantizer.fit(link.granularity.rows(u)) for u in pairs[0]]
            together = zip(pairs[0], levels, pairs[1], strict=True)
            jobs = [Job(u, q, link.granularity, w) for u, q, w in together]
            one(link, state, jobs)
            return levels

        def run(shaped: Any = shaped, quantizer: Any = quantizer, prox_map: Any = prox_map) -> None:
            made, bits = peer.quantizer(quantizer)
            for p, dim in shaped:
                q, levels = made.quantize(p, bits, dim=dim)
                prox_map.apply_(p, q, levels, peer.STEP, dim=dim)

        def reset(theirs: Any = theirs, latents: Any = latents) -> None:
            torch._foreach_copy_(theirs, latents)

        works: dict[str, Any] = {name: partial(ours, one) for name, one in fast.items()}
        times = interleaved({**works, "peer": run}, repeats, before=reset)
        _same(works, weights)
        for name in fast:
            value, spread = ratio(times["peer"], times[name])
            found[name].append(value)
            held = 1.0 if name == "eager" else None
            case = f"{quantizer!r} and parq, {where}"
            yield Found(
                "refits", case, f"{name}, peer's time over ours", value, spread, held, False
            )
    for name, values in found.items():
        what = f"{name}, peer's time over ours, geometric mean"
        mean = geometric_mean(values)
        yield Found("refits", f"{len(values)} cases", what, mean)


def _same(works: dict[str, Any], weights: list[Tensor]) -> None:
    """Levels and weights of all forms are the same, bit for bit."""
    results = []
    for work in works.values():
        levels = work()
        results.append([*levels, *(w.clone() for w in weights)])
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


def run(size: str, repeats: int) -> Iterator[Found]:
    """The groups of this module."""
    tiny = size == "tiny"
    yield from large(1 << (14 if tiny else 24), min(repeats, 5))
    if peer.available:
        shapes = [(8, 32, 3, 3), (32, 64)] if tiny else quantized(resnet18())
        yield from refits(shapes, repeats, compiled=not tiny)
        yield from optimal_against_peer(1 << (8 if tiny else 18))
