"""Sharded parameters: which rows of a DTensor a rank holds, and how it maps them alone.

Levels are fitted to the gathered latent, the same on every rank, and kept whole. Maps act
element by element, so that a rank maps its own shard: rows are runs of the weight's logical
order, and so is a shard along dimension 0, which is filled up to whole rows for the map.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from parq_fn.foundation.value import value
from parq_fn.quantizers.granularity import Granularity


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
    rows: slice  # of the levels


def local(tensor: Tensor) -> Tensor:
    """The rank's own shard; of a plain tensor the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed(mine: Tensor, like: Tensor) -> Tensor:
    """The tensor of which this rank holds `mine`, sharded as `like` is."""
    if not isinstance(like, DTensor):
        return mine
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(mine, mesh, placements, shape=like.shape, stride=like.stride())


def part_of(weight: Tensor, granularity: Granularity) -> Part:
    """The part of the weight's rows that this rank holds.

    Raises ValueError as the granularity does, and for a weight sharded along another dimension
    than the first (unless all of it is one row), or along more than one dimension of the mesh.
    """
    r, n = granularity.shape(weight)
    whole = Part(granularity, slice(None))
    if not isinstance(weight, DTensor):
        return whole
    mine = local(weight)
    if r == 1:
        return Part(run(max(mine.numel(), 1), 0, 0), slice(None))
    held = [(i, p) for i, p in enumerate(weight.placements) if not isinstance(p, Replicate)]
    if not held:
        return whole
    mesh_dim, place = held[0]
    if len(held) > 1 or type(place) is not Shard or place.dim != 0:
        raise ValueError(
            f"it is placed as {weight.placements}; rows of {granularity!r} can be told from one "
            "Shard(0) only"
        )
    size = -(-weight.shape[0] // weight.device_mesh.size(mesh_dim))  # as torch.chunk cuts
    inner = weight.shape[1:].numel()
    start = min(weight.shape[0], weight.device_mesh.get_local_rank(mesh_dim) * size) * inner
    stop = start + mine.numel()
    first, last = start // n, -(-stop // n)
    return Part(run(n, start - first * n, last * n - stop), slice(first, last))
