"""`binary_relax`: a weighted mean of the latent and its nearest level."""

from __future__ import annotations

import torch
from torch import Tensor

from parq_fn.foundation.checks import Interval
from parq_fn.foundation.scalar import is_plain
from parq_fn.foundation.traits import unchanged
from parq_fn.proxmaps.hard import HARD, hard_derivatives
from parq_fn.proxmaps.levels import Levels, closest, nan_with, prepare
from parq_fn.proxmaps.proxmap import Formula, computed, follows_levels, prox_map

# w = u - theta g = q + (1 - theta) g, g = u - q the gap to the nearest level q. Of the two equal
# expressions the one with the smaller correction is used: rounding then cannot overshoot u or q,
# and w is u where theta is 0, and q where the gap is.


def _shares(theta: Tensor) -> tuple[Tensor, ...]:
    return theta, 1 - theta


def _from_latent(u: Tensor, q: Levels, bound: Tensor | None, theta: Tensor, keep: Tensor) -> Tensor:
    """binary_relax for theta < 1/2."""
    near = closest(u, q, bound)
    gap = u - near
    return _or_sum(u - theta * gap, gap, u, near, theta, keep)


def _from_level(u: Tensor, q: Levels, bound: Tensor | None, theta: Tensor, keep: Tensor) -> Tensor:
    """binary_relax for 1/2 <= theta < 1."""
    near = closest(u, q, bound)
    gap = near - u
    return _or_sum(near - keep * gap, gap, u, near, theta, keep)  # -0.0 - 0.0 is -0.0


def _or_sum(w: Tensor, gap: Tensor, u: Tensor, near: Tensor, theta: Tensor, keep: Tensor) -> Tensor:
    """w, but where the gap overflows the sum of two terms, which does not."""
    if is_plain(gap) and bool(gap.sum().isfinite()):
        return w
    return torch.where(gap.abs() < torch.inf, w, keep * u + theta * near)


def _binary_relax(
    u: Tensor, q: Levels, bound: Tensor | None, theta: Tensor, keep: Tensor
) -> Tensor:
    near = closest(u, q, bound)
    gap = u - near
    w = torch.where(theta < 0.5, u - theta * gap, near + keep * gap)
    w = _or_sum(w, gap, u, near, theta, keep)
    return torch.where(theta < 1, w, nan_with(u, near))


_FROM_LATENT = Formula(_from_latent, _shares, even_from=2)
_FROM_LEVEL = Formula(_from_level, _shares, even_from=2)
_BINARY_RELAX = Formula(_binary_relax, _shares, even_from=2)


def binary_relax_at(theta: float | None) -> Formula:
    """`binary_relax` at theta."""
    if theta is None:
        return _BINARY_RELAX
    if theta >= 1:
        return HARD
    return _FROM_LATENT if theta < 0.5 else _FROM_LEVEL


def binary_relax_derivatives(
    u: Tensor, lo: Tensor, hi: Tensor, theta: Tensor
) -> tuple[Tensor, Tensor]:
    """theta of the nearer end, else 0."""
    lower, upper = hard_derivatives(u, lo, hi, theta)
    return theta * lower, theta * upper


@prox_map(
    follows_levels(
        coefficients=Interval(0.0, 1.0),
        jump=lambda theta, width: theta * width,
        regularizer=lambda w, q, theta: binary_relax_regularizer(w, q, theta),
        semigroup=lambda a, b: 1 - (1 - a) * (1 - b),
        sharp=1.0,
        soft=0.0,
        soft_map=unchanged,
    ),
    binary_relax_at,
    binary_relax_derivatives,
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
    return computed(binary_relax_at, u, levels, theta)


def binary_relax_regularizer(w: Tensor, levels: Tensor, theta: float | Tensor) -> Tensor:
    """lam / 2 * dist(w, Q)^2 with lam = theta / (1 - theta); at theta = 1 the indicator of Q."""
    x, q, theta = prepare(w, levels, theta)
    distance = x - closest(x, q)
    relaxed = theta / (2 * torch.where(theta < 1, 1 - theta, 1.0)) * distance.square()
    off = torch.where(distance == 0, torch.zeros_like(x), torch.inf)
    return torch.where(theta < 1, relaxed, off).to(w.dtype)
