"""The cuts of weights into rows, as packed weights hold them: per_channel, per_block or None."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.torch_private import sizes
from parq_fn.quantizers.granularity import Granularity, per_block, per_channel


def empty_of(shape: tuple[int, ...]) -> Tensor:
    """A weight of a shape, without its numbers."""
    try:
        return torch.empty(shape, device="meta")
    except RuntimeError as error:  # negative, or too large to count
        raise ValueError(f"no weight has shape {shape}: {error}") from None


def rows_of(whole: Tensor, r: int, cut: Granularity | None) -> Tensor:
    """A weight's r rows [r, n], cut as in `Packed`."""
    return (
        whole.reshape(r, torch.Size(sizes(whole)).numel() // max(r, 1))
        if cut is None
        else cut.rows(whole)
    )


def restored_of(rows: Tensor, like: Tensor, cut: Granularity | None) -> Tensor:
    """Rows [r, n] in the shape of the weight that they were cut from."""
    return rows.reshape(like.shape) if cut is None else cut.restore(rows, like)


def cut_of(granularity: Any, weight: Tensor) -> Granularity | None:
    """How a weight is cut into its rows, as `Packed` keeps it: None where they are runs of its
    logical order, or one row, whose order is none.

    Raises ValueError for rows in an order that neither per_channel nor per_block makes.
    """
    own = getattr(type(granularity), "rows", None) is Granularity.rows
    if own and (granularity.order(weight) is None or granularity.shape(weight)[0] == 1):
        return None
    if own and isinstance(granularity, per_channel):
        return per_channel(granularity.axis)
    if own and isinstance(granularity, per_block):
        return per_block(granularity.size, granularity.along)
    raise ValueError(
        f"{granularity!r} makes rows in a way of its own, which packed weights do not hold; "
        "per_tensor, per_channel, per_block and granularities that give a shape alone are held"
    )


def cut_as_json(cut: Granularity) -> dict[str, Any]:
    """The fields of a `Packed.cut`, by name, for JSON.

    >>> cut_as_json(per_channel((0, 2))), cut_as_json(per_block(32, along=0))
    ({'axis': [0, 2]}, {'size': 32, 'along': 0})
    """
    return {k: list(got) if isinstance(got, tuple) else int(got) for k, got in vars(cut).items()}


def cut_from_json(fields: dict[str, Any]) -> Granularity:
    """What `cut_as_json` gave, read again.

    Raises ValueError or TypeError for anything else.
    """
    own: dict[str, Any] = {
        k: tuple(got) if isinstance(got, list) else got for k, got in fields.items()
    }
    return per_channel(**own) if own.keys() == {"axis"} else per_block(**own)
