"""A quantizer of rows less their mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.checks import check_kind
from parq_fn.foundation.traits import QuantizerTraits
from parq_fn.foundation.value import value
from parq_fn.quantizers.base import Quantizer
from parq_fn.quantizers.reductions import itself, mean


def less_mean(x: Tensor, qparams: Callable[[Tensor], Tensor]) -> Tensor:
    """Qparams [r, m + 1]: those of rows x less their mean, and the mean."""
    middle = mean(x, itself)
    return torch.cat([qparams(x - middle), middle], -1)


def about_mean(qparams: Tensor, levels: Callable[[Tensor], Tensor]) -> Tensor:
    """Levels of qparams [r, m + 1], of which the last is a mean."""
    return levels(qparams[..., :-1]) + qparams[..., -1:]


def ordered_about_mean(qparams: Tensor, ordered: Callable[[Tensor], Tensor]) -> Tensor:
    """`ordered` qparams [..., m + 1], of which the last is a mean."""
    return torch.cat([ordered(qparams[..., :-1]), qparams[..., -1:]], -1)


def of_inner(name: str) -> Any:
    """The property that gives that of the quantizer inside, `quantizer`."""
    return property(lambda self: getattr(self.quantizer, name))


@value
class centered(Quantizer):
    """The levels of `quantizer` for x - mean(x), plus mean(x), the mean of each row.

    Rows [r, n] -> qparams [r, m + 1], those of the quantizer and the mean -> levels [r, k].
    center=True of the quantizers that take it is short for this.

    Raises ValueError for a quantizer with qparams of the whole tensor, such as nvfp4().

    >>> import torch
    >>> from parq_fn.quantizers import max_uniform
    >>> centered(max_uniform(2))(torch.tensor([[1.0, 5.0]]))
    tensor([[1., 3., 5.]])
    """

    #: Of rows less their mean.
    quantizer: Quantizer

    def __post_init__(self) -> None:
        check_kind("centered", self.quantizer, "a quantizer such as uniform(4)", "fit")
        if self.quantizer.num_whole:
            raise ValueError(
                f"centered: {self.quantizer!r} has qparams of the whole tensor, which rows less "
                "their means would each change; use it by itself"
            )

    homogeneous, num_levels = of_inner("homogeneous"), of_inner("num_levels")
    largest_code, sorts = of_inner("largest_code"), of_inner("sorts")

    @property
    def num_qparams(self) -> int:
        return self.quantizer.num_qparams + 1

    @property
    def scales(self) -> tuple[bool, ...]:
        return (*self.quantizer.scales, True)

    @property
    def positive(self) -> tuple[bool, ...]:
        return (*self.quantizer.positive, False)

    @property
    def learnable(self) -> tuple[bool, ...]:
        return (*self.quantizer.learnable, True)

    def ordered(self, qparams: Tensor) -> Tensor:
        return ordered_about_mean(qparams, self.quantizer.ordered)

    @property
    def traits(self) -> QuantizerTraits:
        return about_mean_traits(self.quantizer.traits)

    def qparams(self, x: Tensor) -> Tensor:
        return less_mean(x, self.quantizer.qparams)

    def rounded(self, qparams: Tensor) -> Tensor:
        return torch.cat([self.quantizer.rounded(qparams[..., :-1]), qparams[..., -1:]], -1)

    def levels(self, qparams: Tensor) -> Tensor:
        return about_mean(qparams, self.quantizer.levels)


def about_mean_traits(own: QuantizerTraits) -> QuantizerTraits:
    """What a quantizer of these traits declares of rows less their mean."""
    return QuantizerTraits(
        scale_exact=own.scale_exact,
        widens=own.widens,
        ambiguous=own.ambiguous,
        exact_on_constants=own.exact_on_constants or own.includes_zero is not False,
        scale=own.scale,
        sign=own.sign,
        shift=own.scale,
        permutation=own.permutation,
        repetition=own.repetition,
    )
