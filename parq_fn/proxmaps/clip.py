"""`clip`: the weight held to the range of its levels."""

from __future__ import annotations

import torch
from torch import Tensor

from parq_fn.proxmaps.even import LEAST
from parq_fn.proxmaps.levels import Levels, between, highest, lowest, prepare
from parq_fn.proxmaps.proxmap import Formula, follows_levels, no_scalars, prox_map


def held(u: Tensor, q: Levels) -> Tensor:
    """u held to the range of the levels."""
    return between(u, lowest(q), highest(q))


def _clip(u: Tensor, q: Levels, bound: Tensor | None) -> Tensor:
    del bound
    return held(u, q)


CLIP = Formula(_clip, no_scalars, even_from=LEAST)


def clip_at(coefficient: float | None) -> Formula:
    """`clip`, which has no coefficient."""
    del coefficient
    return CLIP


def clip_derivatives(u: Tensor, lo: Tensor, hi: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """1 of the end that a weight beyond it is held to, else 0."""
    del c
    return (u < lo).to(u.dtype), ((u > hi) | (lo == hi) & (u == hi)).to(u.dtype)


@prox_map(
    follows_levels(
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
    ),
    clip_at,
    clip_derivatives,
)
def clip(u: Tensor, levels: Tensor, coefficient: float | Tensor | None = None) -> Tensor:
    """argmin_w (w - u)^2 / 2 over q_1 <= w <= q_k: the weight held to the levels' range.

    >>> clip(torch.tensor([[-3.0, 0.2]]), torch.tensor([[-1.0, 1.0]]))
    tensor([[-1.0000,  0.2000]])
    """
    del coefficient
    return CLIP(u, levels, 1.0)


def clip_regularizer(w: Tensor, levels: Tensor) -> Tensor:
    """0 for q_1 <= w <= q_k, else infinity."""
    x, q = prepare(w, levels)
    outside = (x < q[..., :1]) | (x > q[..., -1:])
    return torch.where(outside, torch.inf, torch.zeros_like(x)).to(w.dtype)
