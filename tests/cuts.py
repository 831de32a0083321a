"""Weights of any rank and layout, how rows are cut from them, and how DTensor cuts them."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import Replicate

import parq_fn as pf


def dimensions(draw: Any, rank: int) -> Any:
    """One, as a number, or some of them, in any order; counted from either end."""
    chosen = draw(st.permutations(range(rank)))[: draw(st.integers(1, rank))]
    signed = tuple(d - rank * draw(st.booleans()) for d in chosen)
    return signed[0] if len(signed) == 1 and draw(st.booleans()) else signed


def laid_out(draw: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The numbers 0, 1, ... in a memory format that is drawn."""
    order = draw(st.permutations(range(len(shape))))
    back = [order.index(d) for d in range(len(shape))]
    numbers = torch.arange(torch.Size(shape).numel(), dtype=dtype).reshape(
        [shape[d] for d in order]
    )
    kind = draw(st.sampled_from(["dense", "slice", "expanded"]))
    if kind == "slice" and shape:
        numbers = numbers.repeat_interleave(2, 0)[::2]
    if kind == "expanded" and shape:
        numbers = numbers[:1].expand(numbers.shape)
    return numbers.permute(back)


@st.composite
def cases(draw: Any, low: int = 0) -> tuple[Tensor, Any]:
    rank = draw(st.integers(low, 5))
    shape = tuple(draw(st.lists(st.integers(0, 3), min_size=rank, max_size=rank)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
    if not rank or draw(st.booleans()):
        axis = dimensions(draw, rank) if rank else draw(st.sampled_from([0, 1, -1, (0, 1)]))
        return laid_out(draw, shape, dtype), pf.per_channel(axis)
    along = dimensions(draw, rank)
    length = 1
    for d in along if isinstance(along, tuple) else (along,):
        length *= shape[d]
    divisors = [size for size in range(1, max(length, 2) + 1) if length % size == 0]
    return laid_out(draw, shape, dtype), pf.per_block(draw(st.sampled_from(divisors)), along)


def cut(whole: Tensor, mesh: Any, rank: Any, placements: Any) -> Tensor:
    """What the rank at that coordinate has, cut as DTensor cuts it."""
    for count, place, p in zip(mesh, rank, placements, strict=True):
        if isinstance(p, Replicate):
            continue
        factor = getattr(p, "split_factor", 1)
        chunks = list(torch.chunk(whole, count * factor, p.dim))
        chunks += [chunks[0].narrow(p.dim, 0, 0)] * (count * factor - len(chunks))
        whole = torch.cat(chunks[place::count], p.dim)
    return whole
