"""Evenly spaced levels as whole multiples of a unit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import parq_fn as pf
from parq_fn.export.grid import even_grid, halved, shifted

EVEN = [
    *(pf.uniform(bits, scale) for bits in (1, 2, 3, 4, 8) for scale in ("mean", "max")),
    *(pf.max_uniform(bits) for bits in (2, 3, 4, 8)),
    *(pf.asymmetric(bits) for bits in (1, 2, 4)),
    *(pf.integer(bits, scale) for bits in (2, 4, 8) for scale in ("max", "mean")),
    pf.gaussian(2),
    pf.lsbq(1),
    pf.lsbq(0),
    pf.ternary_uniform(),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", EVEN, ids=repr)
@given(seed=st.integers(0, 10_000), exponent=st.integers(-8, 8))
def test_levels_of_uniform_quantizers_are_multiples_bit_for_bit(
    quantizer, dtype, seed: int, exponent: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = (torch.randn(50, 40, generator=draw) * 2.0**exponent).to(dtype)
    levels = quantizer(rows)
    grid = even_grid(levels)
    assert grid.is_exact.all()
    assert grid.multiples.abs().max() <= 255
    product = grid.multiples.float() * grid.unit
    assert torch.equal(product.to(dtype), levels)
    if not isinstance(quantizer, pf.asymmetric):
        assert grid.multiples.abs().max() < quantizer.num_levels  # no larger than need be


@given(
    st.lists(st.integers(-20, 20), min_size=1, max_size=6),
    st.floats(2**-10, 2**10, width=32),
)
@example([17, 18], 15.0)  # none that is small
def test_any_whole_multiples_are_found(multiples: list[int], unit: float) -> None:
    levels = torch.tensor([sorted(multiples)]).float() * torch.tensor(unit)
    grid = even_grid(levels)
    assert grid.is_exact.all()
    assert torch.equal(grid.multiples.float() * grid.unit, levels)


@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=6))
def test_uneven_levels_are_rounded_within_half_a_unit_and_the_error_is_returned(
    values: list[float],
) -> None:
    levels = torch.tensor([sorted(values)])
    grid = even_grid(levels)
    off = (grid.multiples * grid.unit.double() - levels.double()).abs().amax()
    assert off <= 0.5001 * grid.unit.double() + 1e-7 * levels.abs().max()
    assert torch.equal(
        grid.is_exact, torch.tensor([torch.equal(grid.multiples.float() * grid.unit, levels)])
    )


def test_odd_multiples_are_halves_of_twice_the_unit() -> None:
    levels = pf.uniform(2)(torch.randn(4, 30))
    grid = halved(even_grid(levels))
    assert grid.multiples.tolist() == [[-2, -1, 0, 1]] * 4
    assert torch.equal((grid.multiples + 0.5) * grid.unit, levels)
    with pytest.raises(ValueError, match="not all odd multiples"):
        halved(even_grid(pf.max_uniform(2)(torch.randn(1, 5))))


# Found by reviews.


@pytest.mark.parametrize(
    "levels", [[[20.0, 21.0]], [[120.0, 121.0], [0.0, 16.0]], [[122.0, 127.0], [1.0, 50.0]]]
)
def test_zero_points_fit_the_codes_bits(levels: list[list[float]]) -> None:
    grid = even_grid(torch.tensor(levels))
    codes, zero, bits = shifted(grid)
    half = 2 ** (bits - 1)
    for got in (codes, zero):
        assert bool(((got >= -half) & (got < half)).all())
    assert torch.equal(codes - zero, grid.multiples)
