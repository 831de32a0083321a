"""The laws of prox maps as proxes: of which function, and under which symmetries.

J is the objective J(w) = |w - u|^2 / 2 + r(w; Q, c): of single weights for an elementwise map, of
whole rows for another, whose penalty of a row is the sum of what r gives for it ([r, n], or one
number a row).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from parq_fn.foundation.traits import Coefficient, Penalty, ProxTraits
from parq_fn.testing.law import Claim, equal
from parq_fn.testing.laws.motion import steepest
from parq_fn.testing.laws.proxmaps import ROUNDING, Map, equal_where, law, midpoints, ties_apart

#: How far from the weight the objective is looked at, relative to 1 + |weight|.
NEAR = torch.tensor([0.1, 0.03, 0.01, 1e-3, 1e-4], dtype=torch.float64)


def candidates(w: Tensor, others: Tensor, levels: Tensor, traits: ProxTraits) -> Tensor:
    """Points to try against the weights w [r, n]: near them, and those others [r, m], levels,
    midpoints and a grid.

    Of an elementwise map [r, n, k]: numbers for every weight. Of another [r, k, n]: whole rows,
    where the others are such rows: zeros, the way to the others, w shrunk and grown, and one
    coordinate moved.
    """
    steps = torch.cat([-NEAR, NEAR])
    if traits.elementwise:
        share = torch.linspace(-0.25, 1.25, 31, dtype=torch.float64)
        low, high = levels[..., :1], levels[..., -1:]
        z = torch.cat([others, levels, midpoints(levels), low + share * (high - low)], -1)
        near = w.unsqueeze(-1) + steps * (1 + w.abs().unsqueeze(-1))
        return torch.cat([near, z.unsqueeze(-2).expand(-1, w.shape[-1], -1)], -1)
    row, n = w.unsqueeze(-2), w.shape[-1]
    moved = steps[:, None, None] * torch.eye(n, dtype=w.dtype)
    ways = (others.reshape(w.shape[0], -1, n) - row).unsqueeze(-2)
    ways = (torch.cat([NEAR, torch.ones(1)])[:, None] * ways).flatten(1, 2)
    scaled = torch.cat([steps, -torch.ones(1)])[:, None] * row
    return row + torch.cat([ways, scaled, moved.reshape(1, -1, n).expand(len(w), -1, -1)], -2)


def few(x: Tensor) -> Tensor:
    """At most 16 of a row's weights."""
    return x[..., :: -(-x.shape[-1] // 16)] if x.shape[-1] > 16 else x


def beaten_by_none(
    w: Tensor,
    target: Tensor,
    penalty: Penalty,
    z: Tensor,
    q: Tensor,
    c: Coefficient,
    growth: float,
    traits: ProxTraits,
) -> Claim:
    """J(w) + growth |z - w|^2 <= J(z), for all w [r, n] and all z that `candidates` gives."""
    alone, (r, n) = traits.elementwise, w.shape

    def objective(at: Tensor) -> Tensor:  # like candidates
        if alone:
            flat = penalty(at.flatten(1), q, c).reshape(at.shape)
            return (at - target.unsqueeze(-1)).square() / 2 + flat
        m = at.shape[1]
        slopes = isinstance(c, Tensor) and c.dim() > 0
        each = (q.repeat_interleave(m, 0), c.repeat_interleave(m, 0) if slopes else c)
        cost = penalty(at.flatten(0, 1), *each).reshape(r, m, -1).sum(-1)
        return (at - target.unsqueeze(-2)).square().sum(-1) / 2 + cost

    best = w.unsqueeze(-1 if alone else -2)
    far = (z - best).square()
    left = objective(best) + growth * (far if alone else far.sum(-1))
    right = objective(z)
    size = torch.maximum(left.abs(), right.abs()).clamp(min=1.0)
    gap = torch.where(left.isinf(), torch.inf, (left - right) / size)
    worst = torch.where(right.isinf(), -torch.inf, gap).argmax(-1, keepdim=True)
    better = z.gather(-1, worst) if alone else z.gather(1, worst.unsqueeze(-1).expand(-1, 1, n))
    sides = (side.gather(-1, worst).squeeze(-1) for side in (left, right))
    return Claim(next(sides), "<=", next(sides), {"z": better.reshape(r, n)})


@law(
    "The weight is the argmin of its objective, which grows quadratically around it.",
    "J(f(u)) + g(c) |z - f(u)|^2 <= J(z)  for all z",
    needs=("regularizer",),
    tolerance=1e-9,
    reason="float64 rounding of J, relative to its size",
)
def is_prox(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, any_c: Coefficient, traits: ProxTraits
) -> Iterator[Claim]:
    assert traits.regularizer is not None
    growth = traits.growth(any_c) if traits.growth else 0.0
    # where it moves most a threshold shows
    latents = [u, *steepest(f, u, v, levels, any_c, traits)]
    if traits.elementwise:
        latents = [torch.cat(latents, -1)]
    weights = [f(x, levels, any_c) for x in latents]
    others = torch.cat([u, v, *weights], -1)
    if traits.elementwise:
        others = torch.cat([few(others), latents[0][..., -2:], weights[0][..., -2:]], -1)
    for x, w in zip(latents, weights, strict=True):
        z = candidates(w, others, levels, traits)
        claim = beaten_by_none(w, x, traits.regularizer, z, levels, any_c, growth, traits)
        yield claim._replace(inputs={"u": x, "f(u)": w, **claim.inputs})


@law(
    "The map is the prox of a convex function, at a rescaled latent.",
    "f(u) = argmin_w |w - a|^2 / 2 + phi(w),  a = a(u, c)",
    needs=("convex_function",),
    tolerance=1e-9,
    reason="float64 rounding of the objective, relative to its size",
)
def is_convex_prox(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, any_c: Coefficient, traits: ProxTraits
) -> Claim:
    assert traits.convex_function is not None
    a, w = traits.convex_argument(u, any_c), f(u, levels, any_c)
    z = candidates(w, few(v) if traits.elementwise else v, levels, traits)
    return beaten_by_none(w, a, traits.convex_function, z, levels, any_c, 0.5, traits)


@law(
    "Moreau: what the prox leaves is the prox of the conjugate.",
    "a = prox_phi(a) + prox_phi*(a),  phi*(y) = sup_w y w - phi(w)",
    applies=lambda t: t.elementwise,
    needs=("convex_function",),
    tolerance=1e-9,
    reason="float64 rounding of the objective, relative to its size",
)
def moreau(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient, traits: ProxTraits
) -> Claim:
    assert traits.convex_function is not None
    # The sup is taken over points that hold f(a) and f(b). phi* at a - f(a) is reached in f(a), as
    # a - f(a) is a slope of phi there, and so at b - f(b): for a true prox both sides are exact.
    u, v = few(u), few(v)
    w, other = f(u, levels, c), f(v, levels, c)
    share = torch.linspace(-0.25, 1.25, 31, dtype=torch.float64)
    low, high = levels[..., :1], levels[..., -1:]
    points = torch.cat([w, other, levels, low + share * (high - low)], -1)
    phi = traits.convex_function(points, levels, c)

    def conjugate(y: Tensor, q: Tensor, _: Coefficient) -> Tensor:
        del q
        values: Tensor = y.unsqueeze(-1) * points.unsqueeze(-2) - phi.unsqueeze(-2)
        return values.amax(-1)

    a, b = traits.convex_argument(u, c), traits.convex_argument(v, c)
    left_over, others = a - w, b - other
    z = others.unsqueeze(-2).expand(-1, u.shape[-1], -1)
    return beaten_by_none(left_over, a, conjugate, z, levels, c, 0.5, traits)


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
    mask = ties_apart(u, levels, traits)
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
    return equal_where(ties_apart(u, levels, traits), reflected, -f(u, levels, c))


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
    yield equal_where(ties_apart(u, levels, traits), scaled, f(u, levels, c))


@law(
    "Shifting latent and levels shifts the weight (off ties).",
    "f(u + a; Q + a) = f(u; Q) + a",
    applies=lambda t: t.shifts,
    tolerance=1e-9,
    reason=ROUNDING,
)
def shift(
    f: Map, u: Tensor, levels: Tensor, c: Coefficient, shift: float, traits: ProxTraits
) -> Claim:
    shifted = f(u + shift, levels + shift, c)
    return equal_where(ties_apart(u, levels, traits), shifted, f(u, levels, c) + shift)
