"""Links that bound updates, each element or all of them together."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.checks import Interval, check_numbers
from parq_fn.foundation.scalar import at, new_count, to_device
from parq_fn.foundation.traits import PER_LEAF, TransformationTraits
from parq_fn.foundation.tree import PyTree, tree_leaves, tree_map
from parq_fn.foundation.value import value
from parq_fn.transforms.links import times
from parq_fn.transforms.sharded import gathered
from parq_fn.transforms.transformation import NO_RATE, EmptyState, Link, check_state

_BOUND = Interval(0.0, math.inf)  # infinity: no clipping


@value
class clip(Link):
    """updates -> clamp(updates, -max_abs, max_abs), element by element."""

    #: The largest magnitude of an element.
    max_abs: float | Tensor
    traits = PER_LEAF
    rates = NO_RATE

    def __post_init__(self) -> None:
        check_numbers("clip", _BOUND, max_abs=self.max_abs)

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        check_state(self, state, EmptyState)
        bound = at(self.max_abs, new_count())

        def clamp(u: Tensor) -> Tensor:
            limit = to_device(bound, u).to(u.dtype)
            return torch.minimum(torch.maximum(u, -limit), limit)

        return tree_map(clamp, updates), state


def global_norm(tree: PyTree) -> Tensor:
    """sqrt of the sum of all squares, a 0-d tensor in float32 or better.

    >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0]), "c": None})
    tensor(5.)
    """
    norms = [
        gathered(torch.linalg.vector_norm(u, dtype=torch.promote_types(u.dtype, torch.float32)))
        for u in tree_leaves(tree)
    ]
    if not norms:
        return torch.zeros((), dtype=torch.float32, device="cpu")
    total: Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]))
    return total


@value
class clip_by_global_norm(Link):
    """updates -> min(1, max_norm / (norm + 1e-6)) * updates, norm that of all leaves together.

    The formula is torch.nn.utils.clip_grad_norm_'s.
    """

    #: The largest norm of all updates together.
    max_norm: float | Tensor
    traits = TransformationTraits(plain_weights=True)
    rates = NO_RATE

    def __post_init__(self) -> None:
        check_numbers("clip_by_global_norm", _BOUND, max_norm=self.max_norm)

    def update(
        self, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        del params, extra
        check_state(self, state, EmptyState)
        norm = global_norm(updates)
        factor = (to_device(at(self.max_norm, new_count()), norm) / (norm + 1e-6)).clamp(max=1.0)
        return tree_map(lambda u: times(u, factor), updates), state
