"""A torch.optim optimizer with a prox link behind it.

The base optimizer moves the latents, which live in the state; between steps the parameters hold
the weights. A step is

    g <- gradient(gradient at w, u / shrink, w, levels(q))
    u <- base optimizer(u; g)              [- (lr / gamma) (u - w)]
    q <- quantizer.fit(u / shrink)         where due
    p <- map(u / shrink, levels(q), coefficient)

with the first and the last two lines those of the functional core. The latents take the place of
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
from parq_fn.foundation.scalar import as_scalar, concrete
from parq_fn.foundation.torch_private import not_traced
from parq_fn.foundation.value import briefly, check_flags
from parq_fn.optim.base_optimizer import check_base, check_not_kept, steps_apart
from parq_fn.optim.base_owner import OWN, BaseOwner, prox_state, scalars
from parq_fn.optim.engine.chunks import chunks
from parq_fn.optim.engine.passes import Job, Pass, refit
from parq_fn.optim.groups import KEYS, check_group, is_quantized, link_of
from parq_fn.optim.latents import LatentStore
from parq_fn.optim.state import Group, value_of, wide
from parq_fn.optim.wrapping import Wrapping
from parq_fn.transforms.links import times
from parq_fn.transforms.prox_link import Prox, ProxState, in_rows
from parq_fn.transforms.prox_links import parq_prox
from parq_fn.transforms.sharded import local, part_of


class QuantOptimizer(Wrapping):
    """A torch.optim optimizer whose quantized parameters hold map(latent, levels, coefficient).

    base_optimizer: any that moves the parameters of its groups by itself, without a closure, but
    LBFGS and SparseAdam; what it has learned of them it keeps.
    Of its groups are quantized those with a "prox", a prox link of their own, and those with
    "quant_bits" below 16, by `prox`; the others, and those with 16 bits or more, are the base
    optimizer's alone. A group's "quant_bits" (0 is ternary) override those of the link's
    quantizer, its "quant_block_size" and "quant_axis" for the link's granularity: the dimensions
    whose index is the channel, such as 1 for weights [in, out]; levels are then per channel, or per
    block of the other dimensions where the link or the group has blocks. A link is taken out of its
    group, which shows it as "quant_prox"; `link(group)` gives it.
    prox: a prox link, or None where groups have their own or none is quantized. The learning rate
    of links is their group's. Their `gradient` takes what stands in p.grad at the step, clipped or
    unscaled as it may be, and leaves p.grad as it is.
    anneal_weight_decay: f in [0, 1]; the weight decay of a quantized parameter is taken times
    f * s + 1 - f, s the inverse slope that its step before left (parq_prox only).
    compile: the map under torch.compile, with the same weights, bit for bit but for the sign of a
    zero; the base optimizer and the fits of levels are not. A map is compiled when it is first met,
    some seconds where annealing starts and where it ends, for which a CPU needs a C++ compiler; it
    pays where weights are many. torch.compile(optimizer.step) runs the step as it is.

    `param_groups` are the base's own, so a learning-rate scheduler may be built on either. A
    quantized group shows "inverse_slope" (the map's coefficient) and "lr_sum" as numbers, of the
    last step. A parameter whose requires_grad is off is left alone, and its count of updates
    stands still; one without a gradient is not moved by the base but goes on to be mapped. Elements
    of a parameter that other code changes become its latents, so weights may be loaded into the
    module after the optimizer was built; parameters that it exchanges, puts in another order or
    moves are followed. All methods begin with it. torch does not count writes through `p.data`, nor
    those of torch.distributed.checkpoint.load into the state dict of a sharded module: the latter
    are found before the first step and where state is saved or loaded, and both by `sync()`.

    State of a parameter, from construction on: the base's own entries; "updates" [], int64; and
    where quantized "latent" (float32 or better, like the parameter), "qparams" [..., m] in its
    dtype (as of a prox link), "count" [], int64, "slope" and "lr_sum" [], float64.

    Raises TypeError for an optimizer around another, what is no prox link, and FSDP1's flat
    parameters; ValueError for other unfit optimizers, where there is a link and no group has
    quant_bits, bits and no link, for other keys "quant_...", two parameters of one name, a base
    whose state has names of those above, and as the quantizer and granularity do.

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

    _copied = ("base", "prox", "anneal_weight_decay", "compile", "_latents", "_own")

    def __init__(
        self,
        base_optimizer: Optimizer,
        prox: Prox | None = None,
        *,
        anneal_weight_decay: float = 0.0,
        compile: bool = False,
    ):
        check_base(base_optimizer)
        if prox is not None and not isinstance(prox, Prox):
            raise TypeError(
                "QuantOptimizer: expected a prox link such as parq_prox(lsbq(2), ...), got "
                f"{briefly(prox)}"
            )
        check_numbers("QuantOptimizer", SHARE, anneal_weight_decay=anneal_weight_decay)
        check_flags("QuantOptimizer", compile=compile)
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.base, self.prox, self.compile = base_optimizer, prox, compile
        self.anneal_weight_decay = anneal_weight_decay
        self.param_groups = base_optimizer.param_groups
        self._own: list[Prox | None] = []
        self._links: dict[tuple[Any, ...], Prox] = {}
        self._pass = Pass(compile=compile)
        owner = BaseOwner(self, base_optimizer, self.link, self._weight)
        self._store, self._latents = LatentStore(self, owner), owner.latents
        self._enter(self.param_groups)
        quantized = [place for place in self._store.places() if is_quantized(place.group)]
        check_not_kept(base_optimizer, {place.p: place.label for place in quantized})
        asked = any(group.get("quant_bits") is not None for group in self.param_groups)
        if prox is not None and not asked and not quantized:
            raise ValueError(
                "QuantOptimizer: no group has quant_bits below 16; give one such as "
                '{"params": ..., "quant_bits": 2}'
            )

    # Groups and their parameters.

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group to the base optimizer, and its state."""
        if not hasattr(self, "base"):  # called by Optimizer.__init__
            super().add_param_group(param_group)
            return
        self._store.sync()
        self.base.add_param_group(param_group)
        try:
            self._enter(self.param_groups[-1:])
        except Exception:
            self.param_groups.pop()
            raise

    def _enter(self, groups: list[Group]) -> None:
        """Takes in new groups: their own links are kept here, and their parameters have state."""
        first = len(self._own)
        for index, group in enumerate(groups, first):
            check_group(group, index, self.prox, self.base.defaults)
        own = [group.pop("prox", None) for group in groups]
        for group, link in zip(groups, own, strict=True):
            if link is not None:
                group["quant_prox"] = repr(link)
        self._own += own
        try:
            self._check_decay(groups)
            self._store.add()
        except Exception:
            del self._own[first:]
            for group, link in zip(groups, own, strict=True):
                if link is not None:
                    group["prox"] = link
                    del group["quant_prox"]
            raise
        for group in groups:
            if is_quantized(group) and group["params"]:
                _show(group, prox_state(self.state[group["params"][0]]))

    def _check_decay(self, groups: list[Group]) -> None:
        links = [self.link(group) for group in groups if is_quantized(group)]
        others = [link for link in links if not isinstance(link, parq_prox)]
        if self.anneal_weight_decay and others:
            raise ValueError(
                "QuantOptimizer: anneal_weight_decay follows an inverse slope, which parq_prox "
                f"has and {type(others[0]).__name__} has not"
            )

    def link(self, group: Group) -> Prox:
        """The prox link of a quantized group: its own, or `prox`, with the group's bits, block
        size and axis.

        Raises ValueError for a group that is not quantized, or not one of the optimizer's.
        """
        index = next((i for i, one in enumerate(self.param_groups) if one is group), None)
        if index is None or not is_quantized(group):
            raise ValueError("QuantOptimizer.link: expected one of its quantized param_groups")
        key = (index, *map(group.get, KEYS))
        if key not in self._links:
            own = self._own[index]
            link: Any = self.prox if own is None else own
            self._links[key] = link_of(link, group)
        return self._links[key]

    # The step.

    @not_traced  # by torch.compile(optimizer.step): the map alone may be, with compile=True
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the base optimizer on the latents, then the map onto the parameters.

        The closure, if any, runs first, at the weights; its value is returned.
        """
        loss = value_of(closure)
        self._store.sync()
        with torch.no_grad():
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
        pulled = {
            p
            for group in self.param_groups
            if is_quantized(group) and self.link(group).normal_map is not None
            for p in group["params"]
        }
        moved = [p for p in groups if p.grad is not None and self._is_trained(p)]
        needy = [p for p in moved if self._has_own_gradient(p, groups[p]) or p in pulled]
        alone = set(needy)
        rest = [p for p in moved if p not in alone]
        runs = [moved]
        if needy and steps_apart(self.base):
            runs = chunks({p: p.numel() for p in needy}) + ([rest] if rest else [])
        for chunk in runs:
            pulls = {p: self._pull(p, groups[p]) for p in chunk if p in pulled}
            self._step_base(chunk, groups)
            for p, pull in pulls.items():
                latent = local(self._latents[p])
                latent.sub_(pull.to(latent.dtype))

    def _is_trained(self, p: Tensor) -> bool:
        """Not frozen; a parameter of the base alone is moved wherever the base moves it."""
        return p.requires_grad or self._latents[p] is p

    def _pull(self, p: Tensor, group: Group) -> Tensor:
        gamma: Any = self.link(group).normal_map
        return times(local(self._latents[p]) - local(p), _rate(group) / as_scalar(gamma))

    def _has_own_gradient(self, p: Tensor, group: Group) -> bool:
        return p.dtype != wide(p) or (is_quantized(group) and self.link(group).pulls_back)

    def _gradient(self, p: Tensor, group: Group) -> Tensor:
        """That of the latent, from that of the parameter."""
        latent, state = self._latents[p], prox_state(self.state[p])
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
        moved = set(chunk)
        for p, latent in self._latents.items():
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
        if latent is not p:
            entries["latent"] = latent.detach()  # the base may have given it other memory
        own = self.base.state.get(latent, {})
        if own is not entries:
            merged = {**own, **{key: entries[key] for key in OWN if key in entries}}
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
            state = link.advance(prox_state(self.state[params[0]]), rate)
            if concrete(link.due(state)) is not False:
                entries = [self.state[p] for p in params]
                columns = ([one[key] for one in entries] for key in ("latent", "qparams"))
                for one, qparams in zip(entries, refit(link, state, *columns), strict=True):
                    one["qparams"] = qparams
            self._pass(link, state, [self._job(link, p) for p in params])
            for p in params:
                self.state[p].update(scalars(state))
                self._store.wrote(p)
        if by_state:
            longest = by_state[max(by_state)][0]
            _show(group, prox_state(self.state[longest]))

    def _job(self, link: Prox, p: Tensor) -> Job:
        """The map of this rank's part of a parameter."""
        entries, part = self.state[p], part_of(p, link.granularity)
        latent, qparams = local(entries["latent"]), in_rows(entries["qparams"])[part.rows]
        return Job(latent, qparams, part.granularity, local(p))

    def levels(self, p: Tensor) -> Tensor:
        """The levels [..., k] of a quantized parameter, in its dtype; see `levels_of`. Raises
        ValueError for what this optimizer does not quantize."""
        self._store.sync()
        for group in self.param_groups:
            if is_quantized(group) and any(p is own for own in group["params"]):
                return self.link(group).quantizer.levels_in(self.state[p]["qparams"], p.dtype)
        shape = getattr(p, "shape", None)
        got = briefly(p) if shape is None else f"a parameter of shape {tuple(shape)}"
        raise ValueError(
            f"levels: {got} is none that this optimizer quantizes; give a parameter, such as "
            "net.weight, of a group with quant_bits below 16"
        )

    def _weight(self, group: Group, p: Tensor) -> Tensor:
        """The weights of this rank's part of a parameter, of its latent now."""
        link, state = self.link(group), prox_state(self.state[p])
        job = self._job(link, p)._replace(weight=torch.empty_like(local(p)))
        self._pass(link, state, [job])
        return job.weight

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_links": {}, "_pass": Pass(compile=self.compile)}

    def _resume(self) -> None:
        self._own = [None for _ in self.param_groups]
        owner = BaseOwner(self, self.base, self.link, self._weight)
        owner.latents = self._latents
        self._store = LatentStore(self, owner)
        self._store.add(begin=False)
        owner.resume()


def _rate(group: Group) -> Tensor:
    rate = group["lr"]
    return as_scalar(rate).detach().to(device="cpu", dtype=torch.float64)


def _show(group: Group, state: ProxState) -> None:
    group["inverse_slope"], group["lr_sum"] = float(state.slope), float(state.lr_sum)
