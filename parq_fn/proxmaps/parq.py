"""`parq`: a line of slope 1 / s through the middle of each cell, held to the cell's ends."""

from __future__ import annotations

import torch
from torch import Tensor

from parq_fn.foundation.checks import Interval
from parq_fn.foundation.scalar import is_plain
from parq_fn.proxmaps.clip import CLIP, clip, clip_regularizer, held
from parq_fn.proxmaps.even import LEAST
from parq_fn.proxmaps.hard import HARD, hard_derivatives
from parq_fn.proxmaps.levels import Levels, between, cell, midpoint, nan_with, nearer, prepare
from parq_fn.proxmaps.proxmap import Formula, computed, follows_levels, prox_map

#: Up to so many levels, a line for each cell costs less than a search for a weight's cell.
_LINES_MAX = 5


# The line u + (u - c) (1 - s) / s of slope 1 / s through the midpoint c of u's cell, held to
# the cell's ends. It is c + (u - c) / s, written so that u = c gives u itself.


def _steep(s: Tensor) -> tuple[Tensor, ...]:
    # keeps the gradient finite at s = 0, and avoids inf * 0 for a subnormal s
    safe = s.clamp(min=torch.finfo(s.dtype).tiny)
    return ((1 - safe) / safe,)


def _sloped(u: Tensor, q: Levels, bound: Tensor | None, steep: Tensor) -> Tensor:
    """parq for 0 < s < 1: beyond the levels the outer lines are too, infinities among them."""
    del bound
    if isinstance(q, Tensor) and 2 <= q.shape[-1] <= _LINES_MAX and _in_place(u, q):
        return _highest_line(u, q, steep)
    lo, hi = cell(u, q)
    if _in_place(u, lo):
        return (u - midpoint(lo, hi)).mul_(steep).add_(u).clamp_max_(hi).clamp_min_(lo)
    return between(u + (u - midpoint(lo, hi)) * steep, lo, hi)


def _in_place(u: Tensor, levels: Tensor) -> bool:
    return (is_plain(u) and is_plain(levels)) or torch.compiler.is_compiling()


def _highest_line(u: Tensor, q: Tensor, steep: Tensor) -> Tensor:
    """`_sloped` without a search: the largest of min(l_i(u), q_{i+1}) and q_1, l_i(u) =
    u + (u - c_i) * steep the line of cell i.

    For u in cell i, those of the cells before are at their upper ends, of which q_i is the largest,
    as l_j(u) >= u there; those of the cells after are at most u and at most l_i(u), as c_j grows.
    Rounding keeps order, so this holds to the bit, but for the sign of a zero. steep > 0. In memory
    of its own, in place.
    """
    w = q[..., :1]
    for i in range(q.shape[-1] - 1):
        lo, hi = q[..., i : i + 1], q[..., i + 1 : i + 2]
        w = (u - midpoint(lo, hi)).mul_(steep).add_(u).clamp_max_(hi).clamp_min_(w)
    return w


def _any_slope(s: Tensor) -> tuple[Tensor, ...]:
    return (s, *_steep(s))


def _parq(u: Tensor, q: Levels, bound: Tensor | None, s: Tensor, steep: Tensor) -> Tensor:
    del bound
    v = held(u, q)  # clamped first: at s = 1 an infinite u would give inf * 0
    lo, hi = cell(v, q)
    w = between(v + (v - midpoint(lo, hi)) * steep, lo, hi)
    return torch.where(s > 0, w, nan_with(v, nearer(v, lo, hi)))


_SLOPED = Formula(_sloped, _steep, cells_from=_LINES_MAX + 1, even_from=_LINES_MAX + 1)
_PARQ = Formula(_parq, _any_slope, cells_from=3, even_from=LEAST)


def parq_at(s: float | None) -> Formula:
    """`parq` at inverse slope s."""
    if s is None:
        return _PARQ
    if s <= 0:
        return HARD
    return CLIP if s >= 1 else _SLOPED


def parq_derivatives(u: Tensor, lo: Tensor, hi: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """1 of the end that the weight is held to; on the line (1 - 1 / s) / 2 of both."""
    (steep,) = _steep(s)
    line = u + (u - midpoint(lo, hi)) * steep
    upper = (line >= hi).to(u.dtype)  # floats, for booleans are slow on a CPU
    lower = (line < lo).to(u.dtype)
    tilt = -0.5 * steep * (1 - upper - lower)
    lower, upper = lower + tilt, upper + tilt
    if is_plain(s) and s > 0:
        return lower, upper
    held = hard_derivatives(u, lo, hi, s)
    return torch.where(s > 0, lower, held[0]), torch.where(s > 0, upper, held[1])


@prox_map(
    follows_levels(
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
    ),
    parq_at,
    parq_derivatives,
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
    return computed(parq_at, u, levels, inverse_slope)


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
