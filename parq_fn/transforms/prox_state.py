"""The state of a prox link, and the rows of what it holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.scalar import to_device
from parq_fn.foundation.tree import PyTree
from parq_fn.foundation.value import state_class


@state_class
class ProxState(NamedTuple):
    """State of a prox link."""

    count: Tensor  # type: ignore[assignment] # (hides tuple.count) [], int64: updates so far
    slope: Tensor  # [], float64: the map's coefficient at the last update; parq: inverse slope
    lr_sum: Tensor  # [], float64: sum of the learning rates so far, where they are known
    qparams: PyTree  # [..., m] for each param, float32 or better; zeros until a step fitted them:
    #   ... are its own dimensions without those that a row runs over (`Granularity.row_shape`)
    learned: PyTree = ()  # the state of what moves them over the tree `qparams`, with learn=

    @staticmethod
    def elsewhere() -> dict[str, str]:
        """For `read`: where to find what states had before."""
        return {"levels": "levels follow from qparams: levels_of(transformation, state), or of a "
                "parameter optimizer.levels(p)"}  # fmt: skip


def in_rows(qparams: Tensor) -> Tensor:
    """Qparams [..., m] of a state as [r, m]."""
    return qparams.unsqueeze(0).flatten(0, -2)


def shrunk(latent: Tensor, divisor: Tensor | None) -> Tensor:
    """The latent over the divisor, in float32 or better; itself where there is none."""
    if divisor is None:
        return latent
    wide = latent.to(torch.promote_types(latent.dtype, torch.float32))
    return wide / to_device(divisor, wide).to(wide.dtype)  # or a 0-d latent would be promoted
