"""Evenly spaced levels."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from parq_fn.foundation.checks import check_whole
from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import value
from parq_fn.quantizers.base import Grid, Quantizer, under
from parq_fn.quantizers.centered import about_mean, less_mean
from parq_fn.quantizers.reductions import largest, mean_and_largest

#: Rows that are fitted at once, where one way through them asks for no memory but a piece's. More
#: would have to be cut into columns that are too narrow.
_ROWS = 512


@value
class Scaled(Quantizer):
    """Base of the quantizers of one scale: levels j * step, j = -(k-1)/2, ..., (k-1)/2.

    Qparams: the step; with center=True that of x - mean(x), and the mean, which is added to the
    levels. A new one gives `num_levels` and `step(x)`, and has a field `center`.
    """

    homogeneous = True

    #: Whether the row mean is taken out first and added to the levels.
    center = False

    def step(self, x: Tensor) -> Tensor:
        """Prepared rows [r, n] -> the distance of their levels [r, 1]."""
        raise NotImplementedError(f"{type(self).__name__} must define step")

    @property
    def num_qparams(self) -> int:
        return 2 if self.center else 1

    @property
    def positive(self) -> tuple[bool, ...]:
        return (True, False) if self.center else (True,)

    @property
    def telling(self) -> bool:
        return not self.center

    @property
    def rows_at_once(self) -> int:
        return 1 if self.center else _ROWS

    @property
    def traits(self) -> QuantizerTraits:
        return replace(
            super().traits,
            symmetric=not self.center,
            evenly_spaced=not self.center,
            scale=True,
            sign=True,
            shift=self.center,
            repetition=True,
        )

    def qparams(self, x: Tensor) -> Tensor:
        return less_mean(x, self.step) if self.center else self.step(x)

    def grid(self, qparams: Tensor) -> Grid | None:
        return None if self.center else self._grid(qparams)

    def levels_within(self, qparams: Tensor, end: float) -> Tensor:
        if self.center:
            return super().levels_within(qparams, end)
        return self.levels(under(qparams, end, (self.num_levels - 1) / 2))

    def levels(self, qparams: Tensor) -> Tensor:
        if self.center:
            return about_mean(qparams, lambda step: self._grid(step).levels(self.num_levels))
        return super().levels(qparams)

    def _grid(self, step: Tensor) -> Grid:
        last = (self.num_levels - 1) / 2
        return Grid(step, -last, last)


@value
class uniform(Scaled):
    """2^b levels (j + 1/2) * step, j = -2^(b-1) .. 2^(b-1) - 1: symmetric, without a zero.

    step = q_max / (2^(b-1) - 1/2), q_max = min(b mean|x|, max|x|) for scale "mean", max|x| for
    scale "max". With center=True the row mean is taken out first and added to the levels. Of 2 bits
    scale "mean" is SEQ, the stretched grid of ParetoQ, with a scale that is fitted.

    Rows [r, n] -> qparams, the step (see `Scaled`) -> levels [r, 2^b], bits b in 1..8. Raises
    ValueError for other bits or scales.

    >>> import torch
    >>> uniform(2, scale="max")(torch.tensor([[0.3, -3.0]]))
    tensor([[-3., -1.,  1.,  3.]])

    Source: Jin et al., PARQ, arXiv 2503.15748, section 5; scale "mean" after ParetoQ,
    arXiv 2502.02631.
    """

    #: Of a level's index: 2^bits levels.
    bits: int
    #: What the outermost level follows from.
    scale: Literal["mean", "max"] = "mean"
    center: bool = False

    def __post_init__(self) -> None:
        check_whole("uniform", 1, 8, bits=self.bits)
        if self.scale not in ("mean", "max"):
            raise ValueError(f"uniform: scale must be 'mean' or 'max', got {self.scale!r}")

    @property
    def num_levels(self) -> int:
        return int(2**self.bits)

    @property
    def extremes(self) -> bool:
        return self.scale == "max" and not self.center

    @property
    def traits(self) -> QuantizerTraits:
        return replace(
            super().traits,
            exact_on_constants=True,
            idempotent=self.scale == "max" and not self.center,
        )

    def step(self, x: Tensor) -> Tensor:
        if self.scale == "mean":
            mean, q_max = mean_and_largest(x)
            q_max = torch.minimum(self.bits * mean, q_max)
        else:
            q_max = largest(x)
        return q_max / (self.num_levels / 2 - 0.5)


@value
class max_uniform(Scaled):
    """2^b - 1 levels j * step, |j| < 2^(b-1), step = max|x| / (2^(b-1) - 1): zero among them.

    With center=True the row mean is taken out first and added to the levels.

    Rows [r, n] -> qparams, the step (see `Scaled`) -> levels [r, 2^b - 1], bits b in 2..8. Raises
    ValueError for other bits.

    >>> import torch
    >>> max_uniform(2)(torch.tensor([[0.3, -3.0]]))
    tensor([[-3.,  0.,  3.]])
    """

    #: 2^bits - 1 levels.
    bits: int
    center: bool = False

    def __post_init__(self) -> None:
        check_whole("max_uniform", 2, 8, bits=self.bits)

    @property
    def num_levels(self) -> int:
        return int(2**self.bits - 1)

    @property
    def extremes(self) -> bool:
        return not self.center

    @property
    def largest_code(self) -> float:
        return float(self.num_levels // 2)

    @property
    def traits(self) -> QuantizerTraits:
        return replace(
            super().traits,
            includes_zero=not self.center,
            exact_on_constants=True,
            idempotent=not self.center,
        )

    def step(self, x: Tensor) -> Tensor:
        return largest(x) / (self.num_levels // 2)


@value
class asymmetric(Quantizer):
    """2^b levels (j - z) * scale, j = 0 .. 2^b - 1, from min(x) to max(x) within half a scale.

    scale = (max(x) - min(x)) / (2^b - 1) and the zero point z = round(-min(x) / scale) is an
    integer, so that 0 is a level, exactly, when min(x) <= 0 <= max(x). A constant row c has the
    scale |c|, and the zero point 0 where c >= 0, 1 where c < 0: c is a level.

    Rows [r, n] -> qparams [r, 2], scale and zero point -> levels [r, 2^b], bits b in 1..8.
    Raises ValueError for other bits.

    >>> import torch
    >>> asymmetric(2)(torch.tensor([[-1.0, 0.3, 2.0]]))
    tensor([[-1.,  0.,  1.,  2.]])
    """

    #: 2^bits levels.
    bits: int
    homogeneous = True
    extremes = True
    num_qparams = 2
    scales = positive = learnable = (True, False)

    def __post_init__(self) -> None:
        check_whole("asymmetric", 1, 8, bits=self.bits)

    @property
    def num_levels(self) -> int:
        return int(2**self.bits)

    @property
    def largest_code(self) -> float:
        return float(max(self.num_levels // 2 - 1, 1))

    @property
    def traits(self) -> QuantizerTraits:
        return replace(
            super().traits,
            evenly_spaced=True,
            includes_zero="only_if_spanned",
            exact_on_constants=True,
            repetition=True,
        )

    def qparams(self, x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        spread = (high - low) / (self.num_levels - 1)
        constant = spread == 0
        spread = torch.where(constant, 1.0, spread)  # or its quotients had no derivative
        zero_point = torch.where(constant, (low < 0).to(x.dtype), torch.round(-low / spread))
        return torch.cat([torch.where(constant, low.abs(), spread), zero_point], -1)

    def grid(self, qparams: Tensor) -> Grid:
        first = -qparams[..., 1:]
        return Grid(qparams[..., :1], first, first + (self.num_levels - 1))

    def levels_within(self, qparams: Tensor, end: float) -> Tensor:
        step, zero_point = qparams[..., :1], qparams[..., 1:]
        reach = torch.maximum(zero_point.abs(), (self.num_levels - 1 - zero_point).abs())
        bound = end / reach.clamp(min=1.0) * (1 - 2.0**-22)  # it is rounded
        return self.levels(torch.cat([torch.minimum(step, bound), zero_point], -1))


@value
class ternary_uniform(Scaled):
    """Levels -step, 0, step with step = max|x| / 1.5.

    With center=True the row mean is taken out first and added to the levels.

    Rows [r, n] -> qparams, the step (see `Scaled`) -> levels [r, 3].

    >>> import torch
    >>> ternary_uniform()(torch.tensor([[0.3, -3.0]]))
    tensor([[-2.,  0.,  2.]])
    """

    center: bool = False

    @property
    def num_levels(self) -> int:
        return 3

    @property
    def extremes(self) -> bool:
        return not self.center

    @property
    def traits(self) -> QuantizerTraits:
        return replace(super().traits, includes_zero=not self.center)

    def step(self, x: Tensor) -> Tensor:
        return largest(x) / 1.5
