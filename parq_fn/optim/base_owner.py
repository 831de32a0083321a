"""What QuantOptimizer keeps of a parameter: the base optimizer's entries, and a prox link's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.scalar import new_count
from parq_fn.optim.base_optimizer import template_of, varying, widened
from parq_fn.optim.base_saving import beyond_of, restored, saved
from parq_fn.optim.digest import are_same_links, digest
from parq_fn.optim.groups import KEYS, is_ours, is_quantized
from parq_fn.optim.learned import (
    HELD,
    PREFIX,
    by_exact_names,
    held_entries,
    laid_out,
    learning_begun,
    with_held,
)
from parq_fn.optim.narrow_latents import KEY, check_narrow, key_of
from parq_fn.optim.old_states import Kept, with_qparams
from parq_fn.optim.owner import Place
from parq_fn.optim.saved import FOREIGN, check_keys
from parq_fn.optim.state import ZERO, Entries, Group, wide
from parq_fn.transforms.oscillation import none_held
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_state import ProxState
from parq_fn.transforms.sharded import local

#: The entries of a parameter's state that are ours; the others are the base optimizer's.
QUANTIZED = ("latent", "qparams", "count", "slope", "lr_sum", "link", KEY)
AVERAGE = ("average", "average_count", "average_total")
#: Those that weights follow from.
_WEIGH = tuple(key for key in QUANTIZED if key not in ("link", KEY))


def is_own(key: str) -> bool:
    """Whether an entry is ours, and not the base optimizer's."""
    return key == "updates" or key in AVERAGE or is_of_link(key)


def is_of_link(key: str) -> bool:
    """Whether an entry is one of ours that quantized parameters alone have."""
    return key in QUANTIZED or key.startswith((PREFIX, HELD))


class BaseOwner:
    """The entries of a base optimizer's parameters, quantized ones with those of their link.

    latents: {parameter: what the base moves for it}, the parameter itself where it is not
    quantized. Of a quantized one it shares its memory with the entry "latent".
    link: of a group; weight: (group, parameter) -> this rank's part of its weights now.
    average: whether an average of each parameter's latents is kept.
    dtype: of latents; None for float32 or better.
    """

    who = "QuantOptimizer"
    keys: tuple[str, ...] = KEYS
    widens = False
    needs = frozenset({"updates"})
    dtype: torch.dtype | None = None  # of those that were pickled before they had one

    def __init__(
        self,
        optimizer: Optimizer,
        base: Optimizer,
        link: Callable[[Group], Prox],
        weight: Callable[[Group, Tensor], Tensor],
        *,
        average: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.optimizer, self.base, self.link, self.weight = optimizer, base, link, weight
        self.average, self.dtype = average, dtype
        self.latents: dict[Tensor, Tensor] = {}

    def check(self) -> None:
        if self.base.param_groups is not self.optimizer.param_groups:
            raise ValueError(
                "QuantOptimizer: the base optimizer has new param_groups; load a state through "
                f"the QuantOptimizer, not through its base. {ZERO}"
            )

    def kind(self, group: Group) -> dict[str, Any]:
        known = {*KEYS, "quant_prox"}
        new = {key for key in group if is_ours(key)} - {*known, *self.base.defaults}
        return {key: group.get(key) for key in sorted(known | new)}

    def compared(self, saved: Group) -> tuple[str, ...]:
        """None of a group that was trained in full precision, which may go on quantized."""
        return KEYS if is_quantized(saved) else ()

    def begin(self, fresh: list[Place], places: list[Place]) -> dict[Tensor, Entries]:
        return {
            place.p: {**self._entries(place, places), **self._averaged(place.p)} for place in fresh
        }

    def _averaged(self, p: Tensor) -> Entries:
        """An average that nothing was added to."""
        if not (self.average and p.is_floating_point()):
            return {}
        average = p.detach().to(wide(p), copy=True)
        count = new_count()
        return dict(zip(AVERAGE, (average, count, count.to(torch.float64)), strict=True))

    def _entries(self, place: Place, places: list[Place]) -> Entries:
        p, group, _, label = place
        if not is_quantized(group):
            learned = self._learned(p, p.dtype)
            return {**self._template(place, p), **learned, "updates": self._updates(p)}
        if self.dtype is not None:
            check_narrow(p, self.dtype, label)
        link = whole = self.link(group)
        if link.learn is not None:
            link = by_exact_names(whole, {own.label: own.p for own in places if own.group is group})
        state = link.init({label: p.detach()})
        latent = p.detach().clone().to(wide(p))
        return {
            **self._template(place, latent),
            **self._learned(p, latent.dtype),
            "updates": self._updates(p),
            "latent": latent.to(self.latent_dtype(p)),
            "qparams": state.qparams[label],
            **scalars(state),
            **(laid_out(link, [label], state)[label] if link.learn is not None else {}),
            **({} if link.hold is None else held_entries(none_held(latent))),
            **({} if self.dtype is None else {KEY: key_of(label, state.count)}),
            "link": digest(whole),
        }

    def _template(self, place: Place, latent: Tensor) -> Entries:
        entries = template_of(self.base, place.group, place.p, latent, place.label)
        clash = sorted(filter(is_own, entries))
        if clash:
            raise ValueError(
                f"QuantOptimizer: {type(self.base).__name__} keeps {', '.join(clash)} of "
                f"parameter {place.label!r} in its state, which are names of QuantOptimizer's own"
            )
        return entries

    def _learned(self, p: Tensor, dtype: torch.dtype) -> Entries:
        """What the base has learned of the parameter before it was wrapped."""
        return widened(dict(self.base.state.get(p) or {}), p, dtype)

    def latent_dtype(self, p: Tensor) -> torch.dtype:
        return wide(p) if self.dtype is None or self.dtype != p.dtype else self.dtype

    def _updates(self, p: Tensor) -> Tensor:
        return new_count() + 1 if self.base.state.get(p) else new_count()

    def adopted(self, p: Tensor, entries: Entries) -> None:
        """The entries become the base's too, once it has taken a step with them: until then it has
        none, and begins as it would alone."""
        self.dropped(p)
        latent = p
        if "latent" in entries:
            latent = entries["latent"].detach().requires_grad_()
            entries["latent"] = latent.detach()
        self.latents[p] = latent
        if self.trained(entries):
            self.base.state[latent] = entries

    def dropped(self, p: Tensor) -> None:
        self.base.state.pop(p, None)
        self.base.state.pop(self.latents.pop(p, p), None)

    def is_attached(self, p: Tensor, entries: Entries) -> bool:
        """Whether the base moves this latent, and has these entries."""
        latent = self.latents[p]
        own = entries.get("latent", latent)
        if own is not latent and local(own).data_ptr() != local(latent).data_ptr():
            return False
        return not self.trained(entries) or self.base.state.get(latent) is entries

    def watched(self, entries: Entries) -> Iterable[str]:
        return _WEIGH if "qparams" in entries else ()

    def weighs(self, key: str) -> bool:
        return key in _WEIGH

    def trained(self, entries: Entries) -> bool:
        return bool(int(entries.get("updates", 0)))

    def shared(self) -> set[str]:
        return set()

    def weights(self, params: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = set(params)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p in chosen:
                    yield p, self.weight(group, p)

    def kept(self) -> dict[Tensor, dict[str, Kept]]:
        found: dict[Tensor, dict[str, Kept]] = {}
        for group in self.optimizer.param_groups:
            link = self.link(group) if is_quantized(group) else None
            for p in group["params"]:
                own = link and Kept(link.quantizer, link.granularity.row_shape(p))
                found[p] = {"qparams": own} if own else {}
        return found

    @contextmanager
    def latents_in_groups(self) -> Iterator[None]:
        """All latents in the places of their parameters, for what the base does to all."""
        kept = [group["params"] for group in self.base.param_groups]
        try:
            for group, params in zip(self.base.param_groups, kept, strict=True):
                group["params"] = [self.latents[p] for p in params]
            yield
        finally:
            for group, params in zip(self.base.param_groups, kept, strict=True):
                group["params"] = params

    def saved(self) -> tuple[dict[Tensor, Entries], list[Group], Entries]:
        """(entries of parameters as they are saved, groups as the base saves them, what it saves
        that is of no parameter)."""
        state = self.optimizer.state
        mine = {
            p: _parted(state[p]) for group in self.optimizer.param_groups for p in group["params"]
        }
        theirs, groups, beyond = saved(
            self.base, self.latents, {p: base for p, (base, _) in mine.items()}
        )
        return {p: {**theirs[p], **own} for p, (_, own) in mine.items()}, groups, beyond

    def shown(self) -> dict[Tensor, Entries]:
        return self.saved()[0]

    def varies(self, p: Tensor) -> Callable[[str], bool]:
        groups = self.optimizer.param_groups
        group = next(g for g in groups if any(p is one for one in g["params"]))
        found = varying(self.base, group, p, self.latents[p])
        return lambda key: not is_own(key) and found(key)

    def restored(
        self,
        rows: list[tuple[Tensor, Entries | None]],
        groups: list[Group],
        state_dict: dict[str, Any],
    ) -> list[tuple[Tensor, Entries | None]]:
        """The base has none of what was saved before its first step."""
        parts = [(p, _parted(entries or {})) for p, entries in rows]
        given = [
            (p, base if entries is not None and self.trained(entries) else None)
            for (p, entries), (_, (base, _)) in zip(rows, parts, strict=True)
        ]
        made = restored(self.base, self.latents, given, groups, beyond_of(state_dict))
        return [
            (p, entries if own is None or entries is None else {**own, **mine})
            for (p, entries), (_, own), (_, (_, mine)) in zip(rows, made, parts, strict=True)
        ]

    def check_links(self, p: Tensor, mine: Entries, saved: Entries, where: str) -> None:
        if not are_same_links(mine.get("link"), saved.get("link")):
            link, had = self._link_of(p), saved.get("qparams")
            m = had.shape[-1] if isinstance(had, Tensor) and had.dim() else 0
            own = link.quantizer.num_qparams
            other, here = (f", of {m} qparam(s) a row,", f", of {own}") if m != own else ("", "")
            raise ValueError(
                f"{where}: it was trained with another prox link{other} than {link!r}{here}; build "
                'the optimizer with that one, or delete its entry "link" from the saved "state" to '
                "go on with this"
            )

    def fits(self, p: Tensor, mine: Entries, saved: Entries, label: str) -> Entries:
        """Entries of the base optimizer alone, as of training in full precision, too; an average
        that was not saved begins anew."""
        lost = sorted({*AVERAGE} & saved.keys() - mine.keys())
        if lost:
            raise ValueError(
                f"loaded state dict, parameter {label!r}: it has an average of its latents, and "
                "this optimizer keeps none; build QuantOptimizer(..., average=...), or delete its "
                f'entries {", ".join(lost)} from the saved "state" to go on without'
            )
        saved = {**{key: got for key, got in self._averaged(p).items() if key in mine}, **saved}
        saved = {key: got for key, got in saved.items() if key != KEY or key in mine}
        quantized = any(map(is_of_link, saved))
        if quantized and "qparams" not in mine:
            raise ValueError(
                f"loaded state dict, parameter {label!r}: it was quantized and is not in this "
                "optimizer; give its group the prox link or the bits that it was trained with"
            )
        if "updates" in saved and (quantized or "qparams" not in mine):
            saved = {**{key: mine[key] for key in (KEY,) if key in mine}, **saved}
            if "link" in mine and "link" not in saved:
                saved = {**learning_begun(mine, saved, (PREFIX, HELD)), "link": mine["link"]}
            self._check_keys(p, mine.keys() - {"latent"}, saved, label)
            return saved
        trained = self.trained({"updates": 1, **saved})
        needed = [key for key in mine if not is_own(key)] if trained else []
        self._check_keys(p, needed, saved, label)
        own = {key: mine[key] for key in mine if is_of_link(key) and key != "latent"}
        moved = widened(saved, p, wide(p) if "latent" in mine else p.dtype)
        return {"updates": new_count() + 1, **own, **moved}

    def _check_keys(self, p: Tensor, needed: Iterable[str], saved: Entries, label: str) -> None:
        varies = self.varies(p)
        needed = [key for key in needed if key in saved or not varies(key)]
        check_keys(needed, saved, f"loaded state dict, parameter {label!r}", FOREIGN)

    def resume(self) -> None:
        """Makes entries of those that versions without a store have pickled."""
        state = self.optimizer.state
        for p, kept in self.kept().items():
            entries = with_qparams(state[p], kept)
            if kept:
                entries["link"] = digest(self._link_of(p))
            state[p].clear()  # it may be the base optimizer's too
            state[p].update(entries)

    def _link_of(self, p: Tensor) -> Prox:
        groups = self.optimizer.param_groups
        return next(self.link(g) for g in groups if any(p is one for one in g["params"]))


def _parted(entries: Entries) -> tuple[Entries, Entries]:
    """(the base optimizer's entries, ours)."""
    own = {key: got for key, got in entries.items() if is_own(key)}
    return {key: got for key, got in entries.items() if not is_own(key)}, own


def scalars(state: ProxState) -> Entries:
    """The entries of a parameter that are not of its rows."""
    return {"count": state.count, "slope": state.slope, "lr_sum": state.lr_sum}


def prox_state(entries: dict[str, Any]) -> ProxState:
    """The state of a link that has one parameter, of its entries."""
    return ProxState(entries["count"], entries["slope"], entries["lr_sum"], [entries["qparams"]])


def weight_at(link: Prox, entries: dict[str, Any], latent: Tensor, p: Tensor, name: str) -> Tensor:
    """This rank's part of the weights that a latent has with a parameter's qparams."""
    state = prox_state(entries)._replace(qparams={name: entries["qparams"]})
    made = local(link.weights(state, {name: latent}, dtype=p.dtype)[name])
    return with_held(link, entries, p, made)


def by_step(
    params: Iterable[Tensor], state: Mapping[Tensor, Entries]
) -> dict[tuple[int, float], list[Tensor]]:
    """Parameters by the count and the sum of learning rates of their link, of which those that
    were never frozen have the same."""
    known: dict[tuple[int, int], tuple[int, float]] = {}  # read once of tensors that many share
    found: dict[tuple[int, float], list[Tensor]] = {}
    for p in params:
        count, lr_sum = state[p]["count"], state[p]["lr_sum"]
        own = id(count), id(lr_sum)
        if own not in known:
            known[own] = int(count), float(lr_sum)
        found.setdefault(known[own], []).append(p)
    return found
