"""Prox maps: (u [r, n], levels [r, k], coefficient) -> w [r, n], and their regularizers.

u is the latent weight, Q = (q_1 <= ... <= q_k) the sorted levels of its row, c_i the midpoint
of the cell [q_i, q_{i+1}]; `parq_fn.proxmaps.levels` holds the search and the tie rule. Every map
computes in float32 or better and returns u's dtype and shape; values it puts on a level are
bit-equal to it. NaN gives NaN; an infinity goes to the end level, except where the map has no
bounded range. A coefficient is a number or a 0-d tensor. TypeError and ValueError as
`levels.prepare` raises them.

This file says what each map is; `parq_fn.proxmaps.formulas` computes it.

A regularizer takes (w [r, n], levels [r, k], coefficient) and gives the penalty at every w:
map(u) = argmin_w (w - u)^2 / 2 + penalty(w).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from parq_fn.foundation.checks import Interval
from parq_fn.foundation.traits import ProxTraits, Slopes, declares, unchanged
from parq_fn.proxmaps.formulas import (
    CLIP,
    HARD,
    Chooser,
    binary_relax_at,
    known,
    parq_at,
    proxquant_at,
    soft_at,
)
from parq_fn.proxmaps.levels import between, cell, closest, nan_with, prepare, search


def _of(chooser: Chooser, u: Tensor, levels: Tensor, coefficient: float | Tensor) -> Tensor:
    return chooser(known(u, levels, coefficient))(u, levels, coefficient)


#: What every map here but `par` declares besides its own.
_follows_levels = functools.partial(
    ProxTraits,
    fixes_levels=True,
    keeps_side=True,
    between=True,
    odd=unchanged,
    scales=unchanged,
    shifts=True,
    widens=True,
)


@declares(
    _follows_levels(
        in_range=True,
        fixes_midpoints=True,
        continuous=True,
        lipschitz=lambda _: 1.0,
        lipschitz_attained=True,
        firmly_nonexpansive=True,
        cocoercive=lambda _: 1.0,
        regularizer=lambda w, q, _: clip_regularizer(w, q),
        growth=lambda _: 0.5,
        convex_function=lambda w, q, _: clip_regularizer(w, q),
        idempotent=True,
    )
)
def clip(u: Tensor, levels: Tensor) -> Tensor:
    """argmin_w (w - u)^2 / 2 over q_1 <= w <= q_k: the weight held to the levels' range.

    >>> clip(torch.tensor([[-3.0, 0.2]]), torch.tensor([[-1.0, 1.0]]))
    tensor([[-1.0000,  0.2000]])
    """
    return CLIP(u, levels, 1.0)


def clip_regularizer(w: Tensor, levels: Tensor) -> Tensor:
    """0 for q_1 <= w <= q_k, else infinity."""
    x, q = prepare(w, levels)
    outside = (x < q[..., :1]) | (x > q[..., -1:])
    return torch.where(outside, torch.inf, torch.zeros_like(x)).to(w.dtype)


@declares(
    _follows_levels(
        in_range=True,
        onto_levels=True,
        jump=lambda _, width: width,
        regularizer=lambda w, q, _: hard_regularizer(w, q),
        idempotent=True,
    )
)
def hard(u: Tensor, levels: Tensor) -> Tensor:
    """argmin_w |w - u| over w in Q: the nearest level, the lower one in a tie.

    >>> hard(torch.tensor([[-3.0, 0.0, 0.2]]), torch.tensor([[-1.0, 1.0]]))
    tensor([[-1., -1.,  1.]])

    Source: the straight-through estimator's rounding; PARQ, arXiv 2503.15748, section 4.
    """
    return HARD(u, levels, 0.0)


def hard_regularizer(w: Tensor, levels: Tensor) -> Tensor:
    """0 for w in Q, else infinity."""
    x, q = prepare(w, levels)
    lo, hi = cell(x, q)
    return torch.where((x == lo) | (x == hi), torch.zeros_like(x), torch.inf).to(w.dtype)


@declares(
    _follows_levels(
        coefficients=Interval(0.0, 1.0, open_low=True),
        in_range=True,
        fixes_midpoints=True,
        continuous=True,
        lipschitz=lambda s: 1 / s,
        lipschitz_attained=True,
        cocoercive=lambda s: s,
        regularizer=lambda w, q, s: parq_regularizer(w, q, s),
        growth=lambda s: s / 2,
        convex_function=lambda w, q, s: (
            clip_regularizer(w, q) + (1 - s) / s * interpolant(clip(w, q), q)
        ),
        convex_argument=lambda u, s: u / s,
        semigroup=lambda s, t: s * t,
        sharp=0.0,
        soft=1.0,
        soft_map=clip,
        share=lambda s: 1 - s,
    )
)
def parq(u: Tensor, levels: Tensor, inverse_slope: float | Tensor) -> Tensor:
    """argmin_w (w - u)^2 / 2 + h_s(w), h_s(w) = (1 - s) / 2 * (w - q_i) (q_{i+1} - w) on each
    cell, infinite outside [q_1, q_k]; s the inverse slope in (0, 1].

    That is clamp(c_i + (u - c_i) / s, q_i, q_{i+1}) inside a cell and the end level outside;
    s = 1 is `clip`, s = 0 is `hard`. Levels and midpoints stay where they are, bit for bit.

    >>> u, levels = torch.tensor([[-3.0, 0.2, 0.6]]), torch.tensor([[-1.0, 1.0]])
    >>> parq(u, levels, 0.5)
    tensor([[-1.0000,  0.4000,  1.0000]])

    Source: Jin et al., PARQ, arXiv 2503.15748, equation (8) and figure 3.
    """
    return _of(parq_at, u, levels, inverse_slope)


def parq_regularizer(w: Tensor, levels: Tensor, inverse_slope: float | Tensor) -> Tensor:
    """h_s(w) = (1 - s) / 2 * (w - q_i) (q_{i+1} - w) on each cell, infinite outside [q_1, q_k].

    It is (1 - s)-weakly convex: with w^2 / 2 added it is s w^2 / 2 plus (1 - s) times the
    piecewise-linear interpolant of w^2 / 2 at the levels.
    """
    x, q, s = prepare(w, levels, inverse_slope)
    lo, hi = cell(x, q)
    bump = (1 - s) / 2 * (x - lo) * (hi - x)
    return torch.where((x < lo) | (x > hi), torch.inf, bump).to(w.dtype)


def interpolant(w: Tensor, levels: Tensor) -> Tensor:
    """Phi(w): the piecewise-linear interpolant of w^2 / 2 at the levels, infinite outside.

    For s in (0, 1], parq(u, s) = argmin_w (w - u/s)^2 / 2 + (1 - s) / s * Phi(w): PARQ is a
    convex prox of a rescaled input, and that prox is `par(u / s, levels, slopes)` with the
    slopes (1 - s) / s * c_i.
    """
    x, q = prepare(w, levels)
    lo, hi = cell(x, q)
    # on a cell: lo^2/2 + (lo + hi)/2 (w - lo) = ((lo + hi) w - lo hi) / 2
    line = ((lo + hi) * x - lo * hi) / 2
    return torch.where((x < lo) | (x > hi), torch.inf, line).to(w.dtype)


@declares(
    _follows_levels(
        coefficients=Interval(0.0, math.inf, open_high=True),
        in_range=True,
        fixes_midpoints=True,
        continuous=True,
        lipschitz=lambda t: t / 4 / math.tanh(t / 4) if t > 0 else 1.0,
        lipschitz_attained=True,
        sharp=math.inf,
        soft=0.0,
        soft_map=clip,
    )
)
def soft(u: Tensor, levels: Tensor, temperature: float | Tensor) -> Tensor:
    """c_i + (q_{i+1} - q_i) / 2 * (sigma(T (x - 1/2)) - 1/2) / (sigma(T / 2) - 1/2) in a cell,
    x = (u - q_i) / (q_{i+1} - q_i), sigma(z) = 1 / (1 + exp(-z)); the end level outside.

    T = 0 is `clip`, T = infinity is `hard`. It is not the prox of any function.

    >>> u, levels = torch.tensor([[-3.0, 0.2, 0.6]]), torch.tensor([[-1.0, 1.0]])
    >>> soft(u, levels, 8.0)
    tensor([[-1.0000,  0.3941,  0.8648]])

    Source: the smooth relaxation that PARQ is compared with, arXiv 2503.15748, section 5.
    """
    return _of(soft_at, u, levels, temperature)


@declares(
    _follows_levels(
        coefficients=Interval(0.0, 1.0),
        jump=lambda theta, width: theta * width,
        regularizer=lambda w, q, theta: binary_relax_regularizer(w, q, theta),
        semigroup=lambda a, b: 1 - (1 - a) * (1 - b),
        sharp=1.0,
        soft=0.0,
        soft_map=unchanged,
    )
)
def binary_relax(u: Tensor, levels: Tensor, theta: float | Tensor) -> Tensor:
    """argmin_w (w - u)^2 / 2 + lam / 2 * dist(w, Q)^2, theta = lam / (1 + lam) in [0, 1]:
    (1 - theta) u + theta * nearest level.

    theta = 0 is the identity, theta = 1 is `hard`.

    >>> u, levels = torch.tensor([[-3.0, 0.2, 0.6]]), torch.tensor([[-1.0, 1.0]])
    >>> binary_relax(u, levels, 0.5)
    tensor([[-2.0000,  0.6000,  0.8000]])

    Source: Yin et al., BinaryRelax, arXiv 1801.06313, equation (5).
    """
    return _of(binary_relax_at, u, levels, theta)


def binary_relax_regularizer(w: Tensor, levels: Tensor, theta: float | Tensor) -> Tensor:
    """lam / 2 * dist(w, Q)^2 with lam = theta / (1 - theta); at theta = 1 the indicator of Q."""
    x, q, theta = prepare(w, levels, theta)
    distance = x - closest(x, q)
    relaxed = theta / (2 * torch.where(theta < 1, 1 - theta, 1.0)) * distance.square()
    off = torch.where(distance == 0, torch.zeros_like(x), torch.inf)
    return torch.where(theta < 1, relaxed, off).to(w.dtype)


@declares(
    _follows_levels(
        coefficients=Interval(0.0, math.inf, open_high=True),
        jump=lambda lam, width: min(2 * lam, width),
        regularizer=lambda w, q, lam: proxquant_regularizer(w, q, lam),
        semigroup=lambda a, b: a + b,
        sharp=math.inf,
        soft=0.0,
        soft_map=unchanged,
        scales=lambda lam, a: lam * a,
    )
)
def proxquant(u: Tensor, levels: Tensor, strength: float | Tensor) -> Tensor:
    """argmin_w (w - u)^2 / 2 + lam * dist(w, Q): u moved toward its nearest level by at most
    lam >= 0.

    lam = 0 is the identity, lam = infinity is `hard`.

    >>> u, levels = torch.tensor([[-3.0, 0.2, 0.9]]), torch.tensor([[-1.0, 1.0]])
    >>> proxquant(u, levels, 0.25)
    tensor([[-2.7500,  0.4500,  1.0000]])

    Source: Bai, Wang, Liberty, ProxQuant, arXiv 1810.00861, section 3.
    """
    return _of(proxquant_at, u, levels, strength)


def proxquant_regularizer(w: Tensor, levels: Tensor, strength: float | Tensor) -> Tensor:
    """lam * dist(w, Q)."""
    x, q, lam = prepare(w, levels, strength)
    return (lam * (x - closest(x, q)).abs()).to(w.dtype)


@declares(
    ProxTraits(
        coefficients=Slopes(),
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
