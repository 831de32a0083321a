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
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.checks import SHARE, check_numbers
from parq_fn.foundation.scalar import Scalar, at, concrete
from parq_fn.foundation.torch_private import not_traced
from parq_fn.foundation.value import briefly, check_flags
from parq_fn.optim.adapter import settled
from parq_fn.optim.base_optimizer import check_base, check_not_kept
from parq_fn.optim.base_owner import BaseOwner, by_step, prox_state, scalars, weight_at
from parq_fn.optim.engine.gradients import RowGradients
from parq_fn.optim.engine.passes import Job, Pass, refit
from parq_fn.optim.groups import KEYS, check_group, check_some, is_quantized, link_of
from parq_fn.optim.latents import LatentStore
from parq_fn.optim.learned import (
    by_exact_names,
    held_entries,
    learned_together,
    observed,
    with_held,
)
from parq_fn.optim.moving import Moving, rate_of
from parq_fn.optim.narrow_latents import check_latent_dtype
from parq_fn.optim.state import Group, value_of
from parq_fn.transforms.averaged import moved, share_of
from parq_fn.transforms.collective import RanksError
from parq_fn.transforms.layout import part_of
from parq_fn.transforms.levels_of import fitted_levels
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_links import parq_prox
from parq_fn.transforms.prox_state import ProxState, rows_of
from parq_fn.transforms.rounding import rounding
from parq_fn.transforms.sharded import local

#: What a group shows of its last step.
_SHOWN = ("inverse_slope", "lr_sum")
#: What is said where ranks could not refit together.
_HALF = (
    "Half of the step is done: the base optimizer has moved the latents, counts and levels are as "
    "before it"
)
#: What keeps compiled programs, which are not copied.
_MADE: dict[str, Any] = {"_pass": Pass, "_of_rows": RowGradients}
#: (entries or group, what stood there) of each that a step changes.
Before = list[tuple[dict[str, Any], dict[str, Any]]]


class QuantOptimizer(Moving):
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
    average: the decay of an average of every parameter's latents, as `averaged` takes it; `with
    optimizer.averaged_weights():` has parameters hold its weights. A loaded average goes on with
    this decay, one that was not saved begins anew; where none is kept, loading one is refused.
    latent_dtype: torch.bfloat16 for latents of quantized bfloat16 parameters in half the memory;
    the base moves them in float32, a few parameters at a time, and after it they are rounded
    stochastically. Draws follow from "rounding", [] int64 in a parameter's state, and its count of
    updates: no generator is read, and shards draw as one process does.

    `param_groups` are the base's own, so a learning-rate scheduler may be built on either. A
    quantized group shows "inverse_slope" (the map's coefficient) and "lr_sum" as numbers, of the
    last step. A parameter whose requires_grad is off is left alone, and its count of updates
    stands still; one without a gradient is not moved by the base but goes on to be mapped. Elements
    of a parameter that other code changes become its latents, so weights may be loaded into the
    module after the optimizer was built; parameters that it exchanges, puts in another order or
    moves are followed. All methods begin with it. torch does not count writes through `p.data`,
    nor, to sharded parameters, those of torch._foreach operations and of
    torch.distributed.checkpoint.load into a state dict: those to sharded ones are found before the
    first step and where state is saved or loaded, and all by `sync()`.
    Latents, qparams and counts that other code puts into the state, or writes there, count too:
    parameters get their weights when the next method is called.

    State of a parameter, from construction on: the base's own entries; "updates" [], int64; and
    where quantized "latent" (float32 or better, like the parameter), "qparams" [..., m] in its
    dtype (as of a prox link), "count" [], int64, "slope" and "lr_sum" [], float64; with an
    average "average", float32 or better and like the parameter, "average_count" [], int64, and the
    sum of its weights, "average_total" [], float64.

    Raises TypeError for an optimizer around another, what is no prox link, and flat parameters
    (FSDP1, ZeRO); ValueError for other unfit optimizers, where there is a link and no group has
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

    _copied = (
        *("base", "prox", "anneal_weight_decay", "compile", "average", "latent_dtype"),
        *("_latents", "_own"),
    )

    @settled
    def __init__(
        self,
        base_optimizer: Optimizer,
        prox: Prox | None = None,
        *,
        anneal_weight_decay: float = 0.0,
        compile: bool = False,
        average: Scalar | None = None,
        latent_dtype: torch.dtype | None = None,
    ):
        check_base(base_optimizer)
        check_latent_dtype(latent_dtype, base_optimizer)
        if prox is not None and not isinstance(prox, Prox):
            raise TypeError(
                "QuantOptimizer: expected a prox link such as parq_prox(lsbq(2), ...), got "
                f"{briefly(prox)}"
            )
        check_numbers("QuantOptimizer", SHARE, anneal_weight_decay=anneal_weight_decay)
        check_flags("QuantOptimizer", compile=compile)
        if average is not None:
            check_numbers("QuantOptimizer", SHARE, schedules=True, average=average)
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults)
        self.base, self.prox, self.compile = base_optimizer, prox, compile
        self.anneal_weight_decay, self.average = anneal_weight_decay, average
        self.latent_dtype = latent_dtype
        self.param_groups = base_optimizer.param_groups
        self._own: list[Prox | None] = []
        self._links: dict[tuple[Any, ...], Prox] = {}
        self._pass, self._of_rows = Pass(compile=compile), RowGradients(compile=compile)
        kept: Any = {"average": average is not None, "dtype": latent_dtype}
        owner = BaseOwner(self, base_optimizer, self.link, self._weight, **kept)
        self._store, self._latents = LatentStore(self, owner), owner.latents
        none = all("prox" in group for group in self.param_groups)
        self._enter(self.param_groups)
        check_some(self.param_groups, prox, none=none)
        quantized = [place for place in self._store.places() if is_quantized(place.group)]
        check_not_kept(base_optimizer, {place.p: place.label for place in quantized})

    # Groups and their parameters.

    @settled
    def add_param_group(self, param_group: Group) -> None:
        """Adds a group to the base optimizer, and its state."""
        if not hasattr(self, "base"):  # called by Optimizer.__init__
            super().add_param_group(param_group)
            return
        self._store.check_not_lent("add_param_group")
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

        Where the map, its quantizer or its schedule raises, or ranks do not fit together, the
        base's step is done: the latents have moved. Counts of prox links, levels and all else are
        as before, and parameters get the weights of the moved latents when the next method is
        called. The next step goes on from there, at that count.
        """
        loss = value_of(closure)
        self._step()
        return loss

    @settled
    def _step(self) -> None:
        self._store.check_not_lent("step")
        self._store.sync()
        before: Before = []
        has_moved = False
        try:
            with torch.no_grad():
                self._move()
                has_moved = True
                for group in self.param_groups:
                    if is_quantized(group):
                        self._map_group(group, before)
                if self.average is not None:
                    self._take_averages(self.average)
        except BaseException as error:
            for values, old in reversed(before):
                values.update(old)
            self._store.stopped()
            if has_moved and isinstance(error, RanksError):
                error.args = (f"{error}. {_HALF}",)
            raise

    def _map_group(self, group: Group, before: Before) -> None:
        """before: gets (entries or group, what stood there) of all that it changes."""
        link, rate = self.link(group), rate_of(group)
        by_state = by_step([p for p in group["params"] if p.requires_grad], self.state)
        for params in by_state.values():
            old, entries = prox_state(self.state[params[0]]), [self.state[p] for p in params]
            state = link.advance(old, rate)
            learns = None if link.learn is None else link.active(old)
            fits = concrete(link.due(state)) is not False
            if fits or (learns is not None and learns):
                labels = {place.p: place.label for place in self._store.places()}
            if learns is not None and learns:
                pulled = {labels[p]: self._pulled.get(p) for p in params}
                named = dict(zip(pulled, entries, strict=True))
                own = by_exact_names(link, {labels[p]: p for p in group["params"]})
                for name, new in learned_together(own, state, named, pulled).items():
                    before.append((named[name], {key: named[name][key] for key in new}))
                    named[name].update(new)
            if fits:
                latents, known = ([one[k] for one in entries] for k in ("latent", "qparams"))
                fitted = refit(link, state, latents, known, learns, [labels[p] for p in params])
                for one, qparams in zip(entries, fitted, strict=True):
                    before.append((one, {"qparams": one["qparams"]}))
                    one["qparams"] = qparams
            if link.hold is not None and link.active(state):
                for one in entries:
                    new = held_entries(observed(link, state, one))
                    before.append((one, {key: one[key] for key in new}))
                    one.update(new)
            self._pass(link, state, [self._job(link, p) for p in params])
            for p in params:
                if link.hold is not None:
                    local(p).copy_(with_held(link, self.state[p], p, local(p)))
                before.append((self.state[p], scalars(prox_state(self.state[p]))))
                self.state[p].update(scalars(state))
                self._store.wrote(p)
        if by_state:
            longest = by_state[max(by_state)][0]
            before.append((group, {key: group[key] for key in _SHOWN}))
            _show(group, prox_state(self.state[longest]))

    def _take_averages(self, decay: Scalar) -> None:
        for p, entries in self.state.items():
            if p.requires_grad and "average" in entries:
                count, total = entries["average_count"], entries["average_total"]
                share, entries["average_total"] = share_of(total, at(decay, count))
                entries["average"] = moved(entries["average"], self._latents[p].detach(), share)
                entries["average_count"] = count + 1

    def _job(self, link: Prox, p: Tensor) -> Job:
        """The map of this rank's part of a parameter."""
        entries, part = self.state[p], part_of(p, link.granularity)
        qparams = rows_of(link, entries["qparams"], p, part)
        return Job(local(entries["latent"]), qparams, part.granularity, local(p))

    @settled
    def levels(self, p: Tensor) -> Tensor:
        """The levels [..., k] of a quantized parameter, in its dtype; see `levels_of`. Raises
        ValueError for what this optimizer does not quantize, and before the step that fits them."""
        self._store.sync()
        if (link := self.prox_of(p)) is not None:
            count, qparams = (self.state[p][key] for key in ("count", "qparams"))
            return fitted_levels(link, count, qparams, p.dtype)
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
        return with_held(link, self.state[p], p, job.weight)

    def _rounded(self) -> Iterator[tuple[Tensor, Tensor]]:
        for p, group, _, label in self._store.places():
            if is_quantized(group):
                link, entries = rounding(self.link(group)), self.state[p]
                yield p, weight_at(link, entries, entries["latent"], p, label)

    def _averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.average is None:
            raise ValueError(
                "averaged_weights: no average is kept; build QuantOptimizer(..., average=0.999)"
            )
        for p, group, _, label in self._store.places():
            entries = self.state[p]
            if "average" not in entries:
                continue
            begun = float(entries["average_total"]) > 0
            average = entries["average"] if begun else self._latents[p].detach()
            if is_quantized(group):
                yield p, weight_at(self.link(group), entries, average, p, label)
            else:
                yield p, local(average)

    def __getstate__(self) -> dict[str, Any]:
        made = {kind: how(compile=self.compile) for kind, how in _MADE.items()}
        return {**super().__getstate__(), "_links": {}, **made}

    def _resume(self) -> None:
        self._own = [None for _ in self.param_groups]
        owner = BaseOwner(self, self.base, self.link, self._weight)
        owner.latents = self._latents
        self._store = LatentStore(self, owner)
        self._store.add(begin=False)
        owner.resume()


def _show(group: Group, state: ProxState) -> None:
    group["inverse_slope"], group["lr_sum"] = float(state.slope), float(state.lr_sum)
