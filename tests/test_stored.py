"""Quantizers whose qparams are rounded to what a file holds, and the rounding itself."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import parq_fn as pf
from parq_fn.quantizers.rounding import FORMATS, to_e8m0, to_format
from tests.twins.formats import e8m0, minifloats, nearest_number

HALF, BRAIN = torch.float16, torch.bfloat16
DTYPES: list[Any] = [HALF, BRAIN, "e8m0"]
numbers = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False, width=32),
    st.floats(-70000, 70000, width=32),
    st.floats(-(2.0**-10), 2.0**-10, width=32),
)


# Rounding


@given(st.sampled_from(sorted(FORMATS, key=str)), st.lists(numbers, min_size=1))
def test_rounding_is_to_the_nearest_number(dtype: Any, values: list[float]) -> None:
    want = [nearest_number(x, *FORMATS[dtype]) for x in values]
    for wide in (torch.float32, torch.float64):
        x = torch.tensor(values, dtype=wide)
        found = to_format(x, dtype)
        assert found.tolist() == want
        assert torch.equal(to_format(found, dtype), found)


@pytest.mark.parametrize("dtype", [HALF, BRAIN, torch.float8_e4m3fn], ids=str)
def test_rounding_is_what_casting_does(dtype: torch.dtype) -> None:
    """Of every number of 16 bits and the ties between those of the format."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(BRAIN).float()
    x = torch.cat([x, torch.arange(-(2**15), 2**15, dtype=torch.int16).view(HALF).float()])
    x = x[x.isfinite()]
    x = torch.cat([x, 0.5 * x[:-1] + 0.5 * x[1:], torch.nextafter(x, x + 1)])
    end = torch.finfo(dtype).max
    found = to_format(x, "e4m3" if dtype == torch.float8_e4m3fn else dtype)
    assert torch.equal(found, x.clamp(-end, end).to(dtype).float())


def test_what_each_format_holds() -> None:
    for dtype in (HALF, BRAIN):
        limits = torch.finfo(dtype)
        mantissa, least, largest = FORMATS[dtype]
        assert (2.0**-mantissa, 2.0**least, largest) == (limits.eps, limits.tiny, limits.max)
    e4m3 = minifloats(4, 3)[:-1]  # the last pattern is NaN
    assert max(e4m3) == FORMATS["e4m3"].largest
    x = torch.tensor(e4m3)
    assert torch.equal(to_format(x, "e4m3"), x)
    between = torch.tensor([a + (b - a) * 0.49 for a, b in itertools.pairwise(e4m3)])
    assert torch.equal(to_format(between, "e4m3"), x[:-1])


def test_doubles_are_rounded_once() -> None:
    """By way of float32 they would go to a tie first."""
    x = 1 + 2.0**-11 + 2.0**-30
    assert to_format(torch.tensor(x, dtype=torch.float64), HALF).item() == float(np.float16(x))
    assert float(np.float16(x)) == 1 + 2.0**-10


@pytest.mark.parametrize("dtype", [*FORMATS, "e8m0"], ids=str)
def test_the_derivative_of_rounding_is_one(dtype: Any) -> None:
    """Of zero, of numbers below the normal ones and beyond the largest as well."""
    x = torch.tensor([0.0, 1e-42, 1e-9, 0.3, 5.0, 3.2e38])

    def total(x: torch.Tensor) -> torch.Tensor:
        return (to_e8m0(x) if dtype == "e8m0" else to_format(x, dtype)).sum()

    assert torch.func.grad(total)(x).tolist() == [1.0] * 6


def test_nan_stays() -> None:
    every = torch.tensor([2**31 - 1, 0x7F800001, -1, 0x7FC00000]).to(torch.int32)
    for dtype in FORMATS:
        assert bool(to_format(every.view(torch.float32), dtype).isnan().all())
    assert bool(to_e8m0(every.view(torch.float32)).isnan().all())


@given(st.lists(st.floats(0, width=32, allow_infinity=False), min_size=1))
def test_e8m0_is_the_power_of_two_below(values: list[float]) -> None:
    for dtype in (torch.float32, torch.float64):
        found = to_e8m0(torch.tensor(values, dtype=dtype)).tolist()
        for x, power in zip(values, found, strict=True):
            assert power == e8m0(x)


def test_e8m0_ends_where_its_exponents_do() -> None:
    x = torch.tensor([1e-300, 2.0**-128, 2.0**127, 1e300], dtype=torch.float64)
    assert to_e8m0(x).log2().tolist() == [-127, -127, 127, 127]


# The value


ROWS = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
OWN = [pf.uniform(3), pf.asymmetric(3), pf.affine(4), pf.lsbq(3), pf.lsbq(2, center=True)]
OWN += [pf.lloyd_max(2, symmetric=False), pf.integer(4), pf.codebook.nf4, pf.gaussian(2)]
STORED = [pf.stored(own, dtype) for own in OWN for dtype in (HALF, BRAIN)]
STORED += [pf.stored(own, "e8m0") for own in OWN if own.num_qparams == 1]
every = pytest.mark.parametrize("quantizer", STORED, ids=repr)


@every
def test_what_is_kept_is_not_rounded_and_levels_are_of_what_is(quantizer: pf.stored) -> None:
    own, qparams = quantizer.quantizer, quantizer.fit(ROWS)
    assert torch.equal(qparams, own.fit(ROWS))
    held = quantizer.rounded(qparams)
    assert not torch.equal(held, qparams)
    for i, scales in enumerate(quantizer.scales):
        if not scales:
            assert torch.equal(held[:, i], qparams[:, i])
        elif quantizer.dtype == "e8m0":
            assert torch.equal(held[:, i].log2() % 1, torch.zeros(len(held)))
        else:
            assert torch.equal(held[:, i].to(quantizer.dtype).float(), held[:, i])
    assert torch.equal(quantizer.levels(qparams), own.levels(held))
    assert torch.equal(quantizer.levels(held), own.levels(held))  # as read from the file
    grid, want = quantizer.grid(qparams), own.grid(held)
    assert (grid is None) == (want is None)
    if grid is not None and want is not None:
        assert torch.equal(grid.step, want.step)


@every
def test_gradients_pass_the_rounding(quantizer: pf.stored) -> None:
    own, qparams = quantizer.quantizer, quantizer.fit(ROWS.double())

    def total(levels: Any) -> Any:
        return lambda q: (levels(q) * torch.arange(1.0, own.num_levels + 1)).sum()

    found = torch.func.grad(total(quantizer.levels))(qparams)
    want = torch.func.grad(total(own.levels))(quantizer.rounded(qparams))
    torch.testing.assert_close(found, want)
    by_row = torch.vmap(torch.func.grad(total(lambda q: quantizer.levels(q[None])[0])))(qparams)
    torch.testing.assert_close(by_row, want)


@pytest.mark.rare
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiled_levels_are_rounded_too(dtype: Any) -> None:
    """A compiler drops a cast to a narrow dtype and back."""
    qparams = torch.rand(50, 1, generator=torch.Generator().manual_seed(0))
    for own in (pf.integer(4), pf.codebook.nf4):
        quantizer = pf.stored(own, dtype)
        compiled = torch.compile(quantizer.levels, fullgraph=True)
        assert torch.equal(compiled(qparams), quantizer.levels(qparams))
        assert not torch.equal(compiled(qparams), own.levels(qparams))


def test_scales_saturate() -> None:
    quantizer = pf.stored(pf.max_uniform(2), HALF)
    assert quantizer(torch.tensor([[1e6, 0.0], [1e-9, 0.0]])).tolist() == [
        [-65504, 0, 65504],
        [0, 0, 0],
    ]


def test_centered_and_stored_compose() -> None:
    x = ROWS[:1]
    inside, outside = (
        pf.centered(pf.stored(pf.integer(4), HALF)),
        pf.stored(pf.centered(pf.integer(4)), HALF),
    )
    qparams = inside.fit(x)
    assert torch.equal(qparams, outside.fit(x))
    scale, mean = qparams.half().float().unbind(-1)
    assert inside.rounded(qparams).tolist() == [[scale.item(), qparams[0, 1].item()]]
    assert outside.rounded(qparams).tolist() == [[scale.item(), mean.item()]]
    j = torch.arange(-8.0, 8.0)
    assert torch.equal(inside(x)[0], j * scale + qparams[0, 1])
    assert torch.equal(outside(x)[0], j * scale + mean)


def test_what_cannot_be_stored_is_refused() -> None:
    for two in (pf.affine(2), pf.asymmetric(2), pf.lsbq(2), pf.centered(pf.uniform(2))):
        with pytest.raises(ValueError, match="'e8m0' holds one positive scale a row"):
            pf.stored(two, "e8m0")
    for twice in (pf.stored(pf.uniform(2), HALF), pf.mxfp4(), pf.centered(pf.mxfp4())):
        with pytest.raises(ValueError, match="rounds its qparams already"):
            pf.stored(twice, BRAIN)
    with pytest.raises(ValueError, match=r"or 'e8m0', got torch\.float32"):
        pf.stored(pf.uniform(2), torch.float32)  # type: ignore[arg-type]
    for other in (2, pf.uniform, torch.float16):
        with pytest.raises(TypeError, match="stored: expected a quantizer such as"):
            pf.stored(other, HALF)  # type: ignore[arg-type]


def test_they_print_and_compare() -> None:
    assert repr(pf.stored(pf.uniform(2), HALF)) == "stored(uniform(2), torch.float16)"
    assert repr(pf.stored(pf.codebook.nf4, "e8m0")) == "stored(codebook.nf4, 'e8m0')"
    assert pf.stored(pf.uniform(2), HALF) != pf.stored(pf.uniform(2), BRAIN)


# MXFP4


def test_mxfp4_is_what_gguf_writes() -> None:
    """Scales and, but for ties, weights, of blocks of ordinary numbers."""
    quants = pytest.importorskip("gguf.quants", reason="needs gguf: pip install 'parq_fn[gguf]'")
    kind = pytest.importorskip("gguf").GGMLQuantizationType.MXFP4
    blocks = ROWS[:, :1] * torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(blocks.numpy(), kind), kind))
    quantizer = pf.mxfp4()
    assert torch.equal(quantizer.nearest(blocks, quantizer(blocks)), theirs)
