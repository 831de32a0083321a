"""Sharded parameters: which rows of a DTensor a rank holds, and how it maps them alone.

Qparams are fitted to the gathered latent, the same on every rank, and kept whole. Maps that act
element by element map a rank's own shard; others need whole rows, and `Part.cut` tells.

Where rows are runs of the weight's logical order, so is a shard along dimension 0, which is filled
up to whole rows for the map. Of rows in another order a shard has whole ones, or a part of every
one, or runs that are cut into pieces, each with the qparams of its row.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from parq_fn.foundation.value import value
from parq_fn.quantizers.granularity import Granularity, per_block

if TYPE_CHECKING:  # importing it takes half a second, and where there are none it is for nothing
    from torch.distributed.tensor import DTensor, Placement


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
    """What a rank holds of a parameter's rows."""

    granularity: Granularity  # of the local tensor
    rows: slice | Tensor  # of the qparams; indices where those of a row are needed more than once
    cut: bool = False  # whether there is a rank, this or another, that has a piece of a row


def is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    """Whether it is a DTensor; then someone has imported what makes them."""
    if type(tensor) is Tensor or type(tensor) is nn.Parameter:  # all that a compiler may look at
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The rank's own shard; of a plain tensor the tensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def placed(mine: Tensor, like: Tensor) -> Tensor:
    """The tensor of which this rank holds `mine`, sharded as `like` is."""
    if not is_dtensor(like):
        return mine
    from torch.distributed.tensor import DTensor

    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(mine, mesh, placements, shape=like.shape, stride=like.stride())


def spread(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, sharded as `like` is."""
    if not is_dtensor(like):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, like.placements)


def summed_over_ranks(mine: Tensor, like: Tensor) -> Tensor:
    """The sum of what the ranks that `like` is sharded over have each; of a plain tensor `mine`."""
    if not is_dtensor(like):
        return mine
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if p.is_shard() else Replicate() for p in like.placements]
    return DTensor.from_local(mine, like.device_mesh, placements).full_tensor()


def part_of(weight: Tensor, granularity: Granularity) -> Part:
    """The part of the weight's rows that this rank holds.

    Raises ValueError as the granularity does; for a weight sharded along another dimension than
    the first (unless all of it is one row), or along more than one dimension of the mesh; and for a
    granularity that makes rows in a way of its own, of which a shard cannot be told.
    """
    r, n = granularity.shape(weight)
    whole = Part(granularity, slice(None))
    if not is_dtensor(weight):
        return whole
    from torch.distributed.tensor import Replicate, Shard

    mine = local(weight)
    held = [(i, p) for i, p in enumerate(weight.placements) if not isinstance(p, Replicate)]
    if r == 1:
        cut = any(_is_cut(weight, i, place) for i, place in held)
        return Part(run(max(mine.numel(), 1), 0, 0), slice(None), cut)
    if not held:
        return whole
    mesh_dim, place = held[0]
    if len(held) > 1 or type(place) is not Shard or place.dim != 0:
        raise ValueError(
            f"it is placed as {weight.placements}; rows of {granularity!r} can be told from one "
            "Shard(0) only"
        )
    if getattr(type(granularity), "rows", None) is not Granularity.rows:
        raise ValueError(
            f"it is sharded, and {granularity!r} makes rows in a way of its own, of which a shard "
            "cannot be told; give a granularity shape alone, or use per_channel or per_block"
        )
    size = -(-weight.shape[0] // weight.device_mesh.size(mesh_dim))  # as torch.chunk cuts
    first = min(weight.shape[0], weight.device_mesh.get_local_rank(mesh_dim) * size)
    count = mine.shape[0]
    order = granularity.order(weight)
    split = _is_cut(weight, mesh_dim, place)
    if order is None:
        cut = split and size * weight.shape[1:].numel() % n > 0
        return _run(weight, n, first, mine.numel())._replace(cut=cut)
    if isinstance(granularity, per_block) and 0 in granularity.dims(weight):
        part = _pieces(granularity, weight, first, mine)
        shortest = _piece(granularity, weight, size, weight.shape[0])  # of those of all ranks
        return part._replace(cut=split and shortest < granularity.size)
    if order.dims[0] == 0:  # the rows of some of the indices of dimension 0
        inner = r // max(weight.shape[0], 1)
        return Part(granularity, slice(first * inner, (first + count) * inner))
    return Part(granularity, slice(None), split)  # a part of every row


def _is_cut(weight: DTensor, mesh_dim: int, place: Placement) -> bool:
    """Whether more than one rank along a dimension of the mesh holds elements of the weight."""
    if weight.device_mesh.size(mesh_dim) == 1:
        return False
    return not place.is_shard() or weight.shape[getattr(place, "dim", 0)] > 1


def _run(weight: Tensor, n: int, first: int, numel: int) -> Part:
    """Of rows of n that are runs of the weight: those that the shard lies in."""
    start = first * weight.shape[1:].numel()
    stop = start + numel
    begin, end = start // n, -(-stop // n)
    return Part(run(n, start - begin * n, end * n - stop), slice(begin, end))


def _piece(blocks: per_block, weight: Tensor, first: int, count: int) -> int:
    """The longest pieces that end where blocks and a shard, `count` indices from `first` on, do."""
    along = blocks.dims(weight)
    inner = math.prod(weight.shape[d] for d in along[along.index(0) + 1 :])
    return math.gcd(blocks.size, first * inner, count * inner, weight.shape[0] * inner)


def _pieces(blocks: per_block, weight: Tensor, first: int, mine: Tensor) -> Part:
    """Of blocks that dimension 0 is among: whole ones, or pieces that no block's end lies in.

    What blocks are cut from are indices (a, i, b), those of dimension 0 in the middle; a rank holds
    i from `first` on. The pieces are as long as shard and blocks allow.
    """
    along = blocks.dims(weight)
    place = along.index(0)
    inner = math.prod(weight.shape[d] for d in along[place + 1 :])
    outer = math.prod(weight.shape[d] for d in along[:place])
    count = mine.shape[0]
    size = _piece(blocks, weight, first, count)
    beside = mine.numel() // max(outer * count * inner, 1)  # rows for each block
    if size == blocks.size and outer == 1:
        begin = first * inner // size * beside
        return Part(blocks, slice(begin, begin + mine.numel() // size))
    starts = torch.arange(0, outer * count * inner, size, device=mine.device)
    a, within = starts // max(count * inner, 1), starts % max(count * inner, 1)
    found = (a * weight.shape[0] * inner + first * inner + within) // blocks.size
    rows = found[:, None] * beside + torch.arange(beside, device=mine.device)
    return Part(per_block(size, blocks.along), rows.flatten())
