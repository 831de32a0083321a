"""The state of a prox link, and the rows of what it holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.scalar import to_device
from parq_fn.foundation.tree import PyTree
from parq_fn.foundation.value import state_class
from parq_fn.transforms.transformation import check_state


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
    """State of a prox link that learns its levels: that of any, and of what moves them."""

    count: Tensor  # type: ignore[assignment] # [], int64: updates so far
    slope: Tensor  # [], float64: the map's coefficient at the last update
    lr_sum: Tensor  # [], float64: sum of the learning rates so far
    qparams: PyTree  # [..., m] for each param, float32 or better
    learned: PyTree  # the state of the transformation learn=, over the tree `qparams`

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
    return qparams.unsqueeze(0).flatten(0, -2)


def shrunk(latent: Tensor, divisor: Tensor | None) -> Tensor:
    """The latent over the divisor, in float32 or better; itself where there is none."""
    if divisor is None:
        return latent
    wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
    return wide / to_device(divisor, wide).to(wide.dtype)  # or a 0-d latent would be promoted
