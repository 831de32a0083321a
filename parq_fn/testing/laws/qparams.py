"""The laws of qparams: rows x [r, n] -> F(x) [r, m], their `fit`, and levels L(F(x)) [r, k].

A plain function of rows has none, and is held to nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from parq_fn.testing.law import Claim, at_most, equal
from parq_fn.testing.laws.quantizers import hard, law


@law(
    "Levels are those of the qparams: [r, m], float32 or better, m as declared, zeros of no rows.",
    "Q(x) = L(F(x))",
)
def levels_follow_from_qparams(quantizer: Any, wild: Tensor, dtype: torch.dtype) -> Iterator[Claim]:
    if not hasattr(quantizer, "fit"):
        return
    x = wild.to(dtype)
    x = torch.where(x.isfinite(), x, 0.0)
    fitted, m = quantizer.fit(x), quantizer.num_qparams
    wide = torch.promote_types(dtype, torch.float32)
    yield equal((str(fitted.dtype), tuple(fitted.shape)), (str(wide), (x.shape[0], m)))
    yield equal(len(quantizer.scales), m)
    yield equal(fitted.isfinite(), torch.ones_like(fitted, dtype=torch.bool))
    yield equal(quantizer.levels_in(fitted, dtype), quantizer(x))
    yield equal(quantizer.fit(x[:, :0]), torch.zeros_like(fitted))


@law(
    "Of any qparams with positive scales levels are sorted, pure, and NaN where one is.",
    "L(a F(x)) = L(a F(x)), q_1 <= ... <= q_k",
)
def levels_are_sorted_for_any_qparams(quantizer: Any, x: Tensor, factor: float) -> Iterator[Claim]:
    if not hasattr(quantizer, "fit"):
        return
    own = quantizer.fit(x)
    for turn in (0, 1):  # those that scale, each by its own number
        factors = [
            factor ** (-1) ** (i + turn) if scales else 1.0
            for i, scales in enumerate(quantizer.scales)
        ]
        qparams = own * torch.tensor(factors, dtype=own.dtype)
        kept = qparams.clone()
        q = quantizer.levels(qparams).clone()
        yield equal((str(q.dtype), tuple(q.shape)), (str(x.dtype), (len(x), quantizer.num_levels)))
        yield at_most(q[..., :-1], q[..., 1:])
        yield equal(quantizer.levels(qparams), q)
        yield equal(qparams, kept)
        alone = [quantizer.levels(row[None]) for row in qparams]
        yield equal(torch.cat(alone), q)
    for i in range(own.shape[-1]):
        nan = own.clone()
        nan[0, i] = torch.nan
        q = quantizer.levels(nan)
        yield equal(q[0], torch.full_like(q[0], torch.nan))
        yield equal(q[1:], quantizer.levels(own[1:]))


@law(
    "Levels are those of the rounded qparams, and what is rounded stays.",
    "L(r(p)) = L(p), r(r(p)) = r(p)",
)
def levels_of_rounded_qparams(quantizer: Any, wild: Tensor) -> Iterator[Claim]:
    if not hasattr(quantizer, "rounded"):
        return
    qparams = quantizer.fit(wild)
    held = quantizer.rounded(qparams)
    yield equal(quantizer.levels(held), quantizer.levels(qparams))
    yield equal(quantizer.rounded(held), held)


@law(
    "A row needs of the others what is of the whole tensor alone, the largest over its parts.",
    "F(x)_i = F(x_i; W(x)), W(x) = max_i W(x_i)",
    applies=lambda t: t.whole,
)
def whole_of_parts(quantizer: Any, x: Tensor) -> Iterator[Claim]:
    whole = quantizer.whole(x)
    parts = torch.cat([quantizer.whole(row[None]) for row in x])
    yield equal(parts.amax(0, keepdim=True), whole)
    alone = [quantizer.fit(row[None], whole) for row in x]
    yield equal(torch.cat(alone), quantizer.fit(x))


@law(
    "The grid that it gives is its levels.",
    "L(p) = (step * first, step * (first + 1), ..., step * last)",
    applies=lambda t: t.evenly_spaced,
)
def evenly_spaced(quantizer: Any, x: Tensor) -> Iterator[Claim]:
    qparams = quantizer.fit(x)
    step, first, last = quantizer.grid(qparams)
    j = torch.arange(quantizer.num_levels, dtype=x.dtype)
    yield equal(step * (j + first), quantizer.levels(qparams))
    yield equal(
        torch.as_tensor(last - first), torch.full_like(torch.as_tensor(first), float(j[-1]))
    )


@law(
    "A quantized row has the levels that it was quantized with.",
    "Q(w(x)) = Q(x)",
    applies=lambda t: t.idempotent,
    tolerance=8 * torch.finfo(torch.float64).eps,
    reason="8 ulp: a mean of equal levels is a rounded sum, 3 of 20,000; a step is 2 from itself",
)
def qparams_of_quantized(quantizer: Any, x: Tensor) -> Claim:
    return equal(quantizer(hard(quantizer, x)), quantizer(x))
