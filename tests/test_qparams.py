"""Qparams: what `fit` keeps of a row, and the levels that follow from it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import parq_fn as pf
from parq_fn.quantizers.reductions import exchanges, sorted_columns

ROW = torch.tensor([[-4.0, -1.0, 1.0, 2.0]])

#: quantizer -> its qparams of ROW
KEPT: list[tuple[Any, list[float]]] = [
    (pf.uniform(2, "max"), [8 / 3]),
    (pf.max_uniform(2), [4.0]),
    (pf.ternary_uniform(), [8 / 3]),
    (pf.ternary_uniform(center=True), [7 / 3, -0.5]),
    (pf.asymmetric(2), [2.0, 2.0]),
    (pf.lsbq(0, multiplier=1.0), [2.0]),
    (pf.lsbq(1), [2.0]),
    (pf.lsbq(1, center=True), [2.0, -0.5]),
    (pf.lsbq(2), [2.0, 1.0]),
    (pf.lsbq(3), [2.0, 1.0, 0.5]),
    (pf.lsbq(0, "optimal"), [3.0]),
    (pf.lsbq(1, "optimal"), [2.0]),
    (pf.lsbq(2, "optimal"), [4 / 3, 4.0]),
    (pf.lsbq(2, "alternating"), [4 / 3, 4.0]),
    (pf.lsbq(0, "alternating"), [3.0]),
    (pf.lloyd_max(2), [4 / 3, 4.0]),
    (pf.lloyd_max(1, symmetric=False), [-4.0, 2 / 3]),
    (pf.integer(3), [1.0]),
    (pf.integer(3, "max_symmetric"), [4 / 3.5]),
    (pf.integer(3, "mean"), [4 / 3**0.5]),
    (pf.affine(2), [2.0, -4.0]),
    (pf.codebook.fp4, [4 / 6]),
    (pf.codebook.nf4, [4.0]),
    (pf.gaussian(1), [2 * 0.7978845587140913 * 5.5**0.5]),
    (pf.mxfp4(), [1.0]),
    (pf.nvfp4(), [4 / 6, 4 / 2688]),
    (pf.stored(pf.integer(2), torch.float16), [2.0]),
    (pf.quantizers.centered(pf.integer(2)), [2.5, -0.5]),
    (pf.quantizers.centered(pf.max_uniform(2)), [3.5, -0.5]),
]


@pytest.mark.parametrize(("quantizer", "kept"), KEPT, ids=str)
def test_what_is_kept_of_a_row(quantizer: Any, kept: list[float]) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        qparams = quantizer.fit(ROW.to(dtype))
        assert qparams.dtype == torch.promote_types(dtype, torch.float32)
        assert quantizer.num_qparams == len(quantizer.scales) == len(kept)
        torch.testing.assert_close(qparams.float(), torch.tensor([kept]))
        assert torch.equal(quantizer.levels_in(qparams, dtype), quantizer(ROW.to(dtype)))


def test_a_constant_row_of_asymmetric_is_a_level() -> None:
    rows = torch.tensor([[3.0, 3.0], [-3.0, -3.0], [0.0, 0.0]])
    for bits in (1, 2, 8):
        quantizer = pf.asymmetric(bits)
        assert quantizer.fit(rows).tolist() == [[3.0, 0.0], [3.0, 1.0], [0.0, 0.0]]
        assert torch.equal(quantizer.nearest(rows, quantizer(rows)), rows)


def test_a_quantizer_of_the_old_form_is_refused() -> None:
    with pytest.raises(TypeError, match=r"old_form defines levels and no.*rename levels to"):

        class old_form(pf.Quantizer):
            num_levels = 1

            def levels(self, x: Tensor) -> Tensor:
                return x[:, :1]

    class kept(pf.lsbq):  # which has qparams
        def levels(self, qparams: Tensor) -> Tensor:
            return super().levels(qparams)

    assert torch.equal(kept(2)(ROW), pf.lsbq(2)(ROW))


def test_without_levels_of_its_own_qparams_are_sorted() -> None:
    class ends(pf.Quantizer):
        num_levels = 2

        def qparams(self, x: Tensor) -> Tensor:
            return torch.cat([x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)], -1)

    assert ends().num_qparams == 2
    assert ends().fit(ROW).tolist() == [[2.0, -4.0]]
    assert ends()(ROW).tolist() == [[-4.0, 2.0]]


def test_a_field_may_be_named_grid() -> None:
    @pf.foundation.value.value
    class drawn(pf.Quantizer):
        grid: tuple[float, ...]

        @property
        def num_levels(self) -> int:
            return len(self.grid)

        def qparams(self, x: Tensor) -> Tensor:
            return x.abs().amax(-1, keepdim=True) * torch.tensor(self.grid, dtype=x.dtype)

    assert drawn((-1.0, 0.5))(ROW).tolist() == [[-4.0, 2.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_levels_are_held_to_the_range_of_the_weights_dtype(dtype: torch.dtype) -> None:
    end = torch.finfo(dtype).max
    quantizer = pf.lsbq(2)
    levels = quantizer.levels_in(torch.tensor([[0.9 * end, 0.2 * end]]), dtype)
    assert levels.dtype == dtype
    assert levels[0, -1] == end == -levels[0, 0]
    assert bool((levels.diff() > 0).all())


@pytest.mark.parametrize("quantizer", [q for q, _ in KEPT], ids=str)
def test_the_largest_rows_have_finite_sorted_levels(quantizer: Any) -> None:
    rows = torch.finfo(torch.float32).max * torch.tensor([[-1.0, 1.0], [0.9, 1.0], [-1.0, -1.0]])
    assert bool(quantizer.fit(rows).isfinite().all())
    levels = quantizer(rows)
    assert bool(levels.isfinite().all())
    assert bool((levels.diff() >= 0).all())


@pytest.mark.parametrize("quantizer", [q for q, _ in KEPT], ids=str)
def test_levels_within_a_range_are_those_there_are(quantizer: Any) -> None:
    qparams = quantizer.fit(ROW)
    assert torch.equal(quantizer.levels_within(qparams, 100.0), quantizer.levels(qparams))
    for end in (100.0, 3.0, 0.1):
        held = quantizer.levels_within(qparams, end)
        assert bool((held.abs() <= end).all())
        assert bool((held.diff() >= 0).all())


def test_levels_can_be_kept_beside_qparams() -> None:
    """As states of versions that kept levels have them."""
    quantizer, levels = pf.lsbq(2), torch.tensor([[-9.0, -1.0, 2.0, 5.0]])
    kept = quantizer.with_levels(quantizer.fit(ROW), levels)
    assert kept.shape == (1, 2 + 4)
    assert torch.equal(quantizer.known_levels(kept), levels)
    assert torch.equal(quantizer.levels_in(kept, torch.float16), levels.half())


@pytest.mark.parametrize("m", range(1, 10))
def test_columns_are_sorted_by_exchanges(m: int) -> None:
    """Of zeros and ones all there are, which tells of any numbers (Knuth's 0-1 principle)."""
    rows = torch.tensor(list(itertools.product((0.0, 1.0), repeat=m))).reshape(2**m, m)
    assert torch.equal(sorted_columns(rows), rows.sort(-1).values)
    for row in rows.tolist():
        for i, j in exchanges(m):
            assert i < j < m
            row[i], row[j] = min(row[i], row[j]), max(row[i], row[j])
        assert row == sorted(row)
