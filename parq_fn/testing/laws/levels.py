"""The laws of where weights lie: among their levels, between them and the latents."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from parq_fn.foundation.traits import Coefficient, ProxTraits
from parq_fn.testing.law import Claim, at_most, equal
from parq_fn.testing.laws.proxmaps import (
    ROUNDING,
    Map,
    clip,
    equal_where,
    hard,
    in_dtype,
    law,
    midpoints,
    ties_apart,
)


@law(
    "No weight leaves the range of its levels; infinities go to its ends, of single weights.",
    "q_1 <= f(u) <= q_k",
    applies=lambda t: t.in_range,
)
def in_range(
    f: Map, u: Tensor, any_levels: Tensor, any_c: Coefficient, traits: ProxTraits
) -> Iterator[Claim]:
    q = any_levels
    w = f(u, q, any_c)
    low, high = q[..., :1], q[..., -1:]
    yield at_most(low.expand_as(w), w)
    yield at_most(w, high.expand_as(w))
    if not traits.elementwise:
        return
    infinities = torch.tensor([[-torch.inf, torch.inf]], dtype=q.dtype).expand(q.shape[0], 2)
    yield equal(f(infinities, q, any_c), torch.cat([low, high], -1), u=infinities)


@law(
    "Every weight is a level, bit for bit, in every dtype.",
    "f(u) in Q",
    applies=lambda t: t.onto_levels,
)
def onto_levels(
    f: Map, u: Tensor, any_levels: Tensor, any_c: Coefficient, dtype: torch.dtype
) -> Claim:
    x, q = in_dtype(u, dtype), any_levels.to(dtype)
    w = f(x, q, any_c)
    closest = q.gather(-1, (w.unsqueeze(-1) - q.unsqueeze(-2)).abs().float().argmin(-1))
    return equal(w, closest, u=x, any_levels=q)


@law("A level stays where it is.", "f(q_i) = q_i", applies=lambda t: t.fixes_levels)
def fixes_levels(f: Map, any_levels: Tensor, any_c: Coefficient, dtype: torch.dtype) -> Claim:
    q = any_levels.to(dtype)
    return equal(f(q, q, any_c), q)


@law(
    "The middle of a cell stays where it is.",
    "f(c_i) = c_i,  c_i = (q_i + q_{i+1}) / 2",
    applies=lambda t: t.fixes_midpoints and t.elementwise,
    tolerance=1e-12,
    reason="the midpoint and its share of the cell are rounded",
)
def fixes_midpoints(f: Map, levels: Tensor, c: Coefficient) -> Claim:
    middle = midpoints(levels)
    return equal(f(middle, levels, c), middle)


@law(
    "Mapping a second time changes nothing: single weights bit for bit, rows but for rounding.",
    "f(f(u)) = f(u)",
    applies=lambda t: t.idempotent,
    tolerance=1e-12,
    reason="a sum over a row is rounded, relative to its largest number",
)
def idempotent(
    f: Map, u: Tensor, any_levels: Tensor, any_c: Coefficient, traits: ProxTraits
) -> Iterator[Claim]:
    w = f(u, any_levels, any_c)
    twice = f(w, any_levels, any_c)
    if traits.elementwise:
        yield equal(twice == w, torch.ones_like(w, dtype=torch.bool))
    size = w.abs().amax(-1, keepdim=True).clamp(min=1)
    yield equal(twice / size, w / size)


@law(
    "The map does not change which level is nearest (off ties).",
    "H(f(u)) = H(u)",
    applies=lambda t: t.keeps_side,
)
def keeps_side(f: Map, u: Tensor, levels: Tensor, any_c: Coefficient, traits: ProxTraits) -> Claim:
    mask = ties_apart(u, levels, traits)
    return equal_where(mask, hard(f(u, levels, any_c), levels), hard(u, levels))


@law(
    "Within the range, the weight lies between the latent and its nearest level (off ties).",
    "min(u, H(u)) <= f(u) <= max(u, H(u))  for q_1 <= u <= q_k",
    applies=lambda t: t.between,
    tolerance=1e-12,
    reason="float64 rounding of a value up to 20",
)
def between(
    f: Map, u: Tensor, levels: Tensor, any_c: Coefficient, traits: ProxTraits
) -> Iterator[Claim]:
    x = clip(u, levels)
    near, mask = hard(x, levels), ties_apart(x, levels, traits)
    w = torch.where(mask, f(x, levels, any_c), x)
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
    near, mask = hard(x, levels), ties_apart(x, levels, traits)
    softer, sharper = ((f(x, levels, a) - near).abs() for a in order)
    return at_most(torch.where(mask, sharper, softer), softer)


@law(
    "The sharp limit is the nearest level (off ties).",
    "f(u; Q, sharpest) = H(u)",
    needs=("sharp",),
)
def sharp_limit(f: Map, u: Tensor, levels: Tensor, traits: ProxTraits) -> Claim:
    sharp = f(u, levels, traits.sharp)
    return equal_where(ties_apart(u, levels, traits), sharp, hard(u, levels))


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
    applies=lambda t: t.elementwise,
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
