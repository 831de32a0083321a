"""The laws of prox maps f(u; Q, c) -> w.

H is the nearest level, C the clip to [q_1, q_k]; a weight within 1e-9 of a midpoint is a tie,
and what a law says off ties is not asked of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.traits import Coefficient, ProxTraits
from parq_fn.testing.law import Claim, Collection, at_most, equal

LAWS = Collection("proxmap")
law = LAWS.law

ROUNDING = "float64 rounding, a few steps of 1e-16 of numbers up to 20, magnified by slopes to 1e3"
TIE = 1e-9

Map = Any  # f(u, levels, c)


def midpoints(q: Tensor) -> Tensor:
    """[r, k-1]: half a cell's lower plus half its upper end."""
    return 0.5 * q[..., :-1] + 0.5 * q[..., 1:]


def hard(u: Tensor, q: Tensor) -> Tensor:
    """The nearest level, by looking at all."""
    distance = (u.unsqueeze(-1) - q.unsqueeze(-2)).abs()
    return q.gather(-1, distance.argmin(-1))


def clip(u: Tensor, q: Tensor) -> Tensor:
    """u held to the range of the levels."""
    return torch.minimum(torch.maximum(u, q[..., :1]), q[..., -1:])


def off_ties(u: Tensor, q: Tensor, *others: Tensor) -> Tensor:
    """Where u is no tie."""
    if q.shape[-1] == 1:
        return torch.ones_like(u, dtype=torch.bool)
    distance = (u.unsqueeze(-1) - midpoints(q).unsqueeze(-2)).abs().amin(-1)
    return distance > TIE


def equal_where(mask: Tensor, left: Tensor, right: Tensor) -> Claim:
    """left == right where the mask holds."""
    return equal(torch.where(mask, left, right), right)


def of_row(c: Coefficient, i: int) -> Coefficient:
    """The coefficient of row i: of slopes their row, otherwise as it is."""
    return c[i : i + 1] if isinstance(c, Tensor) and c.dim() else c


# What every map keeps to


@law("The inputs are not changed, and the same inputs give the same bits.", "f(u) = f(u)")
def pure(f: Map, u: Tensor, levels: Tensor, c: Coefficient, dtype: torch.dtype) -> Iterator[Claim]:
    for kind in (u.dtype, dtype):
        x, q = u.to(kind, copy=True), levels.to(kind, copy=True)
        a = c.clone() if isinstance(c, Tensor) else c
        first = f(x, q, a).clone()
        yield equal(x, u.to(kind))
        yield equal(q, levels.to(kind))
        yield equal(a, c)
        yield equal(f(x, q, a), first)


@law("A finite latent gives a finite weight.", "|u| < inf  =>  |f(u)| < inf")
def finite(
    f: Map, u: Tensor, any_levels: Tensor, c: Coefficient, dtype: torch.dtype
) -> Iterator[Claim]:
    for kind in (u.dtype, dtype):
        w = f(u.to(kind), any_levels.to(kind), c)
        yield equal(w.isfinite(), torch.ones_like(w, dtype=torch.bool))


@law(
    "A larger latent weight never gives a smaller weight.",
    "u <= v  =>  f(u) <= f(v)",
    applies=lambda t: t.monotone,
    tolerance=1e-12,
    reason="float64 rounding of a value up to 20",
)
def monotone(f: Map, u: Tensor, v: Tensor, any_levels: Tensor, c: Coefficient) -> Claim:
    w = f(torch.cat([u, v], -1).sort(-1).values, any_levels, c)
    return at_most(w[..., :-1], w[..., 1:])


@law("dtype, shape and device of the weights are the latent's.", "like(f(u)) = like(u)")
def keeps_dtype_and_shape(
    f: Map, u: Tensor, levels: Tensor, c: Coefficient, dtype: torch.dtype
) -> Iterator[Claim]:
    narrow = u.to(dtype)
    for latent, q in ((narrow, levels.to(dtype)), (narrow[..., :0], levels), (narrow, levels)):
        w = f(latent, q, c)
        yield equal(
            (str(w.dtype), tuple(w.shape), str(w.device)),
            (str(dtype), tuple(latent.shape), str(u.device)),
        )


@law("NaN gives NaN, and leaves the other weights alone.", "f(NaN) = NaN")
def nan_gives_nan(
    f: Map, u: Tensor, levels: Tensor, c: Coefficient, dtype: torch.dtype
) -> Iterator[Claim]:
    for kind in (u.dtype, dtype):
        x, q = u.to(kind), levels.to(kind)
        w = f(x, q, c)
        for row, column in ((0, 0), (-1, -1)):
            spoilt, expected = x.clone(), w.clone()
            spoilt[row, column] = expected[row, column] = torch.nan
            yield equal(f(spoilt, q, c), expected, u=spoilt)


@law(
    "Every weight is mapped alike, wherever it stands: order, splitting and strides are nothing.",
    "f(P u) = P f(u),  f((u, v)) = (f(u), f(v))",
    applies=lambda t: t.elementwise,
    tolerance=1e-12,
    reason="vectorised and scalar code of exp and tanh differ in the last bits",
)
def elementwise(
    f: Map, u: Tensor, v: Tensor, any_levels: Tensor, c: Coefficient
) -> Iterator[Claim]:
    q, order = any_levels, v[0].argsort()
    w = f(u, q, c)
    yield equal(f(u[..., order], q, c), w[..., order])
    yield equal(f(torch.cat([u, v], -1), q, c), torch.cat([w, f(v, q, c)], -1))
    yield equal(f(u.t().contiguous().t(), q, c), w)


@law("Row i of a batch is the map of row i alone.", "f(u; Q)_i = f(u_i; Q_i)")
def rows_alone(f: Map, u: Tensor, any_levels: Tensor, c: Coefficient) -> Claim:
    q = any_levels
    alone = [f(u[i : i + 1], q[i : i + 1], of_row(c, i)) for i in range(u.shape[0])]
    return equal(f(u, q, c), torch.cat(alone))


@law(
    "torch.vmap is the loop.",
    "vmap(f)((u, v)) = (f(u), f(v))",
    tolerance=1e-12,
    reason="vectorised and scalar code of exp and tanh differ in the last bits",
)
def vmap_is_loop(f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient) -> Claim:
    batch, q = torch.stack([u, v]), torch.stack([levels, levels + 1])
    looped = torch.stack([f(x, y, c) for x, y in zip(batch, q, strict=True)])
    return equal(torch.vmap(lambda x, y: f(x, y, c))(batch, q), looped)


@law(
    "Half precision is mapped in float32 and rounded once.",
    "f(u) = round(f(float32(u)))",
    applies=lambda t: t.widens,
)
def widens(f: Map, u: Tensor, levels: Tensor, c: Coefficient) -> Iterator[Claim]:
    for dtype in (torch.bfloat16, torch.float16):
        x, q = u.to(dtype), levels.to(dtype)
        yield equal(f(x, q, c), f(x.float(), q.float(), c).to(dtype))


# Where weights lie


@law(
    "No weight leaves the range of its levels; infinities go to its ends.",
    "q_1 <= f(u) <= q_k",
    applies=lambda t: t.in_range,
)
def in_range(f: Map, u: Tensor, any_levels: Tensor, c: Coefficient) -> Iterator[Claim]:
    q = any_levels
    w = f(u, q, c)
    low, high = q[..., :1], q[..., -1:]
    yield at_most(low.expand_as(w), w)
    yield at_most(w, high.expand_as(w))
    infinities = torch.tensor([[-torch.inf, torch.inf]], dtype=q.dtype).expand(q.shape[0], 2)
    yield equal(f(infinities, q, c), torch.cat([low, high], -1), u=infinities)


@law(
    "Every weight is a level, bit for bit, in every dtype.",
    "f(u) in Q",
    applies=lambda t: t.onto_levels,
)
def onto_levels(f: Map, u: Tensor, any_levels: Tensor, c: Coefficient, dtype: torch.dtype) -> Claim:
    q = any_levels.to(dtype)
    w = f(u.to(dtype), q, c)
    closest = q.gather(-1, (w.unsqueeze(-1) - q.unsqueeze(-2)).abs().float().argmin(-1))
    return equal(w, closest)


@law("A level stays where it is.", "f(q_i) = q_i", applies=lambda t: t.fixes_levels)
def fixes_levels(f: Map, any_levels: Tensor, c: Coefficient, dtype: torch.dtype) -> Claim:
    q = any_levels.to(dtype)
    return equal(f(q, q, c), q)


@law(
    "The middle of a cell stays where it is.",
    "f(c_i) = c_i,  c_i = (q_i + q_{i+1}) / 2",
    applies=lambda t: t.fixes_midpoints,
    tolerance=1e-12,
    reason="the midpoint and its share of the cell are rounded",
)
def fixes_midpoints(f: Map, levels: Tensor, c: Coefficient) -> Claim:
    middle = midpoints(levels)
    return equal(f(middle, levels, c), middle)


@law(
    "Mapping a second time changes nothing.",
    "f(f(u)) = f(u)",
    applies=lambda t: t.idempotent,
)
def idempotent(f: Map, u: Tensor, any_levels: Tensor, c: Coefficient) -> Claim:
    w = f(u, any_levels, c)
    return equal(f(w, any_levels, c), w)


@law(
    "The map does not change which level is nearest (off ties).",
    "H(f(u)) = H(u)",
    applies=lambda t: t.keeps_side,
)
def keeps_side(f: Map, u: Tensor, levels: Tensor, c: Coefficient) -> Claim:
    mask = off_ties(u, levels)
    return equal_where(mask, hard(f(u, levels, c), levels), hard(u, levels))


@law(
    "Within the range, the weight lies between the latent and its nearest level (off ties).",
    "min(u, H(u)) <= f(u) <= max(u, H(u))  for q_1 <= u <= q_k",
    applies=lambda t: t.between,
    tolerance=1e-12,
    reason="float64 rounding of a value up to 20",
)
def between(f: Map, u: Tensor, levels: Tensor, c: Coefficient) -> Iterator[Claim]:
    x = clip(u, levels)
    near, mask = hard(x, levels), off_ties(x, levels)
    w = torch.where(mask, f(x, levels, c), x)
    yield at_most(torch.minimum(x, near), w)
    yield at_most(w, torch.maximum(x, near))


@law(
    "Within the range, the sharper of two coefficients puts the weight nearer to its level.",
    "|f_c(u) - H(u)| <= |f_d(u) - H(u)|  for c sharper than d, q_1 <= u <= q_k",
    applies=lambda t: t.between,
    needs=("sharp", "soft", "coefficients"),
    tolerance=1e-9,
    reason=ROUNDING,
)
def sharper_is_nearer(
    f: Map, u: Tensor, levels: Tensor, c: Coefficient, d: Coefficient, traits: ProxTraits
) -> Claim:
    assert traits.sharp is not None
    assert traits.soft is not None
    order = sorted((c, d), reverse=traits.sharp < traits.soft)
    x = clip(u, levels)
    near, mask = hard(x, levels), off_ties(x, levels)
    softer, sharper = ((f(x, levels, a) - near).abs() for a in order)
    return at_most(torch.where(mask, sharper, softer), softer)


@law(
    "The sharp limit is the nearest level (off ties).",
    "f(u; Q, sharpest) = H(u)",
    needs=("sharp",),
)
def sharp_limit(f: Map, u: Tensor, levels: Tensor, traits: ProxTraits) -> Claim:
    sharp = f(u, levels, traits.sharp)
    return equal_where(off_ties(u, levels), sharp, hard(u, levels))


@law(
    "The soft limit is the declared map: clipping to the range, or the identity.",
    "f(u; Q, softest) = C(u) or u",
    needs=("soft", "soft_map"),
    tolerance=1e-12,
    reason="float64 rounding of a value up to 20",
)
def soft_limit(f: Map, u: Tensor, levels: Tensor, traits: ProxTraits) -> Claim:
    assert traits.soft_map is not None
    return equal(f(u, levels, traits.soft), traits.soft_map(u, levels))


@law(
    "Of the latents of a cell, the declared share lands on a level.",
    "|{u in cell: f(u) in {q_i, q_{i+1}}}| / (q_{i+1} - q_i) = share(c)",
    needs=("share",),
    tolerance=4e-3,
    reason="counted on 1,000 points of the cell",
)
def share(f: Map, levels: Tensor, c: Coefficient, traits: ProxTraits) -> Iterator[Claim]:
    assert traits.share is not None
    grid = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for i in range(levels.shape[-1] - 1):
        lo, hi = levels[:, i : i + 1], levels[:, i + 1 : i + 2]
        w = f(lo + (hi - lo) * grid, levels, c)
        landed = ((w == lo) | (w == hi)).double().mean(-1)
        yield equal(landed, torch.full_like(landed, traits.share(c)))


# How weights move


@law(
    "The map is continuous.",
    "|f(u + d) - f(u - d)| -> 0 as d -> 0",
    applies=lambda t: t.continuous,
    tolerance=1e-5,
    reason="d = 1e-9, and slopes up to 1e3 move the weight by 2e-6",
)
def continuous(f: Map, u: Tensor, levels: Tensor, c: Coefficient) -> Iterator[Claim]:
    x = torch.cat([u, levels, midpoints(levels)], -1)
    yield equal(f(x - 1e-9, levels, c), f(x + 1e-9, levels, c))
    # where the map moves most between the points of a grid, halved until 1e-9 is left: a jump
    # stays as wide as it is
    grid = torch.linspace(0.0, 1.0, 18, dtype=u.dtype)
    low, high = levels[..., :1] - 1, levels[..., -1:] + 1
    at = low + (high - low) * grid
    for _ in range(8):
        most = f(at, levels, c).diff(dim=-1).abs().argmax(-1, keepdim=True)
        low, high = at.gather(-1, most), at.gather(-1, most + 1)
        at = low + (high - low) * grid
    yield equal(f(low, levels, c), f(high, levels, c), u=torch.cat([low, high], -1))


@law(
    "At a midpoint the map jumps by the declared width.",
    "f(c_i + 0) - f(c_i - 0) = jump(c, q_{i+1} - q_i)",
    needs=("jump",),
    tolerance=1e-6,
    reason="taken 1e-9 to either side",
)
def jump(f: Map, levels: Tensor, c: Coefficient, traits: ProxTraits) -> Claim:
    assert traits.jump is not None
    middle, jump = midpoints(levels), traits.jump
    measured = f(middle + 1e-9, levels, c) - f(middle - 1e-9, levels, c)
    declared = [[jump(c, width) for width in row] for row in levels.diff(dim=-1).tolist()]
    return equal(measured, torch.tensor(declared, dtype=torch.float64).reshape(middle.shape))


@law(
    "The map has the declared Lipschitz constant.",
    "|f(u) - f(v)| <= L(c) |u - v|",
    needs=("lipschitz",),
    tolerance=1e-9,
    reason=ROUNDING,
)
def lipschitz(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient, traits: ProxTraits
) -> Claim:
    assert traits.lipschitz is not None
    at = torch.cat([u, u, midpoints(levels)], -1)
    other = torch.cat([v, u + 1e-6, midpoints(levels) + 1e-6], -1)
    moved = (f(at, levels, c) - f(other, levels, c)).abs()
    return at_most(moved, traits.lipschitz(c) * (at - other).abs())


@law(
    "No smaller Lipschitz constant will do: it is the slope at the middle of every cell.",
    "f'(c_i) = L(c)",
    applies=lambda t: t.lipschitz_attained,
    needs=("lipschitz",),
    tolerance=1e-4,
    reason="a difference quotient over 2e-6 of the cell, relative to the slope",
)
def lipschitz_attained(f: Map, levels: Tensor, c: Coefficient, traits: ProxTraits) -> Claim:
    assert traits.lipschitz is not None
    middle, d = midpoints(levels), 1e-6 * levels.diff(dim=-1)
    above, below = middle + d, middle - d
    slope = (f(above, levels, c) - f(below, levels, c)) / (above - below)
    return equal(slope, torch.full_like(slope, traits.lipschitz(c)))


@law(
    "The map is firmly nonexpansive.",
    "(f(u) - f(v)) (u - v) >= (f(u) - f(v))^2",
    applies=lambda t: t.firmly_nonexpansive,
    tolerance=1e-9,
    reason=ROUNDING,
)
def firmly_nonexpansive(f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient) -> Claim:
    moved = f(u, levels, c) - f(v, levels, c)
    return at_most(moved.square(), moved * (u - v))


@law(
    "The map is cocoercive with the declared constant.",
    "(f(u) - f(v)) (u - v) >= g(c) (f(u) - f(v))^2",
    needs=("cocoercive",),
    tolerance=1e-9,
    reason=ROUNDING,
)
def cocoercive(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient, traits: ProxTraits
) -> Claim:
    assert traits.cocoercive is not None
    moved = f(u, levels, c) - f(v, levels, c)
    return at_most(traits.cocoercive(c) * moved.square(), moved * (u - v))
