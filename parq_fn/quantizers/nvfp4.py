"""NVFP4: four-bit floating-point numbers times a scale of eight bits times one of the tensor."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import value
from parq_fn.quantizers.base import Quantizer
from parq_fn.quantizers.codebook import codebook
from parq_fn.quantizers.reductions import largest
from parq_fn.quantizers.rounding import to_format

_LEAST, _LARGEST = 2.0**-9, 448.0  # positive numbers of E4M3


@value
class nvfp4(Quantizer):
    """15 levels s t {0, +-.5, +-1, +-1.5, +-2, +-3, +-4, +-6}: s is of the row, t of the tensor.

        t = max|W| / (6 * 448)     s = E4M3(max|x| / 6 / t), at least 2^-9

    E4M3 is the nearest eight-bit floating-point number, of two the even one; t is over all rows of
    a tensor W. So rows are not quantized each from itself alone, which is the exception among
    quantizers: `fit` takes what it is given for all rows of one tensor, or is given `whole`. With
    `per_block(16)`, which it is made for. A tensor of zeros has levels of zeros.

    Rows [r, n] -> qparams [r, 2], max|x| / 6, which is s t once `rounded`, and t -> levels [r, 15].
    `block_scale` gives s. Gradients pass the rounding unchanged.

    >>> import torch
    >>> rows = torch.tensor([[0.5, -672.0], [0.3, -5.0]])
    >>> nvfp4()(rows)[:, :4]
    tensor([[-672.0000, -448.0000, -336.0000, -224.0000],
            [  -4.8750,   -3.2500,   -2.4375,   -1.6250]])

    Source: NVIDIA, "Pretraining Large Language Models with NVFP4", arXiv 2509.25149.
    """

    homogeneous = True
    extremes = True
    telling = True
    num_levels = len(codebook.fp4.table)
    num_qparams = 2
    num_whole = 1
    positive = (True, True)
    learnable = (True, False)
    largest_code = 6.0

    @property
    def traits(self) -> QuantizerTraits:
        return replace(
            super().traits,
            whole=True,
            symmetric=True,
            includes_zero=True,
            sign=True,
            repetition=True,
        )

    def qparams(self, x: Tensor) -> Tensor:
        return largest(x) / 6

    def whole(self, x: Tensor) -> Tensor:
        top = largest(x)
        top = torch.where(top.isfinite(), top, 0.0)
        top = torch.cat([top.new_zeros(1, 1), top])  # there may be no rows
        return top.amax(0, keepdim=True) / (6 * _LARGEST)

    def block_scale(self, qparams: Tensor) -> Tensor:
        """[r, 2] -> [r, 1]: the scale s that eight bits hold."""
        own, whole = qparams[..., :1], qparams[..., 1:]
        some = whole > 0
        share = torch.where(some, own / torch.where(some, whole, 1.0), own)  # NaN where own is
        return to_format(share.clamp(min=_LEAST), "e4m3")

    def rounded(self, qparams: Tensor) -> Tensor:
        whole = qparams[..., 1:]
        return torch.cat([self.block_scale(qparams) * whole, whole], -1)

    def levels_within(self, qparams: Tensor, end: float) -> Tensor:
        return codebook.fp4.levels_within(self.rounded(qparams)[..., :1], end)

    def levels(self, qparams: Tensor) -> Tensor:
        return codebook.fp4.levels(self.rounded(qparams)[..., :1])
