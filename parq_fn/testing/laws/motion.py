"""The laws of how weights move with latents: continuity, jumps, slopes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from parq_fn.foundation.traits import Coefficient, ProxTraits
from parq_fn.testing.law import Claim, at_most, equal
from parq_fn.testing.laws.proxmaps import ROUNDING, Map, inner, law, midpoints, way


def steepest(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient, traits: ProxTraits
) -> tuple[Tensor, Tensor]:
    """Two latents, 1e-9 of a grid apart, between which the map moves most: a jump stays as wide as
    it is.

    The grid of 18 points, narrowed eight times, spans the levels of a row [r, 1]; for a map that
    couples weights the way from u to v [r, n].
    """
    share = torch.linspace(0.0, 1.0, 18, dtype=u.dtype)
    if traits.elementwise:
        low, high = levels[..., :1] - 1, levels[..., -1:] + 1
        for _ in range(8):
            at = low + (high - low) * share
            most = f(at, levels, c).diff(dim=-1).abs().argmax(-1, keepdim=True)
            low, high = at.gather(-1, most), at.gather(-1, most + 1)
        return low, high
    low, high, each = u, v, torch.arange(len(u))
    for _ in range(8):
        rows, w = way(f, low, high, levels, c, share)
        most = w.diff(dim=1).square().sum(-1).argmax(-1)
        low, high = rows[each, most], rows[each, most + 1]
    return low, high


@law(
    "The map is continuous.",
    "|f(u + d) - f(u - d)| -> 0 as d -> 0",
    applies=lambda t: t.continuous,
    tolerance=1e-5,
    reason="d = 1e-9, and slopes up to 1e3 move the weight by 2e-6",
)
def continuous(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient, traits: ProxTraits
) -> Iterator[Claim]:
    x = torch.cat([u, levels, midpoints(levels)], -1) if traits.elementwise else u
    yield equal(f(x - 1e-9, levels, c), f(x + 1e-9, levels, c))
    low, high = steepest(f, u, v, levels, c, traits)
    yield equal(f(low, levels, c), f(high, levels, c), u=torch.cat([low, high], -1))


@law(
    "At a midpoint the map jumps by the declared width.",
    "f(c_i + 0) - f(c_i - 0) = jump(c, q_{i+1} - q_i)",
    applies=lambda t: t.elementwise,
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
) -> Iterator[Claim]:
    assert traits.lipschitz is not None
    size = 1 if traits.elementwise else u.abs().amax(-1, keepdim=True).clamp(min=1)
    pairs = [(u, v), (u, u + 1e-6 * size)]  # sums over a row are rounded
    if traits.elementwise:
        pairs.append((midpoints(levels), midpoints(levels) + 1e-6))
    for at, other in pairs:
        moved = inner((f(at, levels, c) - f(other, levels, c)).square(), traits).sqrt()
        yield at_most(moved, traits.lipschitz(c) * inner((at - other).square(), traits).sqrt())


@law(
    "No smaller Lipschitz constant will do: it is the slope at the middle of every cell.",
    "f'(c_i) = L(c)",
    applies=lambda t: t.lipschitz_attained and t.elementwise,
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
