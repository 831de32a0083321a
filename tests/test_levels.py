"""The search for a cell: its fast forms find what the slow one does, bit for bit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import parq_fn as pf
from parq_fn import formulas, proxmaps
from parq_fn import levels as lv
from parq_fn.optim import QuantOptimizer
from parq_fn.testing.table import OPERATORS
from tests.helpers import sampled


def slow_search(boundaries: Tensor, x: Tensor) -> Tensor:
    """How many of the boundaries lie below each x, one at a time."""
    return torch.tensor(
        [
            [sum(float(b) < float(v) for b in row) for v in values]
            for row, values in zip(boundaries, x, strict=True)
        ],
        dtype=torch.int64,
    ).reshape(x.shape)


def slow_cell(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The first cell whose upper end reaches x, or the last."""
    k = levels.shape[-1]
    if k == 1:
        return levels.expand_as(x), levels.expand_as(x)
    below = slow_search(levels[:, 1:-1], x)
    return levels.gather(1, below), levels.gather(1, below + 1)


@st.composite
def cases(draw: st.DrawFn, most: int = 40) -> tuple[Tensor, Tensor]:
    """(x [r, n], sorted levels [r, k]), many x on levels, midpoints and beyond the ends."""
    rows, k = draw(st.integers(1, 3)), draw(st.integers(1, most))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    q = torch.randn(rows, k, generator=generator, dtype=dtype)
    if draw(st.booleans()):  # coarse, so that levels are equal and midpoints are met
        q = (4 * q).round() / 4
    if draw(st.booleans()):  # neighbouring floats, whose midpoint is one of them
        q = torch.cat([q, q.nextafter(torch.tensor(torch.inf, dtype=dtype))], 1)
    q = q.sort(-1).values
    middle = lv.midpoint(q[:, :-1], q[:, 1:])
    far = torch.tensor([[-torch.inf, -9.0, 0.0, 9.0, torch.inf]], dtype=dtype).expand(rows, -1)
    near = torch.randn(rows, draw(st.integers(0, 9)), generator=generator, dtype=dtype)
    return torch.cat([q, middle, far, near], 1), q


@given(cases())
def test_every_search_counts_the_boundaries_below(case) -> None:
    x, boundaries = case
    wanted = slow_search(boundaries, x)
    assert torch.equal(lv.search(boundaries, x), wanted)
    assert torch.equal(lv.count_below(boundaries, x), wanted)
    assert torch.equal(lv.count_below(boundaries, x.requires_grad_()), wanted)
    assert torch.equal(torch.vmap(lv.count_below)(boundaries, x), wanted)
    assert torch.equal(torch.searchsorted(boundaries, x), wanted)


@given(cases())
def test_every_way_to_a_cell_finds_it(case) -> None:
    x, levels = case
    wanted = slow_cell(x, levels)
    ends = levels[..., 1:-1], levels[..., :-1], levels[..., 1:]
    found = [lv.cell(x, levels)]
    if levels.shape[-1] > 1:
        found.append(lv.lookup_by_halves(x, *ends))
    for pair in found:
        for got, end in zip(pair, wanted, strict=True):
            assert torch.equal(got.expand_as(x), end)


@given(cases())
def test_every_way_to_an_entry_finds_it(case) -> None:
    x, boundaries = case
    below = slow_search(boundaries, x)
    shape = len(x), boundaries.shape[-1] + 1
    tables = torch.randn(shape), torch.arange(shape[0] * shape[1]).view(shape)
    for way in (lv.lookup, lv.lookup_by_halves):
        for got, table in zip(way(x, boundaries, *tables), tables, strict=True):
            assert torch.equal(got, table.gather(1, below))


@given(cases())
def test_the_closest_level_is_the_nearer_end_of_the_cell(case) -> None:
    x, levels = case
    ends = lv.nearer(x, *slow_cell(x, levels))
    bounds = lv.bounds(levels)
    assert bool((bounds[:, 1:] >= bounds[:, :-1]).all())
    found = lv.closest(x, levels), lv.closest(x, levels, bounds), lv.nearest(x, levels)
    (by_halves,) = lv.lookup_by_halves(x, bounds, levels)
    for got in (*found, by_halves):
        assert torch.equal(got.expand_as(x), ends)


@given(cases(most=4))
def test_the_highest_level_reached_is_the_closest(case) -> None:
    """Without an index, where there are few, and with one where memory must not be written to."""
    x, levels = case
    if levels.shape[-1] > 1:
        bounds = lv.bounds(levels)
        before = x.clone(), levels.clone(), bounds.clone()
        found = lv._highest_reached(x, levels, bounds)
        assert torch.equal(found, levels.gather(1, slow_search(bounds, x)))
        assert all(map(torch.equal, (x, levels, bounds), before))
        assert torch.equal(torch.vmap(lv.closest)(x, levels), found)
        assert torch.equal(lv.closest(x.requires_grad_(), levels), found)


def is_a_level(w: Tensor, levels: Tensor) -> bool:
    """Whether each weight is one of its row's levels, the sign of a zero included."""
    w, q = w.unsqueeze(-1), levels.unsqueeze(-2)
    return bool(((w == q) & (w.signbit() == q.signbit())).any(-1).all())


SHARPEST = [
    (proxmaps.hard, 0.0),
    (proxmaps.parq, 0.0),
    (proxmaps.soft, math.inf),
    (proxmaps.binary_relax, 1.0),
    (proxmaps.proxquant, math.inf),
]


@pytest.mark.parametrize(
    ("map_", "sharpest"), sampled(SHARPEST, 2), ids=lambda x: getattr(x, "__name__", "")
)
def test_a_zero_keeps_the_sign_of_its_level(map_, sharpest: float) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda u, q: map_(u, q, sharpest), backend="eager", dynamic=True)
    dtypes = torch.float32, torch.float64, torch.bfloat16, torch.float16
    for k, dtype in itertools.product((1, 2, 3, 4, 5, 17, 40), dtypes):
        levels = (torch.arange(float(k)) - torch.tensor([[0], [k // 2], [k - 1]])).to(dtype)
        levels = torch.where(levels == 0, -0.0, levels)
        zeros = torch.tensor([0.0, -0.0], dtype=dtype).expand(3, 2)
        u = torch.cat([levels, levels + 0.25, levels - 0.25, zeros], -1)
        assert is_a_level(map_(u, levels, sharpest), levels)
        batched = torch.vmap(map_, (None, None, 0))(u, levels, torch.full((1,), sharpest))
        assert is_a_level(batched[0], levels)
        if k in (3, 17) and dtype == torch.float32:
            assert is_a_level(compiled(u, levels), levels)
            assert is_a_level(torch.vmap(lambda u, q: map_(u, q, sharpest))(u, levels), levels)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.usefixtures("graphs_alone")
def test_quantized_weights_have_the_bits_of_their_levels(compile: bool) -> None:
    """Of rows of zeros of either sign, and of weights that a mask has made -0.0."""
    torch.compiler.reset()
    w = torch.randn(6, 32) * (torch.rand(6, 32) > 0.5)
    w[1], w[2] = 0.0, -0.0
    w[3] = w[3].abs()
    chosen = (pf.lsbq(0), pf.integer(3)) if compile else OPERATORS["quantizer"]
    for quantizer in (*chosen, pf.lloyd_max(1, symmetric=False)):
        prox = pf.hard_prox(quantizer, granularity=pf.per_channel(), period=1)
        net = torch.nn.ParameterDict({"w": torch.nn.Parameter(w.clone())})
        group = {"params": [net["w"]], "prox": prox}
        optimizer = QuantOptimizer(torch.optim.SGD([group], lr=0.0), compile=compile)
        net["w"].grad = torch.zeros_like(w)
        optimizer.step()
        assert is_a_level(net["w"].detach(), optimizer.levels(net["w"])), quantizer


CHOOSERS = {
    formulas.hard_at: [0.0],
    formulas.parq_at: [0.0, 1e-300, 1e-40, 1e-9, 0.03, 0.5, 0.999, 1.0],
    formulas.soft_at: [0.0, 1e-30, 0.3, 8.0, 1e30, math.inf],
    formulas.binary_relax_at: [0.0, 1e-30, 0.3, 0.49, 0.5, 0.9, 1 - 2.0**-24, 1.0],
    formulas.proxquant_at: [0.0, 1e-30, 0.3, math.inf],
}


@pytest.mark.parametrize("choose", CHOOSERS)
@given(data=st.data(), case=cases(most=20))
def test_what_is_known_of_the_coefficient_changes_no_weight(choose, data, case) -> None:
    """The formula for a coefficient gives what the one for any coefficient does, and with bounds
    at hand what it does without."""
    x, levels = case
    coefficient = data.draw(st.sampled_from(CHOOSERS[choose]))
    c = torch.tensor(coefficient, dtype=x.dtype)
    extreme = torch.tensor([[torch.nan, 3e38, -3e38]], dtype=x.dtype).expand(len(x), -1)
    x = torch.cat([x, extreme, levels * 1e30, levels * 1e-42], 1)
    before = x.clone()
    formula, every = choose(float(c)), choose(None)
    found = formula(x, levels, c)
    bound = lv.bounds(levels)
    others = [every(x, levels, c), formula.weight(x, levels, bound, *formula.scalars(c))]
    for other in others:
        torch.testing.assert_close(found, other, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


@given(cases(most=9), st.sampled_from([1e-300, 1e-40, 1e-9, 0.03, 0.5, 0.999]))
def test_the_highest_line_is_the_line_of_the_cell(case, slope: float) -> None:
    """parq by the largest of all cells' lines, for few levels, and by a search for the cell."""
    x, q = case
    x = torch.cat([x, torch.full_like(x[:, :1], torch.nan), q * 1e30, q * 1e-42], 1)
    (steep,) = formulas._steep(torch.tensor(slope, dtype=x.dtype))
    lo, hi = lv.cell(x, q)
    wanted = lv.between(x + (x - lv.midpoint(lo, hi)) * steep, lo, hi)
    if q.shape[-1] > 1:
        found = formulas._highest_line(x, q, steep)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


@given(cases(most=9), st.floats(0, 1, width=32))
def test_binary_relax_lies_between_the_weight_and_its_level(case, theta: float) -> None:
    """To the bit, where u and q are of any size, and far apart."""
    x, q = case
    x = torch.cat([x, q * 1e30, q * 1e-42, torch.full_like(x[:, :2], 3e38)], 1)
    q = torch.cat([q, torch.full_like(q[:, :1], -3e38)], 1).sort(-1).values
    near = lv.nearest(x, q)
    w = proxmaps.binary_relax(x, q, theta)
    assert bool((w >= torch.minimum(x, near)).all())
    assert bool((w <= torch.maximum(x, near)).all())
    mean = (1 - theta) * x.double() + theta * near.double()
    finite = x.isfinite()
    size = (x.abs() / 2 + near.abs() / 2)[finite].double()
    error = (w.double() - mean)[finite].abs()
    assert bool((error <= 4 * torch.finfo(x.dtype).eps * size + 1e-44).all())


@pytest.mark.parametrize("theta", [0.25, 0.75])
def test_a_gap_that_overflows_is_still_shared(theta: float) -> None:
    for side in (3e38, -3e38):
        u, q = torch.tensor([[side, side / 2, 1.0]]), torch.tensor([[-side]])
        wanted = (1 - theta) * u.double() + theta * q.double()
        torch.testing.assert_close(proxmaps.binary_relax(u, q, theta), wanted.float())
        far = torch.tensor([[side * 10]])  # infinite
        assert torch.equal(proxmaps.binary_relax(far, q, theta), far)


def test_a_coefficient_is_known_as_the_maps_round_it() -> None:
    """1 - 1e-9 is 1 in float32, where a line of slope 1 would make NaN of an infinite weight."""
    u, q = torch.tensor([[torch.inf, 0.5]]), torch.tensor([[-1.0, 1.0]])
    for s in (1 - 1e-9, torch.tensor(1 - 1e-9, dtype=torch.float64)):
        assert formulas.known(u, q, s) == 1.0
        assert torch.equal(proxmaps.parq(u, q, s), proxmaps.clip(u, q))
    assert formulas.known(u.double(), q, 1 - 1e-9) == 1 - 1e-9
    assert formulas.known(u, q, torch.tensor(0.5, requires_grad=True)) is None
    assert formulas.known(u, q, torch.tensor([0.5, 0.25])) is None


def test_levels_far_apart_do_not_overflow_at_the_start_of_annealing() -> None:
    """A weight's distance to the midpoint of another cell may be infinite; times 0 it is NaN."""
    q = torch.tensor([[-3e38, 0.0, 3e38]])
    for u in (3e38, 1.0, -3e38):
        assert proxmaps.parq(torch.tensor([[u]]), q, 1.0).item() == torch.tensor(u).item()


def test_maps_can_be_functionalized() -> None:
    u, q = torch.linspace(-2, 2, 12).view(3, 4), torch.tensor([[-1.0, 0.0, 1.0]]).expand(3, 3)
    s = torch.tensor(0.5)
    found = torch.func.functionalize(lambda s: proxmaps.parq(u, q, s))(s)
    assert torch.equal(found, proxmaps.parq(u, q, s))


def test_many_levels_are_searched_in_a_batch_without_a_copy_that_torch_warns_of() -> None:
    """Slices of a batch look contiguous, and a binary search of them warned."""
    u, levels = torch.randn(3, 1, 7), torch.randn(3, 1, 40).sort(-1).values  # one row each
    for map_ in (proxmaps.hard, lambda u, q: proxmaps.parq(u, q, 0.5)):
        one_by_one = torch.stack([map_(*pair) for pair in zip(u, levels, strict=True)])
        assert torch.equal(torch.vmap(map_)(u, levels), one_by_one)
