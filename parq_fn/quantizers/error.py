"""The error of rounding weights to a quantizer's levels."""

from __future__ import annotations

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
    nearest = quantizer.nearest(rows, quantizer(rows))
    return float((rows - nearest).square().sum() / rows.square().sum())
