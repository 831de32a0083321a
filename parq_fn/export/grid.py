"""Levels that are evenly spaced: whole multiples of one unit a row, as integer formats hold them.

A level is l = round(n u), n whole, u the row's unit in float32 and the rounding that of the levels'
dtype, so that a consumer that multiplies in float32 has the level bit for bit. Levels without a
zero such as u (2 j + 1) are odd multiples: of 2 u they are j + 1/2, see `halved`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Rows of levels as multiples of a unit."""

    multiples: Tensor  # [r, k], int64
    unit: Tensor  # [r, 1], float32, positive
    error: Tensor  # [r], float64: the largest |level - multiple * unit|; 0 where bit-equal

    @property
    def is_exact(self) -> Tensor:
        """[r], bool: every level of the row is its multiple of the unit, bit for bit."""
        return self.error == 0


def even_grid(levels: Tensor, low: int = -255, high: int = 255, rounded: int = 127) -> Grid:
    """The levels [r, k] as multiples low .. high of a unit.

    Where no unit has all of a row's levels as multiples, the unit max|level| / rounded, with the
    levels rounded to its multiples.

    >>> even_grid(torch.tensor([[-3.0, -1.0, 1.0, 3.0], [0.0, 0.5, 1.0, 1.5]])).multiples
    tensor([[-3, -1,  1,  3],
            [ 0,  1,  2,  3]])
    >>> even_grid(torch.tensor([[-3.14159, -1.0, 1.0, 3.14159]])).is_exact
    tensor([False])
    """
    wide = levels.detach().to(torch.float64)
    magnitude = wide.abs()
    top = magnitude.amax(-1, keepdim=True)
    smallest = torch.where(magnitude > 0, magnitude, torch.inf).amin(-1, keepdim=True)
    smallest = torch.where(top > 0, smallest, 1.0)  # a row of zeros is 0 times 1
    unit, multiples = torch.ones_like(top).float(), torch.zeros_like(wide)
    error = torch.full_like(top.squeeze(-1), torch.inf)
    for part in range(1, max(-low, high) + 1):  # the smallest level is so many units
        for nearest in (_nearest_odd, torch.round):
            if not bool((_may_be(levels, smallest / part, nearest) & (error != 0)).any()):
                continue
            found = _found(levels, smallest / part, nearest)
            fits = (found.amin(-1) >= low) & (found.amax(-1) <= high)
            for candidate in _units(levels, found):
                better = fits & (error != 0) & (_error(levels, found, candidate) == 0)
                multiples = torch.where(better.unsqueeze(-1), found, multiples)
                unit = torch.where(better.unsqueeze(-1), candidate, unit)
                error = torch.where(better, 0.0, error)
        if bool((error == 0).all()):
            break
    near = torch.where(top > 0, top / rounded, 1.0).float()
    rough = (wide / near).round()
    off = (error != 0).unsqueeze(-1)
    multiples, unit = torch.where(off, rough, multiples), torch.where(off, near, unit)
    return Grid(multiples.to(torch.int64), unit, _error(levels, multiples, unit))


def _nearest_odd(ratio: Tensor) -> Tensor:
    """Odd numbers lie further apart, so that levels of few digits tell more of them."""
    return 2 * (ratio / 2).floor() + 1


def _may_be(levels: Tensor, unit: Tensor, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    """[r], bool: all levels lie near multiples of the unit, which is known to a last place of the
    smallest level."""
    ratio = levels.double() / unit
    off = (ratio - nearest(ratio)).abs()
    return (off <= 2 * torch.finfo(levels.dtype).eps * ratio.abs() + 1e-9).all(-1)


def _found(levels: Tensor, unit: Tensor, nearest: Callable[[Tensor], Tensor]) -> Tensor:
    """The multiples that the levels are of about this unit, which the small ones tell better, and
    then all."""
    wide = levels.double()
    for bound in (16, 64, 256, 256):
        found = nearest(wide / unit)
        told = torch.where(found.abs() <= bound, found, 0.0)
        better = _units(levels, told)[0].double()
        unit = torch.where((told != 0).any(-1, keepdim=True), better, unit)
    return nearest(wide / unit)


def off_grid(name: str, levels: Tensor, error: Tensor, reason: str, rounded: bool) -> None:
    """Raises ValueError, with the parameter's name and the worst row, for levels that a format
    does not hold exactly; with `rounded` it warns how far they are off instead."""
    if not bool(error.isfinite().all()):
        raise ValueError(f"parameter {name!r}: levels are not finite, or not in the format's range")
    share = error / levels.double().abs().amax(-1).clamp(min=1e-300)
    worst = int(share.argmax())
    row, off = [round(level, 6) for level in levels[worst].tolist()], f"{float(share[worst]):.2g}"
    about = f"parameter {name!r}: levels of row {worst}, {row}, are not {reason}"
    if not rounded:
        raise ValueError(f"{about}; rounded=True rounds them, off by up to {off} of the largest")
    warnings.warn(f"{about}; rounded, off by up to {off} of the largest", stacklevel=5)


def halved(grid: Grid) -> Grid:
    """Odd multiples 2 j + 1 of u as j, for j + 1/2 of 2 u.

    Raises ValueError where a multiple is even.
    """
    if bool((grid.multiples % 2 == 0).any()):
        raise ValueError("levels are not all odd multiples of one unit")
    return Grid((grid.multiples - 1) // 2, 2 * grid.unit, grid.error)


def shifted(grid: Grid) -> tuple[Tensor, Tensor, int]:
    """(codes [r, k] and zero points [r, 1] with code - zero point = multiple; bits b), the codes
    and zero points in -2^(b-1) .. 2^(b-1) - 1, and b as small as all rows allow. Zero points are
    as near to 0 as they can be.

    >>> codes, zero, bits = shifted(even_grid(torch.tensor([[0.0, 1.0, 2.0, 3.0]])))
    >>> codes, zero, bits
    (tensor([[-2, -1,  0,  1]]), tensor([[-2]]), 2)
    """
    low, high = grid.multiples.amin(-1, keepdim=True), grid.multiples.amax(-1, keepdim=True)
    bits = max(1, int((high - low).max()).bit_length())
    while True:
        half = 2 ** (bits - 1)
        least, most = (-half - low).clamp(min=-half), (half - 1 - high).clamp(max=half - 1)
        if bool((least <= most).all()):
            zero = torch.zeros_like(low).maximum(least).minimum(most)
            return grid.multiples + zero, zero, bits
        bits += 1


def _error(levels: Tensor, multiples: Tensor, unit: Tensor) -> Tensor:
    product = (multiples.float() * unit).to(levels.dtype)
    return (product.double() - levels.double()).abs().amax(-1)


def _units(levels: Tensor, multiples: Tensor) -> list[Tensor]:
    """Units that may have the levels, rounded to their dtype, as those multiples.

    A level l says of the unit that it lies within (|l| -+ half its last place) / |n|; the middle
    and the ends of what all of a row's levels say, and the float32 numbers beside each, for the
    product is rounded to float32 first.
    """
    wide, whole = levels.double().abs(), multiples.abs()
    info = torch.finfo(levels.dtype)
    half = torch.ldexp(info.eps / 4 * (wide > 0), wide.frexp().exponent)
    half = half.clamp(min=info.smallest_normal * info.eps / 2)
    low = torch.where(whole > 0, (wide - half) / whole, 0.0).amax(-1, keepdim=True)
    high = torch.where(whole > 0, (wide + half) / whole, torch.inf).amin(-1, keepdim=True)
    found = high.isfinite()
    ends = [torch.where(found, end, 1.0).float() for end in ((low + high) / 2, low, high)]
    infinity = torch.tensor(torch.inf)
    return [u for end in ends for u in (end, end.nextafter(infinity), end.nextafter(-infinity))]
