"""The search for a cell: its fast forms find what the slow one does, bit for bit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parq_fn import levels as lv
from parq_fn import proxmaps


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
    assert torch.equal(torch.searchsorted(boundaries, x), wanted)


@given(cases())
def test_every_way_to_a_cell_finds_it(case) -> None:
    x, levels = case
    wanted = slow_cell(x, levels)
    for found in (lv.cell(x, levels), lv.cell_by_halves(x, levels)):
        for got, end in zip(found, wanted, strict=True):
            assert torch.equal(got.expand_as(x), end)


@given(cases())
def test_the_closest_level_is_the_nearer_end_of_the_cell(case) -> None:
    x, levels = case
    ends = lv.nearer(x, *slow_cell(x, levels))
    assert torch.equal(lv.closest(x, levels), ends)
    assert torch.equal(lv.nearest(x, levels), ends)


def test_a_zero_keeps_the_sign_of_its_level() -> None:
    levels = torch.tensor([[-1.0, -0.0, 1.0]])
    got = lv.nearest(torch.tensor([[0.1, -0.1]]), levels)
    assert bool(got.signbit().all())


@given(cases(most=20), st.sampled_from([0.0, 1e-30, 0.3, 1.0]))
def test_what_is_said_of_the_coefficient_changes_no_weight(case, c: float) -> None:
    """A map that knows whether it is sharp gives what one gives that computes both."""
    x, levels = case
    maps = {
        proxmaps.parq: (c, 0.0),
        proxmaps.soft: (8 * (1 - c), torch.inf),
        proxmaps.binary_relax: (1 - c, 1.0),
    }
    for f, (relaxed, sharp) in maps.items():
        for coefficient in (torch.tensor(relaxed, dtype=x.dtype), torch.tensor(sharp)):
            said = f(x, levels, coefficient, sharp=bool(coefficient == sharp))
            one = coefficient.expand(1)
            both = torch.vmap(lambda c, f=f: f(x, levels, c))(one)[0]  # where it cannot be read
            assert torch.equal(said, both), f.__name__
            assert torch.equal(said, f(x, levels, coefficient)), f.__name__


@given(cases(most=9), st.sampled_from([1e-300, 1e-40, 1e-9, 0.03, 0.5, 0.999, 1.0]))
def test_the_highest_line_is_the_line_of_the_cell(case, slope: float) -> None:
    """parq by the largest of all cells' lines, for few levels, and by a search for the cell."""
    x, q = case
    x = torch.cat([x, torch.full_like(x[:, :1], torch.nan), q * 1e30, q * 1e-42], 1)
    before = x.clone()
    s = torch.tensor(slope, dtype=torch.float64)
    few = proxmaps._FEW
    try:
        proxmaps._FEW = 0
        wanted = proxmaps.parq(x, q, s, sharp=False)
        proxmaps._FEW = 99
        found = proxmaps.parq(x, q, s, sharp=False)
    finally:
        proxmaps._FEW = few
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(x, before, rtol=0, atol=0, equal_nan=True)


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
