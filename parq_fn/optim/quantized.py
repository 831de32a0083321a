"""A torch.optim optimizer with a prox link behind it.

The base optimizer moves the latents, which live in the state; between steps the parameters hold
the weights. A step is

    g <- gradient(gradient at w, u / shrink, w, Q)
    u <- base optimizer(u; g)              [- (lr / gamma) (u - w)]
    Q <- quantizer(u / shrink)             where due
    p <- map(u / shrink, Q, coefficient)

with the first and the last two lines those of the functional core. The latents stand in for the
parameters in the base's groups only while it steps, so that groups are shared and no exception
leaves a latent in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.checks import SHARE, check_numbers
from parq_fn.foundation.scalar import as_scalar, concrete, new_count
from parq_fn.optim.base_optimizer import steps_apart, template_of, widened
from parq_fn.optim.engine.chunks import chunks
from parq_fn.optim.engine.passes import Job, Pass, refit
from parq_fn.optim.groups import check_group, is_quantized, link_of
from parq_fn.optim.state import (
    Group,
    after_load,
    before_load,
    beside,
    check_dtype,
    check_entries,
    load_groups,
    loaded,
    mark,
    matched,
    name_of,
    refuse_flat,
    taken_over,
    unshared,
    value_of,
    wide,
)
from parq_fn.transforms.links import times
from parq_fn.transforms.prox_link import Prox, ProxState
from parq_fn.transforms.prox_links import parq_prox
from parq_fn.transforms.sharded import local, part_of

#: The entries of a parameter's state that are ours; the others are the base optimizer's.
_QUANTIZED = ("latent", "levels", "count", "slope", "lr_sum")
_OWN = ("updates", *_QUANTIZED)
_UNFIT = (torch.optim.LBFGS, torch.optim.SparseAdam)


class QuantOptimizer(Optimizer):
    """A torch.optim optimizer whose quantized parameters hold map(latent, levels, coefficient).

    base_optimizer: any but LBFGS and SparseAdam; what it has learned of its parameters it keeps.
    Of its groups those with "quant_bits" below 16 are quantized, with the quantizer of `prox` at
    that many bits (0 is ternary) and, where they have a "quant_block_size", per block; the
    others are the base optimizer's alone.
    prox: a prox link. Its learning rate is the group's. Its `gradient` takes what stands in p.grad
    at the step, clipped or unscaled as it may be, and leaves p.grad as it is.
    anneal_weight_decay: f in [0, 1]; a quantized group's weight decay is taken times
    f * s + 1 - f, s the inverse slope that the step before left (parq_prox only).
    compile: the map under torch.compile, with the same weights, bit for bit but for the sign of a
    zero; the base optimizer and the fits of levels are not. A map is compiled when it is first met,
    some seconds where annealing starts and where it ends, for which a CPU needs a C++ compiler; it
    pays where weights are many.

    `param_groups` are the base's own, so a learning-rate scheduler may be built on either. A
    quantized group shows "inverse_slope" (the map's coefficient) and "lr_sum" as numbers, of the
    last step. A parameter whose requires_grad is off is left alone, and its count of updates
    stands still; one without a gradient is not moved by the base but goes on to be mapped.
    Elements of a parameter that are changed between steps become its latents, so weights may be
    loaded into the module after the optimizer was built; but torch does not tell of writes through
    `p.data`, which are to be made under torch.no_grad() instead.

    State of a parameter, from construction on: the base's own entries; "updates" [], int64; and
    where quantized "latent" (float32 or better, like the parameter), "levels" [r, k] in its
    dtype, "count" [], int64, "slope" and "lr_sum" [], float64.

    Raises TypeError for an unfit optimizer, something else than a prox link, and FSDP1's flat
    parameters; ValueError where no group has quant_bits, for other keys "quant_...", for a base
    whose state has names of those above, and as the quantizer and granularity do, with the
    parameter's name where its group has names.

    >>> from parq_fn import lsbq, parq_prox
    >>> from parq_fn.optim import QuantOptimizer
    >>> net = torch.nn.Linear(4, 2)
    >>> groups = [{"params": [net.weight], "quant_bits": 2}, {"params": [net.bias]}]
    >>> base = torch.optim.AdamW(groups, lr=0.01)
    >>> optimizer = QuantOptimizer(base, parq_prox(lsbq(2), anneal_start=0, anneal_end=5))
    >>> for _ in range(7):
    ...     optimizer.zero_grad()
    ...     net(torch.ones(3, 4)).square().sum().backward()
    ...     optimizer.step()
    >>> net.weight.unique().numel() <= 4, optimizer.param_groups[0]["inverse_slope"]
    (True, 0.0)
    """

    def __init__(
        self,
        base_optimizer: Optimizer,
        prox: Prox,
        *,
        anneal_weight_decay: float = 0.0,
        compile: bool = False,
    ):
        given: Any = base_optimizer
        if not isinstance(given, Optimizer) or isinstance(given, (*_UNFIT, QuantOptimizer)):
            raise TypeError(
                "QuantOptimizer: expected a torch.optim optimizer other than LBFGS and "
                f"SparseAdam, got {type(base_optimizer).__name__}"
            )
        if not isinstance(prox, Prox):
            raise TypeError(
                "QuantOptimizer: expected a prox link such as parq_prox(lsbq(2), ...), got "
                f"{prox!r}"
            )
        check_numbers("QuantOptimizer", SHARE, anneal_weight_decay=anneal_weight_decay)
        if anneal_weight_decay and not isinstance(prox, parq_prox):
            raise ValueError(
                "QuantOptimizer: anneal_weight_decay follows an inverse slope, which parq_prox "
                f"has and {type(prox).__name__} has not"
            )
        if not isinstance(compile, bool):
            raise TypeError(f"QuantOptimizer: expected compile=True or False, got {compile!r}")
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.base, self.prox = base_optimizer, prox
        self.anneal_weight_decay, self.compile = anneal_weight_decay, compile
        self.param_groups = base_optimizer.param_groups
        self._links: dict[tuple[Any, Any], Prox] = {}
        self._latents: dict[Tensor, Tensor] = {}
        self._written: dict[Tensor, tuple[int, int]] = {}
        self._order: list[list[Tensor]] = []
        self._bits: list[tuple[Any, Any]] = []
        self._pass = Pass(compile=compile)
        for index, group in enumerate(self.param_groups):
            check_group(group, index)
        if not any(map(is_quantized, self.param_groups)):
            raise ValueError(
                "QuantOptimizer: no group has quant_bits below 16; give one such as "
                '{"params": ..., "quant_bits": 2}'
            )
        for i in range(len(self.param_groups)):
            self._adopt(i)

    # Groups and their parameters.

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group to the base optimizer, and its state."""
        if not hasattr(self, "base"):  # called by Optimizer.__init__
            super().add_param_group(param_group)
            return
        self._check_linked()
        self.base.add_param_group(param_group)
        try:
            check_group(self.param_groups[-1], len(self.param_groups) - 1)
            self._adopt(len(self.param_groups) - 1)
        except Exception:
            self.param_groups.pop()
            raise

    def link(self, group: Group) -> Prox:
        """The prox link of a quantized group: `prox` with the group's bits and block size."""
        key = group["quant_bits"], group.get("quant_block_size")
        if key not in self._links:
            self._links[key] = link_of(self.prox, *key)
        return self._links[key]

    def _adopt(self, index: int) -> None:
        """State for the parameters of a group, none of it half made."""
        group = self.param_groups[index]
        made = {}
        for i, p in enumerate(group["params"]):
            made[p] = self._begin(group, p, name_of(group, index, i))
        for p, (latent, entries) in made.items():
            self._latents[p], self.state[p] = latent, entries
            self._wrote(p)
            if self.base.state.get(p):  # it was trained before it was wrapped
                self._restore(p, widened(self.base.state.pop(p), p, latent))
        self._order[index:] = [list(group["params"])]
        self._bits[index:] = [_bits_of(group)]
        if is_quantized(group) and group["params"]:
            _show(group, _prox_state(self.state[group["params"][0]]))

    def _begin(self, group: Group, p: Tensor, name: str) -> tuple[Tensor, dict[str, Any]]:
        """What the base moves for a parameter, and the parameter's state before any step."""
        refuse_flat("QuantOptimizer", p, name)
        if not is_quantized(group):
            return p, {**self._template(group, p, p, name), "updates": new_count()}
        state = self.link(group).init({name: p.detach()})
        latent = p.detach().clone().to(wide(p)).requires_grad_()
        return latent, {
            **self._template(group, p, latent, name),
            "updates": new_count(),
            "latent": latent.detach(),  # shares memory with what the base moves
            "levels": state.levels[name],
            **_scalars(state),
        }

    def _template(self, group: Group, p: Tensor, latent: Tensor, name: str) -> dict[str, Any]:
        entries = template_of(self.base, group, p, latent)
        clash = sorted(entries.keys() & {*_OWN})
        if clash:
            raise ValueError(
                f"QuantOptimizer: {type(self.base).__name__} keeps {', '.join(clash)} of "
                f"parameter {name!r} in its state, which are names of QuantOptimizer's own"
            )
        return entries

    def _check_linked(self) -> None:
        """Raises ValueError where groups were changed behind our back."""
        if self.base.param_groups is not self.param_groups:
            raise ValueError(
                "QuantOptimizer: the base optimizer has new param_groups; load a state through "
                "the QuantOptimizer, not through its base"
            )
        if len(self._order) != len(self.param_groups):
            raise ValueError(
                f"QuantOptimizer: had {len(self._order)} groups and has "
                f"{len(self.param_groups)}; add groups with its own add_param_group"
            )
        for index, (group, known) in enumerate(zip(self.param_groups, self._bits, strict=True)):
            if _bits_of(group) != known:
                raise ValueError(
                    f"QuantOptimizer: group {index} has quant_bits, quant_block_size = "
                    f"{_bits_of(group)} and was built with {known}, which its levels are of; build "
                    "another optimizer to change them"
                )

    def _follow(self) -> None:
        """Follows parameters that were exchanged in their groups, by position, or moved."""
        self._check_linked()
        for index, (group, known) in enumerate(zip(self.param_groups, self._order, strict=True)):
            if len(known) != len(group["params"]):
                raise ValueError(
                    f"QuantOptimizer: group {index} had {len(known)} parameters and has "
                    f"{len(group['params'])}; add parameters with add_param_group"
                )
            if {*known} == {*group["params"]}:  # in another order at most
                known[:] = group["params"]
            for i, (old, new) in enumerate(zip(known, group["params"], strict=True)):
                if old is not new:
                    self._exchange(group, old, new, name_of(group, index, i))
                    known[i] = new
                if is_quantized(group):
                    self._move_to_device(new, name_of(group, index, i))

    def _exchange(self, group: Group, old: Tensor, new: Tensor, name: str) -> None:
        alike = type(old) is type(new) and old.shape == new.shape
        if not alike and int(self.state[old]["updates"]):
            raise ValueError(
                f"QuantOptimizer: parameter {name!r} was exchanged for a {type(new).__name__} of "
                f"shape {tuple(new.shape)} after it was trained, which its state does not fit; "
                "shard the module before training, or load a checkpoint"
            )
        latent, entries = self._begin(group, new, name)
        kept = self.state.pop(old)
        self.base.state.pop(self._latents.pop(old), None)
        self._latents[new], self.state[new] = latent, entries
        self._wrote(new)
        if alike:
            self._restore(new, beside(new, kept))
            self._written.pop(new)  # its values may be others

    def _move_to_device(self, p: Tensor, name: str) -> None:
        """The state on the parameter's device, to which the module may have been moved."""
        latent = self._latents[p]
        check_dtype("QuantOptimizer", p, latent, name)
        if latent.device == p.device:
            return
        latent.data = latent.data.to(p.device)
        self.state[p].update({**beside(p, self.state[p]), "latent": latent.detach()})

    # Parameters that code outside the optimizer changed.

    def _wrote(self, p: Tensor) -> None:
        self._written[p] = mark(p)

    def _take_over(self) -> None:
        """Elements of parameters that were changed since we wrote them become their latents.

        So weights may be loaded into the module after the optimizer was built. What lies within
        rounding of the map is as we wrote it, perhaps on another machine.
        """
        for group in self.param_groups:
            for p in group["params"] if is_quantized(group) else ():
                mine = local(p)
                if self._written.get(p) == mark(p):
                    continue
                self._wrote(p)
                if mine.numel():
                    link, state = self.link(group), _prox_state(self.state[p])
                    job = self._job(link, p)._replace(weight=torch.empty_like(mine))
                    self._pass(link, state, [job])
                    latent = local(self._latents[p])
                    latent.copy_(taken_over(latent, mine, job.weight))

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer on the latents, then the map onto the parameters.

        The closure, if any, runs first, at the weights; its value is returned.
        """
        loss = value_of(closure)
        self._follow()
        with torch.no_grad():
            self._take_over()
            self._move()
            for group in self.param_groups:
                if is_quantized(group):
                    self._map_group(group)
        return loss

    def _move(self) -> None:
        """The base optimizer's step with latents for parameters, and the normal map's pull.

        Parameters that need a tensor of their own size for it, a gradient of its own or the pull
        from before the step, are moved a few at a time by torch's own optimizers: no more
        elements together than the largest parameter has. Other optimizers, and those with hooks,
        step once, for they may keep account of their steps.
        """
        groups = {p: group for group in self.param_groups for p in group["params"]}
        moved = [p for p in groups if p.grad is not None and self._is_trained(p)]
        needy = [p for p in moved if self._has_own_gradient(p, groups[p]) or self._is_pulled(p)]
        alone = set(needy)
        rest = [p for p in moved if p not in alone]
        runs = [moved]
        if needy and steps_apart(self.base):
            runs = chunks({p: p.numel() for p in needy}) + ([rest] if rest else [])
        for chunk in runs:
            pulls = {p: self._pull(p, groups[p]) for p in chunk if self._is_pulled(p)}
            self._step_base(chunk, groups)
            for p, pull in pulls.items():
                latent = local(self._latents[p])
                latent.sub_(pull.to(latent.dtype))

    def _is_trained(self, p: Tensor) -> bool:
        """Not frozen; a parameter of the base alone is moved wherever the base moves it."""
        return p.requires_grad or self._latents[p] is p

    def _is_pulled(self, p: Tensor) -> bool:
        return self.prox.normal_map is not None and self._latents[p] is not p

    def _pull(self, p: Tensor, group: Group) -> Tensor:
        gamma: Any = self.prox.normal_map
        return times(local(self._latents[p]) - local(p), _rate(group) / as_scalar(gamma))

    def _has_own_gradient(self, p: Tensor, group: Group) -> bool:
        return p.dtype != wide(p) or (is_quantized(group) and self.link(group).pulls_back)

    def _gradient(self, p: Tensor, group: Group) -> Tensor:
        """That of the latent, from that of the parameter."""
        latent, state = self._latents[p], _prox_state(self.state[p])
        grads = [p.grad.to(latent.dtype)]  # type: ignore[union-attr] # it has one
        own = self.link(group).pullback(grads, state, [latent.detach()], weights=[p.detach()])
        found: Tensor = own[0][0]
        return found

    def _step_base(self, chunk: list[Tensor], groups: dict[Tensor, Group]) -> None:
        for p in chunk:
            latent = self._latents[p]
            if latent is not p:
                latent.grad = self._gradient(p, groups[p])
        try:
            with self._latents_in_groups(set(chunk)):
                self.base.step()
        finally:
            for p in chunk:
                if self._latents[p] is not p:
                    self._latents[p].grad = None
        for p in chunk:
            self._merge(p)

    @contextmanager
    def _latents_in_groups(self, chosen: set[Tensor]) -> Iterator[None]:
        kept = [(group["params"], group.get("weight_decay")) for group in self.param_groups]
        f = self.anneal_weight_decay
        try:
            for group in self.param_groups:
                params = [p for p in group["params"] if p in chosen]
                group["params"] = [self._latents[p] for p in params]
                if f and is_quantized(group) and params and group.get("weight_decay"):
                    slope = float(self.state[params[0]]["slope"])
                    group["weight_decay"] = group["weight_decay"] * (f * slope + 1 - f)
            yield
        finally:
            for group, (params, decay) in zip(self.param_groups, kept, strict=True):
                group["params"] = params
                if decay is not None:
                    group["weight_decay"] = decay

    def _merge(self, p: Tensor) -> None:
        """One dict for a parameter's state, the base optimizer's and ours.

        Until its first step the base has none, so that it begins as it would alone; what stands
        in ours before that are placeholders.
        """
        latent, entries = self._latents[p], self.state[p]
        entries["updates"] = entries["updates"] + 1
        if latent is not p:
            entries["latent"] = latent.detach()  # the base may have given it other memory
        own = self.base.state.get(latent, {})
        if own is not entries:
            merged = {**own, **{key: entries[key] for key in _OWN if key in entries}}
            self.state[p] = self.base.state[latent] = merged

    def _map_group(self, group: Group) -> None:
        link, rate = self.link(group), _rate(group)
        by_state: dict[tuple[int, float], list[Tensor]] = {}
        for p in group["params"]:  # those that were never frozen share theirs
            if p.requires_grad:
                entries = self.state[p]
                key = int(entries["count"]), float(entries["lr_sum"])
                by_state.setdefault(key, []).append(p)
        for params in by_state.values():
            state = link.advance(_prox_state(self.state[params[0]]), rate)
            if concrete(link.due(state)) is not False:
                entries = [self.state[p] for p in params]
                columns = ([one[key] for one in entries] for key in ("latent", "levels"))
                for one, levels in zip(entries, refit(link, state, *columns), strict=True):
                    one["levels"] = levels
            self._pass(link, state, [self._job(link, p) for p in params])
            for p in params:
                self.state[p].update(_scalars(state))
                self._wrote(p)
        if by_state:
            longest = by_state[max(by_state)][0]
            _show(group, _prox_state(self.state[longest]))

    def _job(self, link: Prox, p: Tensor) -> Job:
        """The map of this rank's part of a parameter."""
        entries, part = self.state[p], part_of(p, link.granularity)
        latent, levels = local(entries["latent"]), entries["levels"][part.rows]
        return Job(latent, levels, part.granularity, local(p))

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """As of every torch.optim optimizer; latents, levels and counts among the state."""
        self._follow()
        return unshared(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, tensors in the dtypes they were saved in.

        Parameters are matched by position. One without saved state keeps its own but for a
        latent, which is taken from the parameter; so does one with the state of the base
        optimizer alone, as of training in full precision. The parameters themselves are the
        module's to load. Raises ValueError, and changes nothing, where groups, entries or shapes
        do not fit.
        """
        self._follow()
        state_dict = before_load(self, state_dict)
        rows = self.check_groups(state_dict)
        restored = []
        for p, entries, name in rows:
            mine, own = self.state[p], set(_QUANTIZED) | {"updates"}
            if entries is not None:
                needed = mine.keys() - (own if "updates" not in entries else set())
                check_entries(mine, entries, needed, name)
                entries = {key: loaded(got, mine.get(key), p) for key, got in entries.items()}
                if "updates" not in entries:  # of the base optimizer alone
                    entries = widened(entries, p, self._latents[p])
            restored.append((p, entries))
        load_groups(self, state_dict)
        for p, entries in restored:
            self._restore(p, entries)
        after_load(self)

    def check_groups(self, state_dict: dict[str, Any]) -> list[Any]:
        """(parameter, its saved state or None, its name) of a state dict.

        Raises ValueError unless its groups are those of this optimizer, quantized alike.
        """
        return matched(self, state_dict, same=("quant_bits", "quant_block_size"))

    def _restore(self, p: Tensor, entries: dict[str, Any] | None) -> None:
        """Takes over entries, which become the optimizer's own."""
        latent, mine = self._latents[p], self.state[p]
        with torch.no_grad():
            if latent is not p:
                given = None if entries is None else entries.get("latent")
                latent.copy_(p if given is None else given)
        self._wrote(p)
        if entries is None:
            return
        new = dict(entries)
        new.setdefault("updates", torch.ones((), dtype=torch.int64))  # of a plain optimizer
        if latent is not p:
            new["latent"] = latent.detach()
            for key in _QUANTIZED:
                new.setdefault(key, mine[key])
        self.state[p] = new
        self.base.state.pop(latent, None)
        if int(new["updates"]):
            self.base.state[latent] = new

    def __getstate__(self) -> dict[str, Any]:
        names = "defaults state param_groups base prox anneal_weight_decay compile _latents _order"
        own = {name: self.__dict__[name] for name in [*names.split(), "_bits"]}
        return {"_links": {}, "_written": {}, "_pass": Pass(compile=self.compile), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for p, latent in self._latents.items():
            if latent is not p:
                self.state[p]["latent"] = latent.detach()  # pickle parts what shared memory


def _bits_of(group: Group) -> tuple[Any, Any]:
    return group.get("quant_bits"), group.get("quant_block_size")


def _rate(group: Group) -> Tensor:
    rate = group["lr"]
    return as_scalar(rate).detach().to(device="cpu", dtype=torch.float64)


def _show(group: Group, state: ProxState) -> None:
    group["inverse_slope"], group["lr_sum"] = float(state.slope), float(state.lr_sum)


def _scalars(state: ProxState) -> dict[str, Tensor]:
    return {"count": state.count, "slope": state.slope, "lr_sum": state.lr_sum}


def _prox_state(entries: dict[str, Any]) -> ProxState:
    return ProxState(entries["count"], entries["slope"], entries["lr_sum"], [entries["levels"]])
