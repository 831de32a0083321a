"""The laws of quantizers: rows x [r, n] -> levels Q(x) [r, k]; w(x) is the nearest level of x.

Q(x) = L(F(x)), F its `fit`, L its `levels`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.proxmaps.levels import nearest
from parq_fn.quantizers.granularity import per_block
from parq_fn.testing.law import Claim, Collection, at_most, equal, vmapped

LAWS = Collection("quantizer")
law = LAWS.law

ROUNDING = "float64 rounding of sums of up to 300 values"
HALF = (torch.bfloat16, torch.float16)


def error(x: Tensor, q: Tensor) -> Tensor:
    """[r]: squared distance of the row to the nearest of its levels, by looking at all."""
    return (x.unsqueeze(-1) - q.unsqueeze(-2)).abs().amin(-1).square().sum(-1)


def relative(x: Tensor, wanted: Tensor) -> Tensor:
    """[r]: what errors of the row are measured in: |x|^2, or 1 for zeros."""
    size = x.square().sum(-1)
    return wanted / torch.where(size > 0, size, 1.0)


def hard(quantizer: Any, x: Tensor) -> Tensor:
    """The row on its own levels."""
    assign = getattr(quantizer, "nearest", nearest)
    w: Tensor = assign(x, quantizer(x))
    return w


def same_levels(left: Tensor, right: Tensor, x: Tensor, traits: QuantizerTraits) -> Iterator[Claim]:
    """The levels agree, or the errors where several sets of levels are equally good."""
    if not traits.ambiguous:
        yield equal(left, right)
    else:
        yield equal(relative(x, error(x, left)), relative(x, error(x, right)))


@law("The rows are not changed, and the same rows give the same bits.", "Q(x) = Q(x)")
def pure(quantizer: Any, x: Tensor, dtype: torch.dtype) -> Iterator[Claim]:
    for kind in (x.dtype, dtype):
        rows = x.to(kind, copy=True)
        first = quantizer(rows).clone()
        yield equal(rows, x.to(kind))
        yield equal(quantizer(rows), first)


@law(
    "Levels are [r, k] in the rows' dtype, k as declared, finite and sorted, at any magnitude.",
    "q_1 <= ... <= q_k",
)
def levels_are_sorted(quantizer: Any, wild: Tensor, dtype: torch.dtype) -> Iterator[Claim]:
    x = wild.to(dtype)
    x = torch.where(x.isfinite(), x, 0.0)
    q = quantizer(x)
    k = getattr(quantizer, "num_levels", q.shape[-1])
    yield equal((str(q.dtype), tuple(q.shape)), (str(x.dtype), (x.shape[0], k)))
    yield equal(q.isfinite(), torch.ones_like(q, dtype=torch.bool))
    yield at_most(q[..., :-1], q[..., 1:])


@law(
    "Weights go to the nearest level, bit for bit, in every dtype, those that moved since too.",
    "|x - w(x)| <= |x - q_j|",
)
def assigns_nearest(quantizer: Any, x: Tensor, dtype: torch.dtype) -> Iterator[Claim]:
    rows = x.to(dtype)
    q = quantizer(rows)
    assign = getattr(quantizer, "nearest", nearest)
    moved = torch.cat([rows.flip(-1) * 3 + 1, q, q[..., :1] - 5, q[..., -1:] + 5], -1)
    if q.shape[-1] > 1:
        middle = 0.5 * q[..., :-1] + 0.5 * q[..., 1:]
        width = q.diff(dim=-1) / 64
        moved = torch.cat([moved, middle - width, middle + width], -1)
    slack = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for latents in (rows, moved):
        w = assign(latents, q)
        on_level = (w.unsqueeze(-1) == q.unsqueeze(-2)).any(-1)
        yield equal(on_level, torch.ones_like(on_level), latents=latents)
        wide, levels = latents.double(), q.double()
        distance = (wide.unsqueeze(-1) - levels.unsqueeze(-2)).abs().amin(-1)
        least = distance * (1 + slack) + slack * wide.abs()
        yield at_most((wide - w.double()).abs(), least, latents=latents)


SUMS = "sums over rows that stand alone are taken in another order"


@law(
    "Row i's levels are those of row i alone.",
    "Q(x)_i = Q(x_i)",
    applies=lambda t: not t.whole,
    tolerance=1e-12,
    reason=SUMS,
)
def rows_alone(quantizer: Any, x: Tensor) -> Claim:
    return equal(quantizer(x), torch.cat([quantizer(row[None]) for row in x]))


@law(
    "Per block is the quantizer on the reshaped rows.",
    "Q(blocks(x)) = (Q(block) ...)",
    applies=lambda t: not t.whole,
    tolerance=1e-12,
    reason=SUMS,
)
def blocks_alone(quantizer: Any, x: Tensor) -> Claim:
    weight = torch.cat([x, x.flip(-1) / 2], -1)
    size = x.shape[-1]
    together = quantizer(per_block(size).rows(weight))
    alone = [quantizer(row[i : i + size][None]) for row in weight for i in (0, size)]
    return equal(together, torch.cat(alone))


@law(
    "torch.vmap is the loop.",
    "vmap(Q)((x, y)) = (Q(x), Q(y))",
    tolerance=1e-12,
    reason=SUMS,
)
def vmap_is_loop(quantizer: Any, x: Tensor) -> Claim:
    def of(rows: Tensor) -> Tensor:  # without a look at values
        has_fit = hasattr(quantizer, "fit")
        q: Tensor = quantizer.levels(quantizer.fit(rows)) if has_fit else quantizer(rows)
        return q

    batch = torch.stack([x, x.flip(0) / 3])
    return equal(vmapped(of)(batch), torch.stack([of(rows) for rows in batch]))


@law("Zeros give zeros.", "Q(0) = 0")
def zeros_give_zeros(quantizer: Any, x: Tensor, dtype: torch.dtype) -> Claim:
    q = quantizer(torch.zeros_like(x, dtype=dtype))
    return equal(q + 0.0, torch.zeros_like(q))


@law("NaN and infinities are refused with a ValueError.", "Q(NaN), Q(+-inf) raise ValueError")
def refuses_non_finite(quantizer: Any, x: Tensor, dtype: torch.dtype) -> Iterator[Claim]:
    places = ((-1, 0), (0, -1), (-1, -1))
    for bad, place in zip((torch.nan, torch.inf, -torch.inf), places, strict=True):
        rows = x.to(dtype, copy=True)
        rows[place] = bad
        try:
            outcome = f"levels {quantizer(rows).tolist()}"
        except ValueError:
            outcome = "ValueError"
        yield equal(outcome, "ValueError")


@law(
    "Half-precision rows are quantized in float32 and the levels rounded once.",
    "Q(x) = round(Q(float32(x)))",
    applies=lambda t: t.widens,
)
def widens(quantizer: Any, x: Tensor) -> Iterator[Claim]:
    for dtype in HALF:
        rows = x.to(dtype)
        yield equal(quantizer(rows), quantizer(rows.float()).to(dtype))


# The form of the levels


@law("Levels come in pairs of opposite sign.", "Q = -Q", applies=lambda t: t.symmetric)
def symmetric(quantizer: Any, x: Tensor) -> Claim:
    q = quantizer(x) + 0.0
    return equal(q, -q.flip(-1) + 0.0)


@law("Zero is a level, exactly.", "0 in Q(x)", applies=lambda t: bool(t.includes_zero))
def includes_zero(quantizer: Any, x: Tensor, traits: QuantizerTraits) -> Claim:
    has = (quantizer(x) == 0).any(-1)
    if traits.includes_zero == "only_if_spanned":
        has = has | (x.amin(-1) > 0) | (x.amax(-1) < 0)
    return equal(has, torch.ones_like(has))


# How good they are


def least_error(row: list[float], k: int, form: str) -> float:
    """The least squared error of k levels of that form, over all partitions of the sorted row.

    >>> least_error([-4.0, -1.0, 1.0, 2.0], 2, "symmetric")
    6.0
    """
    values = sorted(row if form == "free" else map(abs, row))
    n, runs = len(values), {"free": k, "symmetric": k // 2, "ternary": 2}[form]
    best = float("inf")
    for m in range(1, min(runs, n) + 1):
        for cuts in itertools.combinations(range(1, n), m - 1):
            parts = [values[a:b] for a, b in itertools.pairwise((0, *cuts, n))]
            centers = [sum(part) / len(part) for part in parts]
            if form == "ternary" and m == 2:
                centers[0] = 0.0
            pairs = zip(parts, centers, strict=True)
            best = min(best, sum((x - c) ** 2 for part, c in pairs for x in part))
    return best


@law(
    "No partition of the sorted row does better, of levels of the declared form.",
    "|x - w(x)|^2 = min over partitions",
    needs=("optimal",),
    tolerance=1e-9,
    reason="float64 rounding, relative to |x|^2",
)
def least_squares(quantizer: Any, short: Tensor, traits: QuantizerTraits) -> Claim:
    q = quantizer(short)
    least = [least_error(row, q.shape[-1], str(traits.optimal)) for row in short.tolist()]
    return equal(
        relative(short, error(short, q)), relative(short, torch.tensor(least, dtype=short.dtype))
    )


@law(
    "The error is at most that of the quantizers it is declared to match.",
    "|x - w(x)|^2 <= |x - w'(x)|^2",
    applies=lambda t: bool(t.no_worse_than),
    tolerance=1e-9,
    reason="float64 rounding, relative to |x|^2",
)
def no_worse(quantizer: Any, x: Tensor, traits: QuantizerTraits) -> Iterator[Claim]:
    own = relative(x, error(x, quantizer(x)))
    for other in traits.no_worse_than:
        yield at_most(own, relative(x, error(x, other(x))))


@law(
    "Pythagoras: levels are means, so the residual is orthogonal to the quantized row.",
    "|x|^2 = |w|^2 + |x - w|^2",
    applies=lambda t: t.levels_are_means,
    tolerance=1e-9,
    reason="float64 rounding, relative to |x|^2",
)
def pythagoras(quantizer: Any, x: Tensor) -> Claim:
    w = hard(quantizer, x)
    parts = w.square().sum(-1) + (x - w).square().sum(-1)
    return equal(relative(x, parts), relative(x, x.square().sum(-1)))


@law(
    "Each greedy part takes its energy out of the rest, and the levels are all their sums.",
    "|r_{i+1}|^2 = |r_i|^2 - n v_i^2,  Q = {+-v_1 ... +-v_b}",
    needs=("parts",),
    tolerance=1e-9,
    reason="float64 rounding, relative to |x|^2",
)
def greedy_energy(quantizer: Any, x: Tensor, traits: QuantizerTraits) -> Iterator[Claim]:
    assert traits.parts is not None
    v, rest = traits.parts(x), x
    for part in v:
        left = torch.where(rest >= 0, rest - part, rest + part)
        energy = rest.square().sum(-1) - x.shape[-1] * part.squeeze(-1).square()
        yield equal(relative(x, left.square().sum(-1)), relative(x, energy))
        rest = left
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(v))), dtype=x.dtype)
    yield equal((torch.cat(v, -1) @ signs.t()).sort(-1).values, quantizer(x))


@law(
    "A constant row is reproduced.",
    "w((a, ..., a)) = (a, ..., a)",
    applies=lambda t: t.exact_on_constants,
    tolerance=1e-12,
    reason="the mean of equal values is rounded",
)
def exact_on_constants(quantizer: Any, x: Tensor) -> Claim:
    rows = x[..., :1].expand_as(x).contiguous()
    return equal(hard(quantizer, rows), rows)


@law(
    "A quantized row is reproduced.",
    "w(w(x)) = w(x)",
    applies=lambda t: t.idempotent,
    tolerance=1e-9,
    reason=ROUNDING,
)
def idempotent(quantizer: Any, x: Tensor) -> Claim:
    once = hard(quantizer, x)
    return equal(hard(quantizer, once), once)


# Symmetries


@law(
    "Scaling a row by a power of two scales its levels, bit for bit.",
    "Q(a x) = a Q(x)",
    applies=lambda t: t.scale_exact,
)
def scale_exact(quantizer: Any, x: Tensor, power: float) -> Claim:
    return equal(quantizer(power * x), power * quantizer(x))


@law(
    "Scaling a row scales its levels (or, where several are as good, its error).",
    "Q(a x) = a Q(x)",
    applies=lambda t: t.scale,
    tolerance=1e-9,
    reason=ROUNDING,
)
def scale(quantizer: Any, x: Tensor, factor: float, traits: QuantizerTraits) -> Iterator[Claim]:
    yield from same_levels(quantizer(factor * x) / factor, quantizer(x), x, traits)


@law(
    "The levels of -x are those of x, reflected (or, where several are as good, its error).",
    "Q(-x) = -Q(x)",
    applies=lambda t: t.sign,
    tolerance=1e-9,
    reason=ROUNDING,
)
def sign(quantizer: Any, x: Tensor, traits: QuantizerTraits) -> Iterator[Claim]:
    yield from same_levels(-quantizer(-x).flip(-1), quantizer(x), x, traits)


@law(
    "Shifting a row shifts its levels (or, where several are as good, its error).",
    "Q(x + a) = Q(x) + a",
    applies=lambda t: t.shift,
    tolerance=1e-9,
    reason=ROUNDING,
)
def shift(quantizer: Any, x: Tensor, shift: float, traits: QuantizerTraits) -> Iterator[Claim]:
    yield from same_levels(quantizer(x + shift) - shift, quantizer(x), x, traits)


@law(
    "The order of a row's entries does not matter (or, where several are as good, its error).",
    "Q(P x) = Q(x)",
    applies=lambda t: t.permutation,
    tolerance=1e-9,
    reason=ROUNDING,
)
def permutation(quantizer: Any, x: Tensor, traits: QuantizerTraits) -> Iterator[Claim]:
    mixed = torch.randperm(x.shape[-1], generator=torch.Generator().manual_seed(x.shape[-1]))
    for other in (x.flip(-1), x.roll(1, -1), x[..., mixed]):
        yield from same_levels(quantizer(other), quantizer(x), x, traits)


@law(
    "Repeating every entry leaves the levels (or, where several are as good, the error).",
    "Q((x, x)) = Q(x)",
    applies=lambda t: t.repetition,
    tolerance=1e-9,
    reason=ROUNDING,
)
def repetition(quantizer: Any, x: Tensor, traits: QuantizerTraits) -> Iterator[Claim]:
    yield from same_levels(quantizer(torch.cat([x, x], -1)), quantizer(x), x, traits)
