"""Estimators: what becomes of a gradient at the weights on its way to the latents.

    estimator(grads [r, n], u [r, n], w [r, n], levels [r, k], step []) -> grads [r, n]

u is what the map saw (the latent over the divisor), w the weights that it made, levels those of
their rows in ascending order, step the count of the update being made. Estimators act element by
element, compute in float32 or better and give the dtype of grads. A prox link has one as
`gradient=`; where its map does not make the weights, none is asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parq_fn.foundation.checks import NOT_NEGATIVE, check_numbers
from parq_fn.foundation.scalar import Scalar, as_scalar, at, to_device
from parq_fn.foundation.value import Value, value
from parq_fn.proxmaps.levels import cell, closest, prepare


@value
class Estimator(Value):
    """Base of the estimators; any function of the same arguments serves as one too.

    >>> class doubled(Estimator):
    ...     uses_weights = False
    ...     def __call__(self, grads, u, w, levels, step):
    ...         return 2 * grads
    >>> from parq_fn import hard_prox, lsbq
    >>> hard_prox(lsbq(1), gradient=doubled())
    hard_prox(lsbq(1), gradient=doubled())
    """

    #: Whether w is looked at. Where it is not, u may be given for it, and no map is computed.
    uses_weights = True

    def __call__(self, grads: Tensor, u: Tensor, w: Tensor, levels: Tensor, step: Tensor) -> Tensor:
        """The gradients at the latents."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__")


@value
class straight_through(Estimator):
    """g: the gradient at the weights is taken for that at the latents.

    >>> straight_through()
    straight_through()

    Source: Bengio, Leonard, Courville, arXiv 1308.3432.
    """

    uses_weights = False

    def __call__(self, grads: Tensor, u: Tensor, w: Tensor, levels: Tensor, step: Tensor) -> Tensor:
        del u, w, levels, step
        return grads


@value
class inside(Estimator):
    """g where q_1 <= u <= q_k, else 0: the saturated straight-through estimator.

    >>> q, u = torch.tensor([[-1.0, 1.0]]), torch.tensor([[-2.0, 0.5, 1.0]])
    >>> inside()(torch.ones(1, 3), u, u, q, torch.tensor(0))
    tensor([[0., 1., 1.]])

    Source: the latent's gradient of Esser et al., LSQ, arXiv 1902.08153.
    """

    uses_weights = False

    def __call__(self, grads: Tensor, u: Tensor, w: Tensor, levels: Tensor, step: Tensor) -> Tensor:
        del w, step
        return torch.where(_within(*prepare(u, levels)), grads, 0.0)


@value
class trust(Estimator):
    """g where |w - u| <= factor * (hi - lo) / 2, else 0; lo and hi the ends of the cell of u,
    beyond the levels those of the outer cell. Of one level the width is 0.

    Raises ValueError for a factor below 0.

    >>> q, u = torch.tensor([[-1.0, 1.0]]), torch.tensor([[-3.0, 0.5, 1.5]])
    >>> w = torch.tensor([[-1.0, 1.0, 1.0]])
    >>> trust()(torch.ones(1, 3), u, w, q, torch.tensor(0))
    tensor([[0., 1., 1.]])

    Source: the trust mask of Panferov et al., QuEST, arXiv 2502.05003.
    """

    #: Of half the width of the weight's cell.
    factor: float | Tensor = 1.0

    def __post_init__(self) -> None:
        check_numbers("trust", NOT_NEGATIVE, factor=self.factor)

    def __call__(self, grads: Tensor, u: Tensor, w: Tensor, levels: Tensor, step: Tensor) -> Tensor:
        del step
        x, q = prepare(u, levels)
        lo, hi = cell(x, q)
        bound = _like(as_scalar(self.factor), x) * (0.5 * hi - 0.5 * lo)
        return torch.where((w - x).abs() <= bound, grads, 0.0)


@value
class by_level(Estimator):
    """g * |q|, q the level nearest to u, the lower one in a tie; g where q is 0.

    >>> q, u = torch.tensor([[-2.0, 0.0, 0.5]]), torch.tensor([[-3.0, 0.1, 1.0]])
    >>> by_level()(torch.ones(1, 3), u, u, q, torch.tensor(0))
    tensor([[2.0000, 1.0000, 0.5000]])

    Source: the latent's gradient of Zhu et al., TTQ, arXiv 1612.01064, which assigns weights to
    levels by a threshold, where this library takes the nearest.
    """

    uses_weights = False

    def __call__(self, grads: Tensor, u: Tensor, w: Tensor, levels: Tensor, step: Tensor) -> Tensor:
        del w, step
        size = closest(*prepare(u, levels)).abs()
        return (grads * torch.where(size == 0, 1.0, size)).to(grads.dtype)


@value
class damped(Estimator):
    """g + strength * (u - w) where q_1 <= u <= q_k, else g: latents are drawn to their weights.

    strength: a number, a 0-d tensor or a schedule of the step.

    Raises ValueError for a strength below 0, TypeError for what is none of these.

    >>> q, u = torch.tensor([[-1.0, 1.0]]), torch.tensor([[-3.0, 0.5]])
    >>> w = torch.tensor([[-1.0, 1.0]])
    >>> damped(0.5)(torch.ones(1, 2), u, w, q, torch.tensor(0))
    tensor([[1.0000, 0.7500]])

    Source: dampening, Nagel et al., arXiv 2203.11086; CAGE, arXiv 2510.18784, coupled.
    """

    strength: Scalar

    def __post_init__(self) -> None:
        check_numbers("damped", NOT_NEGATIVE, schedules=True, strength=self.strength)

    def __call__(self, grads: Tensor, u: Tensor, w: Tensor, levels: Tensor, step: Tensor) -> Tensor:
        x, q = prepare(u, levels)
        drawn = grads + _like(at(self.strength, step), x) * (x - w)
        return torch.where(_within(x, q), drawn.to(grads.dtype), grads)


def _within(x: Tensor, levels: Tensor) -> Tensor:
    """Whether weights lie between the outer levels: [r, n]; not where they are NaN."""
    return (x >= levels[..., :1]) & (x <= levels[..., -1:])


def _like(scalar: Tensor, x: Tensor) -> Tensor:
    return to_device(scalar, x).to(x.dtype)


__all__ = ["Estimator", "by_level", "damped", "inside", "straight_through", "trust"]
