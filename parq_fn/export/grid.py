"""Evenly spaced levels: whole multiples of one unit a row, as integer formats hold them.

The step and the first multiple are those that a quantizer had (`Packed.grid`), or the levels say
them (`told`); `as_multiples` takes them as they are. Of other levels `even_grid` searches a unit
that all of them are multiples of, and rounds them where there is none.

A level is l = round(n u), n whole, u the row's unit in float32 and the rounding that of the levels'
dtype, so that a consumer that multiplies in float32 has the level bit for bit. Levels without a
zero such as u (2 j + 1) are odd multiples: of 2 u they are j + 1/2, see `halved`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.value import same
from parq_fn.quantizers.base import Grid, Quantizer

_FARTHEST = 2.0**60  # of multiples, which become int64

# The grid that levels are packed with.


def told(levels: Tensor) -> Grid | None:
    """The grid that levels [r, k] say themselves: the step is the least magnitude of a row, or,
    where no level is 0, twice that; None unless all rows' levels follow from theirs, bit for bit.

    Only of levels in float32 or better this is the step that they were made of: in others they are
    rounded.

    >>> told(torch.tensor([[-3.0, -1.0, 1.0, 3.0]]))
    Grid(step=tensor([[2.]]), first=tensor([[-1.5000]]), last=tensor([[1.5000]]))
    """
    wide = levels.detach().to(wider(levels))
    if not wide.numel():
        return None
    magnitude = wide.abs()
    least = torch.where(magnitude > 0, magnitude, torch.inf).amin(-1, keepdim=True)
    zero, whole = least.isinf(), (magnitude == 0).any(-1, keepdim=True)
    step = torch.where(zero, 0.0, torch.where(whole, least, 2 * least))
    ratio = wide[:, :1] / step
    first = torch.where(whole, ratio.round(), ratio.floor() + 0.5)
    some = first[(~zero).to(torch.uint8).argmax()] if not bool(zero.all()) else 0.0
    grid = _tensors(step, torch.where(zero, some, first), levels)
    return grid if _gives(grid, levels) else None


def grid_of(quantizer: Any, qparams: Tensor, levels: Tensor) -> Grid | None:
    """What `Packed.grid` is of a quantizer's levels [r, k], those of qparams [r, m]; None too where
    they are other multiples: levels that were held to their dtype's range."""
    grid = quantizer.known_grid(qparams) if isinstance(quantizer, Quantizer) else None
    return kept_grid(grid, levels) if grid is not None and _gives(grid, levels) else None


def kept_grid(grid: Grid | None, levels: Tensor) -> Grid | None:
    """The grid of levels [r, k], as a quantizer has it, as `Packed` keeps it: in tensors, and None
    where the levels say it."""
    if grid is None:
        return None
    found = _tensors(grid.step, grid.first, levels)
    return None if same(found, told(levels)) else found


def check_grid(grid: Grid, levels: Tensor) -> None:
    """Raises ValueError unless a grid, as `kept_grid` gives it, is one of levels [r, k]."""
    dtype, r = wider(levels), len(levels)
    for what, part, rows in (("step", grid.step, [r]), ("first multiple", grid.first, [r, 1])):
        if not isinstance(part, Tensor) or part.dtype != dtype or part.dim() != 2:
            raise ValueError(
                f"the {what} of levels in {levels.dtype} is {part!r}, not [r, 1] in {dtype}"
            )
        if part.shape[0] not in rows or part.shape[1] != 1:
            raise ValueError(f"the {what} of {r} rows of levels has the shape {tuple(part.shape)}")
    if not bool((torch.as_tensor(grid.first).abs() <= _FARTHEST).all()):
        raise ValueError(
            f"a first multiple is {grid.first!r}, expected one up to 2^60 in magnitude"
        )
    if not _gives(grid, levels):
        raise ValueError("levels are not those of their grid, step * (first + 0, 1, ...)")


def _gives(grid: Grid, levels: Tensor) -> bool:
    return torch.equal(grid.levels(levels.shape[1]).to(levels.dtype), levels)


def wider(levels: Tensor) -> torch.dtype:
    """The dtype of what levels follow from."""
    return torch.promote_types(levels.dtype, torch.float32)


def _tensors(step: Tensor, first: Tensor | float, levels: Tensor) -> Grid:
    """A grid with first [r, 1], or [1, 1] where all rows agree in it."""
    dtype, (r, k) = wider(levels), levels.shape
    step = step.detach().to(dtype).reshape(r, 1).contiguous()
    first = torch.as_tensor(first, dtype=dtype, device=step.device).detach().reshape(-1, 1)
    if len(first) > 1 and bool((first == first[:1]).all()):
        first = first[:1]
    first = first.contiguous()
    return Grid(step, first, first + (k - 1))


# Multiples, as formats hold them.


class Multiples(NamedTuple):
    """Rows of levels as multiples of a unit."""

    multiples: Tensor  # [r, k], int64
    unit: Tensor  # [r, 1], float32
    error: Tensor  # [r], float64: the largest |level - multiple * unit|; 0 where bit-equal
    half: bool = False  # whether each level is half a unit more than its multiple of it

    @property
    def is_exact(self) -> Tensor:
        """[r], bool: every level of the row is its multiple of the unit, bit for bit."""
        return self.error == 0

    def within(self, low: int, high: int) -> Tensor:
        """[r], bool: the row is exact, and its multiples are low .. high."""
        return self.is_exact & (self.multiples.amin(-1) >= low) & (self.multiples.amax(-1) <= high)


def as_multiples(
    levels: Tensor, grid: Grid, dtype: torch.dtype, *, halves: bool = False
) -> Multiples:
    """Levels [r, k] as multiples of their grid's step, for a reader that multiplies in float32 and
    rounds to this dtype.

    The unit is the step as it is. Half multiples are given as such with `halves`, else as odd ones
    of half a step. In rows of which that is not exact (levels were rounded to fewer bits than the
    reader's) it is the step rounded to the levels' dtype, where that is.

    >>> levels = torch.tensor([[-0.3, -0.1, 0.1, 0.3]])
    >>> as_multiples(levels, told(levels), torch.float32, halves=True)[:2]
    (tensor([[-2, -1,  0,  1]]), tensor([[0.2000]]))
    """
    levels, step = levels.detach(), grid.step
    numbers = grid._replace(step=torch.ones_like(step)).levels(levels.shape[1])
    fraction = numbers % 1
    half = halves and bool((fraction == 0.5).all())
    if not half and bool((fraction != 0).any()):
        numbers, step = 2 * numbers, step / 2
    multiples = (numbers - 0.5 * half).round().to(torch.int64)
    units = step.float(), step.to(levels.dtype).float()
    own, other = (_error(levels.to(dtype), multiples, unit, half) for unit in units)
    better = (own != 0) & (other == 0)
    unit = torch.where(better.unsqueeze(-1), units[1], units[0])
    return Multiples(multiples, unit, torch.where(better, other, own), half)


def even_grid(levels: Tensor, low: int = -255, high: int = 255, rounded: int = 127) -> Multiples:
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
    return Multiples(multiples.to(torch.int64), unit, _error(levels, multiples, unit))


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


def off_grid(
    name: str, levels: Tensor, error: Tensor, reason: str, rounded: bool, grid: Grid | None = None
) -> None:
    """Raises ValueError, with the parameter's name and the worst row, whose zero point is told, for
    levels that a format does not hold exactly; with `rounded` it warns how far they are off."""
    if not bool(error.isfinite().all()):
        raise ValueError(f"parameter {name!r}: levels are not finite, or not in the format's range")
    share = error / levels.double().abs().amax(-1).clamp(min=1e-300)
    worst = int(share.argmax())
    row, off = [round(level, 6) for level in levels[worst].tolist()], f"{float(share[worst]):.2g}"
    about = f"parameter {name!r}: levels of row {worst}, {row}, are not {reason}"
    if grid is not None:
        first, last = (torch.as_tensor(end).expand(len(levels), 1) for end in grid[1:])
        if float(first[worst]) != -float(last[worst]):
            about += f" (their zero point is {-float(first[worst]):g})"
    if not rounded:
        raise ValueError(f"{about}; rounded=True rounds them, off by up to {off} of the largest")
    warnings.warn(f"{about}; rounded, off by up to {off} of the largest", stacklevel=5)


def halved(found: Multiples) -> Multiples:
    """Odd multiples 2 j + 1 of u as j, for j + 1/2 of 2 u; as they are where not all are odd."""
    if found.half or bool((found.multiples % 2 == 0).any()):
        return found
    return Multiples((found.multiples - 1) // 2, 2 * found.unit, found.error, True)


def shifted(found: Multiples) -> tuple[Tensor, Tensor, int]:
    """(codes [r, k] and zero points [r, 1] with code - zero point = multiple; bits b), the codes
    and zero points in -2^(b-1) .. 2^(b-1) - 1, and b as small as all rows allow. Zero points are
    as near to 0 as they can be.

    >>> codes, zero, bits = shifted(even_grid(torch.tensor([[0.0, 1.0, 2.0, 3.0]])))
    >>> codes, zero, bits
    (tensor([[-2, -1,  0,  1]]), tensor([[-2]]), 2)
    """
    low, high = found.multiples.amin(-1, keepdim=True), found.multiples.amax(-1, keepdim=True)
    bits = max(1, int((high - low).max()).bit_length())
    while True:
        half = 2 ** (bits - 1)
        least, most = (-half - low).clamp(min=-half), (half - 1 - high).clamp(max=half - 1)
        if bool((least <= most).all()):
            zero = torch.zeros_like(low).maximum(least).minimum(most)
            return found.multiples + zero, zero, bits
        bits += 1


def _error(levels: Tensor, multiples: Tensor, unit: Tensor, half: bool = False) -> Tensor:
    product = ((multiples.float() + 0.5 * half) * unit).to(levels.dtype)
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
