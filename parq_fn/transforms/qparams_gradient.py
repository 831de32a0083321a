"""Gradients of qparams: how a loss moves with the few numbers that a row's levels follow from.

Of a row with qparams q, levels Q = levels(q) and weights w_i = map(u_i, Q, s), let g_i = dL/dw_i.
By the chain rule dL/dq = (dQ/dq)^T G, where G_j, the gradient of level j, is

    "code"   the sum of g_i over the weights that are nearest to level j, whatever the map
    "map"    the sum of g_i dw_i/dq_j, the exact derivative of the map

A map's weight depends on the two ends of its cell alone, and its file gives the derivatives in
them; of another map autograd is asked. Of one scale a, Q = a T with a table T, neither needs G:
dL/da = sum_i g_i T_j by "code", j the level of i, and g_i (dw_i/dlo T_lo + dw_i/dhi T_hi) by "map".

    "lsq"    of one scale: sum_i g_i (T_j - u_i / a) where q_1 < u_i < q_k, beyond it g_i T_j

A scale of 0 has no gradient. All are sums over weights (`sums`), so that rows may be cut and their
parts added, and a few operations on rows (`of_sums`).

Source: "code": LQ-Nets, arXiv 1807.10029; "lsq": Esser et al., arXiv 1902.08153, equation (3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.scalar import is_plain
from parq_fn.proxmaps.even import Even
from parq_fn.proxmaps.levels import (
    LINEAR_SEARCH_MAX,
    bounds,
    highest,
    lookup,
    lowest,
    prepare,
    search,
)
from parq_fn.proxmaps.proxmap import Derivatives, ProxMap
from parq_fn.quantizers import Quantizer

Kind = Literal["code", "map", "lsq"]
KINDS: tuple[Kind, ...] = ("code", "map", "lsq")


class Tables(NamedTuple):
    """What `sums` takes of rows, made once for each."""

    levels: Tensor | Even  # [r, k], in what maps compute in, or what stands for them
    bound: Tensor | None  # [r, k - 1]: `bounds` of a table
    codes: Tensor | None  # [r, k]: levels of scale 1, where there is but one and a table
    scale: Tensor | None  # [r, 1], where there is but one

    def of(self, change: Callable[[Any], Any]) -> Tables:
        """The same, each changed."""
        return Tables._make(x if x is None else change(x) for x in self)


def is_one_scale(quantizer: Quantizer) -> bool:
    """Whether levels are a scale, the one qparam of a row, times a table."""
    return (*quantizer.scales,) == (True,)


def tables(quantizer: Quantizer, qparams: Tensor, like: torch.dtype) -> Tables:
    """Of qparams [r, m], whose levels weights of that dtype were mapped to."""
    one = is_one_scale(quantizer)
    scale = quantizer.rounded(qparams) if one else None
    even = quantizer.even_in(qparams, like) if one and quantizer.num_levels > 2 else None
    if even is not None:
        return Tables(even, None, None, scale)
    levels = quantizer.levels_in(qparams, like)
    levels = levels.to(torch.promote_types(like, qparams.dtype))
    codes = quantizer.levels(torch.ones_like(qparams)) if one else None
    return Tables(levels, bounds(levels), codes, scale)


def sums(kind: Kind, proxmap: Any, u: Tensor, grads: Tensor, of: Tables, s: Tensor) -> Tensor:
    """[r, 1] of one scale, else [r, k]: what a row's gradient is made of, u and grads [r, n].

    A map without derivatives takes rows whole, and its sums are [r, k].
    """
    x, levels, c = prepare(u, of.levels, s)
    g = grads.to(x.dtype)
    if kind == "map":
        return _of_map(proxmap, x, g, levels, of.codes, c)
    if of.scale is None:
        assert of.bound is not None
        return _segments(g, x, of.bound)
    code = _code(x, levels, of)
    if kind == "lsq":
        inside = (x > lowest(levels)) & (x < highest(levels))
        code = torch.where(inside, code - x / _usable(of.scale), code)
    return _dot(g, code)


def _code(x: Tensor, levels: Tensor | Even, of: Tables) -> Tensor:
    """What multiple of the scale the nearest level is."""
    if isinstance(levels, Even):
        return levels.nearest_multiple(x)
    assert of.bound is not None
    assert of.codes is not None
    (code,) = lookup(x, of.bound, of.codes)
    return code


def _of_map(
    proxmap: Any, x: Tensor, g: Tensor, levels: Tensor | Even, codes: Tensor | None, c: Tensor
) -> Tensor:
    derivatives = derivatives_of(proxmap)
    if derivatives is None:
        return _by_autograd(proxmap, x, g, levels, c)
    if isinstance(levels, Even):
        upper = levels.upper_multiple(x)
        first, second = upper - 1, upper
        lo, hi = levels.level(first), levels.level(second)
    else:
        between = levels[..., 1:-1]
        tables = (*_ends(levels), *(() if codes is None else _ends(codes)))
        lo, hi, *multiples = lookup(x, between, *tables)
        if not multiples:
            return _of_levels(x, g, levels.shape[-1], between, derivatives(x, lo, hi, c))
        first, second = multiples
    low, high = derivatives(x, lo, hi, c)
    return _dot(g, low * first + high * second)


def _of_levels(
    x: Tensor, g: Tensor, k: int, between: Tensor, derivatives: tuple[Tensor, Tensor]
) -> Tensor:
    low, high = derivatives
    if k == 1:
        return (g * (low + high)).sum(-1, keepdim=True)
    first, second = (_segments(g * own, x, between) for own in (low, high))
    pad = torch.nn.functional.pad
    return pad(first, (0, 1)) + pad(second, (1, 0))


def of_sums(
    kind: Kind, proxmap: Any, quantizer: Quantizer, qparams: Tensor, of: Tables, found: Tensor
) -> Tensor:
    """dL/dqparams [r, m], from the sums over all weights of a row."""
    if of.scale is not None:
        if kind == "map" and derivatives_of(proxmap) is None:
            table = quantizer.levels(torch.ones_like(qparams))
            found = (found * table).sum(-1, keepdim=True)
        return torch.where(of.scale == 0, 0.0, found)
    k, m = quantizer.num_levels, quantizer.num_qparams
    if quantizer.sorts and m in (k, k / 2):  # levels, or the upper half: equal ones stay apart
        own = found if m == k else found[..., m:] - found[..., :m].flip(-1)
        order = qparams.argsort(stable=True)  # a fit may give any
        return own.scatter(-1, order, own)
    pull: Any = torch.func.vjp(quantizer.levels, qparams)[1]
    (found,) = pull(found)
    return found


def of_rows(
    kind: Kind,
    proxmap: Any,
    quantizer: Quantizer,
    u: Tensor,
    grads: Tensor,
    qparams: Tensor,
    like: torch.dtype,
    s: Tensor,
) -> Tensor:
    """dL/dqparams [r, m] of rows [r, n] of latents and of gradients at weights of that dtype."""
    of = tables(quantizer, qparams, like)
    return of_sums(kind, proxmap, quantizer, qparams, of, sums(kind, proxmap, u, grads, of, s))


def of_codes(quantizer: Quantizer, grads: Tensor, qparams: Tensor, codes: Tensor) -> Tensor:
    """dL/dqparams [r, m] of weights that are the levels of these indices [r, n], as held ones."""
    found = grads.new_zeros((len(grads), quantizer.num_levels), dtype=qparams.dtype)
    found = found.scatter_add(-1, codes.long().clamp(min=0), grads.to(qparams.dtype))
    scale = quantizer.rounded(qparams) if is_one_scale(quantizer) else None
    return of_sums("map", None, quantizer, qparams, Tables(qparams, None, None, scale), found)


def derivatives_of(proxmap: Any) -> Derivatives | None:
    """Those that a map's file gives."""
    return proxmap.derivatives if isinstance(proxmap, ProxMap) else None


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """[r, 1]: sums of products."""
    found: Tensor = torch.linalg.vecdot(one, other)
    return found.unsqueeze(-1)


def _usable(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def _ends(levels: Tensor) -> tuple[Tensor, Tensor]:
    """The lower and the upper ends of all cells; of one level it is both."""
    if levels.shape[-1] == 1:
        return levels, levels
    return levels[..., :-1], levels[..., 1:]


def _segments(values: Tensor, x: Tensor, boundaries: Tensor) -> Tensor:
    """[r, m + 1]: sums of values [r, n] over the x that lie between neighbours of the sorted
    boundaries [r, m]."""
    m = boundaries.shape[-1]
    plain = is_plain(values) and is_plain(x)
    if torch.compiler.is_compiling() or (plain and m < LINEAR_SEARCH_MAX):
        above = [values.sum(-1)]  # of all, and of those above each boundary
        flags = torch.empty_like(x) if plain else None
        for i in range(m):
            one = boundaries[..., i : i + 1]
            if flags is None:  # in one loop
                above.append(torch.where(x > one, values, 0.0).sum(-1))
            else:  # floats, which a CPU writes several at a time
                above.append(torch.linalg.vecdot(torch.gt(x, one, out=flags), values))
        whole = torch.stack(above, -1)
        return whole - torch.nn.functional.pad(whole[..., 1:], (0, 1))
    index = search(boundaries, x)
    zeros = values.new_zeros(*values.shape[:-1], m + 1)
    return zeros.scatter_add(-1, index, values.expand_as(x))


def _by_autograd(proxmap: Any, x: Tensor, g: Tensor, levels: Any, c: Tensor) -> Tensor:
    if isinstance(levels, Even):
        multiples = torch.arange(levels.num_levels, dtype=x.dtype, device=x.device)
        levels = levels.level(multiples + levels.first)
    pull: Any = torch.func.vjp(lambda table: proxmap(x, table, c), levels)[1]
    (g,) = pull(g)
    return g
