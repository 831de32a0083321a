"""Least-squares binary quantization: levels that are all sums of +-v_1, ..., +-v_b."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from parq_fn.foundation.checks import POSITIVE, check_numbers, check_whole
from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import value
from parq_fn.proxmaps.levels import between
from parq_fn.quantizers.base import Grid, Quantizer, mirror, nan_rows
from parq_fn.quantizers.centered import about_mean, less_mean, ordered_about_mean
from parq_fn.quantizers.reductions import (
    NETWORK,
    beside,
    in_order,
    in_turn,
    mean,
    pieces,
    running_sums,
    sorted_columns,
    summed,
    total,
)

_SWEEPS = 30  # of the alternating method; each costs O(k log n) a row after one sort


@value
class lsbq(Quantizer):
    """Levels: all sums of +-v_1, ..., +-v_b for 1 to 8 bits; -v, 0, v for bits = 0 (ternary).

    The v aim at argmin_v sum_i min_{s in {-1, 1}^b} (x_i - sum_j s_j v_j)^2:

    - "greedy": v_i = mean|r_i|, r_{i+1} = r_i - v_i sign(r_i), r_1 = x, sign(0) = 1, which is
      each v's own optimum given those before it. Ternary: v = multiplier * mean|x|.
    - "optimal": the least-squares optimum itself, for bits 0, 1 and 2.
    - "alternating": from the greedy v, weights to their nearest level and v to its optimum for
      those signs in turn, 30 times; the error never grows. Not the global optimum.

    With center=True the row mean is taken out first and added to the levels.

    Rows [r, n] -> qparams -> levels [r, 2^b] (ternary: [r, 3]). Qparams: v_1, ..., v_b in the order
    fitted, of the other methods with b >= 2 the positive levels, of ternary v; last the mean, with
    center=True. Raises ValueError for bits outside 0..8, for "optimal" with more than 2 bits, and
    for another method.

    >>> import torch
    >>> rows = torch.tensor([[-4.0, -1.0, 1.0, 2.0]])
    >>> lsbq(2)(rows)
    tensor([[-3., -1.,  1.,  3.]])
    >>> lsbq(2, "optimal")(rows)
    tensor([[-4.0000, -1.3333,  1.3333,  4.0000]])

    Source: Pouransari, Tu, Tuzel, arXiv 2001.02786; the exact O(n log n) search is derived
    in `optimal_magnitudes`, of the same file.
    """

    #: 0 (ternary) to 8.
    bits: int
    #: How the v are fitted.
    method: Literal["greedy", "optimal", "alternating"] = "greedy"
    #: Whether the row mean is taken out first and added to the levels.
    center: bool = False
    #: Of mean|x|, greedy ternary only.
    multiplier: float = 1.1
    homogeneous = True

    def __post_init__(self) -> None:
        check_whole("lsbq", 0, 8, bits=self.bits)
        if self.method not in ("greedy", "optimal", "alternating"):
            raise ValueError(
                f"lsbq: method must be 'greedy', 'optimal' or 'alternating', got {self.method!r}"
            )
        if self.method == "optimal" and self.bits > 2:
            raise ValueError(
                f"lsbq: method 'optimal' takes bits 0, 1 and 2, got {self.bits}; "
                "use 'alternating', or lloyd_max for the best levels of any form"
            )
        check_numbers("lsbq", POSITIVE, multiplier=self.multiplier)

    @property
    def num_levels(self) -> int:
        return int(2**self.bits) if self.bits else 3

    @property
    def traits(self) -> QuantizerTraits:
        plain, ternary = not self.center, self.bits == 0
        method = "optimal" if self.bits == 1 else self.method
        best, own = method == "optimal" and plain, method != "alternating"
        worse: list[lsbq] = []
        if method == "alternating" or (method == "optimal" and self.bits == 2):
            worse.append(replace(self, method="greedy"))
        if method == "optimal" and self.bits == 2:
            worse += [replace(self, bits=0), replace(self, bits=1)]
        sums = plain and self.method == "greedy" and not ternary
        return replace(
            super().traits,
            symmetric=plain,
            evenly_spaced=plain and self.bits <= 1,
            includes_zero=plain and ternary,
            optimal=("ternary" if ternary else "symmetric") if best else None,
            levels_are_means=best,
            ambiguous=method == "optimal",
            exact_on_constants=method != "greedy" or not ternary,
            idempotent=best,
            scale=own,
            sign=own,
            shift=own and self.center,
            repetition=own,
            parts=(lambda x: greedy(x, self.bits)) if sums else None,
            no_worse_than=tuple(worse),
        )

    @property
    def telling(self) -> bool:
        means = self.bits == 1 or self.method == "greedy"  # the first of them of |x|
        return means and not self.center and (self.bits > 0 or 0.125 <= self.multiplier <= 8)

    @property
    def num_qparams(self) -> int:
        sums = self.bits <= 1 or self.method == "greedy"
        return (max(self.bits, 1) if sums else self.num_levels // 2) + self.center

    @property
    def positive(self) -> tuple[bool, ...]:
        return (True,) * (self.num_qparams - self.center) + (False,) * self.center

    @property
    def sorts(self) -> bool:
        return self.bits > 1 and self.method != "greedy"

    def ordered(self, qparams: Tensor) -> Tensor:
        return (
            ordered_about_mean(qparams, super().ordered)
            if self.center
            else super().ordered(qparams)
        )

    def qparams(self, x: Tensor) -> Tensor:
        if self.method == "alternating" and self.bits != 1:
            # which minimum it finds may depend on a sum's last bit, and so on a row's order
            x = in_order(x)
        return less_mean(x, self._qparams_about_0) if self.center else self._qparams_about_0(x)

    def _qparams_about_0(self, x: Tensor) -> Tensor:
        if self.bits == 1:  # sum (|x| - v)^2 is least at mean|x|, by whatever method
            return mean(x, torch.abs)
        if self.method == "optimal":
            return optimal_magnitudes(x, self.bits)
        start = [self.multiplier * mean(x, torch.abs)] if self.bits == 0 else greedy(x, self.bits)
        if self.method == "greedy":
            return torch.cat(start, -1)
        codes = _codes(self.bits, x)
        levels = alternate(x, torch.cat(start, -1), codes)
        # the others are their negatives, and 0; a clone, for a state that keeps a part keeps all
        return levels[..., (self.num_levels + 1) // 2 :].clone()

    def grid(self, qparams: Tensor) -> Grid | None:
        if self.center or self.bits > 1:
            return None
        return Grid(qparams, -1.0, 1.0) if self.bits == 0 else Grid(2 * qparams, -0.5, 0.5)

    def levels(self, qparams: Tensor) -> Tensor:
        return about_mean(qparams, self._about_0) if self.center else self._about_0(qparams)

    def levels_within(self, qparams: Tensor, end: float) -> Tensor:
        if self.center:
            return super().levels_within(qparams, end)
        return self._about_0(qparams, end)

    def _about_0(self, qparams: Tensor, end: float = torch.inf) -> Tensor:
        if self.bits == 0:
            return Grid(qparams.clamp(max=end), -1.0, 1.0).levels(3)
        if self.method == "greedy":
            *others, largest = sums(qparams)
            if len(others) > NETWORK:
                others = list(torch.split(in_order(torch.cat(others, -1)), 1, -1))
            else:
                others = in_turn(others)
            magnitudes = [*others, largest]
            table = beside([*(-part for part in reversed(magnitudes)), *magnitudes])
            return table.clamp(-end, end)
        return nan_rows(mirror(sorted_columns(qparams.clamp(max=end))), qparams)


def greedy(x: Tensor, bits: int) -> list[Tensor]:
    """v_1, ..., v_b, each [r, 1]: the mean magnitude of what the ones before it left.

    Of what is left the magnitude alone counts, and |r - v sign(r)| = ||r| - v|.
    """
    v: list[Tensor] = []
    for _ in range(bits):
        v.append(mean(x, _left, *v))
    return v


def _left(x: Tensor, *v: Tensor, out: Tensor | None = None) -> Tensor:
    left = torch.abs(x, out=out)
    for part in v:
        left = torch.abs(torch.sub(left, part, out=out), out=out)
    return left


def _double(x: Tensor, out: Tensor | None = None) -> Tensor:
    return x.to(torch.float64, copy=True) if out is None else out.copy_(x)


def sums(v: Tensor) -> list[Tensor]:
    """v [r, b] >= 0 -> the magnitudes of the sums of +-v_1, ..., +-v_b, 2^(b-1) times [r, 1], the
    largest last, the others unsorted: sums come in pairs of opposite sign, as negation is exact."""
    first, *others = [v[..., i : i + 1] for i in range(v.shape[-1])]
    found = [first]
    for part in others:
        found = [s for one in found for s in ((one - part).abs(), one + part)]
    return found


def optimal_magnitudes(x: Tensor, bits: int) -> Tensor:
    """The positive levels of the least-squares optimum for bits 0 and 2: [r, 1] and [r, 2].

    2 bits: +-v_1 +-v_2 with v_1 >= v_2 >= 0 has magnitudes lo = v_1 - v_2 <= hi = v_1 + v_2 that
    may be any two, so the problem is 2-means on |x|, whose clusters split the sorted magnitudes
    at some j. Of the error only - S_j^2 / j - (S_n - S_j)^2 / (n - j) depends on j, S_j the sum
    of the j smallest; the best of the n splits is found by looking at all. Ternary pins lo at 0:
    its first term goes. Of equally good splits the smallest j is taken; j = 0 puts lo on hi.
    """
    n, data = x.shape[-1], in_order(x.abs())
    whole = total(data, _double)  # S_n
    first, passed = 0, torch.zeros_like(whole)  # j and S_j where a piece begins
    found: tuple[Tensor, ...] = (torch.full_like(whole, -1.0), passed.long(), passed)
    for piece in pieces(data, 1):
        sums = running_sums(piece.double())
        below = passed + torch.nn.functional.pad(sums[:, :-1], (1, 0))  # S_j
        j = torch.arange(piece.shape[1], device=x.device) + first
        gain = (whole - below).square() / (n - j)
        if bits == 2:
            gain = gain + below.square() / j.clamp(min=1)
        here = gain.argmax(-1, keepdim=True)
        new = gain.gather(-1, here), first + here, below.gather(-1, here)
        better = new[0] > found[0]
        found = tuple(torch.where(better, a, b) for a, b in zip(new, found, strict=True))
        first, passed = first + piece.shape[1], passed + sums[:, -1:]
    _, best, below = found
    # means held to their cluster, past which rounding may carry them
    hi = between((whole - below) / (n - best), data.gather(-1, best), data[:, -1:])
    if bits == 0:
        return hi.to(x.dtype)
    end = data.gather(-1, (best - 1).clamp(min=0))
    lo = between(below / best.clamp(min=1), data[:, :1], end)
    lo = torch.where(best == 0, hi, lo)
    return torch.cat([lo, hi], -1).to(x.dtype)


def _codes(bits: int, x: Tensor) -> Tensor:
    """The sign patterns of the levels, [k, b]; for ternary -1, 0, 1 as [3, 1]."""
    if bits == 0:
        return torch.arange(-1.0, 2.0, dtype=torch.float64, device=x.device).unsqueeze(1)
    code = torch.arange(2**bits, device=x.device).unsqueeze(1)  # made there, without waiting
    ones = (code >> torch.arange(bits - 1, -1, -1, device=x.device)) & 1
    return 2.0 * ones.double() - 1.0


def alternate(x: Tensor, start: Tensor, codes: Tensor) -> Tensor:
    """Levels [r, k] of sorted rows from v [r, b] by alternating least squares, codes [k, b].

    Given which weights share a level, the error depends on them through their number N and sum
    S alone, and in one v_i with the others fixed it is a parabola with its minimum at
    v_i = sum_l s_li (S_l - N_l sum_{j != i} s_lj v_j) / sum_l s_li^2 N_l.
    Prefix sums of a row give N and S of all levels by k - 1 binary searches.
    """
    data = x.to(torch.float64)
    prefix = torch.cat([torch.zeros_like(data[..., :1]), running_sums(data)], -1)
    ends = torch.zeros_like(data[..., :1], dtype=torch.int64)
    v = [part.unsqueeze(-1) for part in start.to(torch.float64).unbind(-1)]
    table = codes.unbind(-1)

    def build(v: list[Tensor]) -> tuple[Tensor, Tensor]:
        parts = [s * v_i for s, v_i in zip(table, v, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        levels, order = total.sort(-1)
        return levels, order

    for _ in range(_SWEEPS):
        levels, order = build(v)
        middle = 0.5 * levels[..., :-1] + 0.5 * levels[..., 1:]
        inner = torch.searchsorted(data, middle.contiguous(), right=True)  # ties go down
        edges = torch.cat([ends, inner, ends + x.shape[-1]], -1)
        number = edges.diff().to(torch.float64)
        mass = prefix.gather(-1, edges).diff()
        signs = [s.expand_as(levels).gather(-1, order) for s in table]
        whole = levels
        for i, s in enumerate(signs):
            others = whole - s * v[i]
            weight = summed(s.square() * number).unsqueeze(-1)
            best = summed(s * (mass - number * others)).unsqueeze(-1) / weight.clamp(min=1)
            v[i] = torch.where(weight > 0, best, v[i])
            whole = others + s * v[i]
    return build(v)[0].to(x.dtype)
