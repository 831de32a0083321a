"""Rounding to the numbers that a format of few bits holds, with the derivative of no rounding.

By the bits of the wider number: a compiler takes a cast to and fro for none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.quantizers.powers import power_below


class Format(NamedTuple):
    """Binary floating-point numbers of few bits."""

    mantissa: int  # bits of the fraction
    least: int  # exponent of the smallest normal number
    largest: float


#: What numbers are rounded to, by the dtype that has them.
FORMATS: dict[Any, Format] = {
    torch.float16: Format(10, -14, 65504.0),
    torch.bfloat16: Format(7, -126, (2 - 2.0**-7) * 2.0**127),
    "e4m3": Format(3, -6, 448.0),
}


def to_format(x: Tensor, dtype: torch.dtype | str) -> Tensor:
    """The nearest number of that format, of two the even one, the largest for what is beyond it;
    in the dtype of x, float32 or float64. Its derivative is 1.

    >>> to_format(torch.tensor([1.01, 1e9, 1e-9]), torch.float16)
    tensor([1.0098e+00, 6.5504e+04, 0.0000e+00])
    """
    mantissa, least, largest = FORMATS[dtype]
    bits, own = (torch.int64, 52) if x.dtype == torch.float64 else (torch.int32, 23)
    held = x.detach().clamp(-largest, largest)
    drop = own - mantissa
    raw = held.view(bits)
    raw = raw + ((raw >> drop) & 1) + ((1 << (drop - 1)) - 1)
    normal = torch.where(held.isnan(), held, (raw >> drop << drop).view(x.dtype))
    shift = 1.5 * 2.0 ** (least - mantissa + own)  # next to it numbers are as far apart as here
    subnormal = (held + shift) - shift
    return _passing(torch.where(held.abs() < 2.0**least, subnormal, normal), x)


def to_e8m0(x: Tensor) -> Tensor:
    """The power of two at or below x >= 0, from 2^-127 to 2^127; of 0 it is 0. Its derivative is
    1.

    >>> to_e8m0(torch.tensor([0.0, 1.0, 7.9]))
    tensor([0., 1., 4.])
    """
    own = x.detach()
    power = power_below(own).clamp(2.0**-127, 2.0**127)
    return _passing(torch.where(own > 0, power, own), x)


def _passing(rounded: Tensor, x: Tensor) -> Tensor:
    """`rounded`, bit for bit, with the derivative of x: what is taken away is 0."""
    return rounded - (x.detach() - x)
