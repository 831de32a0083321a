"""MXFP4: four-bit floating-point numbers times a power of two."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import value
from parq_fn.quantizers.base import Quantizer
from parq_fn.quantizers.codebook import codebook
from parq_fn.quantizers.reductions import largest
from parq_fn.quantizers.rounding import to_e8m0


@value
class mxfp4(Quantizer):
    """15 levels 2^e * {0, +-.5, +-1, +-1.5, +-2, +-3, +-4, +-6}, e = floor(log2 max|x|) - 2.

    With `per_block(32)`, which it is made for. Weights beyond 6 * 2^e, up to 8 * 2^e, are clipped.
    2^e lies in 2^-127 .. 2^127; a row of zeros has levels of zeros. A code has 4 bits, of which two
    patterns are zeros.

    Rows [r, n] -> qparams [r, 1], max|x| / 4, which is 2^e once `rounded` down to a power of two ->
    levels [r, 15]. Gradients pass that rounding unchanged.

    >>> import torch
    >>> mxfp4()(torch.tensor([[0.3, -5.0]]))[:, :4]
    tensor([[-6., -4., -3., -2.]])

    Source: OCP Microscaling Formats 1.0, sections 5.3.3, 5.4.1 and 6.3.
    """

    homogeneous = True
    extremes = True
    telling = True
    num_levels = len(codebook.fp4.table)
    num_qparams = 1
    positive = (True,)
    largest_code = 6.0

    @property
    def traits(self) -> QuantizerTraits:
        return replace(
            super().traits,
            symmetric=True,
            includes_zero=True,
            idempotent=True,
            sign=True,
            repetition=True,
        )

    def qparams(self, x: Tensor) -> Tensor:
        return largest(x) / 4

    def rounded(self, qparams: Tensor) -> Tensor:
        return to_e8m0(qparams)

    def levels_within(self, qparams: Tensor, end: float) -> Tensor:
        return codebook.fp4.levels_within(self.rounded(qparams), end)

    def levels(self, qparams: Tensor) -> Tensor:
        return codebook.fp4.levels(self.rounded(qparams))
