"""A quantizer whose qparams are rounded to what a file holds."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import briefly, value
from parq_fn.quantizers.base import Grid, Quantizer
from parq_fn.quantizers.centered import centered, of_inner
from parq_fn.quantizers.rounding import to_e8m0, to_format


@value
class stored(Quantizer):
    """The levels of `quantizer`, from qparams rounded to a dtype: levels(round(qparams)).

    So weights that are served from a file of that dtype are, bit for bit, those that were trained.
    dtype:

    - torch.float16, torch.bfloat16: every qparam that scales with the rows goes to the nearest
      number, of two the even one, beyond the largest to that; others, such as zero points, stay.
    - "e8m0": the power of two at or below, from 2^-127 to 2^127, as Microscaling has it; a scale of
      0 stays 0. For quantizers of one positive scale.

    Rows [r, n] -> qparams [r, m], the quantizer's own, not rounded -> levels [r, k]. `rounded`
    gives what a file is to hold; gradients pass it unchanged.

    Raises TypeError for what is no quantizer, ValueError for another dtype, for "e8m0" of another
    quantizer, and for a quantizer that rounds its qparams already.

    >>> import torch
    >>> from parq_fn import uniform
    >>> quantizer = stored(uniform(2, "max"), "e8m0")
    >>> quantizer.fit(torch.tensor([[0.3, -4.5]]))
    tensor([[3.]])
    >>> quantizer(torch.tensor([[0.3, -4.5]]))
    tensor([[-3., -1.,  1.,  3.]])

    Source: OCP Microscaling Formats 1.0, section 5.4.1 (E8M0).
    """

    #: Whose qparams are rounded.
    quantizer: Quantizer
    #: What the file holds.
    dtype: torch.dtype | Literal["e8m0"]

    def __post_init__(self) -> None:
        own: Any = self.quantizer
        if not isinstance(own, Quantizer):
            raise TypeError(f"stored: expected a quantizer such as uniform(4), got {briefly(own)}")
        if self.dtype not in (torch.float16, torch.bfloat16, "e8m0"):
            raise ValueError(
                f"stored: dtype must be torch.float16, torch.bfloat16 or 'e8m0', got {self.dtype!r}"
            )
        if rounds(own):
            raise ValueError(
                f"stored: {own!r} rounds its qparams already, and a file holds one of both"
            )
        one_scale = own.num_qparams == 1 and own.num_levels > 1 and all(own.scales)
        if self.dtype == "e8m0" and not one_scale:
            raise ValueError(
                f"stored: 'e8m0' holds one positive scale a row, and {own!r} has "
                f"{own.num_qparams} qparams for {own.num_levels} level(s); use torch.bfloat16"
            )

    # Its fit is the quantizer's, and so is what is learned.
    homogeneous, telling, extremes = map(of_inner, ("homogeneous", "telling", "extremes"))
    num_levels, num_qparams, scales = map(of_inner, ("num_levels", "num_qparams", "scales"))
    positive, learnable, sorts = map(of_inner, ("positive", "learnable", "sorts"))
    largest_code, num_whole, whole = map(of_inner, ("largest_code", "num_whole", "whole"))

    def ordered(self, qparams: Tensor) -> Tensor:
        return self.quantizer.ordered(qparams)

    @property
    def traits(self) -> QuantizerTraits:
        own = self.quantizer.traits
        return QuantizerTraits(
            scale_exact=own.scale_exact and self.dtype != torch.float16,  # of few exponents
            widens=own.widens,
            whole=own.whole,
            symmetric=own.symmetric,
            includes_zero=own.includes_zero,
            evenly_spaced=own.evenly_spaced,
            sign=own.sign and own.symmetric,
            permutation=False,  # a sum's last bit may choose the number that it is rounded to
        )

    def qparams(self, x: Tensor) -> Tensor:
        return self.quantizer.qparams(x)

    def rounded(self, qparams: Tensor) -> Tensor:
        if self.dtype == "e8m0":
            return to_e8m0(qparams)
        held = to_format(qparams, self.dtype)
        if all(self.scales):
            return held
        columns = [held if scales else qparams for scales in self.scales]
        return torch.cat([column[..., i : i + 1] for i, column in enumerate(columns)], -1)

    def grid(self, qparams: Tensor) -> Grid | None:
        return self.quantizer.grid(self.rounded(qparams))

    @property
    def grid_gives_levels(self) -> bool:
        """Where those of the quantizer follow from its grid."""
        return self.quantizer.grid_gives_levels

    def levels_within(self, qparams: Tensor, end: float) -> Tensor:
        return self.quantizer.levels_within(self.rounded(qparams), end)

    def levels(self, qparams: Tensor) -> Tensor:
        return self.quantizer.levels(self.rounded(qparams))


def rounds(quantizer: Quantizer) -> bool:
    """Whether a quantizer, or the one that is centered, rounds its qparams."""
    while isinstance(quantizer, centered):
        quantizer = quantizer.quantizer
    return type(quantizer).rounded is not Quantizer.rounded
