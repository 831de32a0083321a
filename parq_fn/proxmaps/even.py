"""Evenly spaced levels, whose cells are found by rounding instead of searching.

Level i of a row is what a table of its levels holds: step * i, i = first, first + 1, ..., rounded
to the dtype of the weights. With t = x / step the ends of a weight's cell are, but for rounding,
floor(t) and its successor, and the boundary next to it is one of two neighbours. One comparison
with what stands there in a table decides, so that cells and nearest levels are those of the
search, bit for bit.

Whether the rounding may be trusted depends on the rows, see `inverse_of`. Where that cannot be
read (under vmap or a compiler, on a GPU) levels are searched as a table.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.scalar import concrete, is_plain, may_be_read

#: As tensors, for a number is made one at each operation.
_HALF, _ONE = torch.tensor(0.5, device="cpu"), torch.tensor(1.0, device="cpu")

#: Of fewer levels there are no cells to be found.
LEAST = 3
#: Up to so many levels, counting the bounds below a weight is faster than a rounding.
COUNTED_MAX = 4


class Even(NamedTuple):
    """Levels step * i, i = first, first + 1, ..., of each row, as dtype rounds them; two or more,
    for cells three. Those are of weights in the dtype of the inverse."""

    step: Tensor  # [r, 1]
    inverse: Tensor  # [r, 1], of the steps, as `inverse_of` gives it
    first: Tensor | float  # [r, 1] where rows differ in it, then whole numbers; else whole or half
    num_levels: int  # k
    dtype: torch.dtype
    #: Three [r, n] in dtype, which whoever gives them for plain weights and steps lends: the first
    #: for nearest levels, the others, good until the next call, for what is made on the way.
    room: tuple[Tensor, Tensor, Tensor] | None = None
    bound: Tensor | None = None  # [r, k - 1]: of levels of a table; where the nearest are counted

    def rows(self, s: slice) -> Even:
        """Those of some of the rows."""
        first = self.first[s] if isinstance(self.first, Tensor) else self.first
        bound = None if self.bound is None else self.bound[s]
        return self._replace(step=self.step[s], inverse=self.inverse[s], first=first, bound=bound)

    @property
    def last(self) -> Tensor | float:
        """The multiple of the highest level."""
        return self.first + (self.num_levels - 1)

    def level(self, multiple: Tensor | float) -> Tensor:
        """step * multiple as the table has it; for a tensor in its dtype, and memory of its own."""
        if not isinstance(multiple, Tensor):
            return (self.step * multiple).to(self.dtype).to(self.inverse.dtype)
        return (self.step * multiple.to(self.step.dtype)).to(self.dtype).to(multiple.dtype)

    def cell(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The ends (lo, hi) of each weight's cell: the neighbouring levels with lo < x <= hi.

        The lowest cell takes in what lies below it, the highest what lies above. NaN gives NaN.
        """
        if (room := self._memory(x)) is not None:
            _, hi, lo = room
            inner = self._inner(torch.mul(x, self.inverse, out=lo), True)
            torch.gt(x, torch.mul(inner, self.step, out=hi), out=hi)  # as floats, not slow bools
            torch.mul(inner.add_(hi), self.step, out=hi)
            return inner.sub_(_ONE).mul_(self.step), hi
        upper = self.upper_multiple(x)
        return self.level(upper - 1), self.level(upper)

    def upper_multiple(self, x: Tensor) -> Tensor:
        """What multiple of the step the upper end of each weight's cell is."""
        inner = self._inner(x.detach() * self.inverse, False)
        return inner + (x > self.level(inner)).to(inner.dtype)  # a sum that is 0 is not -0.0

    def closest(self, x: Tensor) -> Tensor:
        """The nearest level, the lower one in a tie; NaN for NaN."""
        # the midpoint is lo / 2 + hi / 2, for no level is near an end of the dtypes
        if (room := self._memory(x)) is not None:
            (lo, lower, hi), half = room, _HALF * self.step
            if self.bound is not None:
                return torch.mul(self._counted(x, self.bound, lower, hi), self.step, out=lo)
            lower = self._lower(torch.mul(x, self.inverse, out=lower), True)
            torch.mul(lower, half, out=lo)
            middle = torch.add(lower, _ONE, out=hi).mul_(half).add_(lo)
            lower.add_(torch.gt(x, middle, out=middle))
            return torch.mul(lower, self.step, out=lo)
        return self.level(self.nearest_multiple(x))

    def nearest_multiple(self, x: Tensor) -> Tensor:
        """What multiple of the step the nearest level is."""
        lower = self._lower(x.detach() * self.inverse, False)
        middle = (self.level(lower) + self.level(lower + 1)) * 0.5
        return lower + (x > middle).to(lower.dtype)  # a sum that is 0 is not -0.0

    def _inner(self, t: Tensor, in_place: bool) -> Tensor:
        """The multiple next to t of a level that is no outermost one. Takes the memory of t."""
        t = t.floor_().add_(_HALF if in_place else 0.5) if self._halves else t.round_()
        return _held(t, self.first + 1, self.last - 1, in_place)

    def _lower(self, t: Tensor, in_place: bool) -> Tensor:
        """The multiple next below the midpoint next to t. Takes the memory of t."""
        t = t.round_().sub_(_HALF if in_place else 0.5) if self._halves else t.floor_()
        return _held(t, self.first, self.last - 1, in_place)

    def _counted(self, x: Tensor, bound: Tensor, out: Tensor, above: Tensor) -> Tensor:
        """The multiple of the nearest level, of a number `first`."""
        first: Any = self.first
        torch.clamp(x, first, first, out=out)  # NaN stays NaN
        for i in range(self.num_levels - 1):
            out.add_(torch.gt(x, bound[..., i : i + 1], out=above))
        return out

    def _memory(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """What `room` is, where products with the step are the levels and nobody else looks on.

        Taken at once, for several pieces of memory are given back to the system and taken again
        each time.
        """
        if not x.dtype == self.step.dtype == self.dtype == self.inverse.dtype:
            return None
        if self.room is None and is_plain(x) and is_plain(self.step):
            one, other = x.new_empty(2, *x.shape)
            return torch.empty_like(x), one, other
        return self.room

    @property
    def _halves(self) -> bool:
        return isinstance(self.first, float) and not self.first.is_integer()


def _held(x: Tensor, low: Tensor | float, high: Tensor | float, in_place: bool) -> Tensor:
    """x held to [low, high], NaN staying NaN."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.minimum(torch.maximum(x, low), high)  # type: ignore[arg-type] # both are
    return x.clamp_(low, high) if in_place else x.clamp(low, high)  # which alone is batched


def inverse_of(
    step: Tensor, first: Tensor | float, count: int, dtype: torch.dtype
) -> Tensor | None:
    """1 / step [r, 1] where roundings find all cells of `Even` levels; None where they may not, or
    where that cannot be read.

    Let u be half of the dtype's eps, v that of the step's and of what the maps compute in, m the
    largest |i|, all distances in steps. A level is off by m v from its product, and then by m u or,
    of a subnormal level, by half of the dtype's smallest number s; a midpoint by m v more; x times
    the inverse, for x no further out than one step beyond the levels, by 2 (m + 1) v and a little.
    Rounding gives one of the right two neighbours where all of this is less than 1/2. So asked is

        m u + 4 (m + 1) v <= 0.499    and    s / 2 <= step / 8

    (127.5 u = 0.49805 is just within it: 256 levels in bfloat16). No sum of two levels overflows,
    no half of a level and no inverse is subnormal: 8 tiny <= step, 4 (m + 1) step <= largest. A
    step of 0, whose levels are all 0, takes any inverse; NaN gives NaN.
    """
    if count < 2 or not step.numel() or not may_be_read(step):
        return None
    known, wide = step.detach(), torch.promote_types(dtype, torch.float32)
    written, used = torch.finfo(dtype), [torch.finfo(step.dtype), torch.finfo(wide)]
    eps = max(info.eps for info in used)
    bound = (0.499 - 2 * eps) / (written.eps / 2 + 2 * eps)
    if isinstance(first, Tensor):
        most = concrete(torch.maximum(first.abs(), (first + (count - 1)).abs()).amax())
        if most is None:
            return None
    else:
        most = max(abs(first), abs(first + (count - 1)))
    if not most <= bound:
        return None
    low = max(4 * written.tiny * written.eps, *(8 * info.tiny for info in used))
    high = min(written.max, *(info.max for info in used)) / (4 * (most + 1))
    least, largest = concrete(known.amin()), concrete(known.amax())
    if least is None or largest is None:
        return None
    if low <= least and largest <= high:
        return known.reciprocal()
    usable = ~((known < low) | (known > high)) | (known == 0)
    if not concrete(usable.all()):
        return None
    return torch.where(known == 0, 1.0, known).reciprocal()
