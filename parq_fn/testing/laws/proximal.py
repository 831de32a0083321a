"""The laws of prox maps as proxes: of which function, and under which symmetries.

J is the objective J(w) = (w - u)^2 / 2 + r(w; Q, c).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from parq_fn.foundation.traits import Coefficient, Penalty, ProxTraits
from parq_fn.testing.law import Claim, at_most, equal
from parq_fn.testing.laws.proxmaps import ROUNDING, Map, equal_where, law, midpoints, off_ties


def candidates(v: Tensor, levels: Tensor) -> Tensor:
    """[r, m]: points to try, levels, midpoints and a grid around them among them."""
    share = torch.linspace(-0.25, 1.25, 31, dtype=torch.float64)
    low, high = levels[..., :1], levels[..., -1:]
    return torch.cat([v, levels, midpoints(levels), low + share * (high - low)], -1)


def beaten_by_none(
    w: Tensor, target: Tensor, penalty: Penalty, z: Tensor, q: Tensor, c: Coefficient, growth: float
) -> Claim:
    """J(w) + growth (z - w)^2 <= J(z), for all w [r, n] and all z [r, m]."""

    def objective(at: Tensor) -> Tensor:
        flat = penalty(at.flatten(1), q, c).reshape(at.shape)
        return (at - target.unsqueeze(-1)).square() / 2 + flat

    best, tried = w.unsqueeze(-1), z.unsqueeze(-2).expand(-1, w.shape[-1], -1)
    return at_most(objective(best) + growth * (tried - best).square(), objective(tried))


@law(
    "The weight is the argmin of its objective, which grows quadratically around it.",
    "J(f(u)) + g(c) (z - f(u))^2 <= J(z)  for all z",
    needs=("regularizer",),
    tolerance=1e-9,
    reason="float64 rounding of J, relative to its size",
)
def is_prox(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient, traits: ProxTraits
) -> Claim:
    assert traits.regularizer is not None
    growth = traits.growth(c) if traits.growth else 0.0
    w, z = f(u, levels, c), candidates(torch.cat([u, v], -1), levels)
    return beaten_by_none(w, u, traits.regularizer, z, levels, c, growth)


@law(
    "The map is the prox of a convex function, at a rescaled latent.",
    "f(u) = argmin_w (w - a)^2 / 2 + phi(w),  a = a(u, c)",
    needs=("convex_function",),
    tolerance=1e-9,
    reason="float64 rounding of the objective, relative to its size",
)
def is_convex_prox(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient, traits: ProxTraits
) -> Claim:
    assert traits.convex_function is not None
    a, z = traits.convex_argument(u, c), candidates(v, levels)
    return beaten_by_none(f(u, levels, c), a, traits.convex_function, z, levels, c, 0.5)


@law(
    "Moreau: what the prox leaves is the prox of the conjugate.",
    "a = prox_phi(a) + prox_phi*(a),  phi*(y) = max_j (q_j y - phi(q_j))",
    needs=("convex_function",),
    tolerance=1e-9,
    reason="float64 rounding of the objective, relative to its size",
)
def moreau(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient, traits: ProxTraits
) -> Claim:
    assert traits.convex_function is not None
    phi = traits.convex_function(levels, levels, c)

    def conjugate(y: Tensor, q: Tensor, _: Coefficient) -> Tensor:
        values: Tensor = y.unsqueeze(-1) * q.unsqueeze(-2) - phi.unsqueeze(-2)
        return values.amax(-1)

    a, b = traits.convex_argument(u, c), traits.convex_argument(v, c)
    left_over, others = a - f(u, levels, c), b - f(v, levels, c)
    return beaten_by_none(left_over, a, conjugate, others, levels, c, 0.5)


@law(
    "Maps compose to a map of the same family.",
    "f_c(f_d(u)) = f_{c*d}(u),  c*d the declared composition",
    needs=("semigroup", "coefficients"),
    tolerance=1e-8,
    reason="float64 rounding, magnified by slopes to 1e6",
)
def semigroup(
    f: Map, u: Tensor, levels: Tensor, c: Coefficient, d: Coefficient, traits: ProxTraits
) -> Claim:
    assert traits.semigroup is not None
    twice = f(f(u, levels, d), levels, c)
    mask = off_ties(u, levels)
    return equal_where(mask, twice, f(u, levels, traits.semigroup(c, d)))


@law(
    "Reflecting latent and levels reflects the weight (off ties): odd where Q = -Q.",
    "f(-u; -Q) = -f(u; Q)",
    needs=("odd",),
    tolerance=1e-9,
    reason=ROUNDING,
)
def odd(f: Map, u: Tensor, levels: Tensor, c: Coefficient, traits: ProxTraits) -> Claim:
    assert traits.odd is not None
    reflected = f(-u, -levels.flip(-1), traits.odd(c))
    return equal_where(off_ties(u, levels), reflected, -f(u, levels, c))


@law(
    "Scaling latent and levels scales the weight: by a power of two bit for bit.",
    "f(a u; a Q) = a f(u; Q)",
    needs=("scales",),
)
def scale_exact(
    f: Map, u: Tensor, levels: Tensor, c: Coefficient, power: float, traits: ProxTraits
) -> Claim:
    assert traits.scales is not None
    scaled = f(power * u, power * levels, traits.scales(c, power))
    return equal(scaled, power * f(u, levels, c))


@law(
    "Scaling latent and levels scales the weight (off ties).",
    "f(a u; a Q) = a f(u; Q)",
    needs=("scales",),
    tolerance=1e-9,
    reason=ROUNDING,
)
def scale(
    f: Map, u: Tensor, levels: Tensor, c: Coefficient, factor: float, traits: ProxTraits
) -> Iterator[Claim]:
    assert traits.scales is not None
    scaled = f(factor * u, factor * levels, traits.scales(c, factor)) / factor
    yield equal_where(off_ties(u, levels), scaled, f(u, levels, c))


@law(
    "Shifting latent and levels shifts the weight (off ties).",
    "f(u + a; Q + a) = f(u; Q) + a",
    applies=lambda t: t.shifts,
    tolerance=1e-9,
    reason=ROUNDING,
)
def shift(f: Map, u: Tensor, levels: Tensor, c: Coefficient, shift: float) -> Claim:
    shifted = f(u + shift, levels + shift, c)
    return equal_where(off_ties(u, levels), shifted, f(u, levels, c) + shift)
