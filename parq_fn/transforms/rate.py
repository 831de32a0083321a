"""The learning rate of an update, as a prox link finds it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from parq_fn.foundation.scalar import Scalar, at
from parq_fn.foundation.tree import PyTree, values_of
from parq_fn.foundation.value import same


def rate_at(
    given: Scalar | Mapping[str, Scalar | None] | None,
    step: Tensor,
    params: PyTree,
    needed: bool,
    who: str,
    own: Scalar | None,
) -> Tensor:
    """The learning rate of params at a step, 0 where it is not known and not needed.

    own: the link's; given: one for all params, or by the leaf's name, None where it is the link's.
    Raises ValueError where it is needed and there is none, or more than one.
    """
    if isinstance(given, Mapping):
        found = values_of(given, params)
        several = not all(same(rate, found[0]) for rate in found[1:])
        if several and needed:
            raise ValueError(
                f"{who}: shrink, normal_map and pull take one learning rate for all parameters of "
                "the link; give parameters of another rate a link of their own"
            )
        given = 0.0 if several or not found else found[0]
    rate = own if given is None else given
    if rate is not None:
        return at(rate, step)
    if needed:
        raise ValueError(
            f"{who}: shrink, normal_map and pull need the learning rate; give learning_rate=... to "
            "the link or to update"
        )
    return torch.zeros_like(step)
