"""One store of latents under both torch adapters.

Between steps a parameter holds the weights of its latent, and the optimizer's state the latent.
Other code may edit the parameter, put another in its place or in another order, move it, convert
it. Every public method of an adapter begins with `LatentStore.sync`, which finds what was done.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.optim.marks import BEHIND, COPIED, LOADED, WRITTEN, Compare, Mark
from parq_fn.optim.old_states import Kept, like_saved, with_qparams
from parq_fn.optim.owner import Owner, Place
from parq_fn.optim.state import (
    Entries,
    after_load,
    before_load,
    beside,
    check_dtype,
    check_entries,
    check_state_dict,
    loaded,
    loaded_groups,
    matched,
    name_of,
    refuse_flat,
    refuse_meta,
    refuse_reshaped,
    taken_over,
    versions,
    wide,
)
from parq_fn.transforms.sharded import is_dtensor, local


class LatentStore:
    """The parameters of an optimizer by identity: their entries in its state, "latent" among them,
    and what they held when the optimizer last wrote them.

    An edit is told by the count of writes that torch keeps of a tensor, and of a sharded one's
    local tensor. Some writes raise neither: those through `p.data`, and to sharded parameters those
    of torch.distributed.checkpoint.load into the tensors of a state dict. So the values of sharded
    parameters themselves are compared with their weights before the first step, and where state is
    saved or loaded; `sync("all")` compares those of all.
    """

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
        Raises TypeError for parameters of FSDP1; ValueError for two of one name, and as the owner.
        """
        groups, first = self.optimizer.param_groups, len(self._order)
        names = dict(self._names)
        taken = {name for name, _ in names.values()}
        for index, group in enumerate(groups[first:], first):
            for i, p in enumerate(group["params"]):
                label = name_of(group, index, i)
                refuse_flat(self.owner.who, p, label)
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

    # What other code did.

    def sync(self, compare: Compare = "none") -> None:
        """Follows parameters that were exchanged, put in another order or moved, and makes edits
        of parameters those of their latents.

        compare: whose values are compared too, for writes that torch does not count.
        Raises ValueError for what cannot be followed.
        """
        self._follow()
        with torch.no_grad():
            self._take([p for p in self._with_latents() if self._is_suspect(p, compare)])

    def _follow(self) -> None:
        """Follows parameters by identity, others by position; to other devices too."""
        self.owner.check()
        self._check_groups()
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
                check_dtype(self.owner.who, p, latent, label)
                refuse_reshaped(self.owner.who, tuple(latent.shape), p, label)
            moved = beside(p, entries)
            if moved:
                entries.update(moved)
                self.owner.adopted(p, entries)

    def _check_groups(self) -> None:
        who, groups = self.owner.who, self.optimizer.param_groups
        if len(groups) != len(self._order):
            raise ValueError(
                f"{who}: had {len(self._order)} groups and has {len(groups)}; add groups with its "
                "own add_param_group"
            )
        for index, group in enumerate(groups):
            known, kind = self._order[index], self._kinds[index]
            if len(known) != len(group["params"]):
                raise ValueError(
                    f"{who}: group {index} had {len(known)} parameters and has "
                    f"{len(group['params'])}; add parameters with add_param_group"
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
            self._marks.pop(old, None)
            self.owner.dropped(old)
            if new not in kept:
                self._mark(new, COPIED)
        self._order = orders
        for group in self.optimizer.param_groups:
            if group.get("param_names"):
                group["param_names"] = [self._names[p][0] for p in group["params"]]

    def _pairs(self, orders: list[list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """(parameter that is gone, the one that took its place); raises ValueError for others."""
        who, names = self.owner.who, self._names
        pairs: list[tuple[Tensor, Tensor]] = []
        here = {p for order in orders for p in order}
        kinds = {p: kind for kind, own in zip(self._kinds, self._order, strict=True) for p in own}
        for index, (order, before) in enumerate(zip(orders, self._order, strict=True)):
            gone = [p for p in before if p not in here]
            new = [p for p in order if p not in names]
            if len(gone) != len(new) or len({*order}) != len(order):
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

    def rewrite(self) -> None:
        """Parameters hold the weights of their latents, which have moved outside of a step."""
        with torch.no_grad():
            state, params = self.optimizer.state, self._with_latents()
            for p, weight in self.owner.weights([p for p in params if not self._is_copy(p)]):
                local(p).copy_(weight)
                self.wrote(p)
            for p in filter(self._is_copy, params):
                p.copy_(state[p]["latent"])
                self._mark(p, COPIED)

    def _is_copy(self, p: Tensor) -> bool:
        return p in self._marks and self._marks[p].held == COPIED

    def wrote(self, p: Tensor) -> None:
        """The parameter holds the weights of its latent."""
        self._mark(p, WRITTEN)

    def left(self, p: Tensor) -> None:
        """The step has left the parameter alone, and moved what it shares with others."""
        mark = self._marks.get(p)
        if mark is not None and mark.held == WRITTEN:
            self._marks[p] = mark._replace(held=BEHIND)

    def _mark(self, p: Tensor, held: str) -> None:
        self._marks[p] = Mark(versions(p), held)

    def _with_latents(self) -> list[Tensor]:
        state = self.optimizer.state
        return [p for p in self._names if "latent" in state[p] and not p.is_meta]

    def _is_written(self, p: Tensor) -> bool:
        """Whether torch counted a write since the mark was made; True where there is none."""
        mark = self._marks.get(p)
        return mark is None or mark.versions != versions(p)

    def _is_suspect(self, p: Tensor, compare: Compare) -> bool:
        """Whether a parameter may hold what its latent does not know of."""
        if self._is_written(p):
            return True
        held, sharded = self._marks[p].held, is_dtensor(p)
        if held == COPIED:
            return sharded or compare == "all"
        return held == WRITTEN and (compare == "all" or (compare == "sharded" and sharded))

    def _take(self, suspects: list[Tensor]) -> None:
        """Elements that are not, to rounding, what was written become those of the latents."""
        state, compared = self.optimizer.state, []
        for p in suspects:
            mark = self._marks.get(p)
            if mark is not None and mark.held == COPIED:
                state[p]["latent"].copy_(p)
                self._mark(p, COPIED)
            else:
                compared.append(p)
        for p, weight in self.owner.weights(compared):
            latent, mine, behind = local(state[p]["latent"]), local(p), self._is_behind(p)
            if mine.numel():
                latent.copy_(taken_over(latent, mine, weight, between=behind))
            self._mark(p, BEHIND if behind else LOADED)

    def _is_behind(self, p: Tensor) -> bool:
        """Whether it may hold the weights of an earlier step: what it shares has moved since."""
        mark = self._marks.get(p)
        behind = not p.requires_grad or (mark is not None and mark.held == BEHIND)
        return behind and bool(self.owner.shared())

    # Saving and loading.

    def matched(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, Entries | None, str]]:
        """(parameter, its saved state or None, its name for messages), matched by position.

        Raises ValueError where groups do not fit.
        """
        rows = matched(self.optimizer, state_dict, self.owner.compared)
        return [(p, saved, self._names[p][1]) for p, saved in rows]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Checks all, then takes over all: entries by position, tensors in their own dtypes.

        A parameter that was not saved keeps its entries; a latent that was not is taken from the
        parameter. A parameter that other code has written since the optimizer did, such as its
        module's loading, is compared with the loaded latent at the next `sync`, so that either may
        be loaded first; what another one holds does not count.
        """
        check_state_dict(self.owner.who, state_dict)
        self._follow()
        state = self.optimizer.state
        edited = self._edited()  # before anything is loaded, perhaps from the state's own memory
        state_dict = before_load(self.optimizer, state_dict)
        restored: list[tuple[Tensor, Entries | None]] = []
        kept_of, shown = self.owner.kept(), self.owner.shown()
        for p, saved, label in self.matched(state_dict):
            if saved is not None:
                saved = self._fitted(p, shown[p], saved, kept_of[p], label)
            restored.append((p, saved))
        groups = loaded_groups(self.optimizer, state_dict, self.owner.keys)
        restored = self.owner.restored(restored, groups, state_dict)
        shared = self.owner.shared()
        first = next((entries for _, entries in restored if entries is not None), {})
        common = {key: got for key, got in first.items() if key in shared}

        for group, got in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(got)
        for p, entries in restored:
            kept = entries is not None and "latent" in entries
            new = {**state[p], **common} if entries is None else entries
            if "latent" in state[p] and not kept:
                new["latent"] = p.detach().to(wide(p), copy=True)
            self._adopt(p, new)
            if kept and p in edited:
                self._marks.pop(p, None)
            else:
                self._mark(p, LOADED if kept else COPIED)
        after_load(self.optimizer)

    def _fitted(
        self, p: Tensor, mine: Entries, saved: Entries, kept: dict[str, Kept], label: str
    ) -> Entries:
        """Copies of saved entries; raises ValueError where they do not fit."""
        saved = with_qparams(saved, kept)
        saved = {key: got for key, got in saved.items() if key != "latent" or key in mine}
        entries = self.owner.fits(p, mine, saved, label)
        check_entries(like_saved(mine, entries, kept), entries, label, self.owner.varies(p))
        return {key: loaded(got, mine.get(key), p) for key, got in entries.items()}

    def _edited(self) -> set[Tensor]:
        """Parameters with latents that other code has written."""
        state, found = self.optimizer.state, set[Tensor]()
        compared: list[Tensor] = []
        for p in self._with_latents():
            if self._is_written(p):
                found.add(p)
            elif is_dtensor(p) and self._marks[p].held in (COPIED, WRITTEN):
                compared.append(p)
        with torch.no_grad():
            for p, weight in self.owner.weights(compared):
                latent, mine = local(state[p]["latent"]), local(p)
                if mine.numel() and not latent.equal(taken_over(latent, mine, weight)):
                    found.add(p)
        return found

    # Copies of the optimizer.

    def __getstate__(self) -> dict[str, Any]:
        held = {p: mark.held for p, mark in self._marks.items()}
        return {**self.__dict__, "_marks": held}

    def copied(self) -> None:
        """After the optimizer was copied: parameters hold what those that they are copies of did,
        and latents share memory again with what does in the optimizer."""
        held: dict[Tensor, Any] = self._marks
        self._marks = {}
        for p, what in held.items():
            self._mark(p, what)
        for p, entries in self.optimizer.state.items():
            self.owner.adopted(p, entries)


def _are_alike(old: Tensor, new: Tensor) -> bool:
    return type(old) is type(new) and old.shape == new.shape and wide(old) == wide(new)
