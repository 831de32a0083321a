"""The pass on a GPU: its bandwidth, steps without waiting for it, a captured graph; and maps, fits
and steps as they are measured on a CPU."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import parq_fn as pf
from parq_fn.foundation.tree import tree_map
from parq_fn.optim import QuantOptimizer
from parq_fn.optim.engine.passes import Pass
from tests.benchmarks import fits, peer, steps
from tests.benchmarks.measure import Work, ratio
from tests.benchmarks.prox_pass import (
    GRANULARITIES,
    LINKS,
    QUANTIZERS,
    against_peer,
    check,
    jobs_of,
    some_cases,
    state_of,
)
from tests.benchmarks.report import Found
from tests.benchmarks.shapes import LISTS


def milliseconds(works: Mapping[str, Work], repeats: int) -> dict[str, list[float]]:
    """Of one call of each, by the device's own clock, in turns."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        for name, work in works.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(10):
                work()
            end.record()
            end.synchronize()
            if repeat:  # at first it is compiled
                found[name].append(begin.elapsed_time(end) / 10)
    return found


def bandwidth(elements: int, repeats: int) -> Iterator[Found]:
    """What a compiled pass reads and writes a second, latents, levels and weights, over what a copy
    does; and its time over the copy's."""
    width = 1 << (elements.bit_length() // 2)
    u = torch.randn(elements // width, width, device="cuda")
    fast = {"compiled": Pass(compile=True)}
    copies: list[float] = []
    for kind, make in LINKS.items():
        for k, quantizer in QUANTIZERS.items():
            for where, granularity in GRANULARITIES.items():
                link = make(quantizer, granularity=granularity)
                state, (job,) = state_of(link), jobs_of(link, [u])
                works = {
                    "pass": partial(fast["compiled"], link, state, [job]),
                    "copy": partial(job.weight.copy_, u),
                }
                times = milliseconds(works, 5 * repeats)  # short, and some are interrupted
                check(link, state, [job], fast)
                copies += times["copy"]
                case = f"{kind}, {k} levels, {where}"
                over, spread = ratio(times["pass"], times["copy"])
                moved = 1 + job.qparams.numel() / (2 * u.numel())  # over what the copy moves
                share = moved / over
                held = None if kind == "soft" else 0.8  # which computes more than it reads
                what = "share of a copy's bandwidth"
                yield Found("gpu", case, what, share, share * spread / over, held, False)
                yield Found("gpu", case, "time over a copy's", over, spread)
    low, middle, high = statistics.quantiles([8e-6 * elements / took for took in copies], n=4)
    yield Found("gpu", "copy", "GB/s read and written", middle, (high - low) / 2)


def without_waiting() -> Iterator[Found]:
    """Steps, refits among them, in which nothing waits for the device."""
    every = [
        pf.lsbq(2),
        pf.lsbq(2, "optimal"),
        pf.lsbq(2, "alternating"),
        pf.lsbq(0),
        pf.lsbq(2, center=True),
        pf.uniform(2),
        pf.max_uniform(2),
        pf.asymmetric(2),
        pf.ternary_uniform(),
        pf.lloyd_max(2),
    ]
    for compiled, quantizer in [*((False, q) for q in every), (True, pf.lsbq(2))]:
        params = [nn.Parameter(torch.randn(256, 256, device="cuda")) for _ in range(4)]
        for p in params:
            p.grad = torch.ones_like(p)
        group = {"params": params, "quant_bits": getattr(quantizer, "bits", 0)}
        base = torch.optim.AdamW([group], lr=1e-3)
        link = pf.parq_prox(quantizer, anneal_start=0, anneal_end=8, period=3)
        optimizer = QuantOptimizer(base, link, compile=compiled)
        for _ in range(4):
            optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(8):
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        case = f"steps, {quantizer!r}, compile={compiled}"
        yield Found("gpu", case, "steps that waited", 0.0, 0.0, 0.0)


def graph() -> Iterator[Found]:
    """The functional step, captured once and replayed, equals the step run as it is."""
    prox = pf.parq_prox(pf.lsbq(2), anneal_start=2, anneal_end=8, period=3)
    transform = pf.chain(pf.adamw(1e-2), prox)
    start = {"w": torch.randn(64, 64, device="cuda")}
    grads = {"w": torch.full((64, 64), 0.1, device="cuda")}

    def step(params: Any, state: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        return pf.apply_updates(params, updates), state

    def on_device(tree: Any) -> Any:  # counts too, so that the graph advances them
        return tree_map(lambda t: t.to("cuda", copy=True), tree)

    held = on_device((start, transform.init(start)))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what is made at first use is made before the capture
        step(*held)
    torch.cuda.current_stream().wait_stream(side)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        tree_map(lambda old, new: old.copy_(new), held, step(*held))
    params, state = on_device((start, transform.init(start)))
    for _ in range(10):
        captured.replay()
        params, state = step(params, state)
    weights, replayed = transform.weights(state, params), transform.weights(held[1], held[0])
    assert torch.equal(weights["w"], replayed["w"])
    yield Found("gpu", "functional step", "replays of a graph that differ", 0.0, 0.0, 0.0)


def as_on_a_cpu(size: str, repeats: int) -> Iterator[Found]:
    """Some of what is measured on a CPU: fits, and maps and steps of the transformer."""
    name, tiny = "transformer", size == "tiny"
    networks = {name: lambda: [(8, 32), (64,)]} if tiny else LISTS
    yield from fits.large(1 << (14 if tiny else 24), repeats, "cuda")
    for period in (steps.NEVER, 1):
        yield from steps.steps(name, networks[name](), period, False, repeats, True, "cuda")
    if peer.available:
        yield from against_peer(networks, some_cases(name), repeats, device="cuda")


def run(size: str, repeats: int) -> Iterator[Found]:
    """The groups of this module; nothing without a GPU."""
    if not torch.cuda.is_available():
        print("no GPU is at hand: its benchmarks are skipped")
        return
    yield from without_waiting()
    yield from graph()
    yield from bandwidth(1 << (20 if size == "tiny" else 28), repeats)
    for one in as_on_a_cpu(size, repeats):  # the limits are a CPU's
        yield one._replace(group="gpu", limit=None)
