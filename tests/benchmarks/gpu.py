"""The pass on a GPU: its bandwidth, steps without waiting for it, a captured graph."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer
from parq_fn.optim.passes import Pass
from parq_fn.tree import tree_map
from tests.benchmarks.prox_pass import GRANULARITIES, LINKS, QUANTIZERS, check, jobs_of, state_of
from tests.benchmarks.report import Found


def milliseconds(work: Any, repeats: int) -> list[float]:
    """By the device's own clock."""
    for _ in range(3):
        work()
    found = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 10)
    return sorted(found)


def bandwidth(elements: int, repeats: int) -> Iterator[Found]:
    """The share of a copy's bandwidth that a compiled pass has."""
    u = torch.randn(elements // 8192, 8192, device="cuda")
    fast = {"compiled": Pass(compile=True)}
    for kind in ("hard", "parq", "binary_relax"):
        for k, quantizer in QUANTIZERS.items():
            for where, granularity in GRANULARITIES.items():
                link = LINKS[kind](quantizer, granularity=granularity)
                state, jobs = state_of(link), jobs_of(link, [u])
                own = milliseconds(partial(fast["compiled"], link, state, jobs), repeats)
                copy = milliseconds(partial(jobs[0].weight.copy_, u), repeats)
                check(link, state, jobs, fast)
                value = copy[repeats // 2] / own[repeats // 2]
                case = f"{kind}, {k} levels, {where}"
                yield Found("gpu", case, "share of a copy's bandwidth", value, 0.0, 0.8, False)


def without_waiting() -> Iterator[Found]:
    """Steps, refits among them, in which nothing waits for the device."""
    for compiled in (False, True):
        params = [nn.Parameter(torch.randn(256, 256, device="cuda")) for _ in range(4)]
        for p in params:
            p.grad = torch.ones_like(p)
        base = torch.optim.AdamW([{"params": params, "quant_bits": 2}], lr=1e-3)
        link = pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=8, period=3)
        optimizer = QuantOptimizer(base, link, compile=compiled)
        for _ in range(4):
            optimizer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(8):
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield Found("gpu", f"steps, compile={compiled}", "steps that waited", 0.0, 0.0, 0.0)


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


def run(size: str, repeats: int) -> Iterator[Found]:
    """The groups of this module; nothing without a GPU."""
    if not torch.cuda.is_available():
        print("no GPU is at hand: its benchmarks are skipped")
        return
    yield from bandwidth(1 << (20 if size == "tiny" else 28), repeats)
    yield from without_waiting()
    yield from graph()
