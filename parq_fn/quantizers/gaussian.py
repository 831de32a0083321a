"""Evenly spaced levels that are best for normal weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from parq_fn.foundation.checks import check_whole
from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import value
from parq_fn.quantizers.reductions import mean
from parq_fn.quantizers.uniform import Scaled

#: For each number of levels, argmin over a of E min_j (z - q_j)^2, z ~ N(0, 1), q evenly spaced
#: from -a to a; as published, of 128 and 256 levels within .02 and .2 % of the least.
_OUTERMOST = {
    2: 0.7978845587140913,
    3: 1.2240089519030855,
    4: 1.4935346200015913,
    8: 2.051068354131873,
    16: 2.513930578568423,
    32: 2.9160938834961225,
    64: 3.276597282593217,
    128: 3.6010497188221655,
    256: 3.884938678807525,
}


@value
class gaussian(Scaled):
    """2^b evenly spaced levels from -a rms(x) to a rms(x), rms(x) = sqrt(mean(x^2)).

    a is what is best for normal weights, argmin_a E min_j (z - q_j)^2 over z ~ N(0, 1): .798,
    1.494, 2.051, 2.514, ... for 1 to 8 bits; 1.224 for bits = 0, which is ternary.

    Rows [r, n] -> qparams [r, 1], the step -> levels [r, 2^b] (ternary: [r, 3]), bits b in 0..8.
    Raises ValueError for other bits.

    >>> import torch
    >>> gaussian(1)(torch.tensor([[3.0, -1.0, 2.0, -2.0, 0.0, 0.0]]))
    tensor([[-1.3820,  1.3820]])

    Source: Panferov et al., QuEST, arXiv 2502.05003.
    """

    #: 2^bits levels, 3 for 0.
    bits: int
    #: Squares of a row that is not scaled overflow and vanish.
    telling = False

    def __post_init__(self) -> None:
        check_whole("gaussian", 0, 8, bits=self.bits)

    @property
    def num_levels(self) -> int:
        return int(2**self.bits) if self.bits else 3

    @property
    def traits(self) -> QuantizerTraits:
        return replace(super().traits, includes_zero=self.bits == 0)

    def step(self, x: Tensor) -> Tensor:
        k = self.num_levels
        power = mean(x, _square)
        some = power > 0  # at 0 a root has no derivative
        rms = torch.where(some, torch.where(some, power, 1.0).sqrt(), 0.0)
        return rms * (2 * _OUTERMOST[k] / (k - 1))


def _square(x: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mul(x, x, out=out)
