"""Stochastic rounding to bfloat16, drawn from counters as `noise` is."""

from __future__ import annotations

import torch
from torch import Tensor

from parq_fn.foundation.scalar import to_device
from parq_fn.transforms.layout import sharding_of
from parq_fn.transforms.noise import bits_of
from parq_fn.transforms.sharded import is_dtensor

_AT_ONCE = 1 << 18  # elements, so that the bits of a large tensor are never there together


def round_into(rounded: Tensor, x: Tensor, key: Tensor, whole: Tensor) -> None:
    """rounded <- x rounded up or down to bfloat16, up with the probability of its place between:

        P(up) = (x - down) / (up - down),  so that the mean over draws is x

    Numbers that bfloat16 has stay as they are, infinities and NaN too. The draw of an element is a
    fixed function of the key and of its index in the whole, however that is sharded.

    rounded: bfloat16, written to; x: float32, of its shape; key: [] int64.
    whole: the tensor of which this rank holds `rounded`.
    """
    if not x.numel():
        return
    first, *others = _indices(whole, x) or [torch.zeros(1, dtype=torch.int64, device=x.device)]
    columns = torch.zeros(1, dtype=torch.int64, device=x.device)
    for size, index in zip(whole.shape[1:], others, strict=True):
        columns = (columns[:, None] * size + index).flatten()
    width = whole.shape[1:].numel()
    fours = torch.arange(-(-width // 4), device=x.device)  # columns that one number serves
    key, to, of = to_device(key, x), rounded.reshape(len(first), -1), x.reshape(len(first), -1)
    rows = max(_AT_ONCE // width, 1)
    for at in range(0, len(first), rows):
        some = of[at : at + rows].contiguous()
        draws = bits_of(first[at : at + rows, None] * len(fours) + fours, key).view(torch.int16)
        draws = draws[:, :width] if len(columns) == width else draws[:, columns]
        bits = draws.to(torch.int32).bitwise_and_(0xFFFF).add_(some.view(torch.int32))
        up_or_down = bits.bitwise_and_(~0xFFFF).view(torch.float32)
        to[at : at + rows] = torch.where(some.isfinite(), up_or_down, some)
    if to.data_ptr() != rounded.data_ptr():
        rounded.copy_(to.view(rounded.shape))


def _indices(whole: Tensor, mine: Tensor) -> list[Tensor]:
    """Of each dimension of the whole, the indices that this rank has."""
    if not is_dtensor(whole):
        return [torch.arange(size, device=mine.device) for size in mine.shape]
    lies, rank = sharding_of(whole), whole.device_mesh.get_coordinate() or ()
    every = [lies.runs(d, rank) for d in range(whole.dim())]
    return [torch.cat([torch.arange(a, b, device=mine.device) for a, b in runs]) for runs in every]
