"""Evenly spaced levels: rounding finds the cells and levels of the search, bit for bit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import parq_fn as pf
from parq_fn.optim.engine.passes import Job, Pass
from parq_fn.proxmaps import MAPS
from parq_fn.proxmaps import levels as lv
from parq_fn.proxmaps.even import LEAST, Even
from tests.helpers import spread

QUANTIZERS = [
    *(pf.uniform(bits) for bits in range(2, 9)),
    pf.uniform(3, scale="max"),
    *(pf.max_uniform(bits) for bits in range(2, 9)),
    pf.ternary_uniform(),
    pf.lsbq(0),
    pf.integer(4),
    pf.gaussian(3),
    pf.stored(pf.uniform(4), torch.float16),
    *(pf.asymmetric(bits) for bits in range(2, 9)),
]
#: (of latents, of weights)
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.float16),
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
]
COEFFICIENTS: dict[str, list[float]] = {
    "hard": [0.0],
    "clip": [0.0],
    "parq": [0.0, 0.3, 0.9, 1.0],
    "soft": [0.0, 3.0, math.inf],
    "binary_relax": [0.3, 0.7, 1.0],
    "proxquant": [0.1, math.inf],
}
STEPS: dict[str, Any] = {"anneal_start": 2, "anneal_end": 10}


def levels_of(quantizer: Any, rows: Tensor, dtype: torch.dtype) -> tuple[Even, Tensor] | None:
    """(by rounding, as a table), of rows and one of zeros; None where a search is asked for."""
    qparams = quantizer.fit(torch.cat([rows, torch.zeros_like(rows[:1])]))
    even = quantizer.even_in(qparams, dtype)
    return None if even is None else (even, quantizer.levels_in(qparams, dtype))


def hard_cases(table: Tensor, dtype: torch.dtype, reach: int = 2) -> Tensor:
    """Latents on levels and bounds, their neighbours, what is between and beyond, NaN."""
    wide = table.to(torch.promote_types(torch.promote_types(dtype, table.dtype), torch.float32))
    found = []
    for ends in (wide, lv.bounds(wide)):
        below = above = ends.to(dtype)
        found.append(above)
        for _ in range(reach):
            above = above.nextafter(torch.full_like(above, torch.inf))
            below = below.nextafter(torch.full_like(below, -torch.inf))
            found += [above, below]
    share = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)
    odd = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-41, 3e38, -3e38])
    found += [(wide[:, -1:].double() * share).to(dtype), odd.to(dtype).expand(len(wide), -1)]
    return torch.cat(found, 1)


def same(got: Tensor, want: Tensor) -> None:
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want.expand_as(got), rtol=0, atol=0, equal_nan=True)


def check(even: Even, table: Tensor, u: Tensor) -> None:
    """Cells and all maps."""
    (x, by_rounding), (_, by_search) = lv.prepare(u, even), lv.prepare(u, table)
    known = ~x.isnan()
    for got, want in zip(lv.cell(x, by_rounding), lv.cell(x, by_search), strict=True):
        assert torch.equal(got[known], want[known])
    for proxmap in MAPS:
        for c in COEFFICIENTS.get(proxmap.__name__, []):
            for formula in (proxmap.formula(c), proxmap.formula(None)):
                assert formula.rounds(256)
                same(formula(u, even, c), formula(u, table, c))


@pytest.mark.slow
@pytest.mark.parametrize(("quantizer", "dtypes"), spread(QUANTIZERS, DTYPES), ids=str)
def test_rounding_finds_what_the_search_does(quantizer: Any, dtypes: Any) -> None:
    latent, weight = dtypes
    sizes = [1e-3, 1e-2, 1.0, 37.0, 100.0]
    if torch.float16 not in dtypes:
        sizes += [1e-30, 1e4, 1e30]
    generator = torch.Generator().manual_seed(quantizer.num_levels)
    rows = torch.randn(len(sizes), 64, generator=generator) * torch.tensor(sizes).unsqueeze(1)
    found = levels_of(quantizer, rows.to(torch.promote_types(latent, torch.float32)), weight)
    if found is None:
        assert (quantizer.num_qparams, quantizer.num_levels) == (2, 256)
        assert weight == torch.bfloat16
        return
    check(*found, hard_cases(found[1], latent))


@given(
    st.floats(2.0**-124, 2.0**118, width=32),
    st.integers(-(2**20), 2**20) | st.integers(-300, 300),
    st.sampled_from([(bits, dtypes) for bits in (2, 4, 8) for dtypes in DTYPES]),
)
def test_any_step_and_zero_point_is_rounded_right_or_refused(step, zero, case) -> None:
    bits, (latent, weight) = case
    quantizer = pf.asymmetric(bits)
    qparams = torch.tensor([[step, zero]], dtype=torch.promote_types(latent, torch.float32))
    inverse = quantizer.inverse_steps(qparams, weight)
    if inverse is not None:
        table = quantizer.levels_in(qparams, weight)
        check(quantizer.even(qparams, inverse, weight), table, hard_cases(table, latent))


def test_rows_for_which_rounding_may_fail_are_searched() -> None:
    """A subnormal step, one near the end of a dtype, a zero point far out, rounded levels."""
    uniform, asymmetric = pf.uniform(4), pf.asymmetric(8)

    def rounds(quantizer: Any, *qparams: float, dtype: torch.dtype = torch.float32) -> bool:
        rows = torch.tensor([[1.0] * len(qparams), qparams])
        return quantizer.inverse_steps(rows, dtype) is not None

    assert rounds(uniform, 0.3)
    assert rounds(uniform, 0.0)
    assert rounds(uniform, math.nan)
    assert rounds(uniform, 1e-37)
    assert not rounds(uniform, 1e-38)
    assert not rounds(uniform, 1e-45)
    assert not rounds(uniform, -1.0)
    assert not rounds(uniform, math.inf)
    assert rounds(uniform, 5e36)
    assert not rounds(uniform, 1e38)
    assert rounds(asymmetric, 1.0, 2.0**18)
    assert not rounds(asymmetric, 1.0, 2.0**21)
    assert not rounds(asymmetric, 1.0, math.nan)
    for dtype in (torch.bfloat16, torch.float16):
        assert rounds(pf.uniform(8), 0.3, dtype=dtype)
    assert not rounds(asymmetric, 0.3, 7.0, dtype=torch.bfloat16)
    assert rounds(uniform, 3e-7, dtype=torch.float16)
    assert not rounds(uniform, 1e-7, dtype=torch.float16)
    assert not rounds(uniform, 3e4, dtype=torch.float16)


def test_what_has_no_even_levels_or_few_is_searched() -> None:
    rows = torch.randn(2, 9)
    for quantizer in (pf.uniform(4, center=True), pf.lsbq(2), pf.lloyd_max(2)):
        assert quantizer.inverse_steps(quantizer.fit(rows), torch.float32) is None

    class halved(pf.uniform):  # whose levels are no longer those of its grid
        def levels(self, qparams: Tensor) -> Tensor:
            return super().levels(qparams) / 2

    for quantizer in (halved(4), pf.stored(halved(4), torch.float16)):
        assert quantizer.inverse_steps(quantizer.fit(rows), torch.float32) is None
    old = pf.uniform(2).with_levels(torch.ones(1, 1), torch.ones(1, 4))
    assert pf.uniform(2).inverse_steps(old, torch.float32) is None


def test_values_that_cannot_be_read_are_searched() -> None:
    quantizer, rows = pf.uniform(4), torch.randn(5, 40)
    qparams = quantizer.fit(rows)
    seen = []

    def mapped(u: Tensor, q: Tensor) -> Tensor:
        seen.append(quantizer.inverse_steps(q, torch.float32))
        return pf.proxmaps.hard(u, quantizer.levels_in(q, torch.float32))

    torch.vmap(mapped)(rows.unsqueeze(1), qparams.unsqueeze(1))
    assert seen == [None]


@pytest.mark.filterwarnings("ignore:.torch.jit.script.")  # torch's own, at a first jvp
def test_rounding_goes_through_transformations() -> None:
    """Batched, differentiated in latents and qparams, functionalized: as the search."""
    quantizer, rows = pf.uniform(3), torch.randn(4, 64)
    qparams = quantizer.fit(rows)
    inverse = quantizer.inverse_steps(qparams, torch.float32)
    assert inverse is not None

    def value(formula: Any, even: bool, u: Tensor, q: Tensor, c: Tensor) -> Tensor:
        levels: Any = quantizer.levels_in(q, torch.float32)
        if even:
            levels = quantizer.even(q, inverse, torch.float32)
        return formula(u, levels, c)

    weights = torch.randn(4, 64)
    for proxmap in MAPS:
        for c in COEFFICIENTS.get(proxmap.__name__, [])[:2]:
            for formula in (proxmap.formula(None), proxmap.formula(c)):
                found = []
                for even in (True, False):

                    def loss(u: Tensor, q: Tensor, even=even, formula=formula, c=c) -> Tensor:
                        own = torch.tensor(c)
                        return (weights * value(formula, even, u, q, own)).sum()

                    grads = torch.func.grad(loss, (0, 1))(rows, qparams)
                    u, q = (x.clone().requires_grad_() for x in (rows, qparams))
                    by_tape = torch.autograd.grad(loss(u, q), (u, q), materialize_grads=True)
                    _, tangent = torch.func.jvp(loss, (rows, qparams), (weights, qparams))
                    found.append((*grads, *by_tape, tangent))
                for got, want in zip(*found, strict=True):
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    hard = pf.proxmaps.hard.formula(None)

    def one(u: Tensor, step: Tensor, inverse: Tensor) -> Tensor:
        levels = quantizer.even(step, inverse, torch.float32)
        return hard(u.unsqueeze(0), levels, 0.0).squeeze(0)

    want = hard(rows, quantizer.levels_in(qparams, torch.float32), 0.0)
    batch = rows, qparams.unsqueeze(1), inverse.unsqueeze(1)
    assert torch.equal(torch.vmap(one)(*batch), want)
    assert torch.equal(torch.func.functionalize(torch.vmap(one))(*batch), want)


LINKS: dict[str, Any] = {
    "hard": pf.hard_prox,
    "parq": lambda q, **more: pf.parq_prox(q, **STEPS, **more),
    "soft": lambda q, **more: pf.soft_prox(q, **STEPS, **more),
    "binary_relax": lambda q, **more: pf.binary_relax_prox(q, **STEPS, **more),
    "proxquant": lambda q, **more: pf.proxquant_prox(q, strength=0.1, **STEPS, **more),
}
GRANULARITIES = [pf.per_tensor(), pf.per_channel(), pf.per_block(32)]


def passes_are_the_search(kind: str, quantizer: Any, granularity: Any, weight: Any, fast: Pass):
    """An optimizer's pass, and the functional weights, against the map of a table."""
    torch.manual_seed(0)
    link = LINKS[kind](quantizer, granularity=granularity)
    latents = [torch.randn(40, 96), torch.randn(3, 64), torch.randn(33, 1056)]
    latents[0][0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    latents[1][:] *= 1e-42  # subnormal steps: searched
    latents[2][:2] = 0
    for step in (4,) if fast.compile else (4, 12):
        state = link.init([])._replace(count=torch.tensor(step))
        state = link.advance(state, torch.tensor(0.0, dtype=torch.float64))
        jobs, wanted = [], []
        for latent in latents:
            rows = granularity.rows(latent)
            qparams = quantizer.fit(rows.nan_to_num(0.0, 0.0, 0.0))
            jobs.append(Job(latent, qparams, granularity, torch.empty_like(latent, dtype=weight)))
            mapped = link.proxmap(rows, quantizer.levels_in(qparams, weight), state.slope)
            wanted.append(granularity.restore(mapped, latent).to(weight))
            kept = [qparams.reshape(*granularity.row_shape(latent), -1)]
            own = link.weights(state._replace(qparams=kept), [latent], dtype=weight)[0]
            same(own, wanted[-1])
        fast(link, state, jobs)
        for job, want in zip(jobs, wanted, strict=True):
            same(job.weight, want)


SOME = [pf.uniform(2), pf.uniform(4), pf.uniform(8), pf.max_uniform(3), pf.asymmetric(4)]
WEIGHTS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("quantizer", "kind", "granularity", "weight"),
    spread(SOME * 2, list(LINKS), GRANULARITIES, WEIGHTS),
    ids=str,
)
def test_a_pass_in_pieces_rounds_to_what_the_search_finds(
    quantizer, kind, granularity, weight
) -> None:
    passes_are_the_search(kind, quantizer, granularity, weight, Pass())


@pytest.mark.rare
@pytest.mark.parametrize(
    ("quantizer", "kind", "granularity", "weight"),
    spread([*SOME, pf.lsbq(2)], list(LINKS), GRANULARITIES, WEIGHTS),
    ids=str,
)
def test_a_compiled_pass_rounds_to_what_the_search_finds(
    quantizer, kind, granularity, weight
) -> None:
    passes_are_the_search(kind, quantizer, granularity, weight, Pass(compile=True))


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    list(itertools.product([pf.uniform(4), pf.max_uniform(8), pf.asymmetric(4)], WEIGHTS)),
    ids=str,
)
def test_sixteen_million_latents_about_the_bounds(quantizer: Any, dtype: torch.dtype) -> None:
    """Every float32 next to levels and bounds of some hundred rows."""
    generator = torch.Generator().manual_seed(1)
    reach, k = 64, quantizer.num_levels
    left = 1 << 24
    while left > 0:
        rows = torch.randn(64, 32, generator=generator) * 2.0 ** torch.randint(-9, 9, (64, 1))
        found = levels_of(quantizer, rows, dtype)
        assert found is not None
        (_, even), table = lv.prepare(rows, found[0]), found[1].float()
        ends = torch.cat([table, lv.bounds(table)], 1)
        near = ends.unsqueeze(-1).view(torch.int32) + torch.arange(-reach, reach, dtype=torch.int32)
        x = near.view(torch.float32).flatten(1)
        x = torch.where(x.abs() < torch.inf, x, 0.0)  # from a zero on a step down is NaN
        assert torch.equal(lv.closest(x, even), lv.closest(x, table))
        for got, want in zip(lv.cell(x, even), lv.cell(x, table), strict=True):
            assert torch.equal(got, want)
        left -= x.numel()
    assert k >= LEAST
