"""`proxquant`: a step of bounded length toward the nearest level."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from parq_fn.foundation.checks import Interval
from parq_fn.foundation.traits import unchanged
from parq_fn.proxmaps.hard import HARD, hard_derivatives
from parq_fn.proxmaps.levels import Levels, between, closest, nearer, prepare
from parq_fn.proxmaps.proxmap import Formula, computed, follows_levels, itself, prox_map


def _pulled(u: Tensor, q: Levels, bound: Tensor | None, lam: Tensor) -> Tensor:
    near = closest(u, q, bound)
    gap = u - near
    return torch.where(gap.abs() <= lam, near, u - between(gap, -lam, lam))


_PULLED = Formula(_pulled, itself, even_from=2)


def proxquant_at(strength: float | None) -> Formula:
    """`proxquant` at a strength."""
    return HARD if strength == math.inf else _PULLED


def proxquant_derivatives(u: Tensor, lo: Tensor, hi: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """1 of the nearer end where the weight is on it, else 0."""
    there = ((u - nearer(u, lo, hi)).abs() <= lam).to(u.dtype)
    lower, upper = hard_derivatives(u, lo, hi, lam)
    return there * lower, there * upper


@prox_map(
    follows_levels(
        coefficients=Interval(0.0, math.inf, open_high=True),
        jump=lambda lam, width: min(2 * lam, width),
        regularizer=lambda w, q, lam: proxquant_regularizer(w, q, lam),
        semigroup=lambda a, b: a + b,
        sharp=math.inf,
        soft=0.0,
        soft_map=unchanged,
        scales=lambda lam, a: lam * a,
    ),
    proxquant_at,
    proxquant_derivatives,
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
    return computed(proxquant_at, u, levels, strength)


def proxquant_regularizer(w: Tensor, levels: Tensor, strength: float | Tensor) -> Tensor:
    """lam * dist(w, Q)."""
    x, q, lam = prepare(w, levels, strength)
    return (lam * (x - closest(x, q)).abs()).to(w.dtype)
