"""Powers of two, by which numbers are scaled without rounding."""

from __future__ import annotations

import torch
from torch import Tensor


def power_of_two(top: Tensor) -> Tensor:
    """2 ** floor(log2 top), held to the range whose inverse is normal; 1 for 0.

    Of the largest magnitude: exact, so that scaling by it rounds nothing, and
    squares of huge or tiny rows neither overflow nor vanish.
    """
    top = top.detach()
    tiny = torch.finfo(top.dtype).tiny
    return torch.where(top > 0, power_below(top).clamp(tiny, 1 / tiny), 1.0)


def power_below(x: Tensor) -> Tensor:
    """2 ** floor(log2 x) for normal numbers x > 0, by their exponent bits; 0 for subnormal ones."""
    wide = x.dtype == torch.float64
    bits, mask = (torch.int64, 0x7FF0000000000000) if wide else (torch.int32, 0x7F800000)
    return (x.view(bits) & mask).view(x.dtype)
