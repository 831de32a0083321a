"""Evenly spaced levels from the least weight to the largest."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from parq_fn.foundation.checks import check_whole
from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import value
from parq_fn.quantizers.base import Quantizer


@value
class affine(Quantizer):
    """2^b levels j * scale + minimum, j = 0 .. 2^b - 1, minimum = min(x).

    scale = (max(x) - min(x)) / (2^b - 1). Zero need not be a level; with `asymmetric` it is.

    Rows [r, n] -> qparams [r, 2], scale and minimum -> levels [r, 2^b], bits b in 1..8. Raises
    ValueError for other bits.

    >>> import torch
    >>> affine(2)(torch.tensor([[-1.0, 0.3, 2.0]]))
    tensor([[-1.,  0.,  1.,  2.]])

    Source: ggml's Q4_1, which holds these two numbers a block.
    """

    #: 2^bits levels.
    bits: int
    homogeneous = True
    extremes = True
    num_qparams = 2
    positive = (True, False)

    def __post_init__(self) -> None:
        check_whole("affine", 1, 8, bits=self.bits)

    @property
    def num_levels(self) -> int:
        return int(2**self.bits)

    @property
    def largest_code(self) -> float:
        return float(self.num_levels - 1)

    @property
    def traits(self) -> QuantizerTraits:
        return replace(
            super().traits,
            exact_on_constants=True,
            scale=True,
            sign=True,
            shift=True,
            repetition=True,
        )

    def qparams(self, x: Tensor) -> Tensor:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        return torch.cat([(high - low) / (self.num_levels - 1), low], -1)

    def levels(self, qparams: Tensor) -> Tensor:
        scale, minimum = qparams[..., :1], qparams[..., 1:]
        j = torch.arange(self.num_levels, dtype=scale.dtype, device=scale.device)
        return scale * j + minimum
