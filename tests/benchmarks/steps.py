"""Whole steps of QuantOptimizer(AdamW), against AdamW alone and the published optimizer; the
functional loop; what a step holds in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

import parq_fn as pf
from parq_fn.optim import QuantOptimizer
from tests.benchmarks import peer
from tests.benchmarks.measure import finished, interleaved, peak, ratio
from tests.benchmarks.report import Found
from tests.benchmarks.shapes import LISTS, Shapes

SPAN: dict[str, Any] = {"anneal_start": 0, "anneal_end": 1_000_000}
NEVER = 1_000_000  # the period of steps that are not to refit, after the first


def link(period: int, granularity: pf.Granularity | None = None) -> pf.Prox:
    return pf.parq_prox(
        pf.lsbq(2), period=period, granularity=granularity or pf.per_tensor(), **SPAN
    )


def parameters(shapes: Shapes, device: str = "cpu") -> list[Tensor]:
    """Gaussian, with gradients."""
    generator = torch.Generator().manual_seed(0)

    def gaussian(shape: tuple[int, ...], size: float) -> Tensor:
        return (torch.randn(shape, generator=generator) * size).to(device)

    params: list[Tensor] = [nn.Parameter(gaussian(shape, 0.1)) for shape in shapes]
    for p in params:
        p.grad = gaussian(p.shape, 0.01)
    return params


def adamw(params: list[Tensor], fused: bool) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.dim() > 1], "quant_bits": 2},
        {"params": [p for p in params if p.dim() < 2]},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, fused=fused)


def optimizers(
    shapes: Shapes, period: int, fused: bool, compiled: bool, device: str = "cpu"
) -> dict[str, Any]:
    """Each with parameters of its own, after two steps."""

    def base() -> torch.optim.Optimizer:
        return adamw(parameters(shapes, device), fused)

    made: dict[str, Any] = {"base": base(), "eager": QuantOptimizer(base(), link(period))}
    if compiled:
        made["compiled"] = QuantOptimizer(base(), link(period), compile=True)
    if peer.available:
        made["peer"] = peer.optimizer(base(), pf.lsbq(2), "parq", period, channel=False)
    for optimizer in made.values():
        for _ in range(2):
            optimizer.step()
    return made


def check(made: dict[str, Any]) -> None:
    """Eager and compiled have the same parameters and states, bit for bit, after as many steps."""
    if "compiled" not in made:
        return
    one, other = made["eager"], made["compiled"]
    while _count(one) != _count(other):
        min(one, other, key=_count).step()
    for group, like in zip(one.param_groups, other.param_groups, strict=True):
        for p, q in zip(group["params"], like["params"], strict=True):
            assert torch.equal(p, q)
            for key, entry in one.state[p].items():
                assert torch.equal(entry, other.state[q][key]), key


def steps(
    name: str,
    shapes: Shapes,
    period: int,
    fused: bool,
    repeats: int,
    compiled: bool,
    device: str = "cpu",
) -> Iterator[Found]:
    """The time of a step, against that of the base optimizer alone."""
    made = optimizers(shapes, period, fused, compiled, device)
    works = {key: finished(one.step, device) for key, one in made.items()}
    held = name == "transformer" and period != 1 and not fused
    # of one step each, and two gigabytes an optimizer: memory's rate changes from one to the next
    times = interleaved(works, repeats * (3 if held else 1), least=0)
    check(made)
    kind = "refit every step" if period == 1 else "plain step"
    base = "AdamW(fused=True)" if fused else "AdamW"
    for key in times.keys() - {"base"}:
        value, spread = ratio(times[key], times["base"])
        limit = {"eager": 2.5, "compiled": 1.5}.get(key) if held else None
        yield Found("steps", f"{name}, {kind}", f"{key}, time over {base}'s", value, spread, limit)


def _count(optimizer: QuantOptimizer) -> int:
    return int(optimizer.state[optimizer.param_groups[0]["params"][0]]["updates"])


def small(repeats: int, compiled: bool) -> Iterator[Found]:
    """Three hundred parameters of 16 by 16."""
    yield from steps("300 of 16 x 16", [(16, 16)] * 300, NEVER, False, repeats, compiled)
    yield from steps("300 of 16 x 16", [(16, 16)] * 300, 1, False, repeats, compiled)


def compilation() -> Iterator[Found]:
    """The first steps with compile=True of 200 parameters, each of another shape; then others.

    Two steps, for the first maps by a program of its own: there parq is clip.
    """
    shapes: Shapes = [(32 + i, 48 + i) for i in range(200)]
    torch.compiler.reset()
    for name, granularity in (("tensor", pf.per_tensor()), ("channel", pf.per_channel())):
        base = adamw(parameters(shapes), fused=False)
        optimizer = QuantOptimizer(base, link(2, granularity), compile=True)
        with fresh_cache():  # or what an earlier process compiled is found on disk
            start = time.perf_counter()
            optimizer.step()
            optimizer.step()
            took = time.perf_counter() - start
        what = "seconds, first two steps"
        yield Found("compile", f"200 parameters, {name}", what, took, 0.0, 60.0)
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(4):
                optimizer.param_groups[0]["lr"] *= 0.9
                optimizer.step()


def memory(network: str, shapes: Shapes) -> Iterator[Found]:
    """The most that a step holds besides parameters and states, against the largest parameter."""
    largest = 4 * max(torch.Size(shape).numel() for shape in shapes)
    for period, kind in ((NEVER, "plain step"), (1, "refit")):
        names = ["base", "eager"] + ["peer"] * peer.available
        for name in names:

            def prepare(name: str = name, period: int = period) -> Any:
                return optimizers(shapes, period, False, False)[name].step

            value = peak(prepare) / largest
            yield Found("memory", f"{network}, {kind}", f"{name}, largest parameters", value)


def loop(shapes: Shapes, repeats: int) -> Iterator[Found]:
    """update, apply_updates and weights of the functional core, against AdamW's step."""
    params = {f"p{i}": p.detach().clone() for i, p in enumerate(parameters(shapes))}
    grads = {name: torch.full_like(p, 1e-3) for name, p in params.items()}
    mask = {name: p.dim() > 1 for name, p in params.items()}
    transform = pf.chain(pf.adamw(1e-3), pf.masked(link(10), mask))

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        return params, state, transform.weights(state, params)

    state = transform.init(params)
    compiled = torch.compile(step, fullgraph=True)
    with fresh_cache():
        start = time.perf_counter()
        got = compiled(params, state, grads)
        took = time.perf_counter() - start
    yield Found("loop", f"functional, {len(params)} parameters", "seconds to compile", took)
    want = step(params, state, grads)
    torch.testing.assert_close(got[0], want[0])  # fits sum in another order here
    torch.testing.assert_close(pf.read(got[1], "qparams"), pf.read(want[1], "qparams"))
    own = parameters(shapes)
    base = adamw(own, fused=False)
    base.step()
    works = {
        "eager": partial(step, params, want[1], grads),
        "compiled": partial(compiled, params, got[1], grads),
        "base": base.step,
    }
    times = interleaved(works, repeats, least=0)
    for name in ("eager", "compiled"):
        value, spread = ratio(times[name], times["base"])
        yield Found("loop", "functional, plain step", f"{name}, time over AdamW's", value, spread)


def run(size: str, repeats: int) -> Iterator[Found]:
    """The groups of this module."""
    tiny = size == "tiny"
    networks = {"tiny": lambda: [(8, 4, 3, 3), (64, 64), (64,)]} if tiny else LISTS
    for name, shapes in networks.items():
        for period in (NEVER, 1):
            for fused in (False, True):
                yield from steps(name, shapes(), period, fused, repeats, compiled=not tiny)
    if not tiny:
        yield from small(repeats, compiled=True)
        yield from compilation()
    name, first = next(iter(networks.items()))
    yield from memory(name, first())
    if not tiny:
        yield from loop(first(), repeats)
