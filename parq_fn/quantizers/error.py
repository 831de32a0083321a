"""The error of rounding weights to a quantizer's levels."""

from __future__ import annotations

import math

from torch import Tensor

from parq_fn.quantizers.base import Quantizer


def relative_error(rows: Tensor, quantizer: Quantizer) -> float:
    """|x - nearest level|^2 / |x|^2 over all rows x [r, n], levels fitted to each row.

    >>> import torch
    >>> from parq_fn.quantizers import lsbq
    >>> relative_error(torch.tensor([[1.0, 2.0]]), lsbq(1))
    0.1
    """
    rows = rows.double()
    return error_of(quantizer.nearest(rows, quantizer(rows)), rows)


def error_of(rounded: Tensor, x: Tensor) -> float:
    """|x - rounded|^2 / |x|^2 in float64, of numbers of any size; 0 of zeros that stay."""
    x, off = x.double(), x.double() - rounded.double()
    top = float(x.abs().max()) if x.numel() else 0.0
    if not top:
        return math.inf if off.any() else 0.0
    return float((off / top).square().sum() / (x / top).square().sum())
