"""What QuantOptimizer keeps where levels are learned: the state of what moves qparams, as entries
"learn.<path>" of parameters.

A link's `learn` moves the qparams of a group's parameters as one tree {name: qparams}. Its state is
laid out over the parameters: what belongs to one with that one, what all share with each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from parq_fn.optim.leafwise import Part
from parq_fn.optim.state import Entries
from parq_fn.transforms.learn import learner
from parq_fn.transforms.prox_link import Prox

#: What the keys of these entries begin with.
PREFIX = "learn."


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


def is_learned(key: str) -> bool:
    """Whether an entry is of what moves qparams, in either adapter."""
    return key.startswith(PREFIX) or "learned" in key.split(".")


def learning_begun(mine: Entries, saved: Entries) -> Entries:
    """Saved entries; where levels were fitted so far, with those of a learning that begins, and
    without those of one that has ended."""
    own = {key: got for key, got in mine.items() if is_learned(key)}
    if own.keys() & saved.keys():
        return saved
    return {**{key: got for key, got in saved.items() if not is_learned(key)}, **own}
