"""Estimators by autograd: weights whose values are those of a map, and whose derivative in the
latents is what each of the estimators says. Levels are searched by comparison with all of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parq_fn import estimators


def seen_through(
    estimator: Any, u: Tensor, w: Tensor, levels: Tensor, step: int
) -> tuple[Tensor, Tensor]:
    """(weights with a graph to u, what is added to the loss) of rows [r, n] and levels [r, k]."""
    k = levels.shape[-1]
    low, high = levels[:, :1], levels[:, -1:]
    within = ((u >= low) & (u <= high)).detach()
    below = (u.detach()[..., None] > levels[:, None, 1 : k - 1]).sum(-1)
    lo, hi = levels.gather(1, below), levels.gather(1, (below + 1).clamp(max=k - 1))
    nearest = (u.detach()[..., None] - levels[:, None]).abs().argmin(-1)
    size = levels.gather(1, nearest).abs()

    def valued(path: Tensor) -> Tensor:
        return path + (w - path).detach()

    none = u.new_zeros(())
    if isinstance(estimator, estimators.inside):
        return valued(u * within), none
    if isinstance(estimator, estimators.trust):
        trusted = (w - u.detach()).abs() <= estimator.factor * (hi - lo) / 2
        return valued(u * trusted), none
    if isinstance(estimator, estimators.by_level):
        return valued(u * torch.where(size == 0, 1.0, size)), none
    if isinstance(estimator, estimators.damped):
        strength: Any = estimator.strength
        strength = strength(torch.tensor(step)) if callable(strength) else strength
        return valued(u), strength / 2 * (within * (u - w.detach()).square()).sum()
    return valued(u), none
