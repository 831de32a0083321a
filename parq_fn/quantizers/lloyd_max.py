"""Lloyd-Max: the best levels there are, of any form."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from parq_fn.foundation.checks import check_whole
from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import value
from parq_fn.quantizers.base import Quantizer, mirror, nan_rows
from parq_fn.quantizers.kmeans_1d import least_squares_levels
from parq_fn.quantizers.lsbq import lsbq


@value
class lloyd_max(Quantizer):
    """argmin over 2^b levels q of sum_i min_j (x_i - q_j)^2.

    symmetric=True keeps q = -q: the same problem for |x| with half as many levels. The levels
    are the global optimum for rows of up to 4,096 weights, and within 0.5% of its error beyond.

    Rows [r, n] -> qparams, the positive levels or all -> levels [r, 2^b], bits b in 1..8. Raises
    ValueError for other bits.

    >>> import torch
    >>> rows = torch.tensor([[-4.0, -1.0, 1.0, 2.0]])
    >>> lloyd_max(1, symmetric=False)(rows)
    tensor([[-4.0000,  0.6667]])
    >>> lloyd_max(2)(rows)
    tensor([[-4.0000, -1.3333,  1.3333,  4.0000]])

    Source: Lloyd, "Least squares quantization in PCM", 1982; solved exactly by dynamic
    programming over the sorted row.
    """

    #: Of a level's index: 2^bits levels.
    bits: int
    #: Whether levels are -q_k, ..., q_k.
    symmetric: bool = True
    homogeneous = True

    def __post_init__(self) -> None:
        check_whole("lloyd_max", 1, 8, bits=self.bits)

    @property
    def num_levels(self) -> int:
        return int(2**self.bits)

    @property
    def traits(self) -> QuantizerTraits:
        other = lsbq(self.bits) if self.symmetric else replace(self, symmetric=True)
        return replace(
            super().traits,
            symmetric=self.symmetric,
            optimal="symmetric" if self.symmetric else "free",
            levels_are_means=True,
            ambiguous=True,
            exact_on_constants=True,
            idempotent=True,
            scale=True,
            sign=True,
            shift=not self.symmetric,
            repetition=True,
            no_worse_than=(other,),
        )

    @property
    def num_qparams(self) -> int:
        return self.num_levels // 2 if self.symmetric else self.num_levels

    @property
    def positive(self) -> tuple[bool, ...]:
        return (self.symmetric,) * self.num_qparams

    sorts = True

    def qparams(self, x: Tensor) -> Tensor:
        if self.symmetric:
            return least_squares_levels(x.abs(), self.num_qparams)
        return least_squares_levels(x, self.num_levels)

    def levels_within(self, qparams: Tensor, end: float) -> Tensor:
        return self.levels(qparams.clamp(-end, end))

    def levels(self, qparams: Tensor) -> Tensor:
        found = super().levels(qparams)  # sorted
        return nan_rows(mirror(found), found) if self.symmetric else found
