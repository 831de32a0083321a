"""Levels of a table."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from parq_fn.foundation.checks import FINITE, check_numbers
from parq_fn.foundation.scalar import is_number
from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import value
from parq_fn.quantizers.base import Quantizer, under
from parq_fn.quantizers.reductions import largest


@value
class codebook(Quantizer):
    """Levels scale * table, scale = max|x| / max|table|.

    table: the k numbers, in increasing order.

    Three tables have names, by which they print:

    - `codebook.nf4`: quantiles of the normal distribution, a zero among them.
    - `codebook.fp4`: the 15 numbers of FP4 (e2m1), 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives.
    - `codebook.iq4_nl`: what ggml's IQ4_NL holds, integers from -127 to 113.

    Rows [r, n] -> qparams [r, 1], the scale -> levels [r, k]. Raises TypeError for a table that is
    not a tuple of numbers, ValueError for one that is not finite or not in increasing order, or
    that holds no number but 0.

    >>> import torch
    >>> codebook((-1, 0, 0.5, 1))(torch.tensor([[0.3, -3.0]]))
    tensor([[-3.0000,  0.0000,  1.5000,  3.0000]])
    >>> codebook.nf4, codebook.nf4.num_levels
    (codebook.nf4, 16)

    Source: nf4: Dettmers et al., QLoRA, arXiv 2305.14314, appendix E; fp4: OCP Microscaling Formats
    1.0, section 5.3.3; iq4_nl: ggml's kvalues_iq4nl.
    """

    table: tuple[float, ...]
    homogeneous = True
    extremes = True
    num_qparams = 1
    positive = (True,)

    nf4: ClassVar[codebook]
    fp4: ClassVar[codebook]
    iq4_nl: ClassVar[codebook]

    def __post_init__(self) -> None:
        table: Any = self.table  # whatever was given
        if not (isinstance(table, tuple) and all(map(is_number, table))):
            raise TypeError(f"codebook: table must be a tuple of numbers, got {table!r}")
        for i, number in enumerate(table):
            check_numbers("codebook", FINITE, **{f"table[{i}]": number})
        for one, other in itertools.pairwise(table):
            if not one < other:
                raise ValueError(
                    "codebook: table must be in increasing order, each number once, got "
                    f"{other!r} after {one!r}; sort it"
                )
        if not any(table):
            raise ValueError(f"codebook: table must hold a number beside 0, got {table!r}")

    def __repr__(self) -> str:
        for name in _NAMES:
            if self == getattr(codebook, name):
                return f"codebook.{name}"
        return super().__repr__()

    @property
    def top(self) -> float:
        """max|table|."""
        return float(max(abs(number) for number in self.table))

    @property
    def largest_code(self) -> float:
        return self.top

    @property
    def telling(self) -> bool:
        return 2**-8 <= self.top <= 2**8

    @property
    def num_levels(self) -> int:
        return len(self.table)

    @property
    def traits(self) -> QuantizerTraits:
        symmetric = self.table == tuple(-number for number in reversed(self.table))
        both_ends = self.table[0] == -self.table[-1]
        return replace(
            super().traits,
            symmetric=symmetric,
            includes_zero=0 in self.table,
            exact_on_constants=both_ends,
            idempotent=both_ends,
            scale=True,
            sign=symmetric,
            repetition=True,
        )

    def qparams(self, x: Tensor) -> Tensor:
        return largest(x) / self.top

    def levels_within(self, qparams: Tensor, end: float) -> Tensor:
        return self.levels(under(qparams, end, self.top))

    def levels(self, qparams: Tensor) -> Tensor:
        return times_table(qparams, self.table)


def times_table(scale: Tensor, table: tuple[float, ...]) -> Tensor:
    """[r, 1] -> [r, k]: the scale times each number of the table."""
    if scale.device.type == "cpu":
        return scale * torch.tensor(table, dtype=scale.dtype, device="cpu")
    # made there: a copy from the host would wait for the device, and no CUDA graph holds it
    return torch.cat([scale * number for number in table], -1)


codebook.nf4 = codebook(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    )
)
codebook.fp4 = codebook(
    (-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
)
codebook.iq4_nl = codebook(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
)
_NAMES = ("nf4", "fp4", "iq4_nl")
