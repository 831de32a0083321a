"""The nearest levels for weights, whatever a prox link's map and coefficient."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch

from parq_fn.foundation.scalar import concrete
from parq_fn.foundation.tree import PyTree
from parq_fn.proxmaps import hard
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_state import ProxState
from parq_fn.transforms.transformation import children_of


def rounding(transformation: Any) -> Any:
    """The transformation with every prox link's weights the nearest levels of its latents; its
    states are the transformation's own.

    Before levels are fitted, they are those of the latents that are given.

    >>> import torch
    >>> from parq_fn import chain, lsbq, parq_prox, sgd
    >>> transform = chain(sgd(0.1), parq_prox(lsbq(1), anneal_start=5, anneal_end=9))
    >>> params = {"w": torch.tensor([1.0, -3.0])}
    >>> rounding(transform).weights(transform.init(params), params)
    {'w': tensor([ 2., -2.])}
    """
    if isinstance(transformation, Prox):
        kind: Any = type(transformation)
        link = copy.copy(transformation)
        object.__setattr__(link, "__class__", _rounding(kind))
        return link
    inside = children_of(transformation)
    if not inside:
        return transformation
    return transformation.with_children({name: rounding(link) for name, link in inside.items()})


@cache
def _rounding(kind: Any) -> Any:
    """The kind of prox link, with another map, from the first step on."""

    def weights(
        self: Prox, state: ProxState, params: PyTree, *, dtype: torch.dtype | None = None
    ) -> PyTree:
        if concrete(state.count <= self.warmup):
            state = state._replace(count=torch.full_like(state.count, self.warmup + 1))
            state = self.refit(state, params)
        return kind.weights(self, state, params, dtype=dtype)

    own = {"proxmap": hard, "begins": 0, "weights": weights, "formula": Prox.formula}
    return type(kind.__name__, (kind,), own)
