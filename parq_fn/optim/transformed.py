"""A gradient transformation as a torch.optim optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.scalar import is_number
from parq_fn.foundation.value import same
from parq_fn.optim.leafwise import Part, joined, parts_of
from parq_fn.optim.state import (
    Entries,
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
from parq_fn.transforms.chain import every_link
from parq_fn.transforms.links import add_decayed_weights
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.sharded import local
from parq_fn.transforms.train import apply_updates
from parq_fn.transforms.transformation import (
    Transformation,
    check_transformation,
    pulled_update,
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
    may be loaded into the module after the optimizer was built; but torch does not tell of writes
    through `p.data`, which are to be made under torch.no_grad() instead. A parameter whose
    requires_grad is off is left alone.

    A step makes new tensors for some parameters at a time, no more elements together than the
    largest has; for all where a link looks at several together or does not declare the trait
    leafwise, a mask or label is a function, or the learning rates of groups differ.

    The fields of the transformation's state are there from construction on, under the path to
    them ("0.trace", "1.levels"), what is shared by all parameters in each one's;
    `transformation_state` has them as the transformation does, for `read`.

    Raises TypeError for what is no transformation and for FSDP1's flat parameters; ValueError
    for a weight decay where no link takes one, two parameters of one name, fields of the
    transformation's state that would have one name, groups added to a prox link that has taken
    steps, and as the transformation's init does.

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

    def __init__(
        self, params: Iterable[Any] | dict[str, Any], transformation: Transformation
    ) -> None:
        check_transformation(transformation, "the transformation of TransformOptimizer")
        rates = list(_fields(transformation, "learning_rate"))
        one = bool(rates) and all(is_number(rate) and rate == rates[0] for rate in rates)
        own = {"lr": rates[0]} if one else {}
        super().__init__(params, own)  # type: ignore[arg-type] # its type knows no mixtures
        self.transformation = transformation
        self._order: list[list[Tensor]] = []
        self._written: dict[Tensor, tuple[int, int]] = {}
        self._parts: list[Part] = []
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
            if group.get("weight_decay") and not _has(self.transformation, add_decayed_weights):
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
        if latents is None:
            latents = {name: p.to(wide(p)) for name, p in named.items()}
        parts = parts_of(self.transformation, latents)
        states = [part.transformation.init(_of(part, latents)) for part in parts]
        traits = getattr(self.transformation, "traits", None)
        plain = bool(getattr(traits, "plain_weights", False))
        for name, p, _ in self._named():
            has_none = p.dtype == wide(p) and (plain or not p.is_floating_point())
            self.state[p] = {} if has_none else {"latent": named[name].to(wide(p), copy=True)}
            self._wrote(p)
        self._parts = parts
        params = self._by_name()
        common: Entries = {}
        for part, state in zip(parts, states, strict=True):
            common |= self._spread(part, state, params)
        self._share(common)
        self._order = [list(group["params"]) for group in self.param_groups]

    def _by_name(self) -> dict[str, Tensor]:
        return {name: p for name, p, _ in self._named()}

    def _spread(self, part: Part, state: Any, params: dict[str, Tensor]) -> Entries:
        """Lays a part's state out over its parameters; returns what all parameters share."""
        common = {}
        for name, key, leaf in part.take_apart(state):
            if name is None:
                common[key] = leaf
            else:
                self.state[params[name]][key] = leaf
        return common

    def _share(self, common: Entries) -> None:
        for _, p, _ in self._named():
            self.state[p].update(common)

    def _gather(self, part: Part, params: dict[str, Tensor]) -> Any:
        """The state of a part that is laid out over the parameters."""
        first = params[part.names[0]]

        def entry(name: str | None, key: str) -> Any:
            return self.state[first if name is None else params[name]][key]

        return part.put_together(entry)

    def _shared_keys(self) -> set[str]:
        return {key for part in self._parts for name, key in part.places if name is None}

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; its parameters begin now, the others keep their state."""
        building = not hasattr(self, "transformation")  # called by Optimizer.__init__
        if not building and _has(self.transformation, Prox) and self._has_stepped():
            raise ValueError(
                "TransformOptimizer: its prox links have taken steps, and a parameter added now "
                "would have no levels until they fit again; add groups before the first step, or "
                "give the parameters an optimizer of their own"
            )
        if not building:
            self._absorb()
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
        shared = self._shared_keys()
        for p, entries in kept.items():
            self.state[p].update({k: v for k, v in entries.items() if k in self.state[p]})
        common = next(iter(kept.values()), {})
        for _, p, _ in self._named():
            self.state[p].update({k: v for k, v in common.items() if k in shared})

    def _has_stepped(self) -> bool:
        entries = [self.state[p] for group in self._order for p in group]
        found = [got for own in entries for got in own.values() if _is_count(got)]
        return any(int(count) for count in found)

    def _follow(self) -> None:
        """Follows parameters that were exchanged in their groups, by position, or moved."""
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
        for name, p, _ in self._named():
            if p in self.state:
                check_dtype("TransformOptimizer", p, self._latent(p), name)
        if all(old is new for old, new in pairs):
            self._move_to_devices()
            return
        shared = self._shared_keys()
        stepped, kept, alike = self._has_stepped(), {}, []
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
            else:
                alike.append(new)
            kept[new] = entries
        self._begin()
        self._keep(kept)
        self._move_to_devices()
        for new in alike:  # its values may be others
            self._written.pop(new)

    def _move_to_devices(self) -> None:
        """The state on its parameters' devices, to which the module may have been moved."""
        for _, p, _ in self._named():
            self.state[p].update(beside(p, self.state[p]))

    # Parameters that code outside the optimizer changed.

    def _wrote(self, p: Tensor) -> None:
        self._written[p] = mark(p)

    def _absorb(self) -> None:
        """Takes over changed parameters of all parts."""
        params = self._by_name()
        with torch.no_grad():
            for part in self._parts:
                self._take_over(part, self._gather(part, params), params)

    def _take_over(self, part: Part, state: Any, params: dict[str, Tensor]) -> None:
        """Elements of parameters that were changed since we wrote them become their latents.

        So weights may be loaded into the module after the optimizer was built. What lies within
        rounding of the weights is as we wrote it, perhaps on another machine.
        """
        own = _of(part, params)
        changed = {
            name: p
            for name, p in own.items()
            if "latent" in self.state[p] and self._written.get(p) != mark(p)
        }
        if not changed:
            return
        latents = {name: self._latent(p) for name, p in own.items()}
        weights = part.transformation.weights(state, latents)
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
        groups = {name: group for name, _, group in self._named()}
        params = self._by_name()
        common: Entries = {}
        rates = {name: group.get("lr") for name, group in groups.items()}
        decays = {name: group.get("weight_decay") for name, group in groups.items()}
        rate = next(iter(rates.values()), None)
        parts = self._parts
        if all(same(rate, other) for other in rates.values()):
            extra = {} if rate is None else {"learning_rate": rate}
        else:  # a link may want to see them all, and refuse
            extra, parts = {"learning_rate": rates}, self._whole(params)
        if any(decay is not None for decay in decays.values()):
            extra["weight_decay"] = decays
        for part in parts:
            common |= self._update_part(part, params, extra)
        self._share(common)

    def _update_part(self, part: Part, params: dict[str, Tensor], extra: Entries) -> Entries:
        """The step of a part's parameters; returns the entries that it shares with the others,
        which are to see those of the step before."""
        own, transformation = _of(part, params), part.transformation
        state = self._gather(part, params)
        self._take_over(part, state, params)
        latents = {name: self._latent(p) for name, p in own.items()}
        grads = {
            name: p.grad.to(latents[name].dtype) if p.requires_grad and p.grad is not None else None
            for name, p in own.items()
        }
        weights = {name: p.detach() for name, p in own.items()}
        updates, state = pulled_update(transformation, grads, state, latents, weights, **extra)
        latents = apply_updates(latents, updates)
        weights = transformation.weights(state, latents)
        frozen = {p: dict(self.state[p]) for p in own.values() if not p.requires_grad}
        common = self._spread(part, state, params)
        for name, p in own.items():
            if p.requires_grad:
                if "latent" in self.state[p]:
                    self.state[p]["latent"] = latents[name]
                p.copy_(weights[name])
                self._wrote(p)
        for p, entries in frozen.items():
            self.state[p].update(entries)
        return common

    def _whole(self, params: dict[str, Tensor]) -> list[Part]:
        """All parameters as one part."""
        whole = Part(self.transformation, list(params))
        whole.take_apart(self.transformation_state)
        return [whole]

    @property
    def transformation_state(self) -> Any:
        """The transformation's state, for `read`: read(optimizer.transformation_state, "slope")."""
        params = self._by_name()
        states = [self._gather(part, params) for part in self._parts]
        return joined(states) if states else self.transformation.init({})

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
        shared = self._shared_keys()
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
        names = "defaults state param_groups transformation _order _parts"
        return {"_written": {}, **{name: self.__dict__[name] for name in names.split()}}


def _of(part: Part, values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values[name] for name in part.names}


def _is_count(got: Any) -> bool:
    if isinstance(got, Tensor):
        return got.dtype == torch.int64 and got.dim() == 0
    return isinstance(got, int)


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
