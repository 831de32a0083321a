"""A gradient transformation as a torch.optim optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parq_fn.foundation.scalar import is_number
from parq_fn.foundation.torch_private import is_optimizer, not_traced
from parq_fn.foundation.tree import names_of, tree_leaves
from parq_fn.foundation.value import same
from parq_fn.optim.adapter import Adapter, settled
from parq_fn.optim.groups import is_ours
from parq_fn.optim.latents import LatentStore
from parq_fn.optim.leafwise import Part, joined
from parq_fn.optim.old_states import with_qparams
from parq_fn.optim.state import Entries, Group, value_of
from parq_fn.optim.tree_owner import TreeOwner, select
from parq_fn.transforms.averaged import weights_of_average
from parq_fn.transforms.chain import every_link
from parq_fn.transforms.collective import RanksError
from parq_fn.transforms.levels_of import fitted_levels, prox_states
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.rounding import rounding
from parq_fn.transforms.sharded import is_dtensor, local
from parq_fn.transforms.train import apply_updates
from parq_fn.transforms.transformation import (
    Transformation,
    check_transformation,
    pulled_update,
)
from parq_fn.transforms.wrappers import accumulate


class TransformOptimizer(Adapter):
    """A transformation of the functional core, applied to torch parameters in place.

    params: parameters, (name, parameter) pairs such as module.named_parameters(), or groups of
    either. With names, masks and labels of the transformation are those of the module.
    transformation: any. All groups together are its one tree of params.

    A group's "lr" overrides the transformation's learning rate, its "weight_decay" for the
    weight decay of every link that takes one. Where the transformation has one learning rate, a
    number, every group has it for "lr", and torch's schedulers drive it; of a transformation
    that is scheduled itself they find no "lr".

    Between steps a parameter holds transformation.weights(...); its latent, in float32 or
    better, is "latent" in its state, unless weights are the params themselves and of that
    dtype. Elements of a parameter that other code changes become its latents, so weights may be
    loaded into the module after the optimizer was built; parameters that it exchanges, puts in
    another order or moves are followed. All methods begin with it. torch does not count writes
    through `p.data`, nor, to sharded parameters, those of torch._foreach operations and of
    torch.distributed.checkpoint.load into a state dict: those to sharded ones are found before the
    first step and where state is saved or loaded, and all by `sync()`. Links that keep copies of
    parameters (lookahead, schedule_free, averaged) take them in the first step, and edits after it
    do not reach these. A parameter whose requires_grad is off is left alone. Latents, qparams and
    counts that other code puts into the state, or writes there, count too: parameters get their
    weights when the next method is called.

    A step makes new tensors for some parameters at a time, no more elements together than the
    largest has; for all where a link looks at several together or does not declare the trait
    leafwise, a mask or label is a function, or the learning rates of groups differ.

    The fields of the transformation's state are there from construction on, under the path to
    them ("0.trace", "1.qparams"), what is shared by all parameters in each one's;
    `transformation_state` has them as the transformation does, for `read`.

    Raises TypeError for what is no transformation and for flat parameters (FSDP1, ZeRO);
    ValueError for a weight decay where no link takes one, two parameters of one name, fields of
    the transformation's state that would have one name, groups added to a prox link that has
    taken steps, and as the transformation's init does.

    >>> from parq_fn import chain, hard_prox, lsbq, masked, sgd
    >>> from parq_fn.optim import TransformOptimizer
    >>> net = torch.nn.Linear(4, 2)
    >>> transformation = chain(sgd(0.1), masked(hard_prox(lsbq(1), period=1), "weight"))
    >>> optimizer = TransformOptimizer(net.named_parameters(), transformation)
    >>> net(torch.ones(3, 4)).square().sum().backward()
    >>> optimizer.step()
    >>> net.weight.unique().numel() <= 2, optimizer.param_groups[0]["lr"]
    (True, 0.1)
    """

    _copied = ("transformation", "_tree")

    @settled
    def __init__(
        self, params: Iterable[Any] | dict[str, Any], transformation: Transformation
    ) -> None:
        _check_params(params)
        where = "the transformation of TransformOptimizer(params, transformation)"
        check_transformation(transformation, where)
        rates = list(_fields(transformation, "learning_rate"))
        one = bool(rates) and all(is_number(rate) and rate == rates[0] for rate in rates)
        own = {"lr": rates[0]} if one else {}
        super().__init__(params, own)  # type: ignore[arg-type] # its type knows no mixtures
        self.transformation = transformation
        self._tree = TreeOwner(self, transformation, self._check_group)
        self._store = LatentStore(self, self._tree)
        self._store.add()

    def _check_group(self, index: int, group: Group) -> None:
        ours = sorted(key for key in group if is_ours(key))
        if ours:
            raise ValueError(
                f"TransformOptimizer: group {index} has {', '.join(ours)}, which are keys of "
                "QuantOptimizer's groups; here the transformation says what is quantized, such as "
                "masked(parq_prox(...), weight_mask(module))"
            )
        decays = _fields(self.transformation, "weight_decay")
        if group.get("weight_decay") and next(decays, None) is None:
            raise ValueError(
                f"TransformOptimizer: group {index} has weight_decay="
                f"{group['weight_decay']} and no link takes one; give the transformation "
                "add_decayed_weights(...), or an optimizer with a weight decay"
            )

    def _shown(self) -> dict[str, Any]:
        return {"transformation": self.transformation}

    @settled
    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; its parameters begin now, the others keep their state."""
        if not hasattr(self, "transformation"):  # called by Optimizer.__init__
            super().add_param_group(param_group)
            return
        self._store.check_not_lent("add_param_group")
        self._store.sync()
        if _has(self.transformation, Prox) and self._has_stepped():
            raise ValueError(
                "TransformOptimizer: its prox links have taken steps, and a parameter added now "
                "would have no levels until they fit again; add groups before the first step, or "
                "give the parameters an optimizer of their own"
            )
        super().add_param_group(param_group)
        try:
            self._store.add()
        except Exception:
            self.param_groups.pop()
            raise

    def _has_stepped(self) -> bool:
        return any(map(self._tree.trained, self.state.values()))

    # The step.

    @not_traced  # by torch.compile(optimizer.step), which takes sharded or numbered state amiss
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the latents, and the weights that follow into the parameters.

        The closure, if any, runs first, at the weights; its value is returned. Within a function
        that torch.compile traces it runs uncompiled.

        Where a link, a map or a quantizer raises, or ranks do not fit together, the parameters that
        were updated before, if any, keep their new latents and what is theirs alone in the state;
        all others, counts and what else is common to all are as before. The next step goes on from
        there, at that count.
        """
        loss = value_of(closure)
        self._update()
        return loss

    def flush(self) -> None:
        """The update with what `accumulate` has gathered since its last one, as at the end of an
        epoch; nothing where it was nothing. Raises ValueError for another transformation.
        """
        if not isinstance(self.transformation, accumulate):
            raise ValueError(
                "TransformOptimizer.flush: expected accumulate(...) for the transformation, got "
                f"{self.transformation!r}, which gathers nothing"
            )
        self._update(flush=True)

    @settled
    @torch.no_grad()
    def _update(self, flush: bool = False) -> None:
        self._store.check_not_lent("step")
        self._store.sync()
        groups = {place.name: place.group for place in self._store.places()}
        common: Entries = {}
        rates = {name: group.get("lr") for name, group in groups.items()}
        decays = {name: group.get("weight_decay") for name, group in groups.items()}
        rate = next(iter(rates.values()), None)
        parts = self._tree.parts
        if all(same(rate, other) for other in rates.values()):
            extra = {} if rate is None else {"learning_rate": rate}
        else:  # a link may want to see them all, and refuse
            extra, parts = {"learning_rate": rates}, self._whole()
        if any(decay is not None for decay in decays.values()):
            extra["weight_decay"] = decays
        frozen = {name for name, p in self._tree.params.items() if not p.requires_grad}
        if frozen and any(map(is_dtensor, self._tree.params.values())):
            extra["frozen"] = frozen  # ranks are to be alike in it
        done: list[str] = []
        try:
            for part in parts:
                common |= self._update_part(part, extra, flush)
                done += part.names
        except BaseException as error:
            self._store.stopped([self._tree.params[name] for name in done])
            if isinstance(error, RanksError):
                some = f"{len(done)} of {len(groups)} parameters had been updated and keep that"
                rest = f"{some}; all else is as" if done else "All is as"
                error.args = (f"{error}. {rest} before the step",)
            raise
        self._tree.share(common)
        self._store.shared(common)

    def _update_part(self, part: Part, extra: Entries, flush: bool) -> Entries:
        """The step of a part's parameters; returns the entries that it shares with the others,
        which are to see those of the step before."""
        own, transformation = select(part, self._tree.params), part.transformation
        state = self._tree.gather(part)
        latents = {name: self._tree.latent(p) for name, p in own.items()}
        grads = {
            name: p.grad.to(latents[name].dtype) if p.requires_grad and p.grad is not None else None
            for name, p in own.items()
        }
        weights = {name: p.detach() for name, p in own.items()}
        if flush and isinstance(transformation, accumulate):
            updates, state = transformation.flush(state, latents, **extra)
        else:
            updates, state = pulled_update(transformation, grads, state, latents, weights, **extra)
        latents = apply_updates(latents, updates)
        weights = transformation.weights(state, latents)
        frozen = {p: dict(self.state[p]) for p in own.values() if not p.requires_grad}
        common = self._tree.spread(part, state)
        for name, p in own.items():
            if p.requires_grad:
                if "latent" in self.state[p]:
                    self.state[p]["latent"] = latents[name]
                p.copy_(weights[name])
                self._store.wrote(p)
        for p, entries in frozen.items():
            self.state[p].update(self._tree.with_first_fit(entries, self.state[p]))
            self._store.left(p)
        return common

    def _whole(self) -> list[Part]:
        """All parameters as one part."""
        whole = Part(self.transformation, list(self._tree.params))
        whole.take_apart(self._joined())
        return [whole]

    @property
    def transformation_state(self) -> Any:
        """The transformation's state, for `read`: read(optimizer.transformation_state, "slope")."""
        self._store.sync()
        return self._joined()

    @settled
    def levels(self, p: Tensor) -> Tensor:
        """The levels [..., k] of a quantized parameter, in its dtype; see `levels_of`.

        Raises ValueError for a parameter that no prox link of the transformation quantizes, and
        before the step that fits them.
        """
        self._store.sync()
        found = self._quantized_by(p)
        if not found:
            raise ValueError(
                f"levels: a parameter of shape {tuple(p.shape)} is none that this optimizer "
                "quantizes; give one that a prox link of its transformation sees"
            )
        return fitted_levels(*found[-1], p.dtype)

    @settled
    def prox_of(self, p: Tensor) -> Prox | None:
        """The prox link that sees a parameter last; None of one that none sees."""
        self._store.sync()
        return next((link for link, *_ in self._quantized_by(p)[::-1]), None)

    def _quantized_by(self, p: Tensor) -> list[tuple[Prox, Tensor, Tensor]]:
        """(prox link, count, qparams) of each that sees a parameter."""
        name = next((name for name, own in self._tree.params.items() if own is p), None)
        return [
            (link, own.count, qparams)
            for link, own in prox_states(self.transformation, self._joined())
            for at, qparams in zip(names_of(own.qparams), tree_leaves(own.qparams), strict=True)
            if at == name
        ]

    def _rounded(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self._tree.parts:
            state, own = self._tree.gather(part), select(part, self._tree.params)
            latents = {name: self._tree.latent(p) for name, p in own.items()}
            weights = rounding(part.transformation).weights(state, latents)
            links = prox_states(part.transformation, state)
            for name in {name for _, one in links for name in names_of(one.qparams)}:
                yield own[name], local(weights[name])

    def _averages(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in self._tree.parts:
            own = select(part, self._tree.params)
            latents = {name: self._tree.latent(p) for name, p in own.items()}
            state = self._tree.gather(part)
            weights = weights_of_average(part.transformation, state, latents)
            for name, p in own.items():
                yield p, local(weights[name])

    def _resume(self) -> None:
        self._tree = tree = TreeOwner(self, self.transformation, self._check_group)
        tree.parts = self.__dict__.pop("_parts")
        self._store = LatentStore(self, tree)
        self._store.add(begin=False)
        places, saved = self._store.places(), dict(self.state)
        tree.params = {place.name: place.p for place in places}
        try:
            tree.kept()
        except KeyError:  # of a version that kept levels
            self.state.update(tree.begin(places, places))
            for p, kept in tree.kept().items():
                mine = self.state[p]
                own = with_qparams(saved[p], kept)
                mine.update({key: got for key, got in own.items() if key in mine})

    def _joined(self) -> Any:
        states = [self._tree.gather(part) for part in self._tree.parts]
        return joined(states) if states else self.transformation.init({})


def _fields(transformation: Any, name: str) -> Iterator[Any]:
    """The fields of that name of the links that a transformation is made of."""
    for link in every_link(transformation):
        fields = dataclasses.fields(link) if dataclasses.is_dataclass(link) else ()
        got = getattr(link, name) if any(field.name == name for field in fields) else None
        if got is not None:
            yield got


def _has(transformation: Any, kind: type) -> bool:
    """Whether a link of that kind is among those that a transformation is made of."""
    return any(isinstance(link, kind) for link in every_link(transformation))


def _check_params(params: Any) -> None:
    """Raises TypeError for what is often given in the place of parameters."""
    remedy = ""
    if isinstance(params, nn.Module):
        remedy = "give module.named_parameters()"
    elif isinstance(params, dict):
        remedy = "give a list of groups, or of (name, parameter) pairs"
    elif is_optimizer(params):
        remedy = "give its param_groups, or put a prox link behind it by QuantOptimizer"
    elif hasattr(params, "init") and hasattr(params, "update"):
        remedy = "the order is TransformOptimizer(params, transformation)"
    if remedy:
        raise TypeError(
            "TransformOptimizer: expected parameters such as module.named_parameters(), got a "
            f"{type(params).__name__}; {remedy}"
        )
