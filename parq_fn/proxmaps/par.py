"""`par`: the prox of a convex, piecewise affine penalty with its kinks at the levels."""

from __future__ import annotations

import torch
from torch import Tensor

from parq_fn.foundation.traits import ProxTraits, Slopes
from parq_fn.proxmaps.levels import between, nan_with, prepare, search
from parq_fn.proxmaps.proxmap import prox_map


@prox_map(
    ProxTraits(
        coefficients=Slopes(),
        elementwise=True,
        in_range=True,
        continuous=True,
        lipschitz=lambda _: 1.0,
        firmly_nonexpansive=True,
        cocoercive=lambda _: 1.0,
        regularizer=lambda w, q, a: par_regularizer(w, q, a),
        growth=lambda _: 0.5,
        convex_function=lambda w, q, a: par_regularizer(w, q, a),
        odd=lambda a: -a.flip(-1),
        scales=lambda a, factor: a * factor,
        shifts=True,
        widens=True,
    )
)
def par(u: Tensor, levels: Tensor, slopes: Tensor) -> Tensor:
    """argmin_w (w - u)^2 / 2 + Psi(w), Psi convex and piecewise affine with its kinks at the
    levels: slope a_i on the cell [q_i, q_{i+1}].

        w = q_i       for u in [q_i + a_{i-1}, q_i + a_i]
          = u - a_i   for u in [q_i + a_i, q_{i+1} + a_i]

    u: latent weights [r, n].
    levels: [r, k], sorted.
    slopes: [r, k-1] for the cells, nondecreasing, and Psi infinite outside [q_1, q_k]; or
    [r, k+1] with a slope on either side of the range too. The paper's even Psi with slopes
    0 <= a_0 < a_1 < ... on |w| is `symmetric_slopes(a)` on the levels of both signs.
    Raises ValueError for another number of slopes.

    >>> u, levels = torch.tensor([[-3.0, 0.2, 0.9]]), torch.tensor([[-1.0, 0.0, 1.0]])
    >>> par(u, levels, torch.tensor([[-0.5, 0.5]]))
    tensor([[-1.0000,  0.0000,  0.4000]])

    Source: Jin et al., PARQ, arXiv 2503.15748, equations (4) to (6).
    """
    x, q, a = prepare(u, levels, slopes)
    a = _outer_slopes(q, a)
    # The weight is past level j when u > q_j + a_{j+1}; the last one passed begins its piece.
    # Rounding is monotone, so u - a_{j+1} >= q_j then.
    passed = search(q + a[..., 1:], x)
    hi = torch.cat([q, torch.full_like(q[..., :1], torch.inf)], -1).gather(-1, passed)
    slope = a.gather(-1, passed)
    moved = torch.minimum(x - slope, hi)
    return torch.where(slope == -torch.inf, nan_with(x, hi), moved).to(u.dtype)  # u = -inf too


def par_regularizer(w: Tensor, levels: Tensor, slopes: Tensor) -> Tensor:
    """Psi(w), convex and piecewise affine with the slopes of `par`, 0 at the lowest level."""
    x, q, a = prepare(w, levels, slopes)
    a = _outer_slopes(q, a)
    below = (x - q[..., :1]).clamp(max=0)
    above = (x - q[..., -1:]).clamp(min=0)
    inner = torch.zeros_like(x)
    for i in range(q.shape[-1] - 1):
        lo, hi = q[..., i : i + 1], q[..., i + 1 : i + 2]
        inner = inner + a[..., i + 1 : i + 2] * (between(x, lo, hi) - lo)

    def outer(slope: Tensor, distance: Tensor) -> Tensor:  # 0 * inf counts as 0
        flat = (distance == 0) | (slope == 0)
        return torch.where(flat, torch.zeros_like(x), slope * distance)

    total = inner + outer(a[..., :1], below) + outer(a[..., -1:], above)
    return torch.where(x.isnan(), x, total).to(w.dtype)


def symmetric_slopes(magnitudes: Tensor, *, zero_level: bool = True) -> Tensor:
    """The slopes of `par` for the paper's even Psi(w) = max_i a_i (|w| - q_i) + b_i.

    magnitudes [r, m]: a_i on the cell [q_i, q_{i+1}] of the nonnegative levels q_0 < q_1 ...
    With q_0 = 0 a level that gives [r, 2m] slopes for the 2m + 1 levels of both signs; with
    zero_level=False, q_0 > 0, the cell [-q_0, q_0] gets slope 0: [r, 2m + 1] for 2m + 2 levels.

    >>> symmetric_slopes(torch.tensor([[0.5, 1.0]]))
    tensor([[-1.0000, -0.5000,  0.5000,  1.0000]])
    """
    middle = magnitudes[..., : 0 if zero_level else 1] * 0
    return torch.cat([-magnitudes.flip(-1), middle, magnitudes], -1)


def _outer_slopes(q: Tensor, a: Tensor) -> Tensor:
    """The slopes [r, k+1] of all pieces, outer ones infinite where they were not given."""
    k = q.shape[-1]
    a = a.expand(*q.shape[:-1], a.shape[-1])
    if a.shape[-1] == k + 1:
        return a
    if a.shape[-1] != k - 1:
        raise ValueError(
            f"par with {k} levels takes {k - 1} slopes (or {k + 1} with the outer ones), "
            f"got {a.shape[-1]}"
        )
    ends = torch.full_like(q[..., :1], torch.inf)
    return torch.cat([-ends, a, ends], -1)
