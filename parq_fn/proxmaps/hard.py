"""`hard`: the nearest level."""

from __future__ import annotations

import torch
from torch import Tensor

from parq_fn.proxmaps.levels import Levels, cell, closest, prepare, reaches_upper
from parq_fn.proxmaps.proxmap import Formula, follows_levels, no_scalars, prox_map


def rounded(u: Tensor, q: Levels, bound: Tensor | None) -> Tensor:
    """The level nearest to u."""
    return closest(u, q, bound, keep_nan=True)


HARD = Formula(rounded, no_scalars, even_from=2)


def hard_at(coefficient: float | None) -> Formula:
    """`hard`, which has no coefficient."""
    del coefficient
    return HARD


def hard_derivatives(u: Tensor, lo: Tensor, hi: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """1 of the end that the weight is on, else 0."""
    del c
    upper = reaches_upper(u, lo, hi).to(u.dtype)
    return 1 - upper, upper


@prox_map(
    follows_levels(
        in_range=True,
        onto_levels=True,
        jump=lambda _, width: width,
        regularizer=lambda w, q, _: hard_regularizer(w, q),
        idempotent=True,
    ),
    hard_at,
    hard_derivatives,
)
def hard(u: Tensor, levels: Tensor, coefficient: float | Tensor | None = None) -> Tensor:
    """argmin_w |w - u| over w in Q: the nearest level, the lower one in a tie.

    >>> hard(torch.tensor([[-3.0, 0.0, 0.2]]), torch.tensor([[-1.0, 1.0]]))
    tensor([[-1., -1.,  1.]])

    Source: the straight-through estimator's rounding; PARQ, arXiv 2503.15748, section 4.
    """
    del coefficient
    return HARD(u, levels, 0.0)


def hard_regularizer(w: Tensor, levels: Tensor) -> Tensor:
    """0 for w in Q, else infinity."""
    x, q = prepare(w, levels)
    lo, hi = cell(x, q)
    return torch.where((x == lo) | (x == hi), torch.zeros_like(x), torch.inf).to(w.dtype)
