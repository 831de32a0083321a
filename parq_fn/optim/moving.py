"""The first half of QuantOptimizer's step: the base optimizer moves the latents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.scalar import as_scalar, concrete
from parq_fn.optim.base_optimizer import steps_apart
from parq_fn.optim.base_owner import is_own, prox_state
from parq_fn.optim.engine.chunks import chunks
from parq_fn.optim.engine.gradients import RowGradients
from parq_fn.optim.groups import is_quantized
from parq_fn.optim.learned import held_of
from parq_fn.optim.narrow_latents import KEY, in_full
from parq_fn.optim.state import Group, wide
from parq_fn.optim.wrapping import Wrapping
from parq_fn.transforms.layout import part_of
from parq_fn.transforms.learn import gradient_of
from parq_fn.transforms.links import times
from parq_fn.transforms.oscillation import HeldState
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_pullback import own_part
from parq_fn.transforms.sharded import local


class Moving(Wrapping):
    """An adapter whose base optimizer steps with latents in the places of parameters."""

    anneal_weight_decay: float
    _of_rows: RowGradients
    _pulled: dict[Tensor, Tensor]  # gradients of qparams, while a step is made

    def link(self, group: Group) -> Prox:
        raise NotImplementedError

    def prox_of(self, p: Tensor) -> Prox | None:
        """The prox link of a parameter; None of one that is not quantized."""
        groups = (group for group in self.param_groups if is_quantized(group))
        own = next((g for g in groups if any(p is one for one in g["params"])), None)
        return None if own is None else self.link(own)

    def _move(self) -> None:
        """The base optimizer's step with latents for parameters, and the normal map's pull.

        Parameters that need a tensor of their own size for it, a gradient of its own or the pull
        from before the step, are moved a few at a time by torch's own optimizers: no more
        elements together than the largest parameter has. Other optimizers, and those with hooks,
        step once, for they may keep account of their steps.
        """
        groups = {p: group for group in self.param_groups for p in group["params"]}
        pulled = {
            p
            for group in self.param_groups
            if is_quantized(group) and (self.link(group).draws or self.link(group).hold)
            for p in group["params"]
        }
        moved = [p for p in groups if p.grad is not None and self._is_trained(p)]
        self._pulled = self._gradients_of_qparams(moved, groups)
        needy = [p for p in moved if self._has_own_gradient(p, groups[p]) or p in pulled]
        alone = set(needy)
        rest = [p for p in moved if p not in alone]
        runs = [moved]
        if needy and steps_apart(self.base):
            runs = chunks({p: p.numel() for p in needy}) + ([rest] if rest else [])
        for chunk in runs:
            with in_full(self.base, self._latents, self.state, chunk):
                self._move_chunk(chunk, groups, [p for p in chunk if p in pulled])

    def _move_chunk(
        self, chunk: list[Tensor], groups: dict[Tensor, Group], pulled: list[Tensor]
    ) -> None:
        pulls = {p: self._pull(p, groups[p]) for p in pulled if self.link(groups[p]).draws}
        held = {p: local(self._latents[p]).clone() for p in pulled if self.link(groups[p]).hold}
        self._step_base(chunk, groups)
        for p, pull in pulls.items():
            latent = local(self._latents[p].detach())
            latent.sub_(pull.to(latent.dtype))
        for p, before in held.items():
            latent = local(self._latents[p].detach())
            latent.copy_(torch.where(local(held_of(self.state[p]).held), before, latent))

    def _is_trained(self, p: Tensor) -> bool:
        """Not frozen; a parameter of the base alone is moved wherever the base moves it."""
        return p.requires_grad or self._latents[p] is p

    def _pull(self, p: Tensor, group: Group) -> Tensor:
        share = self.link(group).drawn_by(prox_state(self.state[p]), rate_of(group))
        return times(local(self._latents[p]) - local(p), share)

    def _has_own_gradient(self, p: Tensor, group: Group) -> bool:
        return p.dtype != wide(p) or (is_quantized(group) and self.link(group).bends)

    def _gradient(self, p: Tensor, group: Group) -> Tensor:
        """That of the latent, from that of the parameter."""
        latent, state = self._latents[p], prox_state(self.state[p])
        grad = p.grad.to(latent.dtype)  # type: ignore[union-attr] # it has one
        link = self.link(group)
        if not link.bends:
            return grad
        link, seen = replace(link, learn=None), [latent.detach()]
        found: Tensor = link.pullback([grad], state, seen, weights=[p.detach()])[0][0]
        return found

    def _gradients_of_qparams(
        self, moved: list[Tensor], groups: dict[Tensor, Group]
    ) -> dict[Tensor, Tensor]:
        """Those of parameters whose links learn, of the gradients at the weights that they hold."""
        found: dict[Tensor, Tensor] = {}
        labels: dict[Tensor, str] = {}
        for p in moved:
            link = self.link(groups[p]) if is_quantized(groups[p]) else None
            if link is None or link.learn is None:
                continue
            state, latent = prox_state(self.state[p]), self._latents[p].detach()
            if concrete(link.active(state)):
                part, grad = part_of(p, link.granularity), own_part(p.grad, p)  # type: ignore[arg-type] # it has one
                entries = self.state[p]
                held = None if link.hold is None else _held(held_of(entries))
                own = entries["qparams"], p.dtype, held
                labels = labels or {place.p: place.label for place in self._store.places()}
                how = self._of_rows, labels[p]
                found[p] = gradient_of(link, grad, latent, part, state, own, *how)
        return found

    def _step_base(self, chunk: list[Tensor], groups: dict[Tensor, Group]) -> None:
        moved: set[Tensor] = set()
        try:
            for p in chunk:
                latent = self._latents[p]
                if latent is not p:
                    latent.grad = self._gradient(p, groups[p])
            with self._latents_in_groups(set(chunk)):
                self.base.step()
            moved = set(chunk)
        finally:
            for p, latent in self._latents.items():
                if latent is not p:
                    latent.grad = None
                own = self.base.state.get(latent)
                if p in moved or (own and own is not self.state[p]):
                    self._merge(p)

    @contextmanager
    def _latents_in_groups(self, chosen: set[Tensor]) -> Iterator[None]:
        """The chosen parameters' latents in the base's groups, each with its own weight decay; the
        others' too where the base may look at all of them, as alone."""
        groups, apart = list(self.param_groups), steps_apart(self.base)
        kept = [(group["params"], group.get("weight_decay")) for group in groups]
        try:
            for group, (params, decay) in zip(groups, kept, strict=True):
                decays = {p: self._decay(group, p) for p in params if p in chosen}
                own: dict[Any, list[Tensor]] = {}
                other = next(iter(decays.values()), decay)
                for p in params if not apart else decays:
                    own.setdefault(decays.get(p, other), []).append(self._latents[p])
                first, *others = own.items() or [(decay, [])]
                group["params"] = first[1]
                if decay is not None:
                    group["weight_decay"] = first[0]
                for annealed, latents in others:  # frozen for a while, some have other slopes
                    self.param_groups.append({**group, "params": latents, "weight_decay": annealed})
            yield
        finally:
            self.param_groups[:] = groups
            for group, (params, decay) in zip(groups, kept, strict=True):
                group["params"] = params
                if decay is not None:
                    group["weight_decay"] = decay

    def _decay(self, group: Group, p: Tensor) -> Any:
        """The group's weight decay, annealed by the slope that the parameter's last step left."""
        decay, f = group.get("weight_decay"), self.anneal_weight_decay
        if not (f and decay and is_quantized(group)):
            return decay
        return decay * (f * float(self.state[p]["slope"]) + 1 - f)

    def _merge(self, p: Tensor) -> None:
        """One dict for a parameter's state, the base optimizer's and ours.

        Until its first step the base has none, so that it begins as it would alone; what stands
        in ours before that are placeholders.
        """
        latent, entries = self._latents[p], self.state[p]
        entries["updates"] = entries["updates"] + 1
        shares = latent is not p and KEY not in entries  # its memory with the entry
        if shares and local(latent).data_ptr() != local(entries["latent"]).data_ptr():
            entries["latent"] = latent.detach()  # the base has given it other memory
        own = self.base.state.get(latent, {})
        if own is not entries:
            merged = {**own, **{key: got for key, got in entries.items() if is_own(key)}}
            self.state[p] = self.base.state[latent] = merged


def _held(state: HeldState) -> tuple[Tensor, Tensor]:
    return local(state.held), local(state.code)


def rate_of(group: Group) -> Tensor:
    """The group's learning rate now."""
    rate = group["lr"]
    return as_scalar(rate).detach().to(device="cpu", dtype=torch.float64)
