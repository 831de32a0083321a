"""The state of a prox link, and the rows of what it holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.scalar import to_device
from parq_fn.foundation.tree import PyTree, names_of, tree_leaves
from parq_fn.foundation.value import show, state_class
from parq_fn.transforms.layout import Part, part_of, spread_to_rows
from parq_fn.transforms.sharded import local
from parq_fn.transforms.transformation import check_state, name_of


@state_class
class ProxState(NamedTuple):
    """State of a prox link."""

    #: [], int64: updates so far
    count: Tensor  # type: ignore[assignment] # hides tuple.count
    slope: Tensor  # [], float64: the map's coefficient at the last update; parq: inverse slope
    lr_sum: Tensor  # [], float64: sum of the learning rates so far, where they are known
    qparams: PyTree  # [..., m] for each param, float32 or better; zeros until a step fitted them:
    #   ... are its own dimensions without those that a row runs over (`Granularity.row_shape`)

    @staticmethod
    def elsewhere() -> dict[str, str]:
        """For `read`: where to find what states had before."""
        return {"levels": "levels follow from qparams: levels_of(transformation, state), or of a "
                "parameter optimizer.levels(p)"}  # fmt: skip


@state_class
class LearningState(NamedTuple):
    """State of a prox link that learns its levels or holds weights: that of any, and more."""

    count: Tensor  # type: ignore[assignment] # [], int64: updates so far
    slope: Tensor  # [], float64: the map's coefficient at the last update
    lr_sum: Tensor  # [], float64: sum of the learning rates so far
    qparams: PyTree  # [..., m] for each param, float32 or better
    learned: PyTree  # the state of the transformation learn=, over the tree `qparams`; or ()
    oscillation: PyTree  # the `HeldState` of hold=; or ()

    @staticmethod
    def elsewhere() -> dict[str, str]:
        """As of `ProxState`."""
        return ProxState.elsewhere()


def check_prox_state(link: Any, state: Any) -> None:
    """Raises TypeError unless a state is that of a prox link."""
    if not isinstance(state, LearningState):
        check_state(link, state, ProxState)


def in_rows(qparams: Tensor) -> Tensor:
    """Qparams [..., m] of a state as [r, m]."""
    return qparams if qparams.dim() == 2 else qparams.unsqueeze(0).flatten(0, -2)


def rows_of(link: Any, qparams: Tensor, weight: Tensor, part: Part) -> Tensor:
    """[r, m] of the rows that this rank has of a weight, or has pieces of, as its part says.

    qparams: [..., m], as `held_rows` takes them.
    """
    held = in_rows(held_rows(link, qparams, weight))
    return held if part.rows == slice(None) else held[part.rows]


def held_rows(link: Any, qparams: Tensor, weight: Tensor) -> Tensor:
    """[..., m] of the rows that this rank has of a weight, or has pieces of.

    qparams: [..., m], those of a state that was begun before the weight was sharded too.
    Raises ValueError for those of other rows.
    """
    if torch.compiler.is_compiling():  # of dimensions that it may know nothing of
        return local(qparams)
    rows = link.granularity.row_shape(weight)
    if qparams.shape[:-1] != rows:
        raise ValueError(
            f"{name_of(link)}: {link.granularity!r} makes rows {tuple(rows)} of a weight of shape "
            f"{tuple(weight.shape)}, and the state has qparams {tuple(qparams.shape)}, of other "
            "rows; a state belongs to the transformation whose init made it"
        )
    return local(spread_to_rows(qparams, weight, link.granularity))


def shrunk(latent: Tensor, divisor: Tensor | None) -> Tensor:
    """The latent over the divisor, in float32 or better; itself where there is none."""
    if divisor is None:
        return latent
    wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
    return wide / to_device(divisor, wide).to(wide.dtype)  # or a 0-d latent would be promoted


def part_for(link: Any, param: Tensor, params: PyTree) -> Part:
    """What this rank holds of a parameter's rows.

    Raises ValueError, with its name, as `part_of`, and where a rank has pieces of rows that the
    link's map takes whole.
    """
    try:
        part = part_of(param, link.granularity)
        if part.cut and not link.elementwise:
            raise ValueError(
                f"it is placed as {getattr(param, 'placements', None)}, so that ranks hold pieces "
                f"of its rows of {link.granularity!r}, and {show(link.proxmap)} maps whole rows; "
                "give rows that ranks hold whole, such as per_channel(), or a map that declares "
                "the trait elementwise"
            )
    except ValueError as error:
        named = zip(names_of(params), tree_leaves(params), strict=True)
        name = next(name for name, leaf in named if leaf is param)
        raise ValueError(f"{name_of(link)}: parameter {name!r}: {error}") from None
    return part
