"""Formulas: what the prox maps of `parq_fn.proxmaps` compute, each for where its coefficient lies.

At the ends of the annealing a map is `CLIP` or `HARD`, in between a shorter formula than one that
has to serve all coefficients; where a coefficient cannot be read (batched, differentiated, on a
device) that one is taken. All give the same weights, bit for bit but for the sign of a zero. What
is computed once for all weights is apart from what is computed for each, which goes through memory
and is what a compiler is given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.scalar import is_plain
from parq_fn.proxmaps.levels import between, cell, closest, midpoint, nan_with, nearer, prepare
from parq_fn.proxmaps.tanh import tanh

#: Levels up to which a line for each cell costs less than a search for a weight's.
_FEW = 5


class Formula(NamedTuple):
    """w = weight(u, levels, None, *scalars(coefficient)), of `prepare`d arguments."""

    #: (u [r, n], levels [r, k], bound, *scalars) -> w [r, n]; bound is `levels.bounds(levels)`
    #: [r, k - 1] where the caller has them, else None, and no more than a help.
    weight: Callable[..., Tensor]
    #: coefficient [] -> what weights take of it, [] each.
    scalars: Callable[[Tensor], tuple[Tensor, ...]]
    #: Whether the weight takes its arguments as `prepare` gives them.
    prepared: bool = True
    #: From so many levels on a weight's cell is searched for, and the weight computed from its
    #: ends; None: from the nearest level, if from any.
    cells_from: int | None = None

    def __call__(self, u: Tensor, levels: Tensor, coefficient: float | Tensor) -> Tensor:
        """The weights, in the dtype of u."""
        x, q, c = prepare(u, levels, coefficient)
        return self.weight(x, q, None, *self.scalars(c)).to(u.dtype)


#: The formula of a map for the value of its coefficient, None where that is not known.
Chooser = Callable[[float | None], Formula]


def known(u: Tensor, levels: Tensor, coefficient: float | Tensor) -> float | None:
    """The coefficient as the maps' dtype rounds it, None where it cannot be read or is
    differentiated."""
    c = torch.as_tensor(coefficient)
    if not (is_plain(c) and c.numel() == 1):
        return None
    dtype = torch.promote_types(torch.promote_types(u.dtype, levels.dtype), torch.float32)
    return float(torch.as_tensor(coefficient, dtype=torch.float64).to(dtype))


def _none(coefficient: Tensor) -> tuple[Tensor, ...]:
    del coefficient
    return ()


def _itself(coefficient: Tensor) -> tuple[Tensor, ...]:
    return (coefficient,)


# hard and clip


def _hard(u: Tensor, q: Tensor, bound: Tensor | None) -> Tensor:
    return nan_with(u, closest(u, q, bound))


def _clip(u: Tensor, q: Tensor, bound: Tensor | None) -> Tensor:
    del bound
    return _held(u, q)


def _held(u: Tensor, q: Tensor) -> Tensor:
    """u held to the range of the levels."""
    return between(u, q[..., :1], q[..., -1:])


HARD = Formula(_hard, _none)
CLIP = Formula(_clip, _none)


def hard_at(coefficient: float | None) -> Formula:
    """`hard`, which has no coefficient."""
    del coefficient
    return HARD


# parq: the line u + (u - c) (1 - s) / s of slope 1 / s through the midpoint c of u's cell, held to
# the cell's ends. It is c + (u - c) / s, written so that u = c gives u itself.


def _steep(s: Tensor) -> tuple[Tensor, ...]:
    # for a gradient at s = 0, and lest a subnormal s overflow to inf * 0
    safe = s.clamp(min=torch.finfo(s.dtype).tiny)
    return ((1 - safe) / safe,)


def _sloped(u: Tensor, q: Tensor, bound: Tensor | None, steep: Tensor) -> Tensor:
    """parq for 0 < s < 1: beyond the levels the outer lines are too, infinities among them."""
    del bound
    in_place = (is_plain(u) and is_plain(q)) or torch.compiler.is_compiling()
    if 2 <= q.shape[-1] <= _FEW and in_place:
        return _highest_line(u, q, steep)
    lo, hi = cell(u, q)
    return between(u + (u - midpoint(lo, hi)) * steep, lo, hi)


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


def _parq(u: Tensor, q: Tensor, bound: Tensor | None, s: Tensor, steep: Tensor) -> Tensor:
    del bound
    v = _held(u, q)  # or at s = 1 an infinite distance to a midpoint would be taken times 0
    lo, hi = cell(v, q)
    w = between(v + (v - midpoint(lo, hi)) * steep, lo, hi)
    return torch.where(s > 0, w, nan_with(v, nearer(v, lo, hi)))


_SLOPED = Formula(_sloped, _steep, cells_from=_FEW + 1)
_PARQ = Formula(_parq, _any_slope, cells_from=3)


def parq_at(s: float | None) -> Formula:
    """`parq` at inverse slope s."""
    if s is None:
        return _PARQ
    if s <= 0:
        return HARD
    return CLIP if s >= 1 else _SLOPED


# soft: sigma(z) - 1/2 = tanh(z / 2) / 2, odd and without cancellation.


def _curvature(t: Tensor) -> tuple[Tensor, ...]:
    usable = (t > 0) & t.isfinite()
    safe = torch.where(usable, t, 1.0).clamp(min=1e-9)  # below, tanh(z) = z to every digit
    return 0.5 * safe, tanh(0.25 * safe)


def _curved(u: Tensor, q: Tensor, bound: Tensor | None, scale: Tensor, full: Tensor) -> Tensor:
    """soft for 0 < T < inf."""
    del bound
    v = _held(u, q)
    lo, hi = cell(v, q)
    limits = torch.finfo(q.dtype)
    half = (0.5 * hi - 0.5 * lo).clamp(min=limits.tiny * limits.eps)  # of the width
    offset = (0.5 * v - 0.5 * lo) / half - 0.5
    share = 0.5 * (tanh(scale * offset) / full)
    # the ends and their midpoint are met exactly
    return between((0.5 - share) * lo + (0.5 + share) * hi, lo, hi)


def _any_curvature(t: Tensor) -> tuple[Tensor, ...]:
    return (t, *_curvature(t))


def _soft(
    u: Tensor, q: Tensor, bound: Tensor | None, t: Tensor, scale: Tensor, full: Tensor
) -> Tensor:
    w = torch.where(t > 0, _curved(u, q, bound, scale, full), _held(u, q))
    return torch.where(t < torch.inf, w, _hard(u, q, bound))


_CURVED = Formula(_curved, _curvature, cells_from=3)
_SOFT = Formula(_soft, _any_curvature, cells_from=3)


def soft_at(t: float | None) -> Formula:
    """`soft` at temperature t."""
    if t is None:
        return _SOFT
    if t <= 0:
        return CLIP
    return HARD if t == math.inf else _CURVED


# binary_relax: of u - theta g and q + (1 - theta) g, g = u - q the gap to the nearest level q, the
# one whose product is at most half of the gap. Rounding keeps order, so that it carries w past
# neither u nor q; and w is u where theta is 0, and q where the gap is.


def _shares(theta: Tensor) -> tuple[Tensor, ...]:
    return theta, 1 - theta


def _from_latent(u: Tensor, q: Tensor, bound: Tensor | None, theta: Tensor, keep: Tensor) -> Tensor:
    """binary_relax for theta < 1/2."""
    near = closest(u, q, bound)
    gap = u - near
    return _or_sum(u - theta * gap, gap, u, near, theta, keep)


def _from_level(u: Tensor, q: Tensor, bound: Tensor | None, theta: Tensor, keep: Tensor) -> Tensor:
    """binary_relax for 1/2 <= theta < 1."""
    near = closest(u, q, bound)
    gap = u - near
    return _or_sum(near + keep * gap, gap, u, near, theta, keep)


def _or_sum(w: Tensor, gap: Tensor, u: Tensor, near: Tensor, theta: Tensor, keep: Tensor) -> Tensor:
    """w, but where the gap overflows the sum of two terms, which does not."""
    if is_plain(gap) and bool(gap.sum().isfinite()):
        return w
    return torch.where(gap.abs() < torch.inf, w, keep * u + theta * near)


def _binary_relax(
    u: Tensor, q: Tensor, bound: Tensor | None, theta: Tensor, keep: Tensor
) -> Tensor:
    near = closest(u, q, bound)
    gap = u - near
    w = torch.where(theta < 0.5, u - theta * gap, near + keep * gap)
    w = _or_sum(w, gap, u, near, theta, keep)
    return torch.where(theta < 1, w, nan_with(u, near))


_FROM_LATENT = Formula(_from_latent, _shares)
_FROM_LEVEL = Formula(_from_level, _shares)
_BINARY_RELAX = Formula(_binary_relax, _shares)


def binary_relax_at(theta: float | None) -> Formula:
    """`binary_relax` at theta."""
    if theta is None:
        return _BINARY_RELAX
    if theta >= 1:
        return HARD
    return _FROM_LATENT if theta < 0.5 else _FROM_LEVEL


# proxquant


def _pulled(u: Tensor, q: Tensor, bound: Tensor | None, lam: Tensor) -> Tensor:
    near = closest(u, q, bound)
    gap = u - near
    return torch.where(gap.abs() <= lam, near, u - between(gap, -lam, lam))


_PULLED = Formula(_pulled, _itself)


def proxquant_at(strength: float | None) -> Formula:
    """`proxquant` at a strength."""
    return HARD if strength == math.inf else _PULLED
