"""Levels: the search for a weight's cell among them, and the one tie rule.

Levels Q = (q_1 <= ... <= q_k) of a row cut the line into cells [q_i, q_{i+1}] with midpoints
c_i = q_i / 2 + q_{i+1} / 2, as rounded. A weight exactly on a midpoint belongs to the lower
level: what `bucketize` on the midpoints gives. Every prox map is a formula in the two ends of
a weight's cell, so this file is the only one that searches.

It searches in three ways that find the same: by binary search, for any number of levels; by
comparison with each, whose passes over memory cost less on a CPU where there are few; and, under
a compiler, by halving the window of levels that a weight may lie in, which is `where` throughout
and so becomes part of one loop with the map that follows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parq_fn.scalar import as_scalar, to_device

#: Up to so many levels are compared one by one, or halved in a compiled loop.
FEW = 32


def prepare(u: Tensor, levels: Tensor, *coefficients: float | Tensor) -> tuple[Tensor, ...]:
    """(u, levels, coefficients) in one dtype of float32 or better, on the device of u.

    Raises TypeError unless u and levels are floating, ValueError unless they are [r, n] and
    [r, k] of the same rows, k >= 1.
    """
    if not (u.is_floating_point() and levels.is_floating_point()):
        raise TypeError(
            f"expected weights and levels of floating dtypes, got {u.dtype} and {levels.dtype}"
        )
    if u.dim() < 1 or levels.dim() != u.dim() or levels.shape[:-1] != u.shape[:-1]:
        raise ValueError(
            "expected weights [r, n] and levels [r, k] of the same rows, got "
            f"{tuple(u.shape)} and {tuple(levels.shape)}"
        )
    if levels.shape[-1] < 1:
        raise ValueError(f"expected at least one level a row, got levels {tuple(levels.shape)}")
    dtype = torch.promote_types(torch.promote_types(u.dtype, levels.dtype), torch.float32)
    scalars = (to_device(as_scalar(c), u).to(dtype) for c in coefficients)
    return (u.to(dtype), levels.to(dtype), *scalars)


def between(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """x held to [lo, hi], NaN staying NaN."""
    return torch.minimum(torch.maximum(x, lo), hi)


def search(boundaries: Tensor, x: Tensor) -> Tensor:
    """How many of the sorted boundaries [r, m] lie below each x [r, n]: int64 [r, n].

    For NaN any number.
    """
    if boundaries.shape[-1] > FEW or x.device.type != "cpu":
        return torch.searchsorted(boundaries.detach().contiguous(), x.detach().contiguous())
    return count_below(boundaries, x)


def count_below(boundaries: Tensor, x: Tensor) -> Tensor:
    """What `search` gives, by comparison with each boundary."""
    count = torch.zeros_like(x, dtype=torch.uint8)
    for i in range(boundaries.shape[-1]):
        count = count + (x > boundaries[..., i : i + 1]).view(torch.uint8)
    return count.long()


def cell(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The ends (lo, hi) of each weight's cell, neighbouring levels with lo < x <= hi; each [r, n]
    or [r, 1], where it is the same for all.

    The lowest cell takes in what lies below it, the highest what lies above; one level is both
    ends of its cell.

    >>> cell(torch.tensor([[-3.0, 0.2]]), torch.tensor([[-1.0, 0.0, 1.0]]))
    (tensor([[-1.,  0.]]), tensor([[0., 1.]]))
    """
    k = levels.shape[-1]
    if k == 1:
        return levels, levels
    if k <= FEW and torch.compiler.is_compiling():
        return cell_by_halves(x, levels)
    if k == 2:
        return levels[..., :1], levels[..., 1:]
    below = search(levels[..., 1:-1], x)
    return levels[..., :-1].gather(-1, below), levels[..., 1:].gather(-1, below)


def cell_by_halves(x: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """What `cell` gives, by halving the window of cells that are left."""
    k = levels.shape[-1]
    window = [levels[..., i : i + 1] for i in range(k)]  # of the cells between neighbours
    while len(window) > 2:
        cells = len(window) - 1
        half = (cells + 1) // 2
        second = cells - half  # the halves share a cell where they must
        above = x > window[second]
        pairs = zip(window[second:], window[: half + 1], strict=True)
        window = [torch.where(above, upper, lower) for upper, lower in pairs]
    return window[0], window[-1]


def midpoint(lo: Tensor, hi: Tensor) -> Tensor:
    """lo / 2 + hi / 2, which cannot overflow."""
    return 0.5 * lo + 0.5 * hi


def nearer(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """The nearer end of the cell, the lower one in a tie; for NaN either."""
    upper = (x > midpoint(lo, hi)) | (x >= hi)  # neighbouring floats: the midpoint rounds to hi
    return torch.where(upper, hi, lo)


def closest(x: Tensor, levels: Tensor) -> Tensor:
    """The nearest level [r, n], the lower one in a tie; for NaN any. x and levels prepared."""
    if torch.compiler.is_compiling():
        return nearer(x, *cell(x, levels))
    lo, hi = levels[..., :-1], levels[..., 1:]
    middle = midpoint(lo, hi)
    bounds = torch.where(middle < hi, middle, lo)  # x above the bound of a cell: `nearer` says hi
    return levels.gather(-1, search(bounds, x))


def nan_with(x: Tensor, level: Tensor) -> Tensor:
    """The level, but NaN where x is; with a derivative of 0 in x."""
    return level - 0.0 * x.clamp(0.0, 0.0)  # 0 taken away leaves even a zero its sign


def nearest(rows: Tensor, levels: Tensor) -> Tensor:
    """The nearest of the levels [r, k] to each weight [r, n], in the dtype of the weights.

    >>> nearest(torch.tensor([[-3.0, 0.0, 0.2]]), torch.tensor([[-1.0, 1.0]]))
    tensor([[-1., -1.,  1.]])
    """
    x, q = prepare(rows, levels)
    return nan_with(x, closest(x, q)).to(rows.dtype)
