"""Evenly spaced levels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from parq_fn.foundation.checks import check_whole
from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import value
from parq_fn.quantizers.base import Quantizer, with_zero
from parq_fn.quantizers.reductions import itself, largest, mean, mean_and_largest


def around_mean(x: Tensor, center: bool, levels: Callable[[Tensor], Tensor]) -> Tensor:
    """levels(x), or with `center` levels(x - mean) + mean, the mean of each row [r, 1]."""
    if not center:
        return levels(x)
    middle = mean(x, itself)
    return levels(x - middle) + middle


def spaced(x: Tensor, first: float, last: float) -> Tensor:
    """first, first + 1, ..., last, in the dtype and on the device of x."""
    return torch.arange(first, last + 1, dtype=x.dtype, device=x.device)


@value
class uniform(Quantizer):
    """2^b levels (j + 1/2) * step, j = -2^(b-1) .. 2^(b-1) - 1: symmetric, without a zero.

    step = q_max / (2^(b-1) - 1/2), q_max = min(b mean|x|, max|x|) for scale "mean", max|x| for
    scale "max". With center=True the row mean is taken out first and added to the levels.

    Rows [r, n] -> levels [r, 2^b], bits b in 1..8. Raises ValueError for other bits or scales.

    >>> import torch
    >>> uniform(2, scale="max")(torch.tensor([[0.3, -3.0]]))
    tensor([[-3., -1.,  1.,  3.]])

    Source: Jin et al., PARQ, arXiv 2503.15748, section 5; scale "mean" after ParetoQ,
    arXiv 2502.02631.
    """

    bits: int
    scale: Literal["mean", "max"] = "mean"
    center: bool = False
    homogeneous = True

    def __post_init__(self) -> None:
        check_whole("uniform", 1, 8, bits=self.bits)
        if self.scale not in ("mean", "max"):
            raise ValueError(f"uniform: scale must be 'mean' or 'max', got {self.scale!r}")

    @property
    def num_levels(self) -> int:
        return int(2**self.bits)

    @property
    def traits(self) -> QuantizerTraits:
        return replace(
            super().traits,
            symmetric=not self.center,
            scale=True,
            sign=True,
            shift=self.center,
            repetition=True,
            exact_on_constants=True,
            idempotent=self.scale == "max" and not self.center,
        )

    @property
    def telling(self) -> bool:
        return not self.center

    def levels(self, x: Tensor) -> Tensor:
        return around_mean(x, self.center, self._levels)

    def _levels(self, x: Tensor) -> Tensor:
        if self.scale == "mean":
            mean, q_max = mean_and_largest(x)
            q_max = torch.minimum(self.bits * mean, q_max)
        else:
            q_max = largest(x)
        half = self.num_levels / 2
        step = q_max / (half - 0.5)
        return step * (spaced(x, -half, half - 1) + 0.5)


@value
class max_uniform(Quantizer):
    """2^b - 1 levels j * step, |j| < 2^(b-1), step = max|x| / (2^(b-1) - 1): zero among them.

    With center=True the row mean is taken out first and added to the levels.

    Rows [r, n] -> levels [r, 2^b - 1], bits b in 2..8. Raises ValueError for other bits.

    >>> import torch
    >>> max_uniform(2)(torch.tensor([[0.3, -3.0]]))
    tensor([[-3.,  0.,  3.]])
    """

    bits: int
    center: bool = False
    homogeneous = True

    def __post_init__(self) -> None:
        check_whole("max_uniform", 2, 8, bits=self.bits)

    @property
    def num_levels(self) -> int:
        return int(2**self.bits - 1)

    @property
    def traits(self) -> QuantizerTraits:
        return replace(
            super().traits,
            symmetric=not self.center,
            scale=True,
            sign=True,
            shift=self.center,
            repetition=True,
            includes_zero=not self.center,
            exact_on_constants=True,
            idempotent=not self.center,
        )

    @property
    def telling(self) -> bool:
        return not self.center

    def levels(self, x: Tensor) -> Tensor:
        return around_mean(x, self.center, self._levels)

    def _levels(self, x: Tensor) -> Tensor:
        top = self.num_levels // 2
        return spaced(x, -top, top) * (largest(x) / top)


@value
class asymmetric(Quantizer):
    """2^b levels (j - z) * scale, j = 0 .. 2^b - 1, from min(x) to max(x) within half a scale.

    scale = (max(x) - min(x)) / (2^b - 1) and the zero point z = round(-min(x) / scale) is an
    integer, so that 0 is a level, exactly, when min(x) <= 0 <= max(x). A constant row gives
    that constant 2^b times.

    Rows [r, n] -> levels [r, 2^b], bits b in 1..8. Raises ValueError for other bits.

    >>> import torch
    >>> asymmetric(2)(torch.tensor([[-1.0, 0.3, 2.0]]))
    tensor([[-1.,  0.,  1.,  2.]])
    """

    bits: int
    homogeneous = True

    def __post_init__(self) -> None:
        check_whole("asymmetric", 1, 8, bits=self.bits)

    @property
    def num_levels(self) -> int:
        return int(2**self.bits)

    @property
    def traits(self) -> QuantizerTraits:
        return replace(
            super().traits,
            includes_zero="only_if_spanned",
            exact_on_constants=True,
            repetition=True,
        )

    def levels(self, x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = (high - low) / (self.num_levels - 1)
        constant = scale == 0
        scale = torch.where(constant, 1.0, scale)
        zero_point = torch.round(-low / scale)
        grid = (spaced(x, 0, self.num_levels - 1) - zero_point) * scale
        return torch.where(constant, low, grid)


@value
class ternary_uniform(Quantizer):
    """Levels -step, 0, step with step = max|x| / 1.5.

    With center=True the row mean is taken out first and added to the levels.

    Rows [r, n] -> levels [r, 3].

    >>> import torch
    >>> ternary_uniform()(torch.tensor([[0.3, -3.0]]))
    tensor([[-2.,  0.,  2.]])
    """

    center: bool = False
    homogeneous = True

    @property
    def num_levels(self) -> int:
        return 3

    @property
    def traits(self) -> QuantizerTraits:
        return replace(
            super().traits,
            symmetric=not self.center,
            scale=True,
            sign=True,
            shift=self.center,
            repetition=True,
            includes_zero=not self.center,
        )

    @property
    def telling(self) -> bool:
        return not self.center

    def levels(self, x: Tensor) -> Tensor:
        return around_mean(x, self.center, self._levels)

    def _levels(self, x: Tensor) -> Tensor:
        return with_zero(largest(x) / 1.5)
