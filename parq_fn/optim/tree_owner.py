"""What TransformOptimizer keeps of a parameter: a transformation's state, laid out over the
parameters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from parq_fn.foundation.tree import names_of, tree_leaves
from parq_fn.optim.digest import are_same_links, digest
from parq_fn.optim.leafwise import Part, parts_of
from parq_fn.optim.learned import learning_begun
from parq_fn.optim.old_states import Kept
from parq_fn.optim.owner import Place
from parq_fn.optim.saved import FOREIGN, check_keys
from parq_fn.optim.state import Entries, Group, wide
from parq_fn.transforms.chain import every_link, every_state
from parq_fn.transforms.levels_of import prox_states
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.sharded import local
from parq_fn.transforms.transformation import Transformation
from parq_fn.transforms.wrappers import AccumulateState

#: The entry that tells which prox links a parameter was trained with, but for a learning rate.
DIGEST = "prox_links"


class TreeOwner:
    """The entries of a transformation's state in parts: "0.trace" of each parameter, "1.count",
    which all have in common, in each one's; and latents.

    check_group: raises ValueError for a group, by its index, that the transformation cannot serve.
    params: the parameters by name.
    """

    who = "TransformOptimizer"
    keys: tuple[str, ...] = ()
    widens = True
    needs: frozenset[str] = frozenset()
    _learned: frozenset[str] = frozenset()  # what keys of a prox link's learning begin with
    _gathered: frozenset[str] = frozenset()  # the keys of what `accumulate` gathers

    def __init__(
        self,
        optimizer: Optimizer,
        transformation: Transformation,
        check_group: Callable[[int, Group], None],
    ) -> None:
        self.optimizer, self.transformation = optimizer, transformation
        self.check_group = check_group
        self.parts: list[Part] = []
        self.params: dict[str, Tensor] = {}
        self._known: set[str] = set()  # the keys of entries, and those that weights follow from
        self._weigh: set[str] = set()

    def check(self) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            self.check_group(index, group)

    def kind(self, group: Group) -> dict[str, Any]:
        return {}

    def compared(self, saved: Group) -> tuple[str, ...]:
        return self.keys

    def begin(self, fresh: list[Place], places: list[Place]) -> dict[Tensor, Entries]:
        """Of all: masks and labels may go by what others there are."""
        self.check()
        new, state = {place.p for place in fresh}, self.optimizer.state
        latents = {}
        for p, _, name, _ in places:
            known = p if p in new else state[p].get("latent", p)
            latents[name] = known.detach().to(wide(p))
        parts = parts_of(self.transformation, latents)
        plain = bool(getattr(getattr(self.transformation, "traits", None), "plain_weights", False))
        made: dict[Tensor, Entries] = {}
        for p, _, _, _ in places:
            has_none = p.dtype == wide(p) and (plain or not p.is_floating_point())
            made[p] = {} if has_none else {"latent": p.detach().to(wide(p), copy=True)}
        params: dict[str, Tensor] = {place.name: place.p for place in places}
        common: Entries = {}
        links: dict[str, list[Prox]] = {}
        known, weigh = {"latent"}, {"latent"}
        learned, gathered = set[str](), set[str]()
        for part in parts:
            initial = part.transformation.init(select(part, latents))
            for owner, key, leaf in part.take_apart(initial):
                (common if owner is None else made[params[owner]])[key] = leaf
            keys = {id(leaf): key for _, key, leaf in part.take_apart(initial)}
            known.update(keys.values())
            for _, own in every_state(part.transformation, initial):
                if isinstance(own, AccumulateState):
                    gathered.update(keys[id(leaf)] for leaf in tree_leaves(own.total))
            for link, own in prox_states(part.transformation, initial):
                weigh.update(keys[id(leaf)] for leaf in tree_leaves(own))
                above = keys[id(own.count)].removesuffix("count")
                learned.update(f"{above}{field}." for field in ("learned", "oscillation"))
                for name in names_of(own.qparams):
                    links.setdefault(name, []).append(replace(link, learning_rate=None))
        for name, seen in links.items():
            made[params[name]][DIGEST] = digest(*seen)
        for entries in made.values():
            entries.update(common)
        self.parts, self.params, self._known, self._weigh = parts, params, known, weigh
        self._learned, self._gathered = frozenset(learned), frozenset(gathered)
        return made

    def latent_dtype(self, p: Tensor) -> torch.dtype:
        return wide(p)

    def adopted(self, p: Tensor, entries: Entries) -> None:
        pass

    def dropped(self, p: Tensor) -> None:
        pass

    def is_attached(self, p: Tensor, entries: Entries) -> bool:
        return True

    def watched(self, entries: Entries) -> Iterable[str]:
        return [key for key in entries if key in self._known]

    def weighs(self, key: str) -> bool:
        return key in self._weigh

    def trained(self, entries: Entries) -> bool:
        counts = (got for key, got in entries.items() if key != DIGEST and _is_count(got))
        return any(map(int, counts))

    def shared(self) -> set[str]:
        return {key for part in self.parts for name, key in part.places if name is None}

    def weights(self, params: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = set(params)
        for part in self.parts:
            own = select(part, self.params)
            if chosen.isdisjoint(own.values()):
                continue
            latents = {name: self.latent(p) for name, p in own.items()}
            weights = part.transformation.weights(self.gather(part), latents)
            for name, p in own.items():
                if p in chosen:
                    yield p, local(weights[name])

    def kept(self) -> dict[Tensor, dict[str, Kept]]:
        found: dict[Tensor, dict[str, Kept]] = {p: {} for p in self.params.values()}
        for part in self.parts:
            state = self.gather(part)
            places = {id(leaf): (name, key) for name, key, leaf in part.take_apart(state)}
            for link, own in prox_states(part.transformation, state):
                for qparams in tree_leaves(own.qparams):
                    name, key = places[id(qparams)]
                    p = self.params[str(name)]
                    found[p][key] = Kept(link.quantizer, link.granularity.row_shape(p))
        return found

    def shown(self) -> dict[Tensor, Entries]:
        return {p: self.optimizer.state[p] for p in self.params.values()}

    def varies(self, p: Tensor) -> Callable[[str], bool]:
        return lambda key: False

    def restored(
        self,
        rows: list[tuple[Tensor, Entries | None]],
        groups: list[Group],
        state_dict: dict[str, Any],
    ) -> list[tuple[Tensor, Entries | None]]:
        names = {p: name for name, p in self.params.items()}
        for p, entries in rows:
            more = sorted(key for key in {*(entries or {})} - self._known if "." in key)
            if more:
                warnings.warn(
                    f"loaded state dict: of parameter {names[p]!r} it has entries of other links "
                    f"than the transformation, which has no {', '.join(more)}; they are kept as "
                    "they were saved, and no step changes them",
                    stacklevel=5,
                )
                break
        return rows

    def check_links(self, p: Tensor, mine: Entries, saved: Entries, where: str) -> None:
        if not are_same_links(mine.get(DIGEST), saved.get(DIGEST)):
            links = [link for link in every_link(self.transformation) if isinstance(link, Prox)]
            raise ValueError(
                f"{where}: it was trained with other prox links than the transformation has, "
                f"{', '.join(map(repr, links))}; build the optimizer with those, or delete the "
                f"entries {DIGEST!r} to go on with these"
            )

    def fits(self, p: Tensor, mine: Entries, saved: Entries, label: str) -> Entries:
        del p
        where = f"loaded state dict, parameter {label!r}"
        if DIGEST not in saved:
            own = {key: mine[key] for key in (DIGEST,) if key in mine}
            saved = {**learning_begun(mine, saved, self._learned), **own}
        check_keys(mine.keys() - {"latent"}, saved, where, FOREIGN)
        return saved

    # The transformation's state.

    def latent(self, p: Tensor) -> Tensor:
        """What the transformation moves for a parameter."""
        latent: Tensor = self.optimizer.state[p].get("latent", p)
        return latent.detach()

    def gather(self, part: Part) -> Any:
        """The state of a part, put together from the entries of parameters."""
        state = self.optimizer.state
        first = self.params[part.names[0]]

        def entry(name: str | None, key: str) -> Any:
            return state[first if name is None else self.params[name]][key]

        return part.put_together(entry)

    def spread(self, part: Part, state: Any) -> Entries:
        """Lays a part's state out over its parameters; returns what all parameters share."""
        common = {}
        for name, key, leaf in part.take_apart(state):
            if name is None:
                common[key] = leaf
            else:
                self.optimizer.state[self.params[name]][key] = leaf
        return common

    def with_first_fit(self, entries: Entries, stepped: Entries) -> Entries:
        """The entries of a parameter that is left alone in a step, with the step's qparams in the
        rows that had none: the next fit may be far, and without levels all weights would be 0.
        Those of the first step are all the step's: links take copies of parameters there. So is
        what gradients accumulate to, with which one update is made for all parameters."""
        if not self.trained(entries):
            return stepped
        new = {**entries, **{key: stepped[key] for key in self._gathered & entries.keys()}}
        for key in self._weigh & entries.keys():
            old, fitted = entries[key], stepped[key]
            if key.rpartition(".")[2] == "qparams" and old.shape == fitted.shape:
                new[key] = torch.where((old == 0).all(-1, keepdim=True), fitted, old)
        return new

    def share(self, common: Entries) -> None:
        """Gives all parameters what they share."""
        for p in self.params.values():
            self.optimizer.state[p].update(common)


def select(part: Part, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a part, of values by name."""
    return {name: values[name] for name in part.names}


def _is_count(got: Any) -> bool:
    if isinstance(got, Tensor):
        return got.dtype == torch.int64 and got.dim() == 0
    return isinstance(got, int)
