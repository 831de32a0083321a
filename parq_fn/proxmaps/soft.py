"""`soft`: a sigmoid in each cell."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parq_fn.foundation.checks import Interval
from parq_fn.foundation.scalar import is_plain
from parq_fn.proxmaps.clip import CLIP, clip, clip_derivatives, held
from parq_fn.proxmaps.even import LEAST
from parq_fn.proxmaps.hard import HARD, hard_derivatives, rounded
from parq_fn.proxmaps.levels import Levels, between, cell
from parq_fn.proxmaps.proxmap import Formula, computed, follows_levels, prox_map
from parq_fn.proxmaps.tanh import tanh

# sigma(z) - 1/2 = tanh(z / 2) / 2, odd and without cancellation.


def _curvature(t: Tensor) -> tuple[Tensor, ...]:
    usable = (t > 0) & t.isfinite()
    safe = torch.where(usable, t, 1.0).clamp(min=1e-9)  # below, tanh(z) = z to every digit
    return 0.5 * safe, tanh(0.25 * safe)


def _curved(u: Tensor, q: Levels, bound: Tensor | None, scale: Tensor, full: Tensor) -> Tensor:
    """soft for 0 < T < inf."""
    del bound
    v = held(u, q)
    lo, hi = cell(v, q)
    v = _offset(v, lo, hi, scale)
    share = 0.5 * (tanh(v) / full)
    del v  # for what a map holds is counted
    # the ends and their midpoint are met exactly
    return between((0.5 - share) * lo + (0.5 + share) * hi, lo, hi)


def _offset(v: Tensor, lo: Tensor, hi: Tensor, scale: Tensor) -> Tensor:
    """scale times the place in the cell, from -1/2 to 1/2."""
    limits = torch.finfo(v.dtype)
    half = (0.5 * hi - 0.5 * lo).clamp(min=limits.tiny * limits.eps)  # of the width
    if all(map(is_plain, (v, lo, scale))):
        return (0.5 * v).sub_(0.5 * lo).div_(half).sub_(0.5).mul_(scale)
    return scale * ((0.5 * v - 0.5 * lo) / half - 0.5)


def _any_curvature(t: Tensor) -> tuple[Tensor, ...]:
    return (t, *_curvature(t))


def _soft(
    u: Tensor, q: Levels, bound: Tensor | None, t: Tensor, scale: Tensor, full: Tensor
) -> Tensor:
    w = torch.where(t > 0, _curved(u, q, bound, scale, full), held(u, q))
    return torch.where(t < torch.inf, w, rounded(u, q, bound))


_CURVED = Formula(_curved, _curvature, cells_from=3, even_from=LEAST)
_SOFT = Formula(_soft, _any_curvature, cells_from=3, even_from=LEAST)


def soft_at(t: float | None) -> Formula:
    """`soft` at temperature t."""
    if t is None:
        return _SOFT
    if t <= 0:
        return CLIP
    return HARD if t == math.inf else _CURVED


def soft_derivatives(u: Tensor, lo: Tensor, hi: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """1 of the end that a weight beyond it is held to. Inside, with x = (u - lo) / (hi - lo) and
    phi(x) = tanh(T (x - 1/2) / 2) / tanh(T / 4), w = (lo + hi) / 2 + (hi - lo) / 2 phi(x) and

        dw/dlo = (1 - phi + phi' (x - 1)) / 2        dw/dhi = (1 + phi - phi' x) / 2.
    """
    scale, full = _curvature(t)
    width = hi - lo
    x = (u.clamp(lo, hi) - lo) / torch.where(width > 0, width, 1.0)
    bent = tanh(scale * (x - 0.5))
    phi, slope = bent / full, scale * (1 - bent.square()) / full
    inner = ((u >= lo) & (u <= hi) & (width > 0)).to(u.dtype)
    lower, upper = clip_derivatives(u, lo, hi, t)
    curved = (
        lower + inner * 0.5 * (1 - phi + slope * (x - 1)),
        upper + inner * 0.5 * (1 + phi - slope * x),
    )
    sharp = hard_derivatives(u, lo, hi, t)

    def either(ends: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        flat, bent, hard = ends
        return torch.where(t > 0, torch.where(t < torch.inf, bent, hard), flat)

    first, second = map(either, zip((lower, upper), curved, sharp, strict=True))
    return first, second


@prox_map(
    follows_levels(
        coefficients=Interval(0.0, math.inf, open_high=True),
        in_range=True,
        fixes_midpoints=True,
        continuous=True,
        lipschitz=lambda t: t / 4 / math.tanh(t / 4) if t > 0 else 1.0,
        lipschitz_attained=True,
        sharp=math.inf,
        soft=0.0,
        soft_map=clip,
    ),
    soft_at,
    soft_derivatives,
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
    return computed(soft_at, u, levels, temperature)
