"""Weights that are held: those whose level keeps turning back.

Of a weight with latent u let k_t be the index of the level nearest to it after update t. Then

    o_t = 1 where k_t != k_(t-1), in the direction opposite to its last change, else 0
    f  <- m o_t + (1 - m) f        how often it turns
    a  <- m k_t + (1 - m) a        its average code, at first k

and from the first t with f > threshold on the weight is held: its latent gets no update, and it is
the level of index a, rounded, half down; the level itself may still be fitted or learned.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.checks import NOT_NEGATIVE, SHARE, check_numbers
from parq_fn.foundation.scalar import Scalar, at, concrete, to_device
from parq_fn.foundation.tree import PyTree, select, tree_map
from parq_fn.foundation.value import Value, state_class, value
from parq_fn.proxmaps.levels import bounds, search
from parq_fn.transforms.layout import part_of
from parq_fn.transforms.prox_state import ProxState, rows_of, shrunk
from parq_fn.transforms.sharded import local, placed
from parq_fn.transforms.transformation import name_of

if TYPE_CHECKING:
    from parq_fn.transforms.prox_link import Prox


@state_class
class HeldState(NamedTuple):
    """What is known of how often weights change their level."""

    code: PyTree  # like params, int16: the index of the nearest level; -1 until there are levels
    direction: PyTree  # like params, int8: of the last change, -1 or 1; 0 before the first
    frequency: PyTree  # like params, float32: f, how often it turns back
    average: PyTree  # like params, float32: a, the average code
    held: PyTree  # like params, bool


@value
class oscillation(Value):
    """For a prox link's `hold=`: weights whose level keeps turning back are held at their average.

    A weight is held once the running frequency f of its turns exceeds the threshold; f and the
    average code move by the momentum m a step (see the module). A held weight stays held: where
    other code edits it in a module that an optimizer trains, the edit reaches its latent alone, and
    the next step puts the weight on its level again.

    Both are numbers, 0-d tensors or schedules of the count of updates. Raises ValueError for a
    threshold below 0 and a momentum outside [0, 1].

    >>> from parq_fn import hard_prox, oscillation, uniform
    >>> hard_prox(uniform(2), hold=oscillation(0.02))
    hard_prox(uniform(2), hold=oscillation(0.02))

    Source: Nagel et al., Overcoming oscillations in quantization-aware training, arXiv 2203.11086,
    section 4.3.
    """

    #: The frequency of turns from which on a weight is held.
    threshold: Scalar
    #: The share of a step in the running frequency and the average code.
    momentum: Scalar = 0.01

    def __post_init__(self) -> None:
        check_numbers("oscillation", NOT_NEGATIVE, schedules=True, threshold=self.threshold)
        check_numbers("oscillation", SHARE, schedules=True, momentum=self.momentum)


def none_held(params: PyTree) -> HeldState:
    """The state before there are levels."""

    def filled(number: int, dtype: torch.dtype) -> PyTree:
        return tree_map(lambda p: torch.full_like(p, number, dtype=dtype), params)

    floats = filled(0, torch.float32), filled(0, torch.float32)
    return HeldState(filled(-1, torch.int16), filled(0, torch.int8), *floats, filled(0, torch.bool))


def observed(link: Prox, state: Any, latents: PyTree) -> Any:
    """The `LearningState` after a look at the levels of updated latents, where it is active."""
    active = link.active(state)
    if concrete(active) is False:
        return state
    old: HeldState = state.oscillation
    codes = tree_map(lambda u, q: code_of(link, state, u, q), latents, state.qparams)
    leaves = tree_map(
        lambda *one: turned(link, state.count - 1, *one),
        codes,
        *old,  # each a tuple of five
    )
    new = HeldState._make(
        tree_map(lambda _, five, i=i: five[i], codes, leaves) for i in range(len(old))
    )
    return state._replace(oscillation=new if concrete(active) else select(active, new, old))


def code_of(link: Prox, state: ProxState, latent: Tensor, qparams: Tensor) -> Tensor:
    """The index of the level that each weight of a leaf is nearest to, int16, like the leaf."""
    part, mine = part_of(latent, link.granularity), local(latent)
    if not mine.numel():
        return latent.to(torch.int16)
    rows = part.granularity.rows(shrunk(mine, link.divisor(state)))
    levels = link.quantizer.levels_in(rows_of(link, qparams, latent, part), rows.dtype)
    found = search(bounds(levels), rows).to(torch.int16)
    return placed(part.granularity.restore(found, mine), latent)


def turned(
    link: Prox,
    step: Tensor,
    code: Tensor,
    last: Tensor,
    direction: Tensor,
    frequency: Tensor,
    average: Tensor,
    held: Tensor,
) -> tuple[Tensor, ...]:
    """(code, direction, frequency, average, held) of a leaf after it was seen at this code."""
    hold: Any = link.hold
    m, threshold = (
        to_device(at(x, step), frequency).to(torch.float32) for x in (hold.momentum, hold.threshold)
    )
    begun, free = last >= 0, ~held
    way = (code - last).sign().to(torch.int8)
    changed = begun & free & (way != 0)
    back = changed & (way == -direction)
    frequency = m * back + (1 - m) * frequency
    moved = torch.where(begun, m * code + (1 - m) * average, code)
    average = torch.where(free, moved, average)
    new = held | (frequency > threshold)
    middle = torch.ceil(average - 0.5).to(torch.int16)  # half goes down
    code = torch.where(held, last, torch.where(new, middle, code))
    return code, torch.where(changed, way, direction), frequency, average, new


def without_held(link: Prox, updates: PyTree, state: Any) -> PyTree:
    """Updates, 0 of held weights; ValueError for the state of a link that holds none."""
    if not getattr(state, "oscillation", ()):
        raise ValueError(
            f"{name_of(link)}: its state is of a link without hold= and does not say what is held; "
            "a state belongs to the transformation whose init made it"
        )
    return tree_map(lambda u, h: torch.where(h, 0.0, u), updates, state.oscillation.held)


def with_held(link: Prox, state: Any, weights: PyTree, params: PyTree) -> PyTree:
    """Weights, of which held ones are at their level."""
    if not getattr(state, "oscillation", ()):
        return weights
    own = state.oscillation.code, state.oscillation.held

    def weight(w: Tensor, param: Tensor, qparams: Tensor, code: Tensor, held: Tensor) -> Tensor:
        return placed(held_weight(link, param, local(w), qparams, local(code), local(held)), param)

    return tree_map(weight, weights, params, state.qparams, *own)


def held_weight(
    link: Prox, param: Tensor, weight: Tensor, qparams: Tensor, code: Tensor, held: Tensor
) -> Tensor:
    """This rank's weights of a leaf, of which held ones are at their level."""
    if not weight.numel():
        return weight
    part = part_of(param, link.granularity)
    rows = part.granularity.rows
    levels = link.quantizer.levels_in(rows_of(link, qparams, param, part), weight.dtype)
    found = levels.gather(-1, rows(code).long().clamp(min=0))
    return torch.where(held, part.granularity.restore(found, weight), weight)
