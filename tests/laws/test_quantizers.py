"""Quantizers: every declared law, and the slow twins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import parq_fn as pq
from parq_fn.quantizers.rounding import FORMATS
from parq_fn.testing import Law, Violation, check_quantizer, laws, strategies
from tests.helpers import sampled
from tests.laws import some
from tests.twins import formats
from tests.twins import quantizers as twins
from tests.twins.formats import GAUSSIAN, nearest_number

OPERATORS = [
    pq.lsbq(0),
    pq.lsbq(1),
    pq.lsbq(2),
    pq.lsbq(4),
    pq.lsbq(2, center=True),
    pq.lsbq(0, "optimal"),
    pq.lsbq(2, "optimal"),
    pq.lsbq(2, "optimal", center=True),
    pq.lsbq(3, "alternating"),
    pq.lsbq(0, "alternating"),
    pq.lloyd_max(1),
    pq.lloyd_max(2),
    pq.lloyd_max(2, symmetric=False),
    pq.uniform(2),
    pq.uniform(3, "max"),
    pq.uniform(2, center=True),
    pq.max_uniform(2),
    pq.max_uniform(3, center=True),
    pq.asymmetric(1),
    pq.asymmetric(3),
    pq.ternary_uniform(),
    pq.ternary_uniform(center=True),
    pq.integer(2),
    pq.integer(3, "max_symmetric"),
    pq.integer(4, "mean"),
    pq.affine(1),
    pq.affine(3),
    pq.codebook.nf4,
    pq.codebook.fp4,
    pq.codebook.iq4_nl,
    pq.codebook((-1, 0, 0.25, 1)),
    pq.gaussian(0),
    pq.gaussian(2),
    pq.mxfp4(),
    pq.nvfp4(),
    pq.stored(pq.uniform(3, "max"), torch.float16),
    pq.stored(pq.asymmetric(2), torch.bfloat16),
    pq.stored(pq.codebook.nf4, "e8m0"),
    pq.stored(pq.centered(pq.integer(3)), torch.bfloat16),
    pq.centered(pq.mxfp4()),
]


@pytest.mark.rare
@pytest.mark.parametrize("quantizer", OPERATORS, ids=repr)
@pytest.mark.laws
def test_every_declared_law(quantizer: Any) -> None:
    slow = getattr(quantizer, "method", "") == "alternating"
    check_quantizer(quantizer, max_examples=some(4) if slow else some(10))


def row_of(twin: Any, x: Tensor, *args: Any) -> Tensor:
    return torch.tensor([twin(row, *args) for row in x.tolist()], dtype=x.dtype)


rows = strategies.rows(length=(1, 7))


@given(rows, st.integers(0, 4))
def test_greedy_equals_its_twin(x: Tensor, bits: int) -> None:
    want = row_of(twins.lsbq_greedy, x, bits)
    torch.testing.assert_close(pq.lsbq(bits)(x), want, atol=1e-12, rtol=1e-12)


@given(rows, st.integers(1, 4), st.sampled_from(("mean", "max")))
def test_uniform_equals_its_twin(x: Tensor, bits: int, scale: Any) -> None:
    want = row_of(twins.uniform, x, bits, scale)
    torch.testing.assert_close(pq.uniform(bits, scale)(x), want, atol=1e-12, rtol=1e-12)


@given(rows, st.integers(2, 4))
def test_max_uniform_equals_its_twin(x: Tensor, bits: int) -> None:
    want = row_of(twins.max_uniform, x, bits)
    torch.testing.assert_close(pq.max_uniform(bits)(x), want, atol=1e-12, rtol=1e-12)
    want = row_of(twins.ternary_uniform, x)
    torch.testing.assert_close(pq.ternary_uniform()(x), want, atol=1e-12, rtol=1e-12)


@given(rows, st.integers(1, 4))
def test_asymmetric_equals_its_twin(x: Tensor, bits: int) -> None:
    """Up to the zero point's rounding where it lies halfway: then one step to a side."""
    got, want = pq.asymmetric(bits)(x), row_of(twins.asymmetric, x, bits)
    step = (x.amax(-1, keepdim=True) - x.amin(-1, keepdim=True)) / (2**bits - 1)
    off = (got - want).abs()
    slack = 1e-11 * x.abs().amax(-1, keepdim=True)
    halfway = ((-x.amin(-1, keepdim=True) / step.clamp(min=1e-300)) % 1 - 0.5).abs() < 1e-6
    near = (off <= slack) | (halfway & ((off - step).abs() <= slack))
    assert near.all()


@given(rows, st.integers(2, 4), st.sampled_from(("max", "max_symmetric", "mean")))
def test_integer_equals_its_twin(x: Tensor, bits: int, scale: Any) -> None:
    want = row_of(twins.integer, x, bits, scale)
    torch.testing.assert_close(pq.integer(bits, scale)(x), want, atol=1e-12, rtol=1e-12)


@given(rows, st.integers(1, 4))
def test_affine_equals_its_twin(x: Tensor, bits: int) -> None:
    want = row_of(twins.affine, x, bits)
    torch.testing.assert_close(pq.affine(bits)(x), want, atol=1e-12, rtol=1e-12)


TABLES = (pq.codebook.nf4, pq.codebook.fp4, pq.codebook.iq4_nl, pq.codebook((-1, 0, 0.25, 1)))


@given(rows, st.sampled_from(TABLES))
def test_codebook_equals_its_twin(x: Tensor, quantizer: pq.codebook) -> None:
    want = row_of(twins.codebook, x, quantizer.table)
    torch.testing.assert_close(quantizer(x), want, atol=1e-12, rtol=1e-12)


@given(rows, st.sampled_from(sorted(GAUSSIAN)))
def test_gaussian_equals_its_twin(x: Tensor, bits: int) -> None:
    want = row_of(twins.gaussian, x, 2**bits if bits else 3, GAUSSIAN[bits])
    torch.testing.assert_close(pq.gaussian(bits)(x), want, atol=1e-12, rtol=1e-12)


@given(strategies.rows(magnitudes=(1.0, 1e-30, 1e30)))
def test_mxfp4_equals_its_twin(x: Tensor) -> None:
    assert torch.equal(pq.mxfp4()(x), row_of(twins.mxfp4, x))


@given(strategies.rows(magnitudes=(1.0, 1e-30, 1e-4, 1e30)))
def test_nvfp4_equals_its_twin(x: Tensor) -> None:
    assert torch.equal(pq.nvfp4()(x), torch.tensor(twins.nvfp4(x.tolist()), dtype=x.dtype))


@given(rows, st.sampled_from((torch.float16, torch.bfloat16, "e8m0")))
def test_stored_equals_its_twin(x: Tensor, dtype: Any) -> None:
    """Of a scale that is one division, and so the twin's to the last bit."""

    def twin(row: list[float]) -> list[float]:
        scale = max(map(abs, row)) / 2
        held = formats.e8m0(scale) if dtype == "e8m0" else nearest_number(scale, *FORMATS[dtype])
        return [j * held for j in range(-2, 3)]

    five = pq.codebook((-2, -1, 0, 1, 2))
    assert torch.equal(pq.stored(five, dtype)(x), row_of(twin, x))


@pytest.mark.parametrize(
    ("quantizer", "least"),
    [
        (pq.lsbq(1), lambda x: twins.symmetric_error(x, 2)),
        (pq.lsbq(0, "optimal"), twins.optimal_ternary_error),
        (pq.lsbq(2, "optimal"), lambda x: twins.symmetric_error(x, 4)),
        (pq.lloyd_max(2), lambda x: twins.symmetric_error(x, 4)),
        (pq.lloyd_max(1, symmetric=False), lambda x: twins.best_error(x, 2)),
        (pq.lloyd_max(2, symmetric=False), lambda x: twins.best_error(x, 4)),
    ],
    ids=lambda x: repr(x) if isinstance(x, pq.Quantizer) else "",
)
@given(x=rows)
def test_no_partition_does_better(quantizer: Any, least: Any, x: Tensor) -> None:
    for row, q in zip(x.tolist(), quantizer(x).tolist(), strict=True):
        size = sum(a * a for a in row) or 1.0
        assert twins.error(row, q) / size == pytest.approx(least(row) / size, abs=1e-12)


@given(rows)
def test_greedy_loses_to_optimal_and_alternating_to_neither(x: Tensor) -> None:
    """The chain of errors at 2 bits: optimal <= alternating <= greedy."""
    for row in x.split(1):
        own = row.tolist()[0]
        size = sum(a * a for a in own) or 1.0
        best, middle, worst = (
            twins.error(own, pq.lsbq(2, method)(row).tolist()[0]) / size
            for method in ("optimal", "alternating", "greedy")
        )
        assert best <= middle + 1e-12
        assert middle <= worst + 1e-12


def test_the_parts_of_greedy_are_means_of_what_is_left() -> None:
    parts = pq.lsbq(2).traits.parts
    assert parts is not None
    v = parts(torch.tensor([[1.0, 3.0]]))
    assert [part.item() for part in v] == [2.0, 1.0]


FAILS: list[tuple[str, Any]] = [
    ("pythagoras", pq.lsbq(2)),
    ("pythagoras", pq.lsbq(0)),
    ("idempotent", pq.lsbq(2)),
    ("idempotent", pq.ternary_uniform()),
    ("exact_on_constants", pq.lsbq(0)),
    ("exact_on_constants", pq.ternary_uniform()),
    ("symmetric", pq.lloyd_max(1, symmetric=False)),
    ("symmetric", pq.lsbq(2, center=True)),
    ("includes_zero", pq.lsbq(2)),
    ("shift", pq.lsbq(2)),
    ("sign", pq.asymmetric(2)),
    ("sign", pq.integer(2)),
    ("idempotent", pq.integer(3, "max_symmetric")),
    ("idempotent", pq.codebook.iq4_nl),
    ("exact_on_constants", pq.codebook.iq4_nl),
    ("sign", pq.codebook.nf4),
    ("idempotent", pq.gaussian(2)),
    ("includes_zero", pq.affine(2)),
    ("scale", pq.mxfp4()),
    ("exact_on_constants", pq.mxfp4()),
    ("rows_alone", pq.nvfp4()),
    ("scale", pq.stored(pq.uniform(3, "max"), torch.float16)),
    ("scale_exact", pq.stored(pq.uniform(3, "max"), torch.float16)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("law", "quantizer"), sampled(FAILS, 8), ids=str)
def test_what_must_not_hold_does_not(law: str, quantizer: Any) -> None:
    with pytest.raises(Violation, match=law):
        check_quantizer(quantizer, laws=[law], max_examples=400)


def test_all_laws_are_declared_by_some_quantizer() -> None:
    declared: set[Law] = {law for q in OPERATORS for law in laws.for_quantizer(q)}
    assert declared == set(laws.ALL["quantizer"])
