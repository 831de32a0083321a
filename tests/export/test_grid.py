"""Evenly spaced levels: the quantizer's own step, or multiples of a unit that is searched."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

import parq_fn as pf
from parq_fn.export import Packed, load, pack_weight, save
from parq_fn.export.file import _header
from parq_fn.export.grid import as_multiples, even_grid, halved, shifted, told
from parq_fn.quantizers import Grid
from tests.export.helpers import EVEN, fitted
from tests.helpers import sampled, spread

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    spread([q for q in EVEN if q != pf.asymmetric(8)], DTYPES[1:]),
    ids=str,
)
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
    assert grid.half
    whole = even_grid(pf.max_uniform(2)(torch.randn(1, 5)))
    assert halved(whole) is whole


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


# Grids that packed weights keep.

CUTS = [pf.per_tensor(), pf.per_channel(), pf.per_block(8), pf.per_channel(1)]


@pytest.mark.parametrize("quantizer", sampled(EVEN, 12), ids=repr)
@given(
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10_000),
    exponent=st.integers(-8, 8),
    offset=st.sampled_from([0.0, 0.0, 3.0, -40.0]),
    cut=st.sampled_from(CUTS),
)
def test_packed_weights_have_the_state_s_step_and_first_multiple(
    quantizer, dtype, seed: int, exponent: int, offset: float, cut
) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 16, generator=draw) + offset
    weight[seed % 4] *= seed % 3  # perhaps a row of zeros
    weight = (weight * 2.0**exponent).to(dtype)
    assume(bool(weight.isfinite().all()))
    packed, mapped, qparams = fitted(quantizer, cut, weight)
    assert torch.equal(packed.unpack(), mapped)
    # else a row's levels are held to the dtype's range, and are multiples of no step of its own
    end = torch.finfo(dtype).max * (1 - 2.0**-20)
    assume(bool((quantizer.levels(qparams.double()).abs() < end).all()))
    own, even = quantizer.grid(qparams), packed.even
    assert even is not None
    assert even.step.dtype == own.step.dtype
    assert torch.equal(even.step, own.step)
    assert torch.equal(
        even.first.expand_as(own.step), torch.as_tensor(own.first) * torch.ones_like(own.step)
    )

    found = as_multiples(packed.levels, even, dtype, halves=True)
    if dtype != torch.float64:
        assert bool(found.is_exact.all())
        assert torch.equal(found.unit, own.step)


@pytest.mark.parametrize(("quantizer", "dtype"), sampled(spread(EVEN, DTYPES), 12), ids=repr)
def test_files_keep_steps_that_levels_do_not_say(quantizer, dtype, tmp_path) -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for cut in CUTS:
        packed, mapped, _ = fitted(quantizer, cut, weight)
        save({"w": packed}, tmp_path / "file")
        again = load(tmp_path / "file")["w"]
        assert again == packed
        assert isinstance(again, Packed)
        assert torch.equal(again.unpack(), mapped)
        assert again.even is not None
        assert torch.equal(again.even.step, packed.even.step)
        about = _header((tmp_path / "file").read_bytes())
        own = about["packed"]["w"]
        assert own.get("grid", False) is (packed.grid is not None)
        plain = packed.grid is packed.cut is None and "from" not in own
        assert (about["version"] == 1) is plain
        if dtype.itemsize >= 4:  # asymmetric's multiples may be without 1 and -1
            assert packed.grid is None or isinstance(quantizer, pf.asymmetric)
        else:
            size = packed.num_bytes - len(packed.codes)
            held = packed.even if "from" in own else packed.grid
            assert size == sum(part.nbytes for part in (held or ())[:2]) + (
                0 if "from" in own else packed.levels.nbytes
            )


def test_a_step_is_told_by_float32_levels_alone() -> None:
    ends = torch.tensor([[-1.0], [-3.0]])
    for quantizer in EVEN:
        qparams = quantizer.fit(torch.cat([torch.randn(2, 30), ends], -1))
        step = quantizer.grid(qparams).step
        levels = quantizer.levels(qparams)
        said = told(levels)
        assert said is not None
        assert torch.equal(said.step, step)
    assert told(pf.lsbq(2)(torch.randn(2, 30))) is None
    assert told(torch.zeros(0, 2)) is None
    assert told(torch.tensor([[torch.nan, torch.nan]])) is None
    zeros = told(torch.zeros(2, 3))
    assert zeros is not None
    assert torch.equal(zeros.step, torch.zeros(2, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_levels_at_the_end_of_their_dtype_are_packed(dtype) -> None:
    """There the step is held back."""
    end = torch.finfo(dtype).max
    weight = torch.tensor([[end, -end, end / 2, 0.0], [1.0, -2.0, 3.0, 0.5]]).to(dtype)
    for quantizer in EVEN:
        packed, mapped, _ = fitted(quantizer, pf.per_channel(), weight)
        assert torch.equal(packed.unpack(), mapped)
        assert bool(mapped.isfinite().all())


def test_free_levels_have_no_grid() -> None:
    weight = torch.randn(4, 16)
    for quantizer in (pf.lloyd_max(2), pf.lsbq(2), pf.lsbq(3), pf.uniform(2, center=True)):
        packed, _, _ = fitted(quantizer, pf.per_channel(), weight)
        assert packed.grid is packed.even is None


@pytest.mark.parametrize(
    ("step", "first", "message"),
    [
        (torch.ones(2, 1), torch.tensor([[-1.0]]), "levels are not those of their grid"),
        (
            torch.ones(1, 1),
            torch.tensor([[0.0]]),
            r"the step of 2 rows of levels has the shape \(1, 1\)",
        ),
        (torch.ones(2, 1), torch.zeros(2, 2), r"the first multiple of 2 rows .* shape \(2, 2\)"),
        (torch.zeros(2, 1), torch.tensor([[1e30]]), "a first multiple is .*, expected one up to 2"),
        (torch.zeros(2, 1), torch.tensor([[torch.nan]]), "a first multiple is .*, expected one"),
        (torch.ones(2), torch.zeros(2, 1), r"not \[r, 1\] in torch.float32"),
        (torch.ones(2, 1).bfloat16(), torch.zeros(2, 1), r"not \[r, 1\] in torch.float32"),
    ],
)
def test_grids_of_other_levels_are_refused(step, first, message: str) -> None:
    levels = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    kept = pack_weight(levels, levels, grid=Grid(torch.ones(2, 1), 0.0, 2.0))
    assert kept.grid is None  # the levels say it
    grid = Grid(step, first, first + 2)
    with pytest.raises(ValueError, match=message):
        Packed(kept.codes, levels, (2, 3), grid=grid)


def test_a_grid_of_other_levels_is_refused_by_name() -> None:
    levels = torch.tensor([[0.0, 1.0]])
    with pytest.raises(ValueError, match="'w': levels are not those of their grid"):
        pack_weight(levels, levels, name="w", grid=Grid(torch.ones(1, 1), 1.0, 2.0))
