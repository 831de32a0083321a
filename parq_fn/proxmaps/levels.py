"""Levels: the search for a weight's cell among them, and the one tie rule.

Levels Q = (q_1 <= ... <= q_k) of a row cut the line into cells [q_i, q_{i+1}] with midpoints
c_i = q_i / 2 + q_{i+1} / 2, as rounded. A weight exactly on a midpoint belongs to the lower
level: what `bucketize` on the midpoints gives. Every prox map is a formula in the two ends of
a weight's cell, so this file is the only one that searches.

Four equivalent searches, chosen for speed: binary search, for any number of levels; comparison
with each level, which on a CPU is faster where there are few; for two to four levels the largest
level that a weight reaches, without an index; and, under a compiler, halving of the window that a
weight may lie in, which is `where` throughout and so fuses with the map that follows. The
fifth way, of evenly spaced levels, is a rounding: see `even`.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

from parq_fn.foundation.scalar import as_scalar, is_plain, to_device
from parq_fn.proxmaps.even import Even

#: Of rows: a table [r, k], or what stands for one.
Levels = Tensor | Even

#: Up to so many boundaries, each is compared, or they are halved in a compiled loop.
LINEAR_SEARCH_MAX = 32
#: Smallest number of levels for which the search for the nearest one gains from bounds at hand.
BOUNDS_MIN = 5
#: Up to so many levels the nearest one is the highest that is reached, without an index.
_REACHED = 4


@overload
def prepare(u: Tensor, levels: Tensor, *coefficients: float | Tensor) -> tuple[Tensor, ...]: ...
@overload
def prepare(u: Tensor, levels: Levels, *coefficients: float | Tensor) -> tuple[Any, ...]: ...
def prepare(u: Tensor, levels: Levels, *coefficients: float | Tensor) -> tuple[Any, ...]:
    """(u, levels, coefficients) in one dtype of float32 or better, on the device of u.

    Levels are a table [r, k], or `Even` of as many rows. Raises TypeError unless u and a table are
    floating, ValueError unless they are [r, n] and [r, k] of the same rows, k >= 1.
    """
    if isinstance(levels, Even):
        dtype = wide(u, levels)
        scalars = (to_device(as_scalar(c), u).to(dtype) for c in coefficients)
        return (u.to(dtype), levels._replace(inverse=levels.inverse.to(dtype)), *scalars)
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
    dtype = wide(u, levels)
    scalars = (to_device(as_scalar(c), u).to(dtype) for c in coefficients)
    return (u.to(dtype), levels.to(dtype), *scalars)


def wide(u: Tensor, levels: Levels) -> torch.dtype:
    """The dtype that maps of these compute in."""
    return torch.promote_types(torch.promote_types(u.dtype, levels.dtype), torch.float32)


def count(levels: Levels) -> int:
    """k, the number of levels of each row."""
    return levels.num_levels if isinstance(levels, Even) else levels.shape[-1]


def lowest(levels: Levels) -> Tensor:
    """The lowest level of each row, [r, 1]."""
    return levels.level(levels.first) if isinstance(levels, Even) else levels[..., :1]


def highest(levels: Levels) -> Tensor:
    """The highest level of each row, [r, 1]."""
    return levels.level(levels.last) if isinstance(levels, Even) else levels[..., -1:]


def between(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """x held to [lo, hi], NaN staying NaN."""
    return torch.minimum(torch.maximum(x, lo), hi)


def search(boundaries: Tensor, x: Tensor) -> Tensor:
    """How many of the sorted boundaries [r, m] lie below each x [r, n]: int64 [r, n].

    For NaN any number.
    """
    if boundaries.shape[-1] > LINEAR_SEARCH_MAX or x.device.type != "cpu":
        return torch.searchsorted(_dense(boundaries), _dense(x.to(boundaries.dtype)))
    return count_below(boundaries, x)


def _dense(x: Tensor) -> Tensor:
    """The values, in memory one after another, as a binary search is to have them."""
    x = x.detach()
    if is_plain(x):
        return x.contiguous()
    return x.clone(memory_format=torch.contiguous_format)  # a batch may look contiguous and not be


def count_below(boundaries: Tensor, x: Tensor) -> Tensor:
    """What `search` gives, by comparison with each boundary."""
    if is_plain(boundaries) and is_plain(x):
        # to floats, which a CPU writes several at a time, and bools it does not
        count, above = torch.zeros_like(x), torch.empty_like(x)
        for i in range(boundaries.shape[-1]):
            count.add_(torch.gt(x, boundaries[..., i : i + 1], out=above))
        return count.long()
    count = torch.zeros_like(x, dtype=torch.uint8)
    for i in range(boundaries.shape[-1]):
        count = count + (x > boundaries[..., i : i + 1]).view(torch.uint8)
    return count.long()


def lookup(x: Tensor, boundaries: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """Of each table [r, m + 1] the entry of every x [r, n], its index how many of the sorted
    boundaries [r, m] lie below x: [r, n], or [r, 1] where there is but one entry."""
    m = boundaries.shape[-1]
    if m == 0:
        return tables
    if m < LINEAR_SEARCH_MAX and torch.compiler.is_compiling():
        return lookup_by_halves(x, boundaries, *tables)
    below = search(boundaries, x)
    return tuple(table.gather(-1, below) for table in tables)


def lookup_by_halves(x: Tensor, boundaries: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
    """What `lookup` gives, by halving the windows of entries and of the boundaries between them."""
    between, *windows = map(_columns, (boundaries, *tables))
    while len(between) > 2:
        entries = len(between) + 1
        half = (entries + 1) // 2
        second = entries - half  # the halves share an entry where they must
        above = x > between[second - 1]
        between = _either(above, between[second:], between[: half - 1])
        windows = [_either(above, window[second:], window[:half]) for window in windows]
    for i, boundary in reversed([*enumerate(between)]):
        above = x > boundary
        windows = [[*w[:i], torch.where(above, w[i + 1], w[i])] for w in windows]
    return tuple(entry for (entry,) in windows)


def _columns(table: Tensor) -> list[Tensor]:
    return [table[..., i : i + 1] for i in range(table.shape[-1])]


def _either(above: Tensor, upper: list[Tensor], lower: list[Tensor]) -> list[Tensor]:
    return [torch.where(above, *ends) for ends in zip(upper, lower, strict=True)]


def cell(x: Tensor, levels: Levels) -> tuple[Tensor, ...]:
    """The ends (lo, hi) of each weight's cell, neighbouring levels with lo < x <= hi; each [r, n]
    or [r, 1], where it is the same for all.

    The lowest cell takes in what lies below it, the highest what lies above; one level is both
    ends of its cell.

    >>> cell(torch.tensor([[-3.0, 0.2]]), torch.tensor([[-1.0, 0.0, 1.0]]))
    (tensor([[-1.,  0.]]), tensor([[0., 1.]]))
    """
    if isinstance(levels, Even):
        return levels.cell(x)
    if levels.shape[-1] == 1:
        return levels, levels
    return lookup(x, levels[..., 1:-1], levels[..., :-1], levels[..., 1:])


def midpoint(lo: Tensor, hi: Tensor) -> Tensor:
    """lo / 2 + hi / 2, which cannot overflow."""
    return 0.5 * lo + 0.5 * hi


def nearer(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """The nearer end of the cell, the lower one in a tie; for NaN either."""
    return torch.where(reaches_upper(x, lo, hi), hi, lo)


def reaches_upper(x: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """Whether the upper end of a weight's cell is the nearer one."""
    return (x > midpoint(lo, hi)) | (x >= hi)  # neighbouring floats: the midpoint rounds to hi


def bounds(levels: Tensor) -> Tensor:
    """Above the i-th of these, a weight is nearer to level i + 1 than to level i: [r, k - 1]."""
    lo, hi = levels[..., :-1], levels[..., 1:]
    middle = midpoint(lo, hi)
    return torch.where(middle < hi, middle, lo)  # as `nearer` decides


def closest(
    x: Tensor, levels: Levels, bound: Tensor | None = None, *, keep_nan: bool = False
) -> Tensor:
    """The nearest level, the lower one in a tie: [r, n], or [r, 1] where there is one.

    bound: `bounds(levels)`, where the caller has them. x and levels prepared.
    keep_nan: NaN gives NaN, in [r, n]; else any level.
    """
    if isinstance(levels, Even):
        return levels.closest(x)
    if bound is None:
        # a compiler computes bounds for each weight: of many levels, finding the cell is cheaper
        if torch.compiler.is_compiling() and levels.shape[-1] >= BOUNDS_MIN:
            level = nearer(x, *cell(x, levels))
            return nan_with(x, level) if keep_nan else level
        bound = bounds(levels)
    few = 2 <= levels.shape[-1] <= _REACHED and is_plain(x) and is_plain(levels)
    if few and levels.numel() and _reachable(levels):
        return _highest_reached(x, levels, bound)
    (level,) = lookup(x, bound, levels)
    return nan_with(x, level) if keep_nan else level


def _reachable(levels: Tensor) -> bool:
    """Whether `_highest_reached` gives these levels: differences are finite, and a row that holds
    -0.0 holds 0.0 too."""
    if not float((levels[..., -1] - levels[..., 0]).amax()) < torch.inf:
        return False
    bits = levels.view(torch.int32 if levels.dtype == torch.float32 else torch.int64)
    negative_zero = torch.iinfo(bits.dtype).min
    if int(bits.amin()) > negative_zero:
        return True
    return bool(((bits == 0).any(-1) | (bits != negative_zero).all(-1)).all())


def _highest_reached(x: Tensor, levels: Tensor, bound: Tensor) -> Tensor:
    """`closest` of two `_reachable` levels or more: from the lowest on, the next where its bound
    is below x. NaN gives NaN, a level -0.0 gives 0.0. In memory of its own."""
    level = x.clamp(0.0, 0.0).add_(levels[..., :1])
    above = torch.empty_like(level)
    for i in range(bound.shape[-1]):
        torch.gt(x, bound[..., i : i + 1], out=above)  # 1 or 0, at which lerp is exact
        level.lerp_(levels[..., i + 1 : i + 2], above)
    return level


def nan_with(x: Tensor, level: Tensor) -> Tensor:
    """The level, but NaN where x is; with a derivative of 0 in x."""
    if torch.compiler.is_compiling() or x.device.type != "cpu":
        return torch.where(x == x, level, x.detach())
    # torch.where is slow on CPUs; subtracting 0 times 1 keeps the sign of zero, 0 times -0 does not
    return torch.sub(level, x.clamp(1.0, 1.0), alpha=0.0)


def nearest(rows: Tensor, levels: Tensor) -> Tensor:
    """The nearest of the levels [r, k] to each weight [r, n], in the dtype of the weights.

    >>> nearest(torch.tensor([[-3.0, 0.0, 0.2]]), torch.tensor([[-1.0, 1.0]]))
    tensor([[-1., -1.,  1.]])
    """
    x, q = prepare(rows, levels)
    return closest(x, q, keep_nan=True).to(rows.dtype)
