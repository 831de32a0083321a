"""Learned qparams: a prox link moves its levels by a transformation of their own.

Where the map made the weights that gradients were taken at,

    d  = dL/dqparams / sqrt(n c)         `qparams_gradient`; n weights a row, c the largest code
    q <- q + update(d)                   by the transformation that is given as learn=

takes the place of a fit. A step that would leave a scale not positive, or anything not finite, is
not taken for that number; what cannot be learned, such as a zero point, stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parq_fn.foundation.scalar import concrete, to_device
from parq_fn.foundation.tree import PyTree, select, tree_map
from parq_fn.foundation.value import Value, briefly, show, value
from parq_fn.quantizers import Quantizer
from parq_fn.transforms.layout import Part, summed_to_rows
from parq_fn.transforms.prox_state import LearningState, ProxState, held_rows, in_rows, shrunk
from parq_fn.transforms.qparams_gradient import KINDS, Kind, is_one_scale, of_codes, of_rows
from parq_fn.transforms.sharded import local, placed
from parq_fn.transforms.transformation import (
    Transformation,
    check_state,
    check_transformation,
    name_of,
    rates_of,
    updated,
)

if TYPE_CHECKING:
    from parq_fn.transforms.prox_link import Prox


@value
class learn(Value):
    """q <- q + update(dL/dq / sqrt(n c)): how a prox link's `learn=` moves its qparams q.

    transformation: what turns the gradient into an increment, such as sgd(1e-3); of its own, with
        its own learning rate, whose schedule counts updates since learning began. It sees raw
        gradients: clip in it, and undo a loss scale before `update`.
    gradient: "code" (the sum of the gradients at the weights nearest to each level, at every
        coefficient), "map" (the exact derivative of the weights in their levels), or for
        quantizers of one scale "lsq" (LSQ's, of any number of levels; its paper has no grid of 1
        bit). See `parq_fn.transforms.qparams_gradient`.
    normalize: whether gradients are divided by sqrt(n c), n the weights of a row, c the quantizer's
        `largest_code`.

    learn=sgd(1e-3) is short for learn=learn(sgd(1e-3)).

    Raises TypeError for what is no transformation, ValueError for one in which gradients pass no
    learning rate, or more than one, and for another gradient.

    >>> from parq_fn import adam, chain, hard_prox, integer, learn, sgd
    >>> chain(sgd(0.1), hard_prox(integer(4), learn=learn(adam(1e-3), gradient="lsq")))
    chain(sgd(0.1), hard_prox(integer(4), learn=learn(adam(), gradient='lsq')))

    Source: Esser et al., LSQ, arXiv 1902.08153; Zhang et al., LQ-Nets, arXiv 1807.10029.
    """

    #: What turns the gradient into an increment.
    transformation: Transformation
    #: Of the loss in the qparams: "code", "map" or "lsq".
    gradient: Kind = "code"
    #: Whether it is divided by sqrt(n c).
    normalize: bool = True

    def __post_init__(self) -> None:
        check_transformation(self.transformation, "the transformation of learn(transformation)")
        if self.gradient not in KINDS:
            raise ValueError(
                f"learn: gradient must be 'code', 'map' or 'lsq', got {self.gradient!r}"
            )
        least, most = rates_of(self.transformation)
        if most == 0 or least > 1:
            raise ValueError(
                f"learn: gradients of qparams pass {most or 'no'} learning rate(s) in "
                f"{self.transformation!r}, which is to turn them into increments; keep one, as in "
                "sgd, adam or adamw, or as scale_by_learning_rate(...)"
            )


def learner(got: Any) -> learn:
    """What was given as learn=, as a `learn`."""
    return got if isinstance(got, learn) else learn(got)


def check_learn(who: str, got: Any, quantizer: Any) -> None:
    """Raises TypeError or ValueError unless a quantizer's qparams can be learned so."""
    own = learner(got)
    if not isinstance(quantizer, Quantizer):
        raise TypeError(
            f"{who}: learn= takes a quantizer of the class Quantizer, got {briefly(quantizer)}"
        )
    if not any(quantizer.learnable):
        raise ValueError(f"{who}: {quantizer!r} has no qparams that are learned; leave learn out")
    if own.gradient == "lsq" and not is_one_scale(quantizer):
        raise ValueError(
            f"{who}: gradient='lsq' is of quantizers of one scale, and {quantizer!r} has "
            f"{quantizer.num_qparams} qparams a row; take gradient='code'"
        )


def normalization(link: Prox, n: int) -> float:
    """What gradients of the qparams of rows of n are multiplied by."""
    if not learner(link.learn).normalize:
        return 1.0
    return 1 / math.sqrt(max(n, 1) * link.quantizer.largest_code)


def check_kept(link: Prox, qparams: Tensor) -> None:
    """Raises ValueError for a state of a version that kept levels, which have no gradient."""
    if qparams.shape[-1] != link.quantizer.num_qparams:
        link.quantizer.known_levels(qparams)  # of another quantizer they are none
        raise ValueError(
            f"{name_of(link)}: the state holds levels of an earlier version, which do not learn; "
            "take steps without learn= until levels were fitted anew"
        )


def gradient_of(
    link: Prox,
    grads: Tensor,
    param: Tensor,
    part: Part,
    state: ProxState,
    own: tuple[Tensor, torch.dtype, tuple[Tensor, Tensor] | None],
    of_rows: Callable[..., Tensor] = of_rows,
    name: str = "",
) -> Tensor:
    """The gradient [..., m] of a leaf's qparams, normalized, summed over the ranks that have pieces
    of a row and placed as the rows are.

    grads: those of this rank's part. own: the leaf's qparams [..., m], the dtype of its weights,
    and, where the link holds weights, (which they are, codes of their levels) of this rank's part.
    of_rows: what gives that of rows. name: the leaf's, for errors.
    """
    qparams, dtype, held = own
    check_kept(link, qparams)
    kept, mine = held_rows(link, qparams, param), local(param)
    whole = in_rows(kept)
    found = torch.zeros_like(of_part := whole[part.rows])
    if mine.numel():
        u, g = map(part.granularity.rows, (shrunk(mine, link.divisor(state)), grads))
        how = learner(link.learn).gradient, link.proxmap, link.quantizer
        if held is not None:
            here, codes = map(part.granularity.rows, held)
            more = of_codes(link.quantizer, torch.where(here, g, 0.0), of_part, codes)
            g = torch.where(here, 0.0, g)
        found = of_rows(*how, u, g, of_part, dtype, state.slope)
        found = found if held is None else found + more
    found = of_all_rows(found, part, whole).view_as(kept)
    found = found * normalization(link, link.granularity.shape(param)[1])
    return summed_to_rows(found, param, link.granularity, name)


def of_all_rows(found: Tensor, part: Part, whole: Tensor) -> Tensor:
    """[R, m], as `whole`: what a rank found for its rows [r, m], 0 for the others."""
    if isinstance(part.rows, Tensor):  # pieces of rows, several of one among them
        return torch.zeros_like(whole).index_add(0, part.rows, found)
    if len(found) == len(whole):
        return found
    return torch.nn.functional.pad(found, (0, 0, part.rows.start, len(whole) - part.rows.stop))


def learned(link: Prox, state: Any, pulled: PyTree, learns: Tensor) -> Any:
    """The `LearningState` with its qparams moved along the gradients `pulled`, where it learns."""
    check_state(link, state, LearningState)
    transformation = learner(link.learn).transformation
    steps, moments = updated(transformation, pulled, state.learned, state.qparams)
    qparams = tree_map(lambda q, step: moved(link.quantizer, q, step), state.qparams, steps)
    if concrete(learns) is not True:
        qparams = select(learns, qparams, state.qparams)
        moments = select(learns, moments, state.learned)
    return state._replace(qparams=qparams, learned=moments)


def moved(quantizer: Quantizer, qparams: Tensor, step: Tensor | None) -> Tensor:
    """qparams + step, where that leaves them finite and scales above 0, of those that are
    learned; free levels in order."""
    if step is None:
        return qparams
    old = local(qparams)
    new = (old + local(step)).to(old.dtype)
    positive, learnable = (
        to_device(torch.tensor(flags, device="cpu"), new)
        for flags in (quantizer.positive, quantizer.learnable)
    )
    taken = learnable & new.isfinite() & ((new > 0) | ~positive)
    return placed(quantizer.ordered(torch.where(taken, new, old)), qparams)


def needs_chain(link: Prox) -> ValueError:
    """What to say of a link that learns and was given no gradient of its qparams."""
    return ValueError(
        f"{name_of(link)}: it learns its levels, and {show(link)}.update was given no gradient of "
        "them (pulled=...), which the chain around it makes; put it in a chain: chain(sgd(0.1), "
        f"{name_of(link)}(...))"
    )
