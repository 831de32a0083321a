"""Which rows of a sharded weight a rank has: against a weight whose elements are numbered."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Partial, _StridedShard

import parq_fn as pf
from parq_fn.transforms.exchange import shared
from parq_fn.transforms.layout import Layout, Sharding, _layout, part_of, sharded_along
from parq_fn.transforms.lines import Lines, Pieces, put_together
from tests.cuts import cut, dimensions


def every_rank(mesh: Any) -> list[tuple[int, ...]]:
    return list(itertools.product(*map(range, mesh)))


@st.composite
def sharded(draw: Any, granular: bool = True) -> tuple[Any, ...]:
    """(shape, mesh, placements, granularity)."""
    rank = draw(st.integers(1, 3))
    shape = tuple(draw(st.lists(st.integers(1, 8), min_size=rank, max_size=rank)))
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    some = st.integers(0, rank - 1)
    placements = [draw(st.one_of(st.just(Replicate()), st.builds(Shard, some))) for _ in mesh]
    if len(mesh) == 2 and isinstance(placements[1], Shard) and draw(st.booleans()):
        placements[0] = _StridedShard(placements[1].dim, split_factor=mesh[1])
    kinds: list[Any] = [pf.per_tensor(), pf.per_channel(dimensions(draw, rank))]
    along = dimensions(draw, rank)
    length = 1
    for d in along if isinstance(along, tuple) else (along,):
        length *= shape[d]
    sizes = [size for size in range(1, length + 1) if length % size == 0]
    kinds.append(pf.per_block(draw(st.sampled_from(sizes)), along))
    return shape, mesh, tuple(placements), draw(st.sampled_from(kinds))


@given(sharded())
def test_a_rank_holds_the_indices_that_torch_gives_it(case: Any) -> None:
    shape, mesh, placements, _ = case
    for rank, (d, size) in itertools.product(every_rank(mesh), enumerate(shape)):
        own = [_first(p) if getattr(p, "dim", None) == d else Replicate() for p in placements]
        runs = Sharding(shape, mesh, placements).runs(d, rank)
        index = [i for a, b in runs for i in range(a, b)]
        assert cut(torch.arange(size), mesh, rank, own).tolist() == index


def _first(p: Any) -> Any:
    """The placement, of the first dimension."""
    factor = getattr(p, "split_factor", None)
    return Shard(0) if factor is None else _StridedShard(0, split_factor=factor)


def layout_at(case: Any, rank: tuple[int, ...]) -> tuple[Tensor, Layout]:
    """(this rank's part of a weight whose elements are numbered, its layout)."""
    shape, mesh, placements, granularity = case
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    mine = cut(numbers, mesh, rank, placements)
    return mine, _layout(Sharding(shape, mesh, placements), tuple(mine.shape), rank, granularity)


@given(sharded())
def test_each_element_has_the_qparams_of_its_row(case: Any) -> None:
    shape, mesh, _, granularity = case
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    rows = granularity.rows(numbers)
    row_of = torch.empty(numbers.numel(), dtype=torch.int64)
    row_of[rows.flatten()] = torch.arange(len(rows)).repeat_interleave(rows.shape[1])
    qparams = torch.arange(len(rows)).reshape(*granularity.row_shape(numbers), 1)
    pieces = False
    for rank in every_rank(mesh):
        mine, (part, own_placements, across) = layout_at(case, rank)
        if not mine.numel():
            continue
        own = cut(qparams, mesh, rank, own_placements).unsqueeze(0).flatten(0, -2)[part.rows]
        local = part.granularity.rows(mine)
        assert len(own) == len(local)
        assert torch.equal(row_of[local], own.expand_as(local))
        assert torch.equal(part.granularity.restore(local, mine), mine)
        counts = torch.bincount(row_of[mine.flatten()], minlength=len(rows))
        pieces |= bool(((counts > 0) & (counts < rows.shape[1])).any())
        if not across:  # its rows are whole, and in the order of what belongs to them
            assert torch.equal(local, rows[own.flatten()])
    assert part.cut == pieces


@st.composite
def pieces(draw: Any) -> tuple[Any, ...]:
    """(a sharding, the coordinate of a rank, dimensions of a line)."""
    rank = draw(st.integers(1, 3))
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 4, 6, 12]), min_size=rank, max_size=rank)))
    some, factors = st.integers(0, rank - 1), st.integers(1, 3)
    strided = st.builds(lambda d, n: _StridedShard(d, split_factor=n), some, factors)
    kinds = st.one_of(st.just(Replicate()), st.builds(Shard, some), strided)
    lies = Sharding(shape, mesh, tuple(draw(kinds) for _ in mesh))
    place = [draw(st.integers(0, size - 1)) for size in mesh]
    return lies, place, tuple(draw(st.permutations(range(rank)))[: draw(st.integers(1, rank))])


class Mesh:
    """What lines ask of a mesh."""

    def __init__(self, shape: Any, place: Any) -> None:
        self.size, self.get_coordinate = lambda d: shape[d], lambda: place


@settings(max_examples=100)
@given(pieces())
def test_pieces_of_equal_ranks_make_the_lines_that_they_make_one_by_one(case: Any) -> None:
    lies, place, dims = case
    shape, mesh, placements = lies
    sharing = [i for i, p in enumerate(placements) if sharded_along(p) in dims and mesh[i] > 1]
    chosen = [d for d in range(len(shape)) if d not in dims]
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    each = {}
    for at in itertools.product(*(range(mesh[i]) for i in sharing)):
        rank = list(place)
        for i, own in zip(sharing, at, strict=True):
            rank[i] = own
        each[at] = cut(numbers, mesh, rank, placements).permute(*chosen, *dims).flatten()
    assume(sharing and len({len(piece) for piece in each.values()}) == 1)
    own = [p if sharded_along(p) in chosen else Replicate() for p in placements]
    whole = cut(numbers, mesh, place, own).permute(*chosen, *dims)
    whole = whole.reshape(whole.shape[: len(chosen)].numel(), *whole.shape[len(chosen) :])
    of = Mesh(mesh, place)
    leaf = Lines(whole, whole.shape[1:], dims, 1, (), -1, of, lies, (*sharing,), (*sharing,))
    last_first = torch.stack([each[at] for at in sorted(each, key=lambda at: (at[-1], at[:-1]))])
    together = last_first.view(mesh[sharing[-1]], -1)
    for came in (None, together):
        into = torch.full_like(whole, -1).contiguous()
        put_together(into, leaf, Pieces(each, came))
        assert torch.equal(into, whole)


def lines(count: int, *shape: int) -> Lines:
    mine = torch.empty(count, *shape)
    return Lines(mine, shape, (0,), 1, (count,), -1, None, Sharding((), (), ()), (0,), (0,))


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 50)), min_size=1, max_size=12),
    st.lists(st.integers(1, 4), min_size=1, max_size=2),
)
def test_every_line_is_fitted_by_one_rank_that_has_room(given: Any, sizes: Any) -> None:
    leaves = [lines(*one) for one in given]
    largest = max(count * n for count, n in given)
    seen: list[tuple[int, int]] = []
    for turn in shared(leaves, sizes):
        loads: dict[Any, int] = {}
        for share in turn:
            at = range(share.lines.start, share.lines.stop)
            assert len(at)
            seen += [(share.leaf, i) for i in at]
            load = len(at) * given[share.leaf][1]
            loads[share.owner] = loads.get(share.owner, 0) + load
        assert max(loads.values()) <= largest
        assert all(0 <= place < size for o in loads for place, size in zip(o, sizes, strict=True))
    assert sorted(seen) == [(i, j) for i, (count, _) in enumerate(given) for j in range(count)]


def test_tensors_of_one_size_are_spread_evenly() -> None:
    for turn in shared([lines(1, 10)] * 8, [2, 2]):
        assert sorted(share.owner for share in turn) == every_rank([2, 2])


def test_sums_over_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="a sum over ranks"):
        _layout(Sharding((4,), (2,), (Partial(),)), (4,), (0,), pf.per_channel())


def test_rows_of_a_plain_tensor_that_blocks_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="block size 2 does not divide"):
        part_of(torch.ones(2, 3), pf.per_block(2))
