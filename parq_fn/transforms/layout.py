"""How the rows of a sharded weight lie on ranks.

A rank holds, of each dimension of a DTensor, some of the indices (`held`). Where a weight is
sharded along dimensions that choose the row, a rank has whole rows, and what belongs to them, such
as their qparams, is sharded as they are. Along the others a rank has a piece of a row, and what
belongs to rows is the same on all ranks along that dimension of the mesh (`Layout.across`).

Blocks are whole where the runs of indices that ranks hold end where blocks do. Else they are cut
into pieces, each with the qparams of its row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from parq_fn.foundation.torch_private import inner_shard
from parq_fn.foundation.value import value
from parq_fn.quantizers.granularity import Granularity, per_block
from parq_fn.transforms.collective import summed
from parq_fn.transforms.sharded import is_dtensor, local, placed_so, spread_so

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement

#: Runs of indices, each from its first to before its second number.
Runs = list[tuple[int, int]]


@value
class run(Granularity):
    """Rows of n for a run of a larger weight: `front` elements of the first row come before it,
    `back` of the last row after it."""

    n: int
    front: int
    back: int

    def shape(self, weight: Tensor) -> tuple[int, int]:
        return (self.front + weight.numel() + self.back) // self.n, self.n

    def rows(self, weight: Tensor) -> Tensor:
        flat = weight.reshape(-1)
        if not self.front + self.back:  # nothing to copy it for
            return flat.view(self.shape(weight))
        return nn.functional.pad(flat, (self.front, self.back)).reshape(self.shape(weight))

    def restore(self, rows: Tensor, weight: Tensor) -> Tensor:
        flat = rows.reshape(-1)
        return super().restore(flat[self.front : flat.numel() - self.back], weight)


class Part(NamedTuple):
    """What a rank holds of a weight's rows."""

    granularity: Granularity  # of the local tensor
    rows: slice | Tensor  # of the qparams that it has, [r, m]; indices where one is needed twice
    cut: bool = False  # whether there is a rank, this or another, that has a piece of a row


class Layout(NamedTuple):
    """How the rows of a DTensor lie on the ranks of its mesh."""

    part: Part
    placements: tuple[Placement, ...]  # of what belongs to rows, [..., m]
    across: tuple[int, ...]  # the mesh's dimensions along which ranks have pieces of the same rows


def part_of(weight: Tensor, granularity: Granularity) -> Part:
    """The part of a weight's rows that this rank holds.

    Raises ValueError as `layout_of`.
    """
    if not is_dtensor(weight):
        granularity.shape(weight)
        return Part(granularity, slice(None))
    return layout_of(weight, granularity).part


def layout_of(weight: DTensor, granularity: Granularity) -> Layout:
    """How a weight's rows lie on ranks.

    Raises ValueError as the granularity does; for a weight that is a sum over ranks, or that lies
    on other ranks; for a granularity that makes rows in a way of its own, or whose rows are runs
    of a weight that is sharded along another dimension than the first, of which a shard cannot be
    told.
    """
    mesh = weight.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(
            f"it lies on the ranks {mesh.mesh.tolist()}, and this rank is none of them; give each "
            "rank the parameters that it has parts of"
        )
    mine = inner_shard(weight)
    found = _layout(sharding_of(weight), tuple(mine.shape), tuple(coordinate), granularity)
    rows = found.part.rows
    if isinstance(rows, Tensor):
        found = found._replace(part=found.part._replace(rows=rows.to(mine.device)))
    return found


def across(weight: Tensor, granularity: Granularity) -> tuple[int, ...]:
    """The dimensions of its mesh along which ranks have pieces of a weight's rows."""
    return layout_of(weight, granularity).across if is_dtensor(weight) else ()


def sharding_of(weight: DTensor) -> Sharding:
    """How a DTensor lies on its mesh."""
    return Sharding(tuple(weight.shape), tuple(weight.device_mesh.shape), weight.placements)


def to_rows(mine: Tensor, weight: Tensor, granularity: Granularity) -> Tensor:
    """[..., m] of which this rank has `mine`, placed as the weight's rows are; of a plain weight
    `mine`."""
    if not is_dtensor(weight):
        return mine
    shape = *granularity.row_shape(weight), mine.shape[-1]
    return placed_so(mine, weight, layout_of(weight, granularity).placements, shape)


def spread_to_rows(whole: Tensor, weight: Tensor, granularity: Granularity) -> Tensor:
    """What every rank has whole, [..., m], placed as the weight's rows are; what is placed already,
    or belongs to a plain weight, as it is."""
    if not is_dtensor(weight) or is_dtensor(whole):
        return whole
    return spread_so(whole, weight, layout_of(weight, granularity).placements)


def summed_to_rows(mine: Tensor, weight: Tensor, granularity: Granularity, name: str) -> Tensor:
    """[..., m] placed as the rows of the weight of that name are, summed over the ranks that have
    pieces of the same rows, of which this one has `mine`; of a plain weight `mine`."""
    if is_dtensor(weight):
        for d in across(weight, granularity):
            mine = summed(mine, weight.device_mesh, d, [name])
    return to_rows(mine, weight, granularity)


def local_row_shape(weight: Tensor, granularity: Granularity) -> tuple[int, ...]:
    """`Granularity.row_shape` of the rows that this rank has, or has pieces of."""
    if not is_dtensor(weight):
        return granularity.row_shape(weight)
    mine, cut = local(weight), bool(across(weight, granularity))
    shape = granularity.row_shape(weight if cut else mine)
    dims = granularity.row_dims(weight)
    return tuple(n if d is None else mine.shape[d] for n, d in zip(shape, dims, strict=True))


# Which indices a rank holds.


class Cut(NamedTuple):
    """How a dimension of the mesh cuts one of a weight."""

    ranks: int  # of that dimension
    rank: int  # the place among them
    factor: int  # how many pieces each rank has, every `ranks`-th of all


def held(size: int, cuts: Iterable[Cut]) -> Runs:
    """The runs of indices below `size` that a rank has after these cuts, made one after another as
    torch.chunk makes them.

    >>> held(10, [Cut(2, 1, 1)]), held(8, [Cut(2, 0, 2)])
    ([(5, 10)], [(0, 2), (4, 6)])
    """
    runs = [(0, size)]
    for ranks, rank, factor in cuts:
        step = -(-_length(runs) // (ranks * factor)) or 1
        places = (i * ranks + rank for i in range(factor))
        runs = [own for i in places for own in _between(runs, i * step, (i + 1) * step)]
    return runs


def _length(runs: Runs) -> int:
    return sum(b - a for a, b in runs)


def _between(runs: Runs, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Of the indices of runs, one after another, those from the start-th to before the stop-th."""
    for a, b in runs:
        low, high = max(start, 0), min(stop, b - a)
        if low < high:
            yield a + low, a + high
        start, stop = start - (b - a), stop - (b - a)


def sharded_along(placement: Any) -> int | None:
    """The dimension that a placement shards; None where it shards none."""
    return getattr(placement, "dim", None) if not placement.is_partial() else None


class Sharding(NamedTuple):
    """How a weight lies on the ranks of a mesh."""

    shape: tuple[int, ...]  # the weight's
    mesh: tuple[int, ...]  # sizes of its dimensions
    placements: tuple[Placement, ...]

    def runs(self, dim: int, rank: Sequence[int]) -> Runs:
        """The indices of a dimension of the weight that the rank at that coordinate has."""
        return held(self.shape[dim], self.cuts(dim, rank))

    def cuts(self, dim: int, rank: Sequence[int]) -> list[Cut]:
        """How the mesh cuts that dimension, for that rank."""
        return [
            Cut(self.mesh[i], rank[i], getattr(p, "split_factor", 1))
            for i, p in enumerate(self.placements)
            if sharded_along(p) == dim and self.mesh[i] > 1
        ]

    def every_rank(self, dims: Iterable[int]) -> Iterator[tuple[int, ...]]:
        """Coordinates, one for each way in which the mesh cuts these dimensions."""
        chosen = {*dims}
        ways = [
            range(size) if sharded_along(p) in chosen else range(1)
            for size, p in zip(self.mesh, self.placements, strict=True)
        ]
        return itertools.product(*ways)


# Layouts, which depend on shapes alone.


@lru_cache(maxsize=4096)
def _layout(
    lies: Sharding, mine: tuple[int, ...], coordinate: tuple[int, ...], granularity: Granularity
) -> Layout:
    from torch.distributed.tensor import Replicate

    shape, mesh, placements = lies
    weight = torch.empty(shape, device="meta")
    r, n = granularity.shape(weight)
    if any(p.is_partial() for p in placements):
        raise ValueError(
            f"it is placed as {placements}, a sum over ranks that is not taken yet; give weights "
            "that ranks hold"
        )
    dims = granularity.row_dims(weight)
    whole_blocks = False
    if isinstance(granularity, per_block):
        whole_blocks = _ends_with_blocks(granularity, weight, lies)
        first = granularity.dims(weight)[0]
        dims = tuple(first if d is None and whole_blocks else d for d in dims)
    found: list[Placement] = []
    between = []
    for i, p in enumerate(placements):
        d = sharded_along(p)
        if d is not None and d in dims:
            found.append(_along(p, dims.index(d)))
        else:
            found.append(Replicate())
            if d is not None and mesh[i] > 1:
                between.append(i)
    layout = Layout(Part(granularity, slice(None)), tuple(found), tuple(between))
    if not between:
        return layout
    cut = any(shape[sharded_along(placements[i]) or 0] > 1 for i in between)
    numel = math.prod(mine)
    if r == 1:
        return layout._replace(part=Part(run(max(numel, 1), 0, 0), slice(None), cut))
    if getattr(type(granularity), "rows", None) is not Granularity.rows:
        raise ValueError(
            f"it is sharded, and {granularity!r} makes rows in a way of its own, of which a shard "
            "cannot be told; give a granularity shape alone, or use per_channel or per_block"
        )
    if isinstance(granularity, per_block):
        along = granularity.dims(weight)
        part = _pieces(granularity, along, lies, coordinate, mine)
        every = (_places(along, lies, other) for other in lies.every_rank(along))
        cut = any(_piece(granularity.size, places) < granularity.size for places in every)
        return layout._replace(part=part._replace(cut=cut))
    if dims == (None,):
        return layout._replace(part=_run(n, lies, coordinate, granularity))
    return layout._replace(part=Part(granularity, slice(None), cut))  # a part of every row


def _along(placement: Any, dim: int) -> Placement:
    """The placement, of another dimension."""
    from torch.distributed.tensor import Shard

    if not hasattr(placement, "split_factor"):
        return Shard(dim)
    same: Placement = type(placement)(dim, split_factor=placement.split_factor)
    return same


def _ends_with_blocks(blocks: per_block, weight: Tensor, lies: Sharding) -> bool:
    """Whether all ranks hold whole blocks, those that a DTensor of blocks would have there."""
    first, *others = blocks.dims(weight)
    if any(sharded_along(p) in others for p in lies.placements):
        return False
    inner = math.prod(weight.shape[d] for d in others)
    count = weight.shape[first] * inner // blocks.size
    for rank in lies.every_rank([first]):
        runs = [(a * inner, b * inner) for a, b in lies.runs(first, rank)]
        whole = held(count, lies.cuts(first, rank))
        of_blocks = [(a * blocks.size, b * blocks.size) for a, b in whole]
        if _joined(runs) != _joined(of_blocks):
            return False
    return True


def _joined(runs: Runs) -> Runs:
    """The same indices in as few runs as there can be."""
    found: Runs = []
    for a, b in runs:
        if found and found[-1][1] == a:
            found[-1] = found[-1][0], b
        else:
            found.append((a, b))
    return found


def _places(along: Sequence[int], lies: Sharding, rank: Sequence[int]) -> Tensor:
    """The place, in what blocks are cut from, of each element that a rank holds of it."""
    places = torch.zeros(1, dtype=torch.int64)
    for d in along:
        runs = lies.runs(d, rank)
        index = torch.cat([torch.arange(0), *(torch.arange(a, b) for a, b in runs)])
        places = (places[:, None] * lies.shape[d] + index).flatten()
    return places


def _piece(size: int, places: Tensor) -> int:
    """The longest pieces that end where blocks of that size do, and where the places do."""
    if not len(places):
        return size
    ends = (places.diff() != 1) | (places[1:] % size == 0)
    starts = (ends.nonzero().flatten() + 1).tolist()
    return math.gcd(size, len(places), *starts)


def _pieces(
    blocks: per_block,
    along: Sequence[int],
    lies: Sharding,
    rank: Sequence[int],
    mine: tuple[int, ...],
) -> Part:
    """Of blocks that ranks have pieces of: pieces that no block's end lies in."""
    places = _places(along, lies, rank)
    size = _piece(blocks.size, places)
    index = places[::size] // blocks.size
    place, count = min(along), math.prod(lies.shape[d] for d in along) // blocks.size
    before = math.prod(mine[:place])
    after = math.prod(mine[d] for d in range(place, len(mine)) if d not in along)
    rows = torch.arange(before)[:, None, None] * count + index[:, None]
    rows = rows * after + torch.arange(after)
    return Part(per_block(size, blocks.along), rows.flatten())


def _run(n: int, lies: Sharding, rank: Sequence[int], granularity: Granularity) -> Part:
    """Of rows of n that are runs of the weight: those that the shard lies in."""
    inner = math.prod(lies.shape[1:])
    every = [_joined(lies.runs(0, other)) for other in lies.every_rank([0])]
    other = any(sharded_along(p) not in (None, 0) for p in lies.placements)
    if other or any(len(runs) > 1 for runs in every):
        raise ValueError(
            f"it is placed as {lies.placements}; rows of {granularity!r} can be told from shards "
            "along the first dimension only, each of them one run"
        )
    first, last = (_joined(lies.runs(0, rank)) or [(0, 0)])[0]
    start, stop = first * inner, last * inner
    begin, end = start // n, -(-stop // n)
    cut = any(a * inner % n or b * inner % n for runs in every for a, b in runs)
    return Part(run(n, start - begin * n, end * n - stop), slice(begin, end), cut)
