"""Sharded tensors: what a rank has of a DTensor, and back."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:  # importing it takes half a second, and where there are none it is for nothing
    from torch.distributed.tensor import DTensor, Placement


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
    """The tensor of which this rank holds `mine`, of the shape of `like` and sharded as it is."""
    if not is_dtensor(like):
        return mine
    return placed_so(mine, like, like.placements, like.shape)


def placed_so(
    mine: Tensor, like: DTensor, placements: Sequence[Placement], shape: Sequence[int]
) -> Tensor:
    """The tensor of that shape of which this rank holds `mine`, placed so on the mesh of `like`."""
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    stride = like.stride() if size == like.shape else _contiguous(size)
    return DTensor.from_local(mine, like.device_mesh, placements, shape=size, stride=stride)


def _contiguous(shape: torch.Size) -> tuple[int, ...]:
    return tuple(max(shape[d + 1 :].numel(), 1) for d in range(len(shape)))


def spread(whole: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, sharded as `like` is."""
    return spread_so(whole, like, like.placements) if is_dtensor(like) else whole


def spread_so(whole: Tensor, like: DTensor, placements: Sequence[Placement]) -> Tensor:
    """A tensor that every rank has, placed so on the mesh of `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    everywhere = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, placements)
