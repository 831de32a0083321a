"""Quantizers against brute force and on rows that break naive formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

import parq_fn as pf
from parq_fn.quantizers import reductions
from parq_fn.quantizers.lsbq import _codes, greedy
from parq_fn.quantizers.powers import power_of_two
from tests.helpers import sampled

ALL = [
    *(pf.uniform(b, scale, center=c) for b in (1, 2, 4, 8) for scale in ("mean", "max")
      for c in (False, True)),
    *(pf.max_uniform(b, center=c) for b in (2, 3, 8) for c in (False, True)),
    *(pf.asymmetric(b) for b in (1, 2, 8)),
    *(pf.ternary_uniform(center=c) for c in (False, True)),
    *(pf.lsbq(b, center=c) for b in (0, 1, 2, 3, 8) for c in (False, True)),
    *(pf.lsbq(b, "optimal", center=c) for b in (0, 1, 2) for c in (False, True)),
    *(pf.lsbq(b, "alternating", center=c) for b in (0, 1, 2, 3, 8) for c in (False, True)),
    *(pf.lloyd_max(b, symmetric=s) for b in (1, 2, 3, 8) for s in (False, True)),
    *(pf.integer(b, scale) for b in (2, 4, 8) for scale in ("max", "max_symmetric", "mean")),
    *(pf.affine(b) for b in (1, 2, 8)),
    *(pf.codebook.nf4, pf.codebook.fp4, pf.codebook.iq4_nl, pf.codebook((-1, 0, 0.25, 1))),
    *(pf.gaussian(b) for b in (0, 1, 2, 8)),
    pf.mxfp4(),
    pf.nvfp4(),
    *(pf.stored(pf.integer(4), dtype) for dtype in (torch.float16, torch.bfloat16, "e8m0")),
    *(pf.stored(q, torch.bfloat16) for q in (pf.asymmetric(4), pf.affine(4), pf.lloyd_max(2))),
    *(pf.centered(q) for q in (pf.codebook.nf4, pf.mxfp4(), pf.stored(pf.lsbq(2), torch.float16))),
]  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
every = pytest.mark.parametrize("quantizer", sampled(ALL, len(ALL) // 5), ids=repr)

finite = st.floats(-10, 10, allow_subnormal=False).map(lambda v: round(v, 3))
small_rows = st.lists(finite, min_size=1, max_size=12)


def error(x: Tensor, levels: Tensor) -> float:
    return float((x - pf.proxmaps.hard(x, levels)).square().sum())


def brute_force(values: list[float], cells: int, pinned: bool = False) -> float:
    """Least squared error over all ways to cut the sorted values into runs, each at its mean;
    pinned puts the first run at 0."""
    ordered, n = sorted(values), len(values)
    best = math.inf
    for cuts in itertools.combinations_with_replacement(range(n + 1), cells - 1):
        edges = (0, *cuts, n)
        total = 0.0
        for i, (a, b) in enumerate(itertools.pairwise(edges)):
            run = ordered[a:b]
            mean = 0.0 if (pinned and i == 0) or not run else math.fsum(run) / len(run)
            total += math.fsum((v - mean) ** 2 for v in run)
        best = min(best, total)
    return best


@given(small_rows)
@pytest.mark.parametrize("bits", [0, 1, 2])
def test_lsbq_optimal_is_the_best_partition_of_the_magnitudes(bits: int, values) -> None:
    x = torch.tensor([values], dtype=torch.float64)
    got = error(x, pf.lsbq(bits, "optimal")(x))
    cells = {0: 2, 1: 1, 2: 2}[bits]
    best = brute_force([abs(v) for v in values], cells, pinned=bits == 0)
    assert got == pytest.approx(best, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("n", [100, 1000])
@pytest.mark.parametrize("bits", [0, 2])
def test_lsbq_optimal_on_rows_of_hundreds(bits: int, n: int) -> None:
    """All n splits tried one by one, in plain sums."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(3, n, dtype=torch.float64, generator=generator)
    levels = pf.lsbq(bits, "optimal")(x)
    for row, own in zip(x, levels, strict=True):
        a = row.abs().sort().values
        best = min(
            (a[:j] - (0.0 if bits == 0 or j == 0 else a[:j].mean())).square().sum()
            + (a[j:] - a[j:].mean()).square().sum()
            for j in range(n)
        )
        assert error(row[None], own[None]) == pytest.approx(float(best), rel=1e-12)


@given(small_rows)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [1, 2])
def test_lloyd_max_is_the_best_partition(bits: int, symmetric: bool, values) -> None:
    x = torch.tensor([values], dtype=torch.float64)
    levels = pf.lloyd_max(bits, symmetric)(x)
    magnitudes = [abs(v) for v in values] if symmetric else values
    best = brute_force(magnitudes, 2**bits // (2 if symmetric else 1))
    assert error(x, levels) == pytest.approx(best, rel=1e-9, abs=1e-9)


@given(st.lists(finite, min_size=1, max_size=60), st.integers(1, 5))
def test_alternating_is_never_worse_than_greedy(values, bits: int) -> None:
    x = torch.tensor([values], dtype=torch.float64)
    ours = error(x, pf.lsbq(bits, "alternating")(x))
    assert ours <= error(x, pf.lsbq(bits)(x)) * (1 + 1e-12) + 1e-12


def test_alternating_gives_a_weight_halfway_between_two_levels_to_the_lower() -> None:
    x = torch.tensor([[7.0, 3.0, -6.0, 2.0, -5.0, 7.0]], dtype=torch.float64)
    # greedy has v_1 = mean|x| = 5, so that -5 is halfway: it goes with 7, 7 and -6, of mean 6.25
    assert pf.lsbq(2, "alternating")(x).tolist() == [[-6.25, -2.5, 2.5, 6.25]]


def test_lsbq_optimal_reproduces_two_magnitudes_and_takes_the_first_of_equal_splits() -> None:
    x = torch.tensor([[0.2, 0.2, 0.2, 1.0]], dtype=torch.float64)  # their mean in floats is not 0.2
    assert pf.lsbq(2, "optimal")(x).tolist() == [[-1.0, -0.2, 0.2, 1.0]]
    one, up = 1.877351497677698, 1.8773514976776982  # no split gains what rounding does not lose
    x = torch.tensor([[one, one, one, up, 1.8773514976776977]], dtype=torch.float64)
    assert pf.lsbq(2, "optimal")(x).tolist() == [[-one, -one, one, one]]


def test_alternating_improves_on_greedy_where_there_is_room() -> None:
    x = torch.randn(1, 20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for bits in (2, 3, 4):
        greedy_error, alternating_error, best = (
            error(x, q(x)) / x.numel()
            for q in (pf.lsbq(bits), pf.lsbq(bits, "alternating"), pf.lloyd_max(bits))
        )
        assert best <= alternating_error < 0.95 * greedy_error


@pytest.mark.parametrize("bits", [0, 2, 3])
def test_alternating_ends_where_refitting_its_signs_gains_nothing(bits: int) -> None:
    x = torch.randn(1, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    levels = pf.lsbq(bits, "alternating")(x)
    codes = list(itertools.product((-1.0, 1.0), repeat=bits)) if bits else [(-1,), (0,), (1,)]
    codes = torch.tensor(codes, dtype=torch.float64)
    # the v behind the levels: least squares of all levels on their sign patterns, in some order
    top = levels[0].abs().max()
    halves = [top - level for level in levels[0]]
    v = torch.tensor(sorted({round(float(h) / 2, 12) for h in halves})[1:], dtype=torch.float64)
    v = levels[0, 2:] if bits == 0 else _basis(v, levels, bits)
    order = (codes @ v).argsort()
    torch.testing.assert_close((codes @ v)[order], levels[0], rtol=1e-9, atol=1e-9)
    index = (pf.proxmaps.hard(x, levels)[..., None] == levels[:, None]).double().argmax(-1)[0]
    design = codes[order][index]
    refit = design @ torch.linalg.lstsq(design, x[0]).solution
    assert error(x, levels) <= float((x[0] - refit).square().sum()) * (1 + 1e-4)


def _basis(candidates: Tensor, levels: Tensor, bits: int) -> Tensor:
    """The v among half differences to the top level whose sums of +-v are the levels."""
    for v in itertools.combinations(candidates.tolist(), bits):
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)), dtype=levels.dtype)
        sums = (signs @ torch.tensor(v, dtype=levels.dtype)).sort().values
        if torch.allclose(sums, levels[0], atol=1e-9):
            return torch.tensor(v, dtype=levels.dtype)
    raise AssertionError(f"levels {levels} are no sums of +-v")


@given(small_rows)
def test_greedy_energy(values) -> None:
    """|r_{i+1}|^2 = |r_i|^2 - n v_i^2."""
    x = torch.tensor([values], dtype=torch.float64)
    rest = x
    for v in greedy(x, 3):
        after = torch.where(rest >= 0, rest - v, rest + v)
        left = rest.square().sum() - rest.numel() * v.square().sum()
        torch.testing.assert_close(after.square().sum(), left, rtol=1e-9, atol=1e-9)
        rest = after


@pytest.mark.slow
@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_levels_in_every_dtype(quantizer, dtype) -> None:
    """Declared number, sorted, finite, in the dtype; narrow ones are float32's, rounded."""
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = x.clone()
    levels = quantizer(x)
    assert levels.shape == (3, quantizer.num_levels)
    assert levels.dtype == dtype
    assert bool(levels.isfinite().all())
    assert bool((levels.diff() >= 0).all())
    assert torch.equal(x, before)
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(levels, quantizer(x.float()).to(dtype))
    hard = quantizer.nearest(x, levels)
    assert hard.dtype == dtype
    assert bool((hard[..., None] == levels[:, None]).any(-1).all())
    gap = (x.double() - hard.double()).abs()
    nearest = (x.double()[..., None] - levels.double()[:, None]).abs().amin(-1)
    torch.testing.assert_close(gap, nearest, rtol=0, atol=1e-6)


@pytest.mark.slow
@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_extreme_rows(quantizer, dtype) -> None:
    """Zeros, one weight, ties, the largest and the smallest numbers: finite, sorted, no error."""
    top, tiny = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    rows = [[0.0] * 5, [1.0] * 5, [-2.0, 2.0] * 3, [top, -top, top / 2], [tiny, -tiny, 0.0], [3.0]]
    for row in rows:
        x = torch.tensor([row], dtype=dtype)
        levels = quantizer(x)
        assert bool(levels.isfinite().all()), row
        assert bool((levels.diff() >= 0).all()), row
        if not any(row):
            assert not bool(levels.any())
    assert quantizer(torch.zeros(2, 0, dtype=dtype)).tolist() == [[0.0] * quantizer.num_levels] * 2
    assert quantizer(torch.zeros(0, 4, dtype=dtype)).shape == (0, quantizer.num_levels)


@pytest.mark.slow
@every
@pytest.mark.parametrize("exponent", [-90, -1, 7, 90])
def test_powers_of_two_scale_bit_for_bit(quantizer, exponent: int) -> None:
    x = torch.randn(2, 17, generator=torch.Generator().manual_seed(0))
    if quantizer.traits.scale_exact:
        assert torch.equal(quantizer(x * 2.0**exponent), quantizer(x) * 2.0**exponent)


@pytest.mark.slow
@every
def test_rows_are_their_own(quantizer) -> None:
    x = torch.randn(4, 23, generator=torch.Generator().manual_seed(0))
    x[1, 3] = torch.nan
    x[2, 5] = torch.inf
    levels = quantizer.fit(x)
    assert bool(levels[1].isnan().all())
    assert bool(levels[2].isnan().all())
    for i in (0, 3):
        assert torch.equal(levels[i], quantizer.fit(x[i : i + 1], quantizer.whole(x))[0])


@pytest.mark.slow
@every
def test_vmap_is_the_loop(quantizer) -> None:
    x = torch.randn(3, 2, 19, generator=torch.Generator().manual_seed(0))
    together = torch.vmap(quantizer)(x)
    for rows, levels in zip(x, together, strict=True):
        torch.testing.assert_close(levels, quantizer(rows), rtol=1e-6, atol=1e-6)


@given(small_rows)
def test_least_squares_orders(values) -> None:
    x = torch.tensor([values], dtype=torch.float64)
    two = error(x, pf.lsbq(2, "optimal")(x)) - 1e-9
    assert two <= error(x, pf.lsbq(0, "optimal")(x))
    assert two <= error(x, pf.lsbq(2)(x))
    assert two <= error(x, pf.lsbq(1)(x))
    assert error(x, pf.lloyd_max(2, symmetric=False)(x)) - 1e-9 <= two + 1e-9


@given(small_rows)
@pytest.mark.parametrize(
    "quantizer",
    [pf.lsbq(1), pf.lsbq(0, "optimal"), pf.lsbq(2, "optimal"), pf.lloyd_max(2), pf.lloyd_max(1)],
    ids=repr,
)
def test_quantizing_a_quantized_row_gives_it_back(quantizer, values) -> None:
    x = torch.tensor([values], dtype=torch.float64)
    assume(float(x.abs().max()) > 0)
    once = quantizer.nearest(x, quantizer(x))
    twice = quantizer.nearest(once, quantizer(once))
    torch.testing.assert_close(twice, once, rtol=1e-9, atol=1e-9)


def test_asymmetric_has_an_exact_zero() -> None:
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(0))
    x[:, 0], x[:, 1] = -x[:, 0].abs(), x[:, 1].abs()
    assert bool((pf.asymmetric(3)(x) == 0).any(-1).all())


@pytest.mark.slow
def test_error_on_gaussian_rows() -> None:
    """Mean squared error on N(0, 1), against the known optima of the Gaussian source."""
    x = torch.randn(1, 400_000, generator=torch.Generator().manual_seed(0)).double()
    for quantizer, expected in [
        (pf.lsbq(2), 0.1304), (pf.lsbq(3), 0.0584), (pf.lsbq(4), 0.0316),
        (pf.lloyd_max(1), 0.3634), (pf.lloyd_max(2), 0.1175), (pf.lloyd_max(3), 0.03454),
        (pf.lloyd_max(4), 0.009497), (pf.lsbq(2, "optimal"), 0.1175),
        (pf.lsbq(0, "optimal"), 0.1902),
    ]:  # fmt: skip
        assert error(x, quantizer(x)) / x.numel() == pytest.approx(expected, rel=0.02), quantizer


def test_published_faults_of_optimal_are_absent() -> None:
    """Relative error on Gaussian rows: .19 ternary and below greedy's .128 per channel."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).double()
    power = float(x.square().sum())
    assert error(x, pf.lsbq(0, "optimal")(x)) / power < 0.20
    assert error(x, pf.lsbq(2, "optimal")(x)) / power < error(x, pf.lsbq(2)(x)) / power < 0.14


@pytest.mark.parametrize(
    ("build", "error_type", "message"),
    [
        (lambda: pf.lsbq(9), ValueError, "lsbq: bits must lie in 0..8, got 9"),
        (lambda: pf.lsbq(-1), ValueError, "got -1"),
        (lambda: pf.uniform(0), ValueError, "uniform: bits must lie in 1..8, got 0"),
        (lambda: pf.max_uniform(1), ValueError, "max_uniform: bits must lie in 2..8, got 1"),
        (lambda: pf.asymmetric(2.0), TypeError, "bits must be a whole number, got 2.0"),
        (lambda: pf.lloyd_max(True), TypeError, "bits must be a whole number, got True"),
        (lambda: pf.lsbq(3, "optimal"), ValueError, "takes bits 0, 1 and 2, got 3; use"),
        (lambda: pf.lsbq(2, "best"), ValueError, "method must be 'greedy', 'optimal'"),
        (lambda: pf.lsbq(0, multiplier=0.0), ValueError, r"multiplier must lie in \(0, inf\)"),
        (lambda: pf.uniform(2, "median"), ValueError, "scale must be 'mean' or 'max'"),
        (lambda: pf.integer(2, "median"), ValueError, "scale must be 'max', 'max_symmetric' or"),
        (lambda: pf.codebook([0.0, 1.0]), TypeError, r"a tuple of numbers, got \[0.0, 1.0\]"),
        (lambda: pf.codebook((0.0, "1")), TypeError, "a tuple of numbers, got"),
        (lambda: pf.codebook((1.0, 0.5)), ValueError, "increasing order, .* got 0.5 after 1.0"),
        (lambda: pf.codebook((1.0, 1.0)), ValueError, "each number once"),
        (lambda: pf.codebook((0.0, math.inf)), ValueError, r"table\[1\] must lie in"),
        (lambda: pf.codebook((0,)), ValueError, r"a number beside 0, got \(0,\)"),
        (lambda: pf.codebook(()), ValueError, r"a number beside 0, got \(\)"),
        (lambda: pf.lsbq(2)(torch.ones(3)), ValueError, r"takes rows \[r, n\], got shape \(3,\)"),
        (lambda: pf.lsbq(2)(torch.ones(1, 3, dtype=torch.int32)), TypeError, "torch.int32"),
        (lambda: pf.lsbq(2)([[1.0]]), TypeError, "takes rows as a tensor, got list"),
        (lambda: pf.lsbq(2)(np.ones((1, 2))), TypeError, "takes rows as a tensor, got ndarray"),
        (
            lambda: pf.lsbq(2)(torch.tensor([[1.0], [torch.nan], [torch.inf]])),
            ValueError,
            r"lsbq\(2\) takes finite rows, got NaN or infinity in 2 row\(s\)",
        ),
    ],
)
def test_bad_input(build, error_type, message: str) -> None:
    with pytest.raises(error_type, match=message):
        build()


@pytest.mark.parametrize("bits", [0, 2])
@pytest.mark.parametrize("n", [3, 7, 100])
def test_optimal_levels_of_equal_weights_are_the_weight(bits: int, n: int) -> None:
    """Sums of equal weights round: their mean must not leave the weight, nor unsort the levels."""
    weight = 1 + torch.rand(
        1000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    levels = pf.lsbq(bits, "optimal")(weight.expand(1000, n))
    assert torch.equal(levels[:, -1:], weight)
    assert bool((levels.diff() >= 0).all())


def test_a_quantizer_must_define_its_qparams() -> None:
    class bare(pf.Quantizer):
        pass

    class counted(pf.Quantizer):
        num_levels = 2

    with pytest.raises(NotImplementedError, match="bare must define num_levels"):
        bare()(torch.ones(1, 0))
    with pytest.raises(NotImplementedError, match="counted must define qparams"):
        counted()(torch.ones(1, 3))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rows_are_scaled_by_the_power_of_two_below_their_maximum(dtype) -> None:
    """Or by the nearest one whose inverse is a normal number."""
    limits = torch.finfo(dtype)
    low, high = math.frexp(limits.tiny)[1] - 1, math.frexp(limits.max)[1] - 2
    for exponent in (0, 1, -1, 5, -100, 100, low, high - 1, high):
        for fraction in (1.0, 1.25, 2 - limits.eps):
            top = torch.tensor([[fraction * 2.0**exponent], [0.5]], dtype=dtype)
            assert power_of_two(top).tolist() == [[2.0**exponent], [0.5]]
    tops = [[limits.max], [limits.tiny], [limits.tiny * limits.eps], [0.0]]
    ends = torch.tensor(tops, dtype=dtype)
    assert power_of_two(ends)[3] == 1
    for power in power_of_two(ends).flatten().tolist():
        assert math.frexp(power)[0] == 0.5
        assert limits.tiny <= 1 / power <= limits.max
    assert bool(((ends / power_of_two(ends)).abs() < 4).all())


def test_defaults() -> None:
    assert pf.uniform(2) == pf.uniform(2, scale="mean", center=False)
    assert pf.max_uniform(2) == pf.max_uniform(2, center=False)
    assert pf.ternary_uniform() == pf.ternary_uniform(center=False)
    assert pf.lsbq(2) == pf.lsbq(2, method="greedy", center=False, multiplier=1.1)
    assert pf.lloyd_max(2) == pf.lloyd_max(2, symmetric=True)
    assert pf.integer(2) == pf.integer(2, scale="max")


@pytest.mark.parametrize(
    ("build", "low", "high"),
    [(pf.lsbq, 0, 8), (pf.uniform, 1, 8), (pf.max_uniform, 2, 8), (pf.asymmetric, 1, 8),
     (pf.lloyd_max, 1, 8), (pf.integer, 2, 8), (pf.affine, 1, 8), (pf.gaussian, 0, 8)],
)  # fmt: skip
def test_bits_from_least_to_most(build, low: int, high: int) -> None:
    build(low), build(high)
    for bits in (low - 1, high + 1):
        with pytest.raises(ValueError, match=rf"bits must lie in {low}\.\.{high}, got {bits}"):
            build(bits)


def test_numbers_of_levels() -> None:
    for b in range(1, 9):
        assert pf.uniform(b).num_levels == pf.asymmetric(b).num_levels == 2**b
        assert pf.lsbq(b).num_levels == pf.lloyd_max(b).num_levels == 2**b
        assert pf.affine(b).num_levels == pf.gaussian(b).num_levels == 2**b
        assert b == 1 or pf.integer(b).num_levels == 2**b
        assert b == 1 or pf.max_uniform(b).num_levels == 2**b - 1
    assert pf.lsbq(0).num_levels == pf.ternary_uniform().num_levels == 3
    assert pf.gaussian(0).num_levels == 3


@pytest.mark.slow
@every
def test_levels_are_made_on_the_device_of_the_rows(quantizer) -> None:
    levels = quantizer.levels(quantizer.fit(torch.ones(3, 7, device="meta")))
    assert levels.device.type == "meta"
    assert levels.shape == (3, quantizer.num_levels)


@pytest.mark.slow
@every
@pytest.mark.parametrize("number", [0.0, 2.0, -1.5])
def test_constant_rows_have_finite_derivatives(quantizer, number: float) -> None:
    x = torch.full((2, 5), number, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(quantizer.fit(x).sum(), x)
    assert bool(slope.isfinite().all())


@pytest.mark.parametrize("method", ["alternating", "optimal"])
def test_long_float32_rows_are_summed_in_float64(method: str) -> None:
    """The few largest weights have a level to themselves, behind a large sum."""
    x = 1 + 0.1 * torch.randn(1, 200_000, generator=torch.Generator().manual_seed(0))
    x[0, :3] = torch.tensor([10.1, 10.2, 10.4])
    levels = pf.lsbq(2, method)(x)
    assert levels.dtype == torch.float32
    torch.testing.assert_close(levels.double(), pf.lsbq(2, method)(x.double()), rtol=4e-7, atol=0)


def test_levels_that_no_weight_has_stay_and_have_finite_derivatives() -> None:
    quantizer = pf.lsbq(0, "alternating", multiplier=4.0)
    x = torch.ones(1, 5, dtype=torch.float64, requires_grad=True)
    levels = quantizer.levels(quantizer.fit(x))
    assert levels.tolist() == [[-4, 0, 4]]
    (slope,) = torch.autograd.grad(levels.square().sum(), x)
    assert bool(slope.isfinite().all())


def test_alternating_fits_a_level_that_one_weight_has() -> None:
    for n in (1, 2):
        levels = pf.lsbq(0, "alternating")(torch.tensor([[3.0, 0.0]])[:, :n])
        torch.testing.assert_close(levels, torch.tensor([[-3.0, 0.0, 3.0]]))


def test_what_levels_may_rely_on() -> None:
    seen = []

    class watching(pf.Quantizer):
        num_levels = 1

        def qparams(self, x):
            seen.append(x)
            return x[..., :1]

    rows = [[0.3, -5.0], [0.0, 0.0], [torch.nan, 1.0], [1.0, torch.inf], [6e-8, 0.0]]
    for dtype in DTYPES:
        watching().fit(torch.tensor(rows, dtype=dtype))
    for x in seen:
        assert x.dtype in (torch.float32, torch.float64)
        top = x.abs().amax(-1)
        assert bool((((top >= 1) & (top < 2)) | (top == 0)).all())


@pytest.mark.parametrize("center", [False, True])
def test_alternating_levels_do_not_hang_on_the_order_of_a_row(center: bool) -> None:
    """Found by a thorough run: greedy's start, summed in another order, led to other levels."""
    a = 0.82588156756667
    row = torch.tensor([a, 6.694189620364256, 4.00133217081299, a, a, -7.999999999999999])
    row = row.double() + (1e-3 if center else 0)
    quantizer = pf.lsbq(3, "alternating", center=center)
    orders = torch.tensor(list(itertools.permutations(range(6))))
    assert torch.equal(quantizer(row[orders]), quantizer(row[None]).expand(len(orders), -1))


@pytest.mark.parametrize("far", [1.0, 2.0**31, 2.0**33, 2.0**-31, 2.0**-33, 2.0**100, 2.0**-100])
def test_levels_of_rows_that_are_scaled_first_are_the_same(far: float) -> None:
    """What `homogeneous` says of a quantizer: it may see rows as they are, or scaled."""
    quantizers = [pf.uniform(3), pf.max_uniform(3), pf.asymmetric(2), pf.ternary_uniform()]
    quantizers += [pf.lsbq(b, m) for b in (0, 1, 2) for m in ("greedy", "optimal", "alternating")]
    quantizers += [pf.lloyd_max(2), pf.lloyd_max(3, symmetric=False), pf.lsbq(3, center=True)]
    quantizers += [pf.integer(3, scale) for scale in ("max", "max_symmetric", "mean")]
    quantizers += [
        pf.affine(3),
        pf.codebook.nf4,
        pf.codebook.iq4_nl,
        pf.gaussian(0),
        pf.gaussian(3),
    ]
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    rows[1] *= 1e-3
    rows[2] = 0
    for quantizer in quantizers:
        assert quantizer.homogeneous
        factors = torch.tensor([far if scales else 1.0 for scales in quantizer.scales])
        assert torch.equal(quantizer.fit(rows * far), quantizer.fit(rows) * factors), quantizer


def test_a_quantizer_that_does_not_say_so_sees_scaled_rows() -> None:
    seen = []

    class watching(pf.Quantizer):
        num_levels = 1

        def qparams(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x[:, :1]

    watching().fit(torch.tensor([[3.0, -5.0], [0.25, 0.0]]))
    assert seen[0].tolist() == [[0.75, -1.25], [1.0, 0.0]]
    assert not pf.Quantizer().homogeneous


def test_a_long_row_is_split_where_a_short_one_is() -> None:
    """Optimal splits are searched in pieces, of which the first best counts."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, (1 << 18) + 77, generator=generator, dtype=torch.float64).abs()
    for bits in (0, 2):
        positive = pf.lsbq(bits, "optimal").fit(x)
        data = x.sort(-1).values
        sums = data.cumsum(-1)
        n = x.shape[1]
        j = torch.arange(1, n, dtype=torch.float64)
        gain = (sums[:, -1:] - sums[:, :-1]).square() / (n - j)
        gain += sums[:, :-1].square() / j if bits == 2 else 0
        best = gain.argmax(-1, keepdim=True)
        above = (sums[:, -1:] - sums.gather(1, best)) / (n - 1 - best)
        below = sums.gather(1, best) / (best + 1)
        want = torch.cat([below, above], 1) if bits == 2 else above
        torch.testing.assert_close(positive, want, rtol=1e-10, atol=0)


SEVERAL = [pf.lsbq(1), pf.lsbq(2, "optimal"), pf.lsbq(3, "alternating"), pf.lloyd_max(2)]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's
@pytest.mark.parametrize("quantizer", SEVERAL, ids=repr)
def test_levels_have_their_tangent(quantizer) -> None:
    """Rows are sorted by numpy only where nothing is to be known of how."""
    x = torch.tensor([[1.0, -2.0, 3.0, -5.0]], dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(quantizer.fit(dual)).tangent
    assert tangent is not None
    slope = (quantizer.fit(x + 1e-6) - quantizer.fit(x - 1e-6)) / 2e-6
    torch.testing.assert_close(tangent, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", SEVERAL, ids=repr)
def test_a_traced_fit_fits_other_rows_too(quantizer) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(2, 30, generator=generator) for _ in range(2))
    traced = make_fx(lambda x: quantizer.fit(x))(one)
    torch.testing.assert_close(traced(other), quantizer.fit(other))


@pytest.mark.parametrize("quantizer", [pf.lsbq(2), pf.uniform(3)], ids=repr)
def test_the_layout_of_rows_changes_no_level(quantizer) -> None:
    rows = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)).t()
    assert torch.equal(quantizer.fit(rows), quantizer.fit(rows.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "quantizer",
    [pf.lsbq(3), pf.lsbq(0), pf.lsbq(2, "optimal"), pf.lsbq(0, "optimal"), pf.lloyd_max(2)],
    ids=repr,
)
def test_rows_in_pieces_are_left_alone(quantizer, dtype, monkeypatch) -> None:
    """Pieces share memory for what is made of them, never that of the rows."""
    x = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = quantizer.fit(x)
    monkeypatch.setattr(reductions, "_PIECE", 2048)
    before = x.clone()
    torch.testing.assert_close(quantizer.fit(x), whole)
    assert torch.equal(x, before)


TELLING = [quantizer for quantizer in [*ALL, pf.lsbq(0, multiplier=8.0)] if quantizer.telling]
odd = st.one_of(
    st.floats(-8, 8, width=32), st.floats(width=32), st.sampled_from([2.0**31, 2.0**33, 2.0**-33])
)


def test_which_qparams_tell_of_their_rows() -> None:
    assert {type(quantizer) for quantizer in TELLING} == {
        pf.uniform, pf.max_uniform, pf.ternary_uniform, pf.lsbq, pf.integer, pf.codebook,
        pf.mxfp4, pf.nvfp4, pf.stored,
    }  # fmt: skip
    assert not any(getattr(quantizer, "center", False) for quantizer in TELLING)
    assert not pf.codebook((0.0, 300.0)).telling
    assert not pf.codebook((0.0, 1e-3)).telling
    assert not pf.lsbq(0, multiplier=0.1).telling
    assert not pf.lsbq(0, multiplier=9.0).telling
    assert not pf.lsbq(2, "optimal").telling
    assert pf.lsbq(1, "optimal").telling
    assert all(quantizer.homogeneous for quantizer in TELLING)


@example(pf.uniform(2), [1.7014117331926443e38, 1.7014118346046923e38])
@given(st.sampled_from(TELLING), st.lists(odd, min_size=1, max_size=9))
def test_the_first_qparam_tells_of_its_row(quantizer, values) -> None:
    """What `telling` says."""
    x = torch.tensor([values])
    first = float(quantizer.qparams(x)[0, 0])
    # in float64, for a float32 sum of finite numbers overflows or not as it is ordered
    mean, top = float(x.double().abs().mean()), float(x.abs().max())
    if math.isnan(top):
        assert math.isnan(first)
    elif top == math.inf:
        assert not first < math.inf
    elif top >= 1e30:
        assert not first < mean / 256
    elif top > 1e-30:
        assert mean / 256 <= first <= 256 * top


@given(st.sampled_from(TELLING), st.lists(st.lists(odd, min_size=3, max_size=3), max_size=4))
def test_levels_are_the_same_of_rows_that_are_looked_at_first(quantizer, values) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        rows = torch.tensor(values, dtype=torch.float64).reshape(-1, 3).to(dtype)
        levels = quantizer.fit(rows)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(quantizer), "telling", False)
            looked_at = quantizer.fit(rows)
        torch.testing.assert_close(levels, looked_at, rtol=0, atol=0, equal_nan=True)


def test_one_way_through_memory_gives_what_two_give() -> None:
    for shape in [(1, 1), (3, 1000), (3, 1024), (2, 5000), (1, (1 << 18) + 7), (300, 1025)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        mean, top = reductions.mean_and_largest(x)
        assert torch.equal(mean, reductions.mean(x, torch.abs))
        assert torch.equal(top, reductions.largest(x))


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_codes_are_all_patterns_of_signs(bits: int) -> None:
    signs = [list(pattern) for pattern in itertools.product((-1.0, 1.0), repeat=bits)]
    assert _codes(bits, torch.ones(1)).tolist() == signs
    assert _codes(0, torch.ones(1)).tolist() == [[-1.0], [0.0], [1.0]]


@pytest.mark.parametrize("n", [1023, 1024, 1500, 4096])
def test_equal_weights_have_equal_shares_of_a_derivative(n: int) -> None:
    for quantizer in TELLING:
        x = torch.ones(1, n, requires_grad=True)
        (slope,) = torch.autograd.grad(quantizer.fit(x)[:, -1].sum(), x)
        torch.testing.assert_close(slope, slope[:, :1].expand_as(slope), msg=repr(quantizer))


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", [pf.lsbq(1), pf.lsbq(3), pf.uniform(2)], ids=repr)
def test_fits_are_traced_with_symbols_for_sizes(quantizer) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    trace = make_fx(lambda x: quantizer.fit(x), tracing_mode="symbolic")
    traced = trace(torch.randn(2, 30, generator=torch.Generator().manual_seed(0)))
    other = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(traced(other), quantizer.fit(other))
    there = trace(torch.empty(2, 30, device="meta"))  # where sums go by halves of a known size
    assert there(torch.empty(3, 40, device="meta")).shape == (3, quantizer.num_qparams)


@given(st.integers(0, 300), st.sampled_from([1, 7, 64, 1000, 4097]), st.integers(0, 2**20))
def test_sums_of_a_stated_order(n: int, longer: int, seed: int) -> None:
    """As on a GPU: exact to rounding, and a row's whatever the rows beside it."""
    n *= longer if n < 30 else 1
    x = torch.randn(3, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    near = {"rtol": 0, "atol": 1e-15 * (1 + n)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "_own_order", lambda _: False)
        total, running = reductions.summed(x), reductions.running_sums(x)
        alone = [(reductions.summed(row), reductions.running_sums(row)) for row in x]
        batched = torch.vmap(reductions.summed)(x), torch.vmap(reductions.running_sums)(x)
    exact = torch.tensor([math.fsum(row.tolist()) for row in x], dtype=torch.float64)
    assert running.is_contiguous()  # or a search in it warns
    torch.testing.assert_close(total, exact, **near)
    torch.testing.assert_close(running, x.cumsum(-1), **near)
    for found in (zip(*alone, strict=True), batched):
        sums, sums_up_to = found
        assert torch.equal(torch.stack(list(sums)), total)
        assert torch.equal(torch.stack(list(sums_up_to)), running)


@pytest.mark.slow
@every
def test_levels_by_sums_of_a_stated_order(quantizer, monkeypatch) -> None:
    """As on a GPU: those of torch's sums, to rounding, and of any rows and derivatives."""
    x = torch.randn(5, 1500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = quantizer.fit(x)
    slope = torch.func.grad(lambda x: quantizer.fit(x).square().sum())(x)
    monkeypatch.setattr(reductions, "_own_order", lambda _: False)
    torch.testing.assert_close(quantizer.fit(x), wanted, rtol=1e-12, atol=1e-12)
    found = torch.func.grad(lambda x: quantizer.fit(x).square().sum())(x)
    torch.testing.assert_close(found, slope, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("n", [5000, (1 << 17) + 5])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_levels_of_long_rows_by_sums_of_a_stated_order(n: int, bits: int, monkeypatch) -> None:
    """As on a GPU: by other roundings perhaps from other cuts, and no worse."""
    quantizer = pf.lloyd_max(bits, symmetric=False)
    x = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    wanted = error(x, quantizer.fit(x))
    monkeypatch.setattr(reductions, "_own_order", lambda _: False)
    levels = quantizer.fit(x)
    assert torch.equal(levels, torch.cat([quantizer.fit(row[None]) for row in x]))
    assert error(x, levels) <= wanted * 1.0001


# Found by attack, each with the input that showed it.


def test_levels_that_are_neighbouring_floats_are_fixed_points() -> None:
    low = torch.tensor(1.7).nextafter(torch.tensor(2.0))
    levels = torch.stack([low, low.nextafter(torch.tensor(2.0))])[None]
    for w in (pf.proxmaps.hard, lambda u, q: pf.proxmaps.parq(u, q, 0.0)):
        assert torch.equal(w(levels, levels), levels)


@every
def test_extremes_says_whether_least_and_largest_weight_are_all_that_is_fitted_to(
    quantizer: pf.Quantizer,
) -> None:
    rows = torch.randn(5, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rows = rows**5 * torch.tensor([1.0, 1e-30, 1e30, 3.0, 1.0]).double().unsqueeze(1)  # far ends
    ends = torch.stack([rows.amin(1), rows.amax(1)], 1)
    assert torch.equal(quantizer.fit(rows), quantizer.fit(ends)) == quantizer.extremes
