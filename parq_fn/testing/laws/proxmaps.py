"""The laws of prox maps f(u; Q, c) -> w: what every map keeps to.

H is the nearest level, C the clip to [q_1, q_k]; a weight within 1e-9 of a midpoint is a tie,
and what a law says off ties is not asked of it. A map that does not declare `elementwise` may
couple the weights of a row: <., .> and |.| are then inner products and norms over the row, and
laws that only make sense of single weights do not apply.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.traits import Coefficient, ProxTraits
from parq_fn.testing.law import Claim, Collection, at_most, equal, vmapped

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


def off_ties(u: Tensor, q: Tensor) -> Tensor:
    """Where u is no tie."""
    if q.shape[-1] == 1:
        return torch.ones_like(u, dtype=torch.bool)
    distance = (u.unsqueeze(-1) - midpoints(q).unsqueeze(-2)).abs().amin(-1)
    return distance > TIE


def ties_apart(u: Tensor, q: Tensor, traits: ProxTraits) -> Tensor:
    """Where u is no tie, and for a map that couples weights of a row none of its row is."""
    mask = off_ties(u, q)
    return mask if traits.elementwise else mask.all(-1, keepdim=True).expand_as(u)


def inner(x: Tensor, traits: ProxTraits) -> Tensor:
    """Products [r, n] as inner products: [r, 1], of an elementwise map's weights each alone."""
    return x if traits.elementwise else x.sum(-1, keepdim=True)


def equal_where(mask: Tensor, left: Tensor, right: Tensor) -> Claim:
    """left == right where the mask holds."""
    return equal(torch.where(mask, left, right), right)


def of_row(c: Coefficient, i: int) -> Coefficient:
    """The coefficient of row i: of slopes their row, otherwise as it is."""
    return c[i : i + 1] if isinstance(c, Tensor) and c.dim() else c


def way(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient, share: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows on the way from u to v [r, n], a share [m] of it each, and their weights: [r, m, n]."""
    m = len(share)
    rows = u.unsqueeze(1) + share[:, None] * (v - u).unsqueeze(1)
    c = c.repeat_interleave(m, 0) if isinstance(c, Tensor) and c.dim() else c
    w = f(rows.flatten(0, 1), levels.repeat_interleave(m, 0), c)
    return rows, w.reshape(rows.shape)


def in_dtype(u: Tensor, dtype: torch.dtype) -> Tensor:
    """u rounded to the dtype, held to half of its largest number."""
    end = torch.finfo(dtype).max / 2
    return u.clamp(-end, end).to(dtype)


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
    f: Map, u: Tensor, any_levels: Tensor, any_c: Coefficient, dtype: torch.dtype
) -> Iterator[Claim]:
    for kind in (u.dtype, dtype):
        x, q = in_dtype(u, kind), any_levels.to(kind)
        w = f(x, q, any_c)
        yield equal(w.isfinite(), torch.ones_like(w, dtype=torch.bool), u=x, any_levels=q)


@law(
    "Every weight is mapped alike, wherever it stands: order, splitting and strides are nothing.",
    "f(P u) = P f(u),  f((u, v)) = (f(u), f(v))",
    applies=lambda t: t.elementwise,
    tolerance=1e-12,
    reason="vectorised and scalar code of exp and tanh differ in the last bits",
)
def elementwise(
    f: Map, u: Tensor, v: Tensor, any_levels: Tensor, any_c: Coefficient
) -> Iterator[Claim]:
    q, order = any_levels, v[0].argsort()
    w = f(u, q, any_c)
    yield equal(f(u[..., order], q, any_c), w[..., order])
    yield equal(f(torch.cat([u, v], -1), q, any_c), torch.cat([w, f(v, q, any_c)], -1))
    yield equal(f(u.t().contiguous().t(), q, any_c), w)
    yield equal(f(u[..., :4], q, any_c), w[..., :4])


@law(
    "The map is firmly nonexpansive.",
    "<f(u) - f(v), u - v> >= |f(u) - f(v)|^2",
    applies=lambda t: t.firmly_nonexpansive,
    tolerance=1e-9,
    reason=ROUNDING,
)
def firmly_nonexpansive(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient, traits: ProxTraits
) -> Claim:
    moved = f(u, levels, c) - f(v, levels, c)
    return at_most(inner(moved.square(), traits), inner(moved * (u - v), traits))


@law(
    "The map is cocoercive with the declared constant.",
    "<f(u) - f(v), u - v> >= g(c) |f(u) - f(v)|^2",
    needs=("cocoercive",),
    tolerance=1e-9,
    reason=ROUNDING,
)
def cocoercive(
    f: Map, u: Tensor, v: Tensor, levels: Tensor, any_c: Coefficient, traits: ProxTraits
) -> Claim:
    assert traits.cocoercive is not None
    moved = f(u, levels, any_c) - f(v, levels, any_c)
    least = traits.cocoercive(any_c) * moved.square()
    return at_most(inner(least, traits), inner(moved * (u - v), traits))


@law(
    "A larger latent weight never gives a smaller weight.",
    "<f(u) - f(v), u - v> >= 0",
    applies=lambda t: t.monotone,
    tolerance=1e-12,
    reason="float64 rounding of a value up to 20, of rows relative to their norms",
)
def monotone(
    f: Map, u: Tensor, v: Tensor, any_levels: Tensor, any_c: Coefficient, traits: ProxTraits
) -> Iterator[Claim]:
    q = any_levels
    if not traits.elementwise:
        moved = f(u, q, any_c) - f(v, q, any_c)
        product = inner(moved * (u - v), traits)
        yield at_most(torch.zeros_like(product), product)
    # where it falls may be narrow: pairs 1e-5 apart, at places that differ between examples
    first = ((u.sum() + v.sum()) * 0.618034).frac().abs()
    shares = (torch.arange(512, dtype=u.dtype) + first) / 512
    if traits.elementwise:
        at = q[..., :1] - 1 + (q[..., -1:] - q[..., :1] + 2) * shares
        x = torch.cat([u, v, at, at + 1e-5], -1).sort(-1).values
        w = f(x, q, any_c)
        least = w.diff(dim=-1).argmin(-1, keepdim=True)
        x, w = (y.gather(-1, torch.cat([least, least + 1], -1)) for y in (x, w))
        yield Claim(w[..., :1], "<=", w[..., 1:], {"u": x, "f(u)": w})
        return
    shares = torch.cat([shares[::16], shares[::16] + 1e-5]).sort().values
    size, each = 1 + torch.maximum(u.norm(dim=-1), v.norm(dim=-1)), torch.arange(len(u))
    for low, high in ((u, v), (0.0 * u, 4 * u / size[:, None])):
        x, w = way(f, low, high, q, any_c, shares)
        apart = x.diff(dim=1)
        product = (apart * w.diff(dim=1)).sum(-1) / (1 + apart.norm(dim=-1)) / size[:, None]
        i = product.argmin(-1)
        pair = {"u": x[each, i], "v": x[each, i + 1], "f(u)": w[each, i], "f(v)": w[each, i + 1]}
        least = product.amin(-1)
        yield Claim(torch.zeros_like(least), "<=", least, pair)


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


@law(
    "NaN gives NaN, and leaves other rows alone, other weights too where weights stand alone.",
    "f(NaN) = NaN",
)
def nan_gives_nan(
    f: Map, u: Tensor, levels: Tensor, c: Coefficient, dtype: torch.dtype, traits: ProxTraits
) -> Iterator[Claim]:
    for kind in (u.dtype, dtype):
        x, q = u.to(kind), levels.to(kind)
        w = f(x, q, c)
        for row, column in ((0, 0), (-1, -1)):
            spoilt, expected = x.clone(), w.clone()
            spoilt[row, column] = torch.nan
            got = f(spoilt, q, c)
            if not traits.elementwise:  # what becomes of its row is the map's own affair
                expected[row] = got[row]
            expected[row, column] = torch.nan
            yield equal(got, expected, u=spoilt)


@law("Row i of a batch is the map of row i alone.", "f(u; Q)_i = f(u_i; Q_i)")
def rows_alone(f: Map, u: Tensor, any_levels: Tensor, any_c: Coefficient) -> Claim:
    q = any_levels
    alone = [f(u[i : i + 1], q[i : i + 1], of_row(any_c, i)) for i in range(u.shape[0])]
    return equal(f(u, q, any_c), torch.cat(alone))


@law(
    "torch.vmap is the loop.",
    "vmap(f)((u, v)) = (f(u), f(v))",
    tolerance=1e-12,
    reason="vectorised and scalar code of exp and tanh differ in the last bits",
)
def vmap_is_loop(f: Map, u: Tensor, v: Tensor, levels: Tensor, c: Coefficient) -> Claim:
    batch, q = torch.stack([u, v]), torch.stack([levels, levels + 1])
    looped = torch.stack([f(x, y, c) for x, y in zip(batch, q, strict=True)])
    return equal(vmapped(lambda x, y: f(x, y, c))(batch, q), looped)


@law(
    "Half precision is mapped in float32 and rounded once.",
    "f(u) = round(f(float32(u)))",
    applies=lambda t: t.widens,
)
def widens(f: Map, u: Tensor, levels: Tensor, c: Coefficient) -> Iterator[Claim]:
    for dtype in (torch.bfloat16, torch.float16):
        x, q = u.to(dtype), levels.to(dtype)
        yield equal(f(x, q, c), f(x.float(), q.float(), c).to(dtype))


@law(
    "In a narrow dtype the map is what it is in float64, of a latent that is a few roundings away.",
    "f(u - d) - d <= round(f)(u) <= f(u + d) + d,  d = 2 eps (|u| + max|Q|)",
    applies=lambda t: t.monotone and (t.elementwise or t.firmly_nonexpansive),
    tolerance=1e-12,
    reason="float64 rounding",
)
def narrow(
    f: Map, u: Tensor, levels: Tensor, c: Coefficient, dtype: torch.dtype, traits: ProxTraits
) -> Iterator[Claim]:
    u = u.clamp(-1e3, 1e3).to(dtype)  # whose squares and sums are in range
    x, q = u.double(), levels.to(dtype).double()
    w = f(u, levels.to(dtype), c).double()
    info = torch.finfo(dtype)
    d = 2 * info.eps * (x.abs() + q.abs().amax(-1, keepdim=True) + info.tiny)
    if traits.elementwise:
        yield at_most(f(x - d, q, c) - d, w, u=u)
        yield at_most(w, f(x + d, q, c) + d, u=u)
    else:
        off = (w - f(x, q, c)).norm(dim=-1)
        yield at_most(off, 2 * d.norm(dim=-1), u=u)
