"""The prox pass: against a copy of the same memory, and against the published maps.

Written are the weights of all parameters of a network, in place; the published map's parameters
are set back to the latents before it runs, untimed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import parq_fn as pf
from parq_fn import Prox, ProxState
from parq_fn.optim.engine.passes import Job, Pass, plain
from parq_fn.proxmaps.levels import midpoint
from tests.benchmarks import peer
from tests.benchmarks.measure import finished, interleaved, on_device, ratio
from tests.benchmarks.report import Found, geometric_mean
from tests.benchmarks.shapes import LISTS, quantized

LINKS: dict[str, Any] = {
    "hard": pf.hard_prox,
    "parq": partial(pf.parq_prox, **peer.STEPS),
    "binary_relax": partial(pf.binary_relax_prox, **peer.STEPS),
    "soft": partial(pf.soft_prox, **peer.STEPS, end_temperature=20.0),
}
GRANULARITIES = {
    "tensor": pf.per_tensor(),
    "channel": pf.per_channel(),
    "block of 32": pf.per_block(32),
}
Case = tuple[str, str, int, str]  # network, map, levels, granularity
QUANTIZERS = {2: pf.lsbq(1), 3: pf.lsbq(0), 4: pf.lsbq(2), 16: pf.lsbq(4)}  # by levels
EVEN = pf.uniform(4)  # whose 16 levels are evenly spaced
#: Times of a copy that a map of EVEN may take, compiled in blocks, and eager.
EVEN_LIMITS = {("hard", "compiled", "block of 32"): 1.15} | {
    ("hard", "eager", where): 6.0 for where in ("channel", "block of 32")
}


def state_of(link: Prox) -> ProxState:
    """Some way into the annealing."""
    state = link.init([])._replace(count=torch.tensor(peer.STEP))
    return link.advance(state, torch.zeros((), dtype=torch.float64))


def flat(shapes: list[tuple[int, ...]], granularity: pf.Granularity) -> list[tuple[int, ...]]:
    """Kernels as matrices for blocks, and without those that blocks do not divide."""
    if not isinstance(granularity, pf.per_block):
        return shapes
    matrices = [(s[0], int(torch.Size(s[1:]).numel())) for s in shapes]
    return [s for s in matrices if s[1] % granularity.size == 0]


def jobs_of(link: Prox, latents: list[Tensor]) -> list[Job]:
    rows = [link.granularity.rows(u) for u in latents]
    levels = [link.quantizer.fit(x) for x in rows]
    return [
        Job(u, q, link.granularity, torch.empty_like(u))
        for u, q in zip(latents, levels, strict=True)
    ]


def check(link: Prox, state: ProxState, jobs: list[Job], passes: dict[str, Pass]) -> None:
    """Every form equals the plain one bit for bit, and that in float64 to rounding."""
    wanted = [job._replace(weight=torch.empty_like(job.weight)) for job in jobs]
    plain(link, state, wanted)
    for name, fast in passes.items():
        fast(link, state, jobs)
        for job, want in zip(jobs, wanted, strict=True):
            assert torch.equal(job.weight, want.weight), (link, name, job.weight.shape)
    for job in wanted:
        rows = link.granularity.rows(job.latent).double()
        q = link.quantizer.levels_in(job.qparams, job.weight.dtype).double()
        twin = link.proxmap(rows, q, state.slope)
        got = link.granularity.rows(job.weight).double()
        size = q.abs().amax(1, keepdim=True)
        jumps = midpoint(q[:, :-1], q[:, 1:])
        last = max(0, jumps.shape[1] - 1)
        above = torch.searchsorted(jumps, rows)
        ends = (jumps.gather(1, (above - i).clamp(0, last)) for i in (0, 1))
        aside = torch.stack([(rows - end).abs() <= 1e-6 * size for end in ends]).any(0)
        wrong = ((got - twin).abs() > 1e-5 * (size + rows.abs())) & ~aside
        assert not bool(wrong.any()), (link, job.weight.shape)


def against_copy(elements: int, repeats: int, compiled: bool = True) -> Iterator[Found]:
    """One weight of so many elements, against `weight.copy_(latent)`."""
    width = 1 << (elements.bit_length() // 2)
    u = torch.randn(elements // width, width)
    fast = {"compiled": Pass(compile=True), "eager": Pass()}
    if not compiled:
        del fast["compiled"]
    copies: list[float] = []
    for kind, make in LINKS.items():
        for quantizer in (*QUANTIZERS.values(), EVEN):
            k = quantizer.num_levels
            for where, granularity in GRANULARITIES.items():
                link = make(quantizer, granularity=granularity)
                state, jobs = state_of(link), jobs_of(link, [u])
                check(link, state, jobs_of(link, [u[: len(u) // 64 + 1]]), fast)
                for name, one in fast.items():
                    works = {
                        name: partial(one, link, state, jobs),
                        "copy": partial(jobs[0].weight.copy_, u),
                    }
                    # next to each other and often, for they are short
                    often = 5 if name == "compiled" else 1
                    times = interleaved(works, often * repeats, least=0)
                    copies += times["copy"]
                    limit = 1.25 if k <= 4 else 2.0
                    affine = kind != "soft"  # which computes more than it reads
                    held = limit if name == "compiled" and affine else None
                    levels = f"{k} levels"
                    if quantizer is EVEN:
                        held = EVEN_LIMITS.get((kind, name, where), held)
                        levels = f"{k} even levels"
                    value, spread = ratio(times[name], times["copy"])
                    what = f"{name}, time over a copy's"
                    yield Found("pass", f"{kind}, {levels}, {where}", what, value, spread, held)
    # the machine's memory may have more rates than one, and the ratios depend on it
    low, middle, high = statistics.quantiles([8e-9 * elements / took for took in copies], n=4)
    yield Found("pass", "copy", "GB/s read and written", middle, (high - low) / 2)


def against_peer(
    networks: dict[str, Any],
    chosen: Iterable[Case],
    repeats: int,
    *,
    compiled: bool = True,
    device: str = "cpu",
) -> Iterator[Found]:
    """All weights of a network, against the published map."""
    fast = {"eager": Pass(), "compiled": Pass(compile=True)}
    if not compiled:
        del fast["compiled"]
    found: dict[str, list[float]] = {}
    for network, kind, k, where in chosen:
        link = LINKS[kind](QUANTIZERS[k], granularity=GRANULARITIES[where])
        torch.manual_seed(0)
        shapes = flat(quantized(networks[network]()), link.granularity)
        latents = [torch.randn(shape).to(device) for shape in shapes]
        state, jobs = state_of(link), jobs_of(link, latents)
        prox_map = peer.prox_map(kind)
        theirs = [u.clone() for u in latents]
        shaped = [peer.rows_of(p, link.granularity) for p in theirs]
        dims = [dim for _, dim in shaped]
        made = [link.quantizer.levels(job.qparams) for job in jobs]
        levels = [own if dim else own[0] for own, dim in zip(made, dims, strict=True)]

        def run(shaped: Any = shaped, levels: Any = levels, prox_map: Any = prox_map) -> None:
            for (p, dim), q in zip(shaped, levels, strict=True):
                prox_map.apply_(p, None, q, peer.STEP, dim=dim)

        def reset(theirs: Any = theirs, latents: Any = latents) -> None:
            torch._foreach_copy_(theirs, latents)

        works: dict[str, Any] = {
            name: partial(one, link, state, jobs) for name, one in fast.items()
        }
        works["peer"] = run
        done = {name: finished(work, device) for name, work in works.items()}
        clocks = {"time": interleaved(done, repeats, before=finished(reset, device))}
        if device != "cpu":
            clocks["time on the device"] = on_device(works, repeats, reset)
        check(link, state, jobs, fast)
        for clock, times in clocks.items():
            for name in fast:
                value, spread = ratio(times["peer"], times[name])
                what = f"{name}, peer's {clock} over ours"
                found.setdefault(what, []).append(value)
                case = f"{network}, {kind}, {k} levels, {where}"
                limit = 1.0 if name == "eager" else None
                yield Found("peer", case, what, value, spread, limit, False)
    for what, values in found.items():
        yield Found(
            "peer", f"{len(values)} cases", f"{what}, geometric mean", geometric_mean(values)
        )


def state_size() -> Found:
    """Of a block's levels."""
    link = pf.hard_prox(EVEN, granularity=pf.per_block(32))
    qparams = link.init([torch.zeros(64, 64)]).qparams[0]
    size = qparams.numel() * qparams.element_size() / (64 * 64 / 32)
    return Found("pass", f"{EVEN!r}, block of 32", "state, bytes a block", size, 0.0, 4.0)


def all_cases(network: str) -> Iterator[Case]:
    """Of a network."""
    for kind in peer.KINDS:
        for k in QUANTIZERS:
            for where in GRANULARITIES:
                yield network, kind, k, where


def some_cases(network: str) -> Iterator[Case]:
    """Four levels, per tensor and channel."""
    for kind in peer.KINDS:
        for where in ("tensor", "channel"):
            yield network, kind, 4, where


def run(size: str, repeats: int) -> Iterator[Found]:
    """The groups of this module."""
    tiny = size == "tiny"
    elements = 1 << (16 if tiny else 26)
    yield from against_copy(elements, repeats, compiled=not tiny)
    yield state_size()
    if peer.available:
        networks = {"tiny": lambda: [(8, 4, 3, 3), (32, 64), (64,)]} if tiny else LISTS
        first, *others = networks
        chosen = [*all_cases(first), *(case for other in others for case in some_cases(other))]
        yield from against_peer(networks, chosen, repeats, compiled=not tiny)
