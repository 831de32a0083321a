"""What QuantOptimizer keeps where levels are learned: the state of what moves qparams, as entries
"learn.<path>" of parameters.

A link's `learn` moves the qparams of a group's parameters as one tree {name: qparams}. Its state is
laid out over the parameters: what belongs to one with that one, what all share with each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parq_fn.optim.leafwise import Part
from parq_fn.optim.state import Entries
from parq_fn.transforms.learn import learned, learner
from parq_fn.transforms.oscillation import HeldState, code_of, held_weight, turned
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_state import LearningState, ProxState
from parq_fn.transforms.sharded import local
from parq_fn.transforms.transformation import pinned

#: What the keys of these entries begin with, and those of `HeldState`.
PREFIX, HELD = "learn.", "hold."


def by_exact_names(link: Prox, params: Mapping[str, Tensor]) -> Prox:
    """The link, whose masks and labels of what moves qparams say of some of the parameters what
    they say of all of these."""
    how = learner(link.learn)
    inside = pinned(how.transformation, dict(params))
    return replace(link, learn=replace(how, transformation=inside))


def laid_out(link: Prox, names: list[str], state: Any) -> dict[str, Entries]:
    """{name: entries} of what a `LearningState` of these parameters has learned."""
    found: dict[str, Entries] = {name: {} for name in names}
    for owner, key, leaf in Part(learner(link.learn).transformation, names).take_apart(
        state.learned
    ):
        for name in names if owner is None else [owner]:
            found[name][PREFIX + key] = leaf
    return found


def put_together(link: Prox, qparams: dict[str, Tensor], entries: Mapping[str, Entries]) -> Any:
    """That part of the state, from the entries of the parameters that qparams are of."""
    transformation, names = learner(link.learn).transformation, list(qparams)
    part = Part(transformation, names)
    part.take_apart(transformation.init(qparams))

    def entry(name: str | None, key: str) -> Any:
        return entries[names[0] if name is None else name][PREFIX + key]

    return part.put_together(entry)


def learned_together(
    link: Prox, state: ProxState, entries: Mapping[str, Entries], pulled: dict[str, Tensor | None]
) -> dict[str, Entries]:
    """{name: entries that are new} of parameters whose qparams move along their gradients."""
    qparams = {name: own["qparams"] for name, own in entries.items()}
    moments = put_together(link, qparams, entries)
    of_all = LearningState(*state[:3], qparams, moments, ())
    new = learned(link, of_all, pulled, torch.tensor(True, device="cpu"))
    parts = laid_out(link, list(entries), new)
    return {name: {"qparams": new.qparams[name], **parts[name]} for name in entries}


def learning_begun(mine: Entries, saved: Entries, prefixes: Iterable[str]) -> Entries:
    """Saved entries, of other prox links perhaps: where other keys begin with a prefix than mine,
    with mine, of a learning or holding that begins, and without those of one that has ended."""
    for prefix in prefixes:
        own, other = (
            {key for key in entries if f"{key}.".startswith(prefix)} for entries in (mine, saved)
        )
        if own != other:
            kept = {key: got for key, got in saved.items() if key not in other}
            saved = {**kept, **{key: mine[key] for key in own}}
    return saved


def held_entries(state: HeldState) -> Entries:
    """A parameter's entries of a `HeldState` of it alone."""
    return {HELD + key: got for key, got in zip(HeldState._fields, state, strict=True)}


def held_of(entries: Entries) -> HeldState:
    """That state, from the entries."""
    return HeldState._make(entries[HELD + key] for key in HeldState._fields)


def with_held(link: Prox, entries: dict[str, Any], p: Tensor, weight: Tensor) -> Tensor:
    """This rank's part of a parameter's weights, those that are held on their level."""
    if link.hold is None:
        return weight
    code, held = (local(entries[HELD + key]) for key in ("code", "held"))
    return held_weight(link, p, weight, entries["qparams"], code, held)


def observed(link: Prox, state: ProxState, entries: dict[str, Any]) -> HeldState:
    """What a parameter's step makes of the weights that are held."""
    code = code_of(link, state, entries["latent"], entries["qparams"])
    return HeldState._make(turned(link, state.count - 1, code, *held_of(entries)))
