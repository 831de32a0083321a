"""The parameters of an optimizer by identity, with the entries of its state.

Other code may put another parameter in one's place or in another order, move it, convert it, and
edit the entries of the state.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.optim.marks import AHEAD, BOTH, COPIED, Mark, seen
from parq_fn.optim.owner import Owner, Place
from parq_fn.optim.saved import check_entries, check_keys
from parq_fn.optim.state import (
    ZERO,
    Entries,
    beside,
    check_dtype,
    loaded,
    name_of,
    refuse_flat,
    refuse_inference,
    refuse_meta,
    refuse_reshaped,
    versions,
    wide,
)

_FEWER = f"build another optimizer to leave some out. {ZERO}"


class Places:
    """The parameters of an optimizer, their names, entries and what they held when the optimizer
    last wrote them."""

    def __init__(self, optimizer: Optimizer, owner: Owner) -> None:
        self.optimizer, self.owner = optimizer, owner
        self._order: list[list[Tensor]] = []
        self._kinds: list[dict[str, Any]] = []
        self._names: dict[Tensor, tuple[str, str]] = {}
        self._marks: dict[Tensor, Mark] = {}

    def places(self) -> list[Place]:
        """All parameters, in the order of the groups."""
        groups = self.optimizer.param_groups
        return [Place(p, group, *self._names[p]) for group in groups for p in group["params"]]

    # Groups and their parameters.

    def add(self, begin: bool = True) -> None:
        """Entries for all parameters of the groups that are new, or an error and none.

        begin: off where the state has them already.
        Raises TypeError for parameters of FSDP1 or ZeRO; ValueError for two of one name, and as
        the owner.
        """
        groups, first = self.optimizer.param_groups, len(self._order)
        names = dict(self._names)
        taken = {name for name, _ in names.values()}
        for index, group in enumerate(groups[first:], first):
            for i, p in enumerate(group["params"]):
                label = name_of(group, index, i)
                refuse_flat(self.owner.who, p, label)
                refuse_inference(self.owner.who, p, label)
                if begin:
                    refuse_meta(self.owner.who, p, label)
                name = label if group.get("param_names") else f"{index}.{i}"
                if name in taken:
                    raise ValueError(
                        f"{self.owner.who}: two parameters are named {name!r}; groups of several "
                        'modules need names apart, such as ("generator." + name, p)'
                    )
                taken.add(name)
                names[p] = name, label
        fresh = {*names} - {*self._names}
        if begin:
            self._begin(fresh, names, {})
            for p in fresh:
                self._mark(p, COPIED)
        self._names = names
        self._order += [list(group["params"]) for group in groups[first:]]
        self._kinds += [self.owner.kind(group) for group in groups[first:]]

    def _begin(
        self,
        fresh: set[Tensor],
        names: dict[Tensor, tuple[str, str]],
        kept: dict[Tensor, Entries],
    ) -> None:
        """Entries for parameters, under their new names: what was kept for them, or as at the
        start; what all have in common stays."""
        before, self._names = self._names, names
        try:
            places = self.places()
            made = self.owner.begin([place for place in places if place.p in fresh], places)
        except Exception:
            self._names = before
            raise
        shared, state = self.owner.shared(), self.optimizer.state
        known: Entries = next((state[p] for order in self._order for p in order), {})
        common = {key: got for key, got in known.items() if key in shared}
        for p, entries in made.items():
            own = kept.get(p, {}) if p in fresh else state[p]
            self._adopt(p, {**entries, **common, **own})

    def _adopt(self, p: Tensor, entries: Entries) -> None:
        self.optimizer.state[p] = entries
        self.owner.adopted(p, entries)

    def _follow(self, mend: bool = False) -> None:
        """Follows parameters by identity, others by position; to other devices too; and entries
        that other code has put into the state. mend: of these what does not fit is put back."""
        self.owner.check()
        self._check_groups()
        with torch.no_grad():
            self._look(mend)
        groups = self.optimizer.param_groups
        orders = [list(group["params"]) for group in groups]
        if any(
            p is not known
            for order, before in zip(orders, self._order, strict=True)
            for p, known in zip(order, before, strict=True)
        ):
            self._exchange(orders)
        for p, _, _, label in self.places():
            entries = self.optimizer.state[p]
            latent = entries.get("latent", p if self.owner.widens else None)
            if latent is not None:
                check_dtype(self.owner.who, p, latent, self.owner.latent_dtype(p), label)
                refuse_reshaped(self.owner.who, tuple(latent.shape), p, label, kept=True)
            moved = beside(p, entries)
            if moved:
                entries.update(moved)
                self.owner.adopted(p, entries)
                self._see(p)

    # Entries of the state.

    def _mark(self, p: Tensor, held: str) -> None:
        self._marks[p] = self._marked(p, versions(p), held)

    def _marked(self, p: Tensor, counts: tuple[int, ...], held: str) -> Mark:
        entries = self.optimizer.state[p]
        return Mark(counts, held, entries, seen(entries, self.owner.watched(entries)))

    def _see(self, p: Tensor) -> None:
        """The entries are as they ought to be now."""
        mark = self._marks.get(p)
        if mark is not None:
            self._marks[p] = self._marked(p, mark.versions, mark.held)

    def _is_written(self, p: Tensor) -> bool:
        """Whether torch counted a write since the mark was made; True where there is none."""
        mark = self._marks.get(p)
        return mark is None or mark.versions != versions(p)

    def _look(self, mend: bool) -> None:
        """Takes over what other code has put into the state, or written there.

        mend: those that do not fit are put back.
        Raises ValueError for entries that are gone or do not fit.
        """
        for p in self._edited_in_state():
            mark, entries = self._marks[p], self.optimizer.state.get(p)
            changed = mark.changed(entries or {})
            try:
                put = self._fitting(p, mark, changed)
            except ValueError:
                if not mend:
                    raise
                put, entries = {key: got for key, (got, _) in mark.seen.items()}, None
            if entries is None:
                entries = self.optimizer.state[p] = mark.entries
            entries.update(put)
            if not self.owner.is_attached(p, entries):
                self.owner.adopted(p, entries)
            held = mark.held
            if any(map(self.owner.weighs, changed)) and held != BOTH:
                held = BOTH if self._is_written(p) else AHEAD
            self._marks[p] = self._marked(p, mark.versions, held)

    def _edited_in_state(self) -> list[Tensor]:
        """Parameters whose entries of the state other code has put there or written."""
        state, needs, nothing = self.optimizer.state, self.owner.needs, Entries()
        found = []
        for p, mark in self._marks.items():
            entries = state.get(p, nothing)
            if entries is not mark.entries or mark.changed(entries) or not needs <= entries.keys():
                found.append(p)
        return found

    def _fitting(self, p: Tensor, mark: Mark, changed: list[str]) -> Entries:
        """Copies of what other code has put into a parameter's state, in the dtypes of what stood
        there; raises ValueError for what is gone or does not fit."""
        entries: Entries = self.optimizer.state.get(p, {})
        where = f"{self.owner.who}: the state of parameter {self._names[p][1]!r}"
        what = "put back what is, load a state dict, or build an optimizer to begin anew"
        check_keys({*changed, *self.owner.needs}, entries, where, what)
        mine = {key: got for key, (got, _) in mark.seen.items()}
        put = {key: entries[key] for key, got in mine.items() if entries[key] is not got}
        check_entries(mine, put, where, lambda key: False)
        return {key: loaded(got, mine[key], p) for key, got in put.items()}

    def _check_groups(self) -> None:
        who, groups = self.owner.who, self.optimizer.param_groups
        if len(groups) != len(self._order):
            what = "add groups with its own add_param_group"
            raise ValueError(
                f"{who}: had {len(self._order)} groups and has {len(groups)}; "
                f"{_FEWER if len(groups) < len(self._order) else what}"
            )
        for index, group in enumerate(groups):
            known, kind = self._order[index], self._kinds[index]
            if len(known) != len(group["params"]):
                what = "add parameters with add_param_group"
                raise ValueError(
                    f"{who}: group {index} had {len(known)} parameters and has "
                    f"{len(group['params'])}; "
                    f"{_FEWER if len(group['params']) < len(known) else what}"
                )
            for key, now in self.owner.kind(group).items():
                if now != kind.get(key):
                    raise ValueError(
                        f"{who}: group {index} has {key}={now} and was built with {kind.get(key)}, "
                        "which its levels are of; build another optimizer to change it"
                    )

    def _exchange(self, orders: list[list[Tensor]]) -> None:
        """State stays with the parameters that are still there; new ones have, in their order, the
        places of those of their group that are gone."""
        who, state, names = self.owner.who, self.optimizer.state, dict(self._names)
        pairs = self._pairs(orders)
        kept: dict[Tensor, Entries] = {}
        for old, new in pairs:
            names[new] = names.pop(old)
            label = names[new][1]
            refuse_flat(who, new, label)
            refuse_inference(who, new, label)
            refuse_reshaped(who, tuple(old.shape), new, label)
            if _are_alike(old, new):
                kept[new] = state[old]
            elif self.owner.trained(state[old]):
                raise ValueError(
                    f"{who}: parameter {label!r} was exchanged for a {type(new).__name__} of "
                    f"shape {tuple(new.shape)} and {new.dtype} after it was trained, which its "
                    "state does not fit; shard the module before training, or load a checkpoint"
                )
        if pairs:
            self._begin({new for _, new in pairs}, names, kept)
        for old, new in pairs:
            del state[old]
            mark = self._marks.pop(old, None)
            self.owner.dropped(old)
            if new not in kept:
                self._mark(new, COPIED)
            elif mark is not None and mark.held == AHEAD:
                self._mark(new, AHEAD)
        self._order = orders
        for group in self.optimizer.param_groups:
            if group.get("param_names"):
                group["param_names"] = [self._names[p][0] for p in group["params"]]

    def _pairs(self, orders: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """(parameter that is gone, the one that took its place); raises ValueError for others."""
        who, names = self.owner.who, self._names
        pairs: list[tuple[Tensor, Tensor]] = []
        here = Counter(p for order in orders for p in order)
        kinds = {p: kind for kind, own in zip(self._kinds, self._order, strict=True) for p in own}
        for index, (order, before) in enumerate(zip(orders, self._order, strict=True)):
            gone = [p for p in before if p not in here]
            new = [p for p in order if p not in names]
            if len(gone) != len(new) or any(here[p] > 1 for p in order):
                raise ValueError(
                    f"{who}: group {index} lacks {[names[p][1] for p in gone]} and has {len(new)} "
                    "new parameters; exchange parameters one for one, each in its group"
                )
            pairs += zip(gone, new, strict=True)
            kind = self._kinds[index]
            moved = [names[p][1] for p in order if kinds.get(p, kind) != kind]
            if moved:
                raise ValueError(
                    f"{who}: parameter {moved[0]!r} was moved to group {index}, which is quantized "
                    "otherwise than its own; build another optimizer"
                )
        return pairs


def _are_alike(old: Tensor, new: Tensor) -> bool:
    return type(old) is type(new) and old.shape == new.shape and wide(old) == wide(new)
