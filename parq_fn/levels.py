"""Levels: the search for a weight's cell among them, and the one tie rule.

Levels Q = (q_1 <= ... <= q_k) of a row cut the line into cells [q_i, q_{i+1}] with midpoints
c_i = q_i / 2 + q_{i+1} / 2, as rounded. A weight exactly on a midpoint belongs to the lower
level: what `bucketize` on the midpoints gives. Every prox map is a formula in the two ends of
a weight's cell, so this file is the only one that searches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parq_fn.scalar import as_scalar, to_device


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
    """How many of the sorted boundaries [r, k] lie below each x [r, n]: int64 [r, n]."""
    return torch.searchsorted(boundaries.detach().contiguous(), x.detach().contiguous())


def cell(u: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The ends (lo, hi) of each weight's cell, each [r, n]: the levels with lo < u <= hi.

    Below q_1 both are q_1 and above q_k both are q_k, so that a value held to [lo, hi] is held
    to the range of the levels.

    >>> cell(torch.tensor([[-3.0, 0.2]]), torch.tensor([[-1.0, 0.0, 1.0]]))
    (tensor([[-1.,  0.]]), tensor([[-1.,  1.]]))
    """
    above = search(levels, u)
    lo = levels.gather(-1, (above - 1).clamp(min=0))
    hi = levels.gather(-1, above.clamp(max=levels.shape[-1] - 1))
    return lo, hi


def midpoint(lo: Tensor, hi: Tensor) -> Tensor:
    """lo / 2 + hi / 2, which cannot overflow."""
    return 0.5 * lo + 0.5 * hi


def nearer(u: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """The nearer end of the cell, the lower one in a tie; NaN for NaN."""
    upper = (u > midpoint(lo, hi)) | (u >= hi)  # neighbouring floats: the midpoint rounds to hi
    return torch.where(u.isnan(), u, torch.where(upper, hi, lo))


def nearest(rows: Tensor, levels: Tensor) -> Tensor:
    """The nearest of the levels [r, k] to each weight [r, n], in the dtype of the weights.

    >>> nearest(torch.tensor([[-3.0, 0.0, 0.2]]), torch.tensor([[-1.0, 1.0]]))
    tensor([[-1., -1.,  1.]])
    """
    x, q = prepare(rows, levels)
    return nearer(x, *cell(x, q)).to(rows.dtype)
