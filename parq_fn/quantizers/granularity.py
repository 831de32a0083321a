"""Granularity: which weights share levels, as a view of a weight as rows [r, n] and back.

Every row gets levels of its own. Rows follow the weight's logical order, whatever its memory
format: a conv weight in channels_last has the same rows, bit for bit, as its contiguous copy. The
way back restores the strides.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

from torch import Tensor

from parq_fn.foundation.checks import check_whole
from parq_fn.foundation.memory import in_order, inverse, order_of
from parq_fn.foundation.value import Value, value

#: Dimensions of a weight: one or several, negative numbers counting from the end.
Dims = int | tuple[int, ...]


class Order(NamedTuple):
    """The order that rows have a weight's elements in, where it is not the weight's own.

    weight.permute(dims).reshape(parts).permute(turn) has first the dimensions that choose the row,
    then those that a row runs over.
    """

    dims: tuple[int, ...]
    parts: tuple[int, ...]
    turn: tuple[int, ...]

    def to(self, weight: Tensor) -> Tensor:
        """The weight in this order, a view where that can be."""
        return weight.permute(self.dims).reshape(self.parts).permute(self.turn)

    def back(self, ordered: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The weight of that shape whose elements, in this order, are those given."""
        for sizes, permutation in self.steps_back(shape):
            ordered = ordered.reshape(sizes).permute(permutation)
        return ordered

    def steps_back(self, shape: tuple[int, ...]) -> tuple[tuple[list[int], list[int]], ...]:
        """What `back` does: (sizes to reshape to, permutation of them), one after another."""
        first = [self.parts[i] for i in self.turn], inverse(self.turn)
        return first, ([shape[d] for d in self.dims], inverse(self.dims))


@value
class Granularity(Value):
    """Base of the granularities: a shape [r, n] for a weight's shape.

    One of your own gives `shape` alone: its rows are then runs of the weight's logical order, and
    what belongs to them has the one dimension r.
    """

    def shape(self, weight: Tensor) -> tuple[int, int]:
        """(r, n) of the weight's rows; ValueError where the weight cannot be cut so."""
        raise NotImplementedError(f"{type(self).__name__} must define shape")

    def row_shape(self, weight: Tensor) -> tuple[int, ...]:
        """The weight's own dimensions without those that a row runs over: r rows, in this order."""
        return self.shape(weight)[:1]

    def row_dims(self, weight: Tensor) -> tuple[int | None, ...]:
        """Which of the weight's dimensions each of `row_shape` is; None for one that is no
        dimension of the weight, such as that of blocks."""
        return (None,) * len(self.row_shape(weight))

    def order(self, weight: Tensor) -> Order | None:
        """The order of elements in rows; None where rows are runs of the weight's own."""
        del weight
        return None

    def rows(self, weight: Tensor) -> Tensor:
        """The weight as rows [r, n], in its dtype; a view where that can be."""
        shape, order = self.shape(weight), self.order(weight)
        return (weight if order is None else order.to(weight)).reshape(shape)

    def restore(self, rows: Tensor, weight: Tensor) -> Tensor:
        """Rows [r, n] in the shape and memory format of `weight`."""
        own = self.order(weight)
        whole = rows.reshape(weight.shape) if own is None else own.back(rows, weight.shape)
        return in_order(whole, order_of(weight))


def _check_dims(who: str, name: str, got: Any) -> None:
    """Raises TypeError unless it is whole numbers, ValueError where there are none or one twice."""
    dims = got if isinstance(got, tuple) else (got,)
    if any(isinstance(d, bool) or not isinstance(d, numbers.Integral) for d in dims):
        raise TypeError(f"{who}: {name} must be a whole number or a tuple of them, got {got!r}")
    if not dims:
        raise ValueError(f"{who}: {name} must name a dimension, got (); per_tensor() is one row")
    if len(set(dims)) < len(dims):
        raise ValueError(f"{who}: {name} must name each dimension once, got {got!r}")


def _dims(granularity: Granularity, name: str, given: Dims, weight: Tensor) -> tuple[int, ...]:
    """The dimensions of a weight, counted from the front, in the order given."""
    rank, given = weight.dim(), given if isinstance(given, tuple) else (given,)
    outside = [d for d in given if not -rank <= d < rank]
    if outside:
        raise ValueError(
            f"{granularity!r} takes weights that have dimension {outside[0]}, got shape "
            f"{tuple(weight.shape)}; choose another {name} for it, or leave it out"
        )
    dims = tuple(d % rank for d in given)
    if len(set(dims)) < len(dims):
        raise ValueError(
            f"{granularity!r} names a dimension of shape {tuple(weight.shape)} twice, as {dims}; "
            f"give each dimension of {name} once"
        )
    return dims


@value
class per_tensor(Granularity):
    """One row: all weights of a tensor share levels.

    >>> import torch
    >>> per_tensor().rows(torch.zeros(4, 2, 3, 3)).shape
    torch.Size([1, 72])
    """

    def shape(self, weight: Tensor) -> tuple[int, int]:
        return 1, weight.numel()

    def row_shape(self, weight: Tensor) -> tuple[int, ...]:
        return ()


@value
class per_channel(Granularity):
    """A row for each index of an axis, or of several: axis 0 of [o, i, h, w] is o rows of i*h*w.

    axis: the dimensions whose index chooses the row, negative numbers counting from the end. 0 for
    linear layers, convolutions and embeddings, [out, in, ...]; 1 for weights [in, out, ...], such
    as transformers' Conv1D and transposed convolutions of one group; (0, 1) for the weights of all
    experts together, [experts, out, in]. Rows stand in the weight's order of these dimensions.

    A 0-d or 1-D tensor is one row, whatever the axis. Raises TypeError for an axis that is no whole
    number, ValueError for one that is named twice or that a weight has not.

    >>> import torch
    >>> per_channel().rows(torch.zeros(4, 2, 3, 3)).shape
    torch.Size([4, 18])
    >>> per_channel(axis=1).rows(torch.tensor([[1, 2], [3, 4]])).tolist()
    [[1, 3], [2, 4]]
    """

    axis: Dims = 0

    def __post_init__(self) -> None:
        _check_dims("per_channel", "axis", self.axis)

    def dims(self, weight: Tensor) -> tuple[int, ...]:
        """The dimensions that choose the row, in the weight's order."""
        return tuple(sorted(_dims(self, "axis", self.axis, weight)))

    def shape(self, weight: Tensor) -> tuple[int, int]:
        if weight.dim() < 2:
            return 1, weight.numel()
        if self.axis == 0:
            return weight.shape[0], weight.shape[1:].numel()
        r = n = 1
        kept = self.dims(weight)
        for d, size in enumerate(weight.shape):
            r, n = (r * size, n) if d in kept else (r, n * size)
        return r, n

    def row_shape(self, weight: Tensor) -> tuple[int, ...]:
        if weight.dim() < 2:
            return ()
        return tuple(weight.shape[d] for d in self.dims(weight))

    def row_dims(self, weight: Tensor) -> tuple[int | None, ...]:
        return self.dims(weight) if weight.dim() > 1 else ()

    def order(self, weight: Tensor) -> Order | None:
        if weight.dim() < 2 or self.axis == 0:
            return None
        kept = self.dims(weight)
        if kept == tuple(range(len(kept))):
            return None
        order = (*kept, *(d for d in range(weight.dim()) if d not in kept))
        return Order(order, tuple(weight.shape[d] for d in order), tuple(range(len(order))))


@value
class per_block(Granularity):
    """A row for each run of `size` weights along the last dimension, or along others.

    along: the dimensions that runs are cut from, negative numbers counting from the end; several
    are flattened in the order given: a kernel [o, i, 3, 3] along (1, 2, 3) is o * 9i / size rows.
    Rows stand in the weight's order of dimensions, those of `along` together where the first of
    them in the weight stood, with in / size indices for their in.

    Raises TypeError for dimensions that are no whole numbers; ValueError for a size below 1 or one
    that does not divide `in`, and for a dimension that is named twice or that a weight has not.

    >>> import torch
    >>> per_block(32).rows(torch.zeros(4, 64)).shape
    torch.Size([8, 32])
    >>> per_block(2, along=0).rows(torch.tensor([[1, 5], [2, 6], [3, 7], [4, 8]])).tolist()
    [[1, 2], [5, 6], [3, 4], [7, 8]]
    """

    #: Weights of a block; it must divide what blocks are cut from.
    size: int
    along: Dims = -1

    def __post_init__(self) -> None:
        check_whole("per_block", 1, size=self.size)
        _check_dims("per_block", "along", self.along)

    def dims(self, weight: Tensor) -> tuple[int, ...]:
        """The dimensions that runs are cut from, in the order that they are flattened in."""
        return _dims(self, "along", self.along, weight)

    def shape(self, weight: Tensor) -> tuple[int, int]:
        self._blocks(weight)
        return weight.numel() // self.size, self.size

    def row_shape(self, weight: Tensor) -> tuple[int, ...]:
        blocks = self._blocks(weight)
        return tuple(blocks if d is None else weight.shape[d] for d in self.row_dims(weight))

    def row_dims(self, weight: Tensor) -> tuple[int | None, ...]:
        along = self.dims(weight)
        kept = (None if d == min(along) else d for d in range(weight.dim()))
        return tuple(d for d in kept if d not in along)

    def order(self, weight: Tensor) -> Order | None:
        along, rank = self.dims(weight), weight.dim()
        if along == tuple(range(rank - len(along), rank)):
            return None
        place = min(along)
        before = tuple(range(place))
        after = tuple(d for d in range(place, rank) if d not in along)
        blocks = self._blocks(weight), self.size
        parts = (*weight.shape[:place], *blocks, *(weight.shape[d] for d in after))
        turn = (*range(place + 1), *range(place + 2, len(parts)), place + 1)
        return Order((*before, *along, *after), parts, turn)

    def _blocks(self, weight: Tensor) -> int:
        """How many there are in what runs are cut from."""
        length = 1
        for d in self.dims(weight):
            length *= weight.shape[d]
        if length % self.size:
            where = "the last dimension" if self.along == -1 else f"the {length} along {self.along}"
            raise ValueError(
                f"block size {self.size} does not divide {where} of shape {tuple(weight.shape)}; "
                "choose another size for it, or per_channel()"
            )
        return length // self.size
