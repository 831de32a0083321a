"""GGUF's types of blocks: which levels each holds, and their bytes.

A block is a run of weights along the last dimension. Each weight is a code, which stands for a
number of the type's table, and each block has a scale that the numbers are multiplied with, in
float32; Q4_1 adds a minimum. `match` says how a type holds levels, and how far off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from parq_fn.export.grid import Multiples, as_multiples, even_grid
from parq_fn.quantizers.base import Grid
from parq_fn.quantizers.codebook import codebook
from parq_fn.quantizers.rounding import to_e8m0, to_format

Array = np.ndarray[Any, Any]


# Bytes: codes [blocks, size], uint8, and the bytes of their scales [blocks, s] -> [blocks, bytes].


def _nibbles(codes: Array, scales: Array) -> Array:
    """The scale, and bytes of two codes: of n weights i and i + n / 2."""
    half = codes.shape[1] // 2
    return np.concatenate([scales, codes[:, :half] | (codes[:, half:] << 4)], -1)


def _q8_0(codes: Array, scales: Array) -> Array:
    return np.concatenate([scales, codes ^ 0x80], -1)  # numbers from -128, as signed bytes


def _q1_0(codes: Array, scales: Array) -> Array:
    return np.concatenate([scales, np.packbits(codes, -1, bitorder="little")], -1)


def _tq1_0(codes: Array, scales: Array) -> Array:
    """Five codes to a byte, those of the last sixteen weights four; a byte is the ceiling of
    256 / 243 times its digits, so that a product by 3 shows one after another above it."""
    parts = []
    for first, last, digits in ((0, 160, 5), (160, 240, 5), (240, 256, 4)):
        powers = np.array([81, 27, 9, 3, 1], np.uint16)[:digits, None]
        parts.append((codes[:, first:last].reshape(len(codes), digits, -1) * powers).sum(-2))
    bytes_of_codes = (np.concatenate(parts, -1) * 256 + 242) // 243
    return np.concatenate([bytes_of_codes.astype(np.uint8), scales], -1)


def _tq2_0(codes: Array, scales: Array) -> Array:
    """Four codes to a byte, of weights 32 apart."""
    four = codes.reshape(len(codes), 2, 4, 32) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    merged = np.bitwise_or.reduce(four, axis=2).reshape(len(codes), -1)
    return np.concatenate([merged, scales], -1)


def _nvfp4(codes: Array, scales: Array) -> Array:
    """Four scales, and bytes of two codes: of each 16 weights i and i + 8."""
    quarters = codes.reshape(len(codes), 4, 2, 8)
    merged = quarters[:, :, 0] | (quarters[:, :, 1] << 4)
    return np.concatenate([scales, merged.reshape(len(codes), -1)], -1)


def _as_float16(scales: Array) -> Array:
    return scales.astype("<f2")[..., None].view(np.uint8)


def _as_e8m0(scales: Array) -> Array:
    """Exponents x of 2^(x - 128), which is half of what the byte means elsewhere: numbers are
    doubled."""
    exponents = np.where(scales > 0, np.frexp(scales)[1] + 127, 0)
    return exponents.astype(np.uint8)[..., None]


def _as_e4m3(scales: Array) -> Array:
    """The bytes of half as large numbers, for the same reason."""
    doubled = torch.from_numpy(2 * scales.astype(np.float32))
    return doubled.to(torch.float8_e4m3fn).view(torch.uint8).numpy()[..., None]


# What is held


@dataclass(frozen=True)
class Kind:
    """A type of blocks."""

    name: str
    size: int  # weights of a block
    numbers: tuple[int, ...]  # that codes 0, 1, ... stand for
    pack: Callable[[Array, Array], Array]
    scale_bytes: Callable[[Array], Array] = _as_float16
    shared: int = 0  # weights that share a scale, where they are not all of a block

    @property
    def per_scale(self) -> int:
        return self.shared or self.size

    def to_bytes(self, codes: Array, scales: Array, minima: Array | None = None) -> Array:
        """Codes [blocks, size] and scales [blocks, scales of a block] -> [blocks, bytes]."""
        parts = [scales] if minima is None else [scales, minima]
        held = np.concatenate(
            [self.scale_bytes(part).reshape(len(codes), -1) for part in parts], -1
        )
        return self.pack(codes.astype(np.uint8), held)


_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # doubled
_IQ4_NL = tuple(map(int, codebook.iq4_nl.table))
#: In the order in which they are tried: of fewer bits first.
KINDS = {
    kind.name: kind
    for kind in (
        Kind("Q1_0", 128, (-1, 1), _q1_0),
        Kind("TQ1_0", 256, (-1, 0, 1), _tq1_0),
        Kind("TQ2_0", 256, (-1, 0, 1), _tq2_0),
        Kind("Q4_0", 32, tuple(range(-8, 8)), _nibbles),
        Kind("IQ4_NL", 32, _IQ4_NL, _nibbles),
        Kind("MXFP4", 32, _FP4, _nibbles, _as_e8m0),
        Kind("NVFP4", 64, _FP4, _nvfp4, _as_e4m3, 16),
        Kind("Q4_1", 32, tuple(range(16)), _nibbles),
        Kind("Q8_0", 32, tuple(range(-128, 128)), _q8_0),
    )
}


class Held(NamedTuple):
    """Rows of levels [r, k] as a type's codes and scales."""

    kind: Kind
    codes: Tensor  # [r, k], int64
    scale: Tensor  # [r, 1], float32, as the file has it
    error: Tensor  # [r], float64: how far the farthest level is off; inf where no number is near
    same: bool  # whether levels are numbers of the type times a scale, which alone was rounded
    minimum: Tensor | None = None  # [r, 1], float32: that of Q4_1
    whole: float = 1.0  # the tensor's own scale, beside those of blocks: of NVFP4

    @property
    def is_exact(self) -> bool:
        """Every level is what a reader makes of it, bit for bit."""
        return not bool(self.error.any())

    @property
    def worst(self) -> float:
        """The largest error, as a share of its row's largest level."""
        return float(self.error.max()) if self.error.numel() else 0.0


class Levels:
    """A weight's levels [r, k], and what is found out about them once for all types."""

    def __init__(self, levels: Tensor, grid: Grid | None) -> None:
        self.given = levels.detach()
        self.wide = self.given.float()  # readers multiply in float32
        self.grid = grid
        self.eps = torch.finfo(self.given.dtype).eps
        self._found: tuple[Multiples, bool] | None = None
        self._fp4: tuple[Tensor, Tensor, Tensor] | None = None

    def some(self, count: int = 256) -> Levels:
        """Of so many rows, that of the largest level among them: what does not hold for them does
        not for all."""
        r = len(self.wide)
        if r <= count:
            return self
        rows = torch.linspace(0, r - 1, count, dtype=torch.float64).round().long()
        rows[0] = self.wide.abs().amax(-1).argmax()
        grid = self.grid
        if grid is not None:
            parts = (torch.as_tensor(part) for part in grid)
            grid = Grid(*(part[rows] if len(part) == r else part for part in parts))
        return Levels(self.given[rows], grid)

    @property
    def multiples(self) -> tuple[Multiples, bool]:
        """(whole multiples of a unit; whether all levels are, but for the rounding to their
        dtype)"""
        if self._found is None:
            found = None
            if self.grid is not None:
                found = as_multiples(self.given, self.grid, torch.float32)
                if not bool(found.is_exact.all()):
                    found = as_multiples(self.given, self.grid, self.given.dtype)
                if not bool(found.is_exact.all()):
                    found = None
            if found is None:
                found = even_grid(self.wide, -8, 8, rounded=7)
            self._found = found, bool(found.is_exact.all())
        return self._found

    @property
    def fp4(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._fp4 is None:
            self._fp4 = self.times(_FP4)
        return self._fp4

    def times(self, numbers: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """(codes [r, k], units [r, 1] in float64, fits [r]): levels as a unit times numbers of a
        table; where they are none, the nearest ones to the unit that holds the farthest level."""
        wide = self.wide.double()
        table, order = torch.tensor(numbers, dtype=torch.float64, device=wide.device).sort()
        top = wide.gather(1, wide.abs().argmax(-1, keepdim=True))
        ends = sorted({n for n in numbers if n}, key=abs, reverse=True)
        if set(ends) == {-n for n in ends}:  # of a scale that is positive
            top, ends = top.abs(), [n for n in ends if n > 0]
        codes, units = torch.zeros_like(wide, dtype=torch.int64), torch.zeros_like(top)
        fits = torch.zeros(len(wide), dtype=torch.bool, device=wide.device)
        near = 4 * self.eps * top.abs()
        for end in ends:
            unit = top / end
            ratio = torch.where(top == 0, 0.0, wide / torch.where(top == 0, 1.0, unit))
            found = nearest_codes(ratio, table)
            off = (table[found] * unit - wide).abs()
            fit = (off <= near).all(-1)
            better = (fit & ~fits) if end != ends[0] else torch.ones_like(fit)
            codes = torch.where(better.unsqueeze(-1), order[found], codes)
            units = torch.where(better.unsqueeze(-1), unit, units)
            fits = fits | fit
            if bool(fits.all()):
                break
        return codes, units, fits


def nearest_codes(x: Tensor, table: Tensor) -> Tensor:
    """Which number of a sorted table is nearest to each."""
    return torch.bucketize(x, (table[1:] + table[:-1]) / 2)


def match(kind: Kind, levels: Levels) -> Held:
    """How a type holds levels, its scales rounded to what the file has."""
    if kind.name == "Q4_1":
        return _with_minimum(kind, levels)
    if kind.numbers in (_FP4, _IQ4_NL):
        of_table = levels.fp4 if kind.numbers == _FP4 else levels.times(kind.numbers)
        return _of_table(kind, levels, *of_table)
    found, even = levels.multiples
    if kind.name == "Q8_0" and not even and bool(levels.fp4[2].all()):
        codes, units, _ = levels.fp4
        multiples = torch.tensor(_FP4, device=codes.device)[codes]
        return _of_multiples(kind, levels, multiples, units.float(), True)
    held = _of_multiples(kind, levels, found.multiples, found.unit, even)
    if held.same or kind.name not in ("Q4_0", "Q8_0"):
        return held
    found = even_grid(levels.wide, -8, 8, rounded=-kind.numbers[0] - 1)  # the nearest ones
    return _of_multiples(kind, levels, found.multiples, found.unit, False)


def _of_multiples(kind: Kind, levels: Levels, multiples: Tensor, unit: Tensor, even: bool) -> Held:
    numbers = torch.tensor(kind.numbers, device=multiples.device)
    low, high = kind.numbers[0], kind.numbers[-1]
    turned = (multiples.amin(-1, keepdim=True) < low) | (multiples.amax(-1, keepdim=True) > high)
    sign = torch.where(turned, -1, 1)
    multiples, unit = sign * multiples, sign * unit
    codes = torch.searchsorted(numbers, multiples.contiguous()).clamp(max=len(numbers) - 1)
    inside = bool((numbers[codes] == multiples).all())
    return _held(kind, levels, codes, unit.half().float(), even and inside)


def _of_table(kind: Kind, levels: Levels, codes: Tensor, units: Tensor, fits: Tensor) -> Held:
    same = bool(fits.all())
    if kind.name == "MXFP4":  # a scale of few exponents and no digits is no rounded one
        scale = torch.where(units > 0, to_e8m0(2 * units.float()) / 2, 0.0)
        return _held(kind, levels, codes, scale, same and torch.equal(scale, units.float()))
    if kind.name != "NVFP4":
        return _held(kind, levels, codes, units.half().float(), same)
    top = float(units.abs().max()) if len(units) else 0.0
    best = None
    wholes = [1.0]
    if top > 0 and levels.wide.shape[1] == 15:  # those of nvfp4: t, whose largest scale is 448
        wholes.append(float(torch.tensor(top / 224.0).float()))
    for whole in wholes:
        share = (2 * units / whole).float()
        scale = to_format(share.clamp(0.0, 448.0), "e4m3") / 2
        near = (scale.double() * whole - units).abs() <= 2 * levels.eps * units
        held = _held(kind, levels, codes, scale, same and bool(near.all()), whole=whole)
        if best is None or held.worst < best.worst:
            best = held
        if held.is_exact:
            break
    return best if best is not None else _held(kind, levels, codes, 0 * units.float(), same)


def _with_minimum(kind: Kind, levels: Levels) -> Held:
    wide = levels.wide.double()
    k = wide.shape[1]
    first, last = wide[:, :1], wide[:, -1:]
    step = (last - first) / (k - 1 if 1 < k <= 16 else 15)
    codes = torch.where(step == 0, 0.0, (wide - first) / torch.where(step == 0, 1.0, step))
    codes = codes.round().clamp(0, 15).to(torch.int64)
    near = 4 * levels.eps * wide.abs().amax(-1, keepdim=True)
    same = bool(((first + step * codes - wide).abs() <= near).all())
    scale, minimum = step.half().float(), first.half().float()
    return _held(kind, levels, codes, scale, same, minimum)


def _held(
    kind: Kind, levels: Levels, codes: Tensor, scale: Tensor, same: bool,
    minimum: Tensor | None = None, whole: float = 1.0,
) -> Held:  # fmt: skip
    numbers = torch.tensor(kind.numbers, dtype=torch.float32, device=codes.device)
    made = scale * numbers[codes] * whole
    made = made if minimum is None else made + minimum
    error = (made.double() - levels.wide.double()).abs().amax(-1)
    share = error / levels.wide.double().abs().amax(-1).clamp(min=1e-300)
    share = torch.where(made.isfinite().all(-1) & share.isfinite(), share, torch.inf)
    return Held(kind, codes, scale, share, same, minimum, whole)
