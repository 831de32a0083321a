"""One store of latents under both torch adapters.

Between steps a parameter holds the weights of its latent, and the optimizer's state the latent.
Other code may edit either, and put another parameter in one's place. Every public method of an
adapter begins with `LatentStore.sync`, which finds what was done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from parq_fn.optim.marks import AHEAD, BEHIND, BOTH, COPIED, LOADED, TAKEN, WRITTEN, Compare, seen
from parq_fn.optim.old_states import Kept, like_saved, spread_rows, with_qparams
from parq_fn.optim.places import Places
from parq_fn.optim.saved import check_entries, check_state_dict, matched
from parq_fn.optim.state import (
    Entries,
    after_load,
    before_load,
    loaded,
    loaded_groups,
    taken_over,
    versions,
)
from parq_fn.transforms.sharded import is_dtensor, local


class LatentStore(Places):
    """The parameters of an optimizer, and the latents in its state, of which they hold the weights.

    An edit is told by the count of writes that torch keeps of a tensor, and of a sharded one's
    local tensor. Some writes raise neither: those through `p.data`, and to sharded parameters those
    of torch._foreach operations and of torch.distributed.checkpoint.load into a state dict. So the
    values of sharded parameters themselves are compared with their weights before the first step,
    and where state is saved or loaded; `sync("all")` compares those of all.
    """

    #: (parameter, what this rank's part of it held) of those that hold other weights for a while.
    _lent: list[tuple[Tensor, Tensor]] | None = None

    # What other code did.

    def sync(self, compare: Compare = "none", write: bool = True) -> None:
        """Follows parameters that were exchanged, put in another order or moved, makes edits of
        parameters those of their latents, and writes the weights of latents that were edited.

        compare: whose values are compared too, for writes that torch does not count.
        write: off where weights are written later.
        Raises ValueError for what cannot be followed. Nothing is done while weights are lent.
        """
        if self._lent is not None:
            return
        self._follow()
        with torch.no_grad():
            params = self._with_latents()
            self._check_both([p for p in params if p in self._marks and self._held(p) == BOTH])
            self._take([p for p in params if self._is_suspect(p, compare)])
            if write:
                self._write_back([p for p in params if self._held(p) in (AHEAD, LOADED)])

    def has_edits(self) -> bool:
        """Whether parameters may be without the weights of latents that were edited or loaded."""
        held = (mark.held for mark in self._marks.values())
        return any(one in (AHEAD, LOADED) for one in held) or bool(self._edited_in_state())

    # Other weights for a while.

    def lend(self, weights: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
        """Parameters hold these weights, (parameter, this rank's part), until `take_back`."""
        self.check_not_lent("rounded() and averaged_weights()")
        self.sync()
        self._lent = []
        try:
            with torch.no_grad():
                for p, weight in weights():
                    self._lent.append((p, local(p).clone()))
                    local(p).copy_(weight)
        except BaseException:
            self.take_back()
            raise

    def take_back(self) -> None:
        """Parameters hold what they did, bit for bit, whatever was written to them since."""
        for p, was in self._lent or ():
            with torch.no_grad():
                local(p).copy_(was)
            if p in self._marks:
                self._marks[p] = self._marks[p]._replace(versions=versions(p))
        self._lent = None

    def check_not_lent(self, what: str) -> None:
        """Raises RuntimeError while parameters hold lent weights."""
        if self._lent is not None:
            raise RuntimeError(
                f"{self.owner.who}: {what} cannot be called inside `with optimizer.rounded():` or "
                "`with optimizer.averaged_weights():`, where parameters hold other weights than "
                "those that they are trained with; leave the block first"
            )

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
        return p in self._marks and self._held(p) == COPIED

    def wrote(self, p: Tensor) -> None:
        """The parameter holds the weights of its latent."""
        self._mark(p, WRITTEN)

    def left(self, p: Tensor) -> None:
        """The step has left the parameter alone, and moved what it shares with others."""
        mark = self._marks.get(p)
        if mark is not None:
            held = BEHIND if mark.held == WRITTEN else mark.held
            self._marks[p] = self._marked(p, mark.versions, held)

    def shared(self, common: Entries) -> None:
        """The step has given all parameters these entries."""
        now = seen(common, common)
        for mark in self._marks.values():
            mark.seen.update(now)

    def stopped(self, moved: Sequence[Tensor] = ()) -> None:
        """A step was stopped by an error: latents that it has moved, these and others, are what
        counts, and not what parameters hold."""
        state, before = self.optimizer.state, {*moved}
        for p in self._with_latents():
            if p in before or self._is_written(p) or self._marks[p].changed(state[p]):
                self._mark(p, AHEAD)

    def _held(self, p: Tensor) -> str:
        return self._marks[p].held

    def _with_latents(self) -> list[Tensor]:
        state = self.optimizer.state
        return [p for p in self._names if "latent" in state[p] and not p.is_meta]

    def _is_suspect(self, p: Tensor, compare: Compare) -> bool:
        """Whether a parameter may hold what its latent does not know of."""
        if self._is_written(p):
            return True
        held, sharded = self._held(p), is_dtensor(p)
        if held == COPIED:
            return sharded or compare == "all"
        return held == WRITTEN and (compare == "all" or (compare == "sharded" and sharded))

    def _take(self, suspects: list[Tensor]) -> None:
        """Elements that are not, to rounding, what was written become those of the latents."""
        state, compared = self.optimizer.state, []
        for p in suspects:
            if self._is_copy(p):
                state[p]["latent"].copy_(p)
                self._mark(p, COPIED)
            else:
                compared.append(p)
        for p, weight in self.owner.weights(compared):
            latent, mine, behind = local(state[p]["latent"]), local(p), self._is_behind(p)
            if mine.numel():
                latent.copy_(taken_over(latent, mine, weight, between=behind))
            self._mark(p, BEHIND if behind else TAKEN)

    def _is_behind(self, p: Tensor) -> bool:
        """Whether it may hold the weights of an earlier step: what it shares has moved since."""
        behind = not p.requires_grad or (p in self._marks and self._held(p) == BEHIND)
        return behind and bool(self.owner.shared())

    def _check_both(self, params: list[Tensor]) -> None:
        """Raises ValueError for parameters that are neither what their latents are nor have the
        weights of these, where other code has written both."""
        for p, weight in self.owner.weights(params):
            latent, mine = local(self.optimizer.state[p]["latent"]), local(p)
            if not (mine.equal(latent.to(mine.dtype)) or _are_of(mine, latent, weight)):
                raise ValueError(
                    f"{self.owner.who}: parameter {self._names[p][1]!r} and its latent in the "
                    "optimizer's state were both written since its last method was called, and "
                    "differ; call optimizer.sync() between the two, or copy one into the other"
                )
        for p in params:
            self._mark(p, TAKEN)

    def _write_back(self, params: list[Tensor]) -> None:
        """Weights of latents that were edited or loaded, where parameters do not have them."""
        state = self.optimizer.state
        for p, weight in self.owner.weights(params):
            latent, mine, behind = local(state[p]["latent"]), local(p), self._is_behind(p)
            if self._held(p) == LOADED and _are_of(mine, latent, weight):
                self._mark(p, WRITTEN)
            elif self._held(p) == LOADED and behind:
                self._mark(p, BEHIND)
            else:
                if not mine.equal(weight):
                    mine.copy_(weight)
                self._mark(p, WRITTEN)

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
        self.check_not_lent("load_state_dict")
        check_state_dict(self.owner.who, state_dict)
        self._follow(mend=True)
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
                new["latent"] = p.detach().to(self.owner.latent_dtype(p), copy=True)
            before, weigh = state[p], filter(self.owner.weighs, new)
            same = all(_is_same(before.get(key), new[key]) for key in weigh)
            self._adopt(p, new)
            if kept and p in edited:
                self._marks[p] = self._marked(p, (), LOADED)
            elif kept and same:
                self._see(p)
            else:
                behind = not p.requires_grad and bool(shared)
                self._mark(p, (BEHIND if behind else LOADED) if kept else COPIED)
        after_load(self.optimizer)

    def _fitted(
        self, p: Tensor, mine: Entries, saved: Entries, kept: dict[str, Kept], label: str
    ) -> Entries:
        """Copies of saved entries; raises ValueError where they do not fit."""
        saved = spread_rows(with_qparams(saved, kept), mine)
        saved = {key: got for key, got in saved.items() if key != "latent" or key in mine}
        like, where = like_saved(mine, saved, kept), f"loaded state dict, parameter {label!r}"
        self.owner.check_links(p, mine, saved, where)
        others = [key for key, own in kept.items() if not own.holds(saved.get(key))]
        like = {key: got for key, got in like.items() if key not in others}
        check_entries(like, saved, where, self.owner.varies(p))
        for key in others:
            raise ValueError(f"{where}: {kept[key].unlike(key, saved[key])}")
        entries = self.owner.fits(p, mine, saved, label)
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
        self.check_not_lent("a copy or a pickle")
        held = {p: mark.held for p, mark in self._marks.items()}
        return {**self.__dict__, "_marks": held}

    def copied(self) -> None:
        """After the optimizer was copied: parameters hold what those that they are copies of did,
        and latents share memory again with what does in the optimizer."""
        for p, entries in self.optimizer.state.items():
            self.owner.adopted(p, entries)
        held: dict[Tensor, Any] = self._marks
        self._marks = {}
        for p, what in held.items():
            self._mark(p, what)


def _are_of(mine: Tensor, latent: Tensor, weight: Tensor) -> bool:
    """Whether a parameter holds, to rounding, the weights of its latent."""
    return not mine.numel() or latent.equal(taken_over(latent, mine, weight))


def _is_same(one: Any, other: Any) -> bool:
    """Whether both are tensors of equal elements."""
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return False
    one, other = local(one), local(other)
    alike = one.dtype == other.dtype and one.device == other.device
    return alike and bool(one.equal(other))
