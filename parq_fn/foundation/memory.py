"""The order that a tensor's dimensions have in memory, such as channels_last."""

from __future__ import annotations

from torch import Tensor


def order_of(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimensions from the largest stride to the smallest; None where that is 0, 1, 2, ...

    >>> import torch
    >>> order_of(torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last))
    (0, 2, 3, 1)
    >>> order_of(torch.zeros(2, 3)) is None
    True
    """
    if tensor.is_contiguous():
        return None
    order = by_stride(tensor.stride())
    return None if order == list(range(tensor.dim())) else tuple(order)


def in_order(tensor: Tensor, order: tuple[int, ...] | None) -> Tensor:
    """The tensor, dense in memory, its dimensions in that order there; itself where it is so."""
    if order is None:
        return tensor.contiguous()
    return tensor.permute(order).contiguous().permute(inverse(order))


def by_stride(strides: tuple[int, ...]) -> list[int]:
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


def inverse(order: tuple[int, ...] | list[int]) -> list[int]:
    """The permutation that undoes one.

    >>> inverse((0, 2, 3, 1))
    [0, 3, 1, 2]
    """
    return sorted(range(len(order)), key=lambda d: order[d])
