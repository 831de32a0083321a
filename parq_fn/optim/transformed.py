"""A gradient transformation as a torch.optim optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import optree
import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.links import add_decayed_weights
from parq_fn.optim.state import (
    Entries,
    Group,
    check_shapes,
    load_groups,
    loaded,
    matched,
    name_of,
    refuse_flat,
    unshared,
    value_of,
    wide,
)
from parq_fn.scalar import is_number
from parq_fn.transformation import (
    Composite,
    Transformation,
    apply_updates,
    check_transformation,
)


class TransformOptimizer(Optimizer):
    """A transformation of the functional core, applied to torch parameters in place.

    params: parameters, (name, parameter) pairs such as module.named_parameters(), or groups of
    either. With names, masks and labels of the transformation are those of the module.
    transformation: any. All groups together are its one tree of params.

    A group's "lr" stands in for the transformation's learning rate, its "weight_decay" for the
    weight decay of every link that takes one. Where the transformation has one learning rate, a
    number, every group has it for "lr", and torch's schedulers drive it.

    Between steps a parameter holds transformation.weights(...); its latent, in float32 or
    better, is "latent" in its state, unless weights are the params themselves and of that
    dtype. The fields of the transformation's state are there from construction on, under the
    path to them ("0.trace", "1.levels"), what is shared by all parameters in each one's.

    Raises TypeError for what is no transformation and for FSDP1's flat parameters; ValueError
    for a weight decay where no link takes one, and as the transformation's init does.

    >>> from parq_fn import chain, hard_prox, lsbq, masked, sgd
    >>> from parq_fn.optim import TransformOptimizer
    >>> net = torch.nn.Linear(4, 2)
    >>> transformation = chain(sgd(0.1), masked(hard_prox(lsbq(1), period=1), "weight"))
    >>> optimizer = TransformOptimizer(net.named_parameters(), transformation)
    >>> net(torch.ones(3, 4)).square().sum().backward()
    >>> optimizer.step()
    >>> net.weight.unique().numel(), optimizer.param_groups[0]["lr"]
    (2, 0.1)
    """

    def __init__(
        self, params: Iterable[Any] | dict[str, Any], transformation: Transformation
    ) -> None:
        check_transformation(transformation, "the transformation of TransformOptimizer")
        rates = {rate for rate in _fields(transformation, "learning_rate") if is_number(rate)}
        scheduled = any(callable(rate) for rate in _fields(transformation, "learning_rate"))
        own = {"lr": rates.pop()} if len(rates) == 1 and not scheduled else {}
        super().__init__(params, own)  # type: ignore[arg-type] # its type knows no mixtures
        self.transformation = transformation
        self._order: list[list[Tensor]] = []
        self._spec: Any = None
        self._places: list[tuple[str | None, str]] = []
        self._begin()

    # The tree of params, by name, in the order of the groups.

    def _named(self) -> Iterator[tuple[str, Tensor, Group]]:
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                names = group.get("param_names")
                yield (names[i] if names else f"{index}.{i}"), p, group

    def _latent(self, p: Tensor) -> Tensor:
        latent: Tensor = self.state[p].get("latent", p)
        return latent.detach()

    def _begin(self, latents: dict[str, Tensor] | None = None) -> None:
        """State for all parameters, as before any step."""
        for index, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                refuse_flat("TransformOptimizer", p, name_of(group, index, i))
            if group.get("weight_decay") and not any(_decays(self.transformation)):
                raise ValueError(
                    f"TransformOptimizer: group {index} has weight_decay="
                    f"{group['weight_decay']} and no link takes one; give the transformation "
                    "add_decayed_weights(...), or an optimizer with a weight decay"
                )
        named = {name: p.detach() for name, p, _ in self._named()}
        state = self.transformation.init(
            {name: p.to(wide(p)) for name, p in named.items()} if latents is None else latents
        )
        traits = getattr(self.transformation, "traits", None)
        plain = bool(getattr(traits, "plain_weights", False))
        for name, p, _ in self._named():
            same = plain and p.dtype == wide(p)
            self.state[p] = {} if same else {"latent": named[name].to(wide(p), copy=True)}
        self._spread(state)
        self._order = [list(group["params"]) for group in self.param_groups]

    def _spread(self, state: Any) -> None:
        """Lays a state out over the parameters, the fields that they share on each."""
        params = {name: p for name, p, _ in self._named()}
        leaves, spec = optree.tree_flatten(state)
        if spec != self._spec:
            accessors = optree.tree_accessors(state)
            self._spec, self._places = spec, [_place(a, params) for a in accessors]
        for (name, key), leaf in zip(self._places, leaves, strict=True):
            for p in params.values() if name is None else [params[name]]:
                self.state[p][key] = leaf

    def _gather(self) -> Any:
        """The state that is laid out over the parameters."""
        params = {name: p for name, p, _ in self._named()}
        first = next(iter(params.values()))
        leaves = [
            self.state[first if name is None else params[name]][key] for name, key in self._places
        ]
        return optree.tree_unflatten(self._spec, leaves)

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; its parameters begin now, the others keep their state."""
        super().add_param_group(param_group)
        if not hasattr(self, "transformation"):  # called by Optimizer.__init__
            return
        kept = {p: self.state[p] for group in self._order for p in group}
        try:
            self._begin({name: self._latent_or_new(p, kept) for name, p, _ in self._named()})
        except Exception:
            self.param_groups.pop()
            self.state.update(kept)
            raise
        self._keep(kept)

    def _latent_or_new(self, p: Tensor, kept: dict[Tensor, Entries]) -> Tensor:
        latent: Tensor = kept.get(p, {}).get("latent", p)
        return latent.detach().to(wide(p))

    def _keep(self, kept: dict[Tensor, Entries]) -> None:
        shared = {key for name, key in self._places if name is None}
        for p, entries in kept.items():
            self.state[p].update({k: v for k, v in entries.items() if k in self.state[p]})
        common = next(iter(kept.values()), {})
        for _, p, _ in self._named():
            self.state[p].update({k: v for k, v in common.items() if k in shared})

    def _follow(self) -> None:
        """Follows parameters that were exchanged in their groups, by position."""
        now = [list(group["params"]) for group in self.param_groups]
        if [len(g) for g in now] != [len(g) for g in self._order]:
            raise ValueError(
                "TransformOptimizer: groups have other numbers of parameters than before; add "
                "parameters with add_param_group"
            )
        pairs = [
            (old, new)
            for olds, news in zip(self._order, now, strict=True)
            for old, new in zip(olds, news, strict=True)
        ]
        if all(old is new for old, new in pairs):
            return
        shared = {key for name, key in self._places if name is None}
        kept = {}
        for old, new in pairs:
            entries = self.state.pop(old)
            if type(old) is not type(new) or old.shape != new.shape:  # sharded since
                entries = {key: got for key, got in entries.items() if key in shared}
            kept[new] = entries
        self._begin()
        self._keep(kept)

    # The step.

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of the latents, and the weights that follow into the parameters.

        The closure, if any, runs first, at the weights; its value is returned.
        """
        loss = value_of(closure)
        self._follow()
        with torch.no_grad():
            self._update()
        return loss

    def _update(self) -> None:
        latents, grads = {}, {}
        rates: dict[str, Any] = {}
        decays: dict[str, Any] = {}
        for name, p, group in self._named():
            latents[name] = self._latent(p)
            grads[name] = None if p.grad is None else p.grad.to(latents[name].dtype)
            if "lr" in group:
                rates[name] = group["lr"]
            decays[name] = group.get("weight_decay")
        extra: dict[str, Any] = {"learning_rate": rates} if len(rates) == len(latents) else {}
        if any(decay is not None for decay in decays.values()):
            extra["weight_decay"] = decays
        updates, state = self.transformation.update(grads, self._gather(), latents, **extra)
        latents = apply_updates(latents, updates)
        weights = self.transformation.weights(state, latents)
        for name, p, _ in self._named():
            if "latent" in self.state[p]:
                self.state[p]["latent"] = latents[name]
            p.copy_(weights[name])
        self._spread(state)

    # Saving and loading.

    def state_dict(self) -> dict[str, Any]:
        """As of every torch.optim optimizer."""
        self._follow()
        return unshared(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state, tensors in the dtypes they were saved in.

        Parameters are matched by position; one without saved state keeps its own, but for a
        latent, which is taken from the parameter. Raises ValueError, and changes nothing, where
        groups, shapes or entries do not fit.
        """
        self._follow()
        rows = matched(self, state_dict)
        for p, saved, name in rows:
            check_shapes(self.state[p], saved, name)
            missing = sorted(self.state[p].keys() - (saved or self.state[p]).keys())
            if missing:
                raise ValueError(
                    f"loaded state dict lacks {', '.join(missing)} of parameter {name!r}; it was "
                    "saved by another transformation"
                )
        load_groups(self, state_dict)
        for p, saved, _ in rows:
            mine = self.state[p]
            if saved is not None:
                mine.update({k: loaded(saved[k], mine[k], p) for k in mine})
            elif "latent" in mine:
                mine["latent"] = p.detach().to(wide(p), copy=True)

    def __getstate__(self) -> dict[str, Any]:
        names = "defaults state param_groups transformation _order _places _spec"
        return {name: self.__dict__[name] for name in names.split()}


def _place(accessor: Any, params: dict[str, Tensor]) -> tuple[str | None, str]:
    """(the parameter's name, or None of what all share; the path without it) of a state's leaf."""
    *above, last = accessor
    own = isinstance(last, optree.MappingEntry) and last.entry in params
    path = above if own else [*above, last]
    key = ".".join(str(getattr(entry, "field", entry.entry)) for entry in path)
    return (str(last.entry) if own else None), key


def _fields(value: Any, name: str) -> Iterator[Any]:
    """The fields of that name in a transformation and those inside it."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _fields(item, name)
    elif isinstance(value, dict):
        yield from _fields(list(value.values()), name)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            got = getattr(value, field.name)
            if field.name == name and got is not None:
                yield got
            yield from _fields(got, name)


def _decays(value: Any) -> Iterator[add_decayed_weights]:
    """The links that take a weight decay."""
    if isinstance(value, Composite):
        yield from _decays(value.expand())
    elif isinstance(value, add_decayed_weights):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _decays(item)
    elif isinstance(value, dict):
        yield from _decays(list(value.values()))
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _decays(getattr(value, field.name))
