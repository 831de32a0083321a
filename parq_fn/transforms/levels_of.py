"""The levels of the prox links inside a transformation, from its state."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import optree
import torch
from torch import Tensor

from parq_fn.foundation.tree import Masked, PyTree, tree_map
from parq_fn.foundation.value import show
from parq_fn.transforms.chain import every_state
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_state import ProxState, check_prox_state
from parq_fn.transforms.sharded import is_dtensor, local, placed_so
from parq_fn.transforms.transformation import check_transformation


def prox_states(transformation: Any, state: Any) -> Iterator[tuple[Prox, ProxState]]:
    """The prox links inside a transformation, each with its state."""
    for link, own in every_state(transformation, state):
        if isinstance(link, Prox):
            yield link, own


def levels_of(transformation: Any, state: Any) -> PyTree:
    """The levels that each leaf's weights are mapped to: a tree of [..., k], sorted.

    The dimensions before k are those of the leaf without those that a row runs over; `Masked()`
    stands for a leaf without levels, zeros stand for those not yet fitted. Levels are in float32
    or better; weights are mapped to them rounded to the weights' dtype. Those of a sharded leaf are
    sharded as its rows are.

    transformation: any that prox links are in, however deep; where several quantize a leaf, the
    last.
    state: its state.
    Raises ValueError where there is no prox link, TypeError for a state that is none of its own.

    >>> import torch
    >>> from parq_fn import chain, hard_prox, lsbq, sgd
    >>> transform, params = chain(sgd(0.0), hard_prox(lsbq(1))), {"w": torch.tensor([1.0, -3.0])}
    >>> _, state = transform.update(params, transform.init(params), params)
    >>> levels_of(transform, state)
    {'w': tensor([-2.,  2.])}
    """
    check_transformation(transformation, "levels_of: the transformation")
    found: PyTree = None
    for link, own in prox_states(transformation, state):
        check_prox_state(link, own)
        levels = tree_map(partial(_placed, link.quantizer.known_levels), own.qparams)
        found = levels if found is None else merged(levels, found)
    if found is None:
        raise ValueError(f"levels_of: there is no prox link in {show(transformation)}")
    return found


def fitted_levels(link: Prox, count: Tensor, qparams: Tensor, dtype: torch.dtype) -> Tensor:
    """`Quantizer.levels_in` of a parameter's qparams [..., m], which may be sharded, after `count`
    updates of the link. Raises ValueError before the first fit."""
    if int(count) <= link.warmup:
        raise ValueError(
            f"levels: none are fitted yet: the first step past warmup={link.warmup} of "
            f"{show(link)} fits them, and {int(count)} were taken; before that weights are the "
            "latents"
        )
    return _placed(partial(link.quantizer.levels_in, dtype=dtype), qparams)


def _placed(levels: Callable[[Tensor], Tensor], qparams: Tensor) -> Tensor:
    """levels(qparams), sharded as qparams are."""
    found = levels(local(qparams))
    if not is_dtensor(qparams):
        return found
    shape = *qparams.shape[:-1], found.shape[-1]
    return placed_so(found, qparams, qparams.placements, shape)


def merged(first: PyTree, second: PyTree) -> PyTree:
    """The leaves of the first tree, those of the second where it has `Masked()`."""

    def either(a: Any, b: Any) -> Any:
        return b if isinstance(a, Masked) else a

    return optree.tree_map(either, first, second, is_leaf=lambda x: isinstance(x, Masked))
