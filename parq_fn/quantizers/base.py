"""What every quantizer does: rows [r, n] -> levels [r, k], and the nearest of them."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from parq_fn.foundation.scalar import concrete, is_plain
from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import Value, value
from parq_fn.proxmaps.levels import nearest
from parq_fn.quantizers.reductions import largest, pieces

_FAR = 2.0**32  # up to here, and down to its inverse, squares and sums are in range


@value
class Quantizer(Value):
    """Base of the quantizers. A new one gives `num_levels` and `levels(x)`.

    `levels` may rely on x [r, n] being float32 or float64, finite, with n >= 1 and each row
    scaled by a power of two so that its largest magnitude lies in [1, 2) (zeros stay zeros);
    it returns [r, k] sorted levels, each row from its own row of x alone. The base sees to
    the rest: dtypes, scaling, empty and non-finite rows.

    >>> import torch
    >>> from parq_fn.quantizers import Quantizer
    >>> class sign_times_max(Quantizer):
    ...     num_levels = 2
    ...     def levels(self, x):
    ...         top = x.abs().amax(-1, keepdim=True)
    ...         return torch.cat([-top, top], -1)
    >>> sign_times_max()(torch.tensor([[0.5, -3.0]]))
    tensor([[-3.,  3.]])
    """

    #: Whether levels(2^i x) = 2^i levels(x), bit for bit; then only rows far from 1 are scaled,
    #: which takes a copy of them.
    homogeneous: ClassVar[bool] = False

    @property
    def telling(self) -> bool:
        """Whether levels(x) of a homogeneous quantizer tell of any row x whether it is finite and
        near 1: the largest of a row is at most 8 max|x| and at least mean|x| / 8, infinite where
        that sum is, and NaN where x holds one. Then rows need no look of their own.

        A subclass with other levels says so for itself.
        """
        return False

    @property
    def num_levels(self) -> int:
        """k, the number of levels of every row."""
        raise NotImplementedError(f"{type(self).__name__} must define num_levels")

    @property
    def traits(self) -> QuantizerTraits:
        """What it declares, for `parq_fn.testing`: here what the base sees to."""
        return QuantizerTraits(scale_exact=True, widens=True)

    def levels(self, x: Tensor) -> Tensor:
        """Prepared rows [r, n] -> levels [r, k]; see the class."""
        raise NotImplementedError(f"{type(self).__name__} must define levels")

    def fit(self, rows: Tensor) -> Tensor:
        """Levels [r, k] of rows [r, n], in their dtype, without a look at their values.

        Computed in float32 or better, then rounded. A row that holds NaN or an infinity gets
        NaN levels and leaves the other rows alone; an empty row gets zeros.
        """
        if rows.shape[-1] == 0:
            return rows.new_zeros((*rows.shape[:-1], self.num_levels))
        # laid out in one way, for the order of a sum follows memory
        x = rows.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()
        end = torch.finfo(rows.dtype).max
        levels = torch.cat([self._fit(piece) for piece in pieces(x, 0)])
        return levels.clamp(-end, end).to(rows.dtype)

    def _fit(self, x: Tensor) -> Tensor:
        if self.telling and is_plain(x):
            levels = self.levels(x)
            # max|x| is 1/8 of a level at least, and n mean|x| at most
            last = levels[:, -1]
            if bool(((last * (_FAR / 8) > 1) & (last * (8 * x.shape[1]) < _FAR)).all()):
                return levels
        top = largest(x)
        finite = top.isfinite()
        usable = concrete(finite.all())
        if not usable:
            x, top = torch.where(finite, x, 0.0), torch.where(finite, top, 0.0)
        scale = power_of_two(top)
        near = self.homogeneous and concrete(((top * _FAR > 1) & (top < _FAR)).all())
        levels = self.levels(x if near else x / scale)
        if levels.shape != (*x.shape[:-1], self.num_levels):
            raise ValueError(
                f"{self!r}: levels(x) has shape {tuple(levels.shape)}, expected "
                f"{(*x.shape[:-1], self.num_levels)}: [r, num_levels]"
            )
        levels = levels if near else levels * scale
        return levels if usable else torch.where(finite, levels, torch.nan)

    def __call__(self, rows: Tensor) -> Tensor:
        """Levels [r, k] of rows [r, n], in their dtype, sorted.

        Raises TypeError unless the rows are floating, ValueError unless they are [r, n] and,
        where values can be read (eager, on the CPU), finite.
        """
        if not isinstance(rows, Tensor):
            raise TypeError(f"{self!r} takes rows as a tensor, got {type(rows).__name__}")
        if not rows.is_floating_point():
            raise TypeError(f"{self!r} takes rows of a floating dtype, got {rows.dtype}")
        if rows.dim() != 2:
            raise ValueError(
                f"{self!r} takes rows [r, n], got shape {tuple(rows.shape)}; "
                "a granularity makes rows of a weight: per_channel().rows(weight)"
            )
        bad = concrete((~rows.isfinite()).any(-1).sum())
        if bad:
            raise ValueError(f"{self!r} takes finite rows, got NaN or infinity in {bad} row(s)")
        return self.fit(rows)

    def nearest(self, rows: Tensor, levels: Tensor) -> Tensor:
        """The nearest level of each weight [r, n], a tie going to the lower level."""
        return nearest(rows, levels)


def power_of_two(top: Tensor) -> Tensor:
    """2 ** floor(log2 top), held to the range whose inverse is normal; 1 for 0.

    The exponent bits of the largest magnitude: exact, so that scaling by it rounds nothing, and
    squares of huge or tiny rows neither overflow nor vanish.
    """
    top = top.detach()
    wide = top.dtype == torch.float64
    bits, mask = (torch.int64, 0x7FF0000000000000) if wide else (torch.int32, 0x7F800000)
    tiny = torch.finfo(top.dtype).tiny
    power = (top.view(bits) & mask).view(top.dtype).clamp(tiny, 1 / tiny)
    return torch.where(top > 0, power, 1.0)


def mirror(positive: Tensor) -> Tensor:
    """Sorted magnitudes [r, k/2] -> the levels [r, k] of both signs."""
    return torch.cat([-positive.flip(-1), positive], -1)


def with_zero(top: Tensor) -> Tensor:
    """A magnitude [r, 1] -> the ternary levels -top, 0, top."""
    return torch.cat([-top, torch.zeros_like(top), top], -1)
