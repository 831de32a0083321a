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
    after_load,
    before_load,
    check_entries,
    load_groups,
    loaded,
    matched,
    name_of,
    refuse_flat,
    taken_over,
    unshared,
    value_of,
    wide,
)
from parq_fn.prox import Prox
from parq_fn.scalar import is_number
from parq_fn.sharded import local
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
    number, every group has it for "lr", and torch's schedulers drive it; of a transformation
    that is scheduled itself they find no "lr".

    Between steps a parameter holds transformation.weights(...); its latent, in float32 or
    better, is "latent" in its state, unless weights are the params themselves and of that
    dtype. Elements of a parameter that are changed between steps become its latents, so weights
    may be loaded into the module after the optimizer was built. A parameter whose requires_grad
    is off is left alone. A step makes new tensors for the whole state.

    The fields of the transformation's state are there from construction on, under the path to
    them ("0.trace", "1.levels"), what is shared by all parameters in each one's;
    `transformation_state` has them as the transformation does, for `read`.

    Raises TypeError for what is no transformation and for FSDP1's flat parameters; ValueError
    for a weight decay where no link takes one, two parameters of one name, groups added to a
    prox link that has taken steps, and as the transformation's init does.

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
        self._written: dict[Tensor, int] = {}
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
            if group.get("weight_decay") and not any(
                _links(self.transformation, add_decayed_weights)
            ):
                raise ValueError(
                    f"TransformOptimizer: group {index} has weight_decay="
                    f"{group['weight_decay']} and no link takes one; give the transformation "
                    "add_decayed_weights(...), or an optimizer with a weight decay"
                )
        named: dict[str, Tensor] = {}
        for name, p, _ in self._named():
            if name in named:
                raise ValueError(
                    f"TransformOptimizer: two parameters are named {name!r}; groups of several "
                    'modules need names apart, such as ("generator." + name, p)'
                )
            named[name] = p.detach()
        state = self.transformation.init(
            {name: p.to(wide(p)) for name, p in named.items()} if latents is None else latents
        )
        traits = getattr(self.transformation, "traits", None)
        plain = bool(getattr(traits, "plain_weights", False))
        for name, p, _ in self._named():
            same = plain and p.dtype == wide(p)
            self.state[p] = {} if same else {"latent": named[name].to(wide(p), copy=True)}
            self._wrote(p)
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
        building = not hasattr(self, "transformation")  # called by Optimizer.__init__
        if not building and any(_links(self.transformation, Prox)) and self._has_stepped():
            raise ValueError(
                "TransformOptimizer: its prox links have taken steps, and a parameter added now "
                "would have no levels until they fit again; add groups before the first step, or "
                "give the parameters an optimizer of their own"
            )
        super().add_param_group(param_group)
        if building:
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

    def _has_stepped(self) -> bool:
        entries = [self.state[p] for group in self._order for p in group]
        found = [got for own in entries for got in own.values() if got.dtype == torch.int64]
        return any(int(count) for count in found)

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
        stepped, kept = self._has_stepped(), {}
        for old, new in pairs:
            entries = self.state.pop(old)
            if type(old) is not type(new) or old.shape != new.shape:  # sharded since
                if stepped:
                    raise ValueError(
                        f"TransformOptimizer: a parameter of shape {tuple(old.shape)} was "
                        f"exchanged for a {type(new).__name__} of shape {tuple(new.shape)} after "
                        "it was trained, which its state does not fit; shard the module before "
                        "training, or load a checkpoint"
                    )
                entries = {key: got for key, got in entries.items() if key in shared}
            kept[new] = entries
        self._begin()
        self._keep(kept)

    # Parameters that another hand changed.

    def _wrote(self, p: Tensor) -> None:
        self._written[p] = local(p)._version

    def _take_over(self, state: Any) -> None:
        """Elements of parameters that were changed since we wrote them become their latents.

        So weights may be loaded into the module after the optimizer was built. What lies within
        rounding of the weights is as we wrote it, perhaps on another machine.
        """
        changed = {
            name: p
            for name, p, _ in self._named()
            if "latent" in self.state[p] and self._written.get(p) != local(p)._version
        }
        if not changed:
            return
        latents = {name: self._latent(p) for name, p, _ in self._named()}
        weights = self.transformation.weights(state, latents)
        for name, p in changed.items():
            mine = local(p)
            if mine.numel():
                latent = local(latents[name])
                latent.copy_(taken_over(latent, mine, local(weights[name])))
            self._wrote(p)

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
        if not any(self._order):
            return
        state = self._gather()
        self._take_over(state)
        latents, grads = {}, {}
        rates: dict[str, Any] = {}
        decays: dict[str, Any] = {}
        for name, p, group in self._named():
            latents[name] = self._latent(p)
            given = p.grad if p.requires_grad else None
            grads[name] = None if given is None else given.to(latents[name].dtype)
            rates[name], decays[name] = group.get("lr"), group.get("weight_decay")
        extra = {"learning_rate": rates, "weight_decay": decays}
        extra = {k: v for k, v in extra.items() if any(one is not None for one in v.values())}
        updates, state = self.transformation.update(grads, state, latents, **extra)
        latents = apply_updates(latents, updates)
        weights = self.transformation.weights(state, latents)
        for name, p, _ in self._named():
            if "latent" in self.state[p]:
                self.state[p]["latent"] = latents[name]
            if p.requires_grad:
                p.copy_(weights[name])
                self._wrote(p)
        self._spread(state)

    @property
    def transformation_state(self) -> Any:
        """The transformation's state, for `read`: read(optimizer.transformation_state, "slope")."""
        return self._gather()

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
        state_dict = before_load(self, state_dict)
        rows = matched(self, state_dict)
        restored = []
        for p, saved, name in rows:
            mine = self.state[p]
            if saved is not None:
                check_entries(mine, saved, mine.keys(), name)
                saved = {key: loaded(saved[key], mine[key], p) for key in mine}
            restored.append((p, saved))
        shared = {key for name, key in self._places if name is None}
        common = next((saved for _, saved in restored if saved is not None), {})
        load_groups(self, state_dict)
        for p, saved in restored:
            mine = self.state[p]
            if saved is None and "latent" in mine:
                mine["latent"] = p.detach().to(wide(p), copy=True)
            mine.update(
                {k: v for k, v in common.items() if k in shared} if saved is None else saved
            )
            self._wrote(p)
        after_load(self)

    def __getstate__(self) -> dict[str, Any]:
        names = "defaults state param_groups transformation _order _places _spec"
        return {"_written": {}, **{name: self.__dict__[name] for name in names.split()}}


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


def _links(value: Any, kind: type) -> Iterator[Any]:
    """The links of a kind among a transformation and those inside it."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, Composite):
        yield from _links(value.expand(), kind)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _links(item, kind)
    elif isinstance(value, dict):
        yield from _links(list(value.values()), kind)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _links(getattr(value, field.name), kind)
