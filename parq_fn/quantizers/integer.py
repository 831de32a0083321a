"""Signed integers times a scale."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from parq_fn.foundation.checks import check_whole
from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import value
from parq_fn.quantizers.base import Grid, Quantizer, under
from parq_fn.quantizers.reductions import largest, mean


@value
class integer(Quantizer):
    """2^b levels j * a, j = -2^(b-1) .. 2^(b-1) - 1: the signed integers of b bits.

    The scale a of a row x:

    - "max": max(max(x) / (2^(b-1) - 1), -min(x) / 2^(b-1)), the least without clipping.
    - "max_symmetric": max|x| / ((2^b - 1) / 2), which clips positive weights by up to half a step.
    - "mean": 2 mean|x| / sqrt(2^(b-1) - 1).

    Rows [r, n] -> qparams [r, 1], a -> levels [r, 2^b], bits b in 2..8. Raises ValueError for other
    bits or scales.

    >>> import torch
    >>> integer(2)(torch.tensor([[0.3, -3.0]]))
    tensor([[-3.0000, -1.5000,  0.0000,  1.5000]])

    Source: torchao's SYMMETRIC_NO_CLIPPING_ERR ("max") and SYMMETRIC, which is its
    UnifTorchaoQuantizer ("max_symmetric"); Esser et al., LSQ, arXiv 1902.08153, whose first scale
    is "mean".
    """

    #: 2^bits levels.
    bits: int
    #: What the scale follows from.
    scale: Literal["max", "max_symmetric", "mean"] = "max"
    homogeneous = True
    telling = True
    num_qparams = 1
    positive = (True,)

    def __post_init__(self) -> None:
        check_whole("integer", 2, 8, bits=self.bits)
        if self.scale not in ("max", "max_symmetric", "mean"):
            raise ValueError(
                f"integer: scale must be 'max', 'max_symmetric' or 'mean', got {self.scale!r}"
            )

    @property
    def num_levels(self) -> int:
        return int(2**self.bits)

    @property
    def extremes(self) -> bool:
        return self.scale != "mean"

    @property
    def largest_code(self) -> float:
        return float(self.num_levels // 2 - 1)

    @property
    def traits(self) -> QuantizerTraits:
        return replace(
            super().traits,
            evenly_spaced=True,
            includes_zero=True,
            exact_on_constants=self.scale == "max",
            idempotent=self.scale == "max",
            scale=True,
            repetition=True,
        )

    def qparams(self, x: Tensor) -> Tensor:
        half = self.num_levels // 2
        if self.scale == "mean":
            return mean(x, torch.abs) * (2 / math.sqrt(half - 1))
        if self.scale == "max_symmetric":
            return largest(x) / (half - 0.5)
        low, high = x.aminmax(dim=-1, keepdim=True)
        return torch.maximum(high / (half - 1), -low / half)

    def levels_within(self, qparams: Tensor, end: float) -> Tensor:
        return self.levels(under(qparams, end, self.num_levels / 2))

    def grid(self, qparams: Tensor) -> Grid:
        half = float(self.num_levels // 2)
        return Grid(qparams, -half, half - 1)
