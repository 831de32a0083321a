"""What QuantOptimizer keeps of a parameter: the base optimizer's entries, and a prox link's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.scalar import new_count
from parq_fn.optim.base_optimizer import template_of, widened
from parq_fn.optim.groups import KEYS, digest, is_quantized
from parq_fn.optim.old_states import Kept, with_qparams
from parq_fn.optim.owner import Place
from parq_fn.optim.state import Entries, Group, check_keys, wide
from parq_fn.transforms.prox_link import Prox, ProxState

#: The entries of a parameter's state that are ours; the others are the base optimizer's.
QUANTIZED = ("latent", "qparams", "count", "slope", "lr_sum", "link")
OWN = ("updates", *QUANTIZED)


class BaseOwner:
    """The entries of a base optimizer's parameters, quantized ones with those of their link.

    latents: {parameter: what the base moves for it}, the parameter itself where it is not
    quantized. Of a quantized one it shares its memory with the entry "latent".
    link: of a group; weight: (group, parameter) -> this rank's part of its weights now.
    """

    who = "QuantOptimizer"
    keys: tuple[str, ...] = KEYS
    widens = False

    def __init__(
        self,
        optimizer: Optimizer,
        base: Optimizer,
        link: Callable[[Group], Prox],
        weight: Callable[[Group, Tensor], Tensor],
    ) -> None:
        self.optimizer, self.base, self.link, self.weight = optimizer, base, link, weight
        self.latents: dict[Tensor, Tensor] = {}

    def check(self) -> None:
        if self.base.param_groups is not self.optimizer.param_groups:
            raise ValueError(
                "QuantOptimizer: the base optimizer has new param_groups; load a state through "
                "the QuantOptimizer, not through its base"
            )

    def kind(self, group: Group) -> dict[str, Any]:
        return {key: group.get(key) for key in (*KEYS, "quant_prox")}

    def begin(self, fresh: list[Place], places: list[Place]) -> dict[Tensor, Entries]:
        del places
        return {place.p: self._entries(place) for place in fresh}

    def _entries(self, place: Place) -> Entries:
        p, group, _, label = place
        if not is_quantized(group):
            return {**self._template(place, p), **self._learned(p, p), "updates": self._updates(p)}
        link = self.link(group)
        state = link.init({label: p.detach()})
        latent = p.detach().clone().to(wide(p))
        return {
            **self._template(place, latent),
            **self._learned(p, latent),
            "updates": self._updates(p),
            "latent": latent,
            "qparams": state.qparams[label],
            **scalars(state),
            "link": digest(link),
        }

    def _template(self, place: Place, latent: Tensor) -> Entries:
        entries = template_of(self.base, place.group, place.p, latent)
        clash = sorted(entries.keys() & {*OWN})
        if clash:
            raise ValueError(
                f"QuantOptimizer: {type(self.base).__name__} keeps {', '.join(clash)} of "
                f"parameter {place.label!r} in its state, which are names of QuantOptimizer's own"
            )
        return entries

    def _learned(self, p: Tensor, latent: Tensor) -> Entries:
        """What the base has learned of the parameter before it was wrapped."""
        return widened(dict(self.base.state.get(p) or {}), p, latent)

    def _updates(self, p: Tensor) -> Tensor:
        return torch.ones((), dtype=torch.int64) if self.base.state.get(p) else new_count()

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

    def trained(self, entries: Entries) -> bool:
        return bool(int(entries["updates"]))

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

    def fits(self, p: Tensor, mine: Entries, saved: Entries, label: str) -> Entries:
        """Entries of the base optimizer alone, as of training in full precision, too."""
        if "updates" in saved:
            check_keys(mine.keys() - {"latent", "link"}, saved, label)
            if "link" in mine and saved.setdefault("link", mine["link"]) != mine["link"]:
                raise ValueError(
                    f"loaded state dict, parameter {label!r}: it was trained with another prox "
                    f"link than {self._link_of(p)!r}; build the optimizer with that one, or delete "
                    'the entries "link" to go on with this'
                )
            return saved
        check_keys(mine.keys() - {*OWN}, saved, label)
        own = {key: mine[key] for key in QUANTIZED if key in mine and key != "latent"}
        moved = widened(saved, p, mine.get("latent", p))
        return {**own, **moved, "updates": torch.ones((), dtype=torch.int64)}

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


def scalars(state: ProxState) -> Entries:
    """The entries of a parameter that are not of its rows."""
    return {"count": state.count, "slope": state.slope, "lr_sum": state.lr_sum}


def prox_state(entries: dict[str, Any]) -> ProxState:
    """The state of a link that has one parameter, of its entries."""
    return ProxState(entries["count"], entries["slope"], entries["lr_sum"], [entries["qparams"]])
