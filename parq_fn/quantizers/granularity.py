"""Granularity: which weights share levels, as a view of a weight as rows [r, n] and back.

Every row gets levels of its own. Rows always follow the weight's logical order, so a conv
weight in channels_last has the same rows, bit for bit, as its contiguous copy; the way back
restores the strides.
"""

from __future__ import annotations

from torch import Tensor

from parq_fn.foundation.checks import check_whole
from parq_fn.foundation.value import Value, value


@value
class Granularity(Value):
    """Base of the granularities: a shape [r, n] for a weight's shape."""

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """(r, n) of the weight's rows; ValueError where the weight cannot be cut so."""
        raise NotImplementedError(f"{type(self).__name__} must define shape")

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as rows [r, n], in its dtype."""
        return weight.reshape(self.shape(weight))

    def restore(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Rows [r, n] in the shape and memory format of `weight`."""
        whole = rows.reshape(weight.shape)
        if weight.is_contiguous():
            return whole
        order = _by_stride(weight.stride())
        if order == list(range(weight.dim())):
            return whole
        back = sorted(range(weight.dim()), key=lambda d: order[d])
        return whole.permute(order).contiguous().permute(back)


def _by_stride(strides: tuple[int, ...]) -> list[int]:
    """The dimensions from the largest stride to the smallest; of equals the first comes first.

    Inserted one by one, for a compiler compares symbolic strides but does not sort by them.
    """
    order: list[int] = []
    for d, stride in enumerate(strides):
        place = len(order)
        while place > 0 and strides[order[place - 1]] < stride:
            place -= 1
        order.insert(place, d)
    return order


@value
class per_tensor(Granularity):
    """One row: all weights of a tensor share levels.

    >>> import torch
    >>> per_tensor().rows(torch.zeros(4, 2, 3, 3)).shape
    torch.Size([1, 72])
    """

    def shape(self, weight: Tensor) -> tuple[int, int]:
        return 1, weight.numel()


@value
class per_channel(Granularity):
    """A row for each index of axis 0: [o, i, h, w] is o rows of i*h*w.

    A 0-d or 1-D tensor is one row.

    >>> import torch
    >>> per_channel().rows(torch.zeros(4, 2, 3, 3)).shape
    torch.Size([4, 18])
    """

    def shape(self, weight: Tensor) -> tuple[int, int]:
        if weight.dim() < 2:
            return 1, weight.numel()
        return weight.shape[0], weight.shape[1:].numel()


@value
class per_block(Granularity):
    """A row for each run of `size` weights in the last dimension of a 1-D or 2-D weight.

    Raises ValueError for a size below 1, a weight of another rank, and a size that does not
    divide the last dimension.

    >>> import torch
    >>> per_block(32).rows(torch.zeros(4, 64)).shape
    torch.Size([8, 32])
    """

    size: int

    def __post_init__(self) -> None:
        check_whole("per_block", 1, size=self.size)

    def shape(self, weight: Tensor) -> tuple[int, int]:
        if weight.dim() not in (1, 2):
            raise ValueError(
                f"per_block({self.size}) takes 1-D and 2-D weights, got shape "
                f"{tuple(weight.shape)}; use per_channel() for it"
            )
        if weight.shape[-1] % self.size:
            raise ValueError(
                f"block size {self.size} does not divide the last dimension of shape "
                f"{tuple(weight.shape)}"
            )
        return weight.numel() // self.size, self.size
