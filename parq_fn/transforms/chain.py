"""Chains of transformations, and transformations that are short for one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from parq_fn.foundation.traits import TransformationTraits, shared, traits_of
from parq_fn.foundation.tree import (
    Params,
    PyTree,
    Updates,
    check_match,
    check_plain,
    check_tree,
)
from parq_fn.foundation.value import changed, value
from parq_fn.transforms.transformation import (
    NO_RATE,
    Link,
    Rates,
    Transformation,
    begun,
    check_transformation,
    children_of,
    handed,
    in_place,
    name_of,
    pull_back,
    pulls_back,
    rates_of,
    updated,
    wrong_state,
)


@value
class Chain(Link):
    """See `chain` and `named_chain`."""

    links: tuple[Transformation, ...]
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for i, link in enumerate(self.links):
            check_transformation(link, f"link {self.names[i] if self.names else i}")
        traits = [traits_of(link) or TransformationTraits() for link in self.links]
        fits = None  # the last link so far that does, or the first that averages
        changes = None  # the last link so far that may change updates
        for link, own in zip(self.links, traits, strict=True):
            if changes is not None and own.pulls_back_inside:
                raise ValueError(
                    f"{link!r} pulls gradients back itself, and {changes!r} in front of it may "
                    "change them first; put it around the whole chain"
                )
            changes = changes if own.passes_updates else link
            alone = fits is None or (own.last and not _averages(fits))
            if not (alone or own.passes_updates):
                raise ValueError(
                    f"{fits!r} fits its levels to params + updates as they reach it, or averages "
                    f"them, and {link!r} behind it may change them; put it last (a link that lets "
                    "updates pass says so in its traits: passes_updates=True)"
                )
            if own.last and fits is None:
                self._check_rates(link)
            fits = link if own.last and alone else fits

    def _check_rates(self, prox: Transformation) -> None:
        before: list[Transformation] = []
        for link in self.links:
            if link is prox:
                break
            before.append(link)
        least, most = _rates([*before, prox])
        if least > 1:
            taking = ", ".join(repr(link) for link in (*before, prox) if rates_of(link)[0])
            raise ValueError(
                f"{self.built_by}: updates pass more than one learning rate on their way to the "
                f"prox link, in {taking}; each turns gradients into increments, so keep one"
            )
        changes = [link for link in before if not _passes(link)]
        if most == 0 and changes:
            raise ValueError(
                f"{self.built_by}: gradients pass no learning rate on their way to the prox link, "
                "and would be added to params as they are; put scale_by_learning_rate(...) behind "
                f"{changes[-1]!r}, or take sgd, adam or adamw"
            )

    def __repr__(self) -> str:
        if self.names is None:
            return f"chain({', '.join(map(repr, self.links))})"
        named = zip(self.names, self.links, strict=True)
        return f"named_chain({', '.join(f'{name}={link!r}' for name, link in named)})"

    @property
    def traits(self) -> TransformationTraits:
        """What all its links declare, but that what it pulls back does not pass."""
        own = shared(self.links)
        passes = own.passes_updates and not self.pulls_back
        return replace(own, passes_updates=passes)

    @property
    def rates(self) -> Rates:
        """The sum of its links', up to the first with a prox link."""
        return _rates(self.links)

    def children(self) -> dict[str, Transformation]:
        """Its links by name, or by number."""
        return dict(zip(self._keys(), self.links, strict=True))

    def with_children(self, children: Mapping[str, Transformation]) -> Transformation:
        """The chain of these links."""
        return changed(self, links=tuple(in_place(self, children)))

    def child_states(self, state: PyTree) -> dict[str, PyTree]:
        """The states of its links."""
        return dict(zip(self._keys(), self._states(state), strict=True))

    def _keys(self) -> tuple[str, ...]:
        return self.names or tuple(map(str, range(len(self.links))))

    def _states(self, state: PyTree) -> list[PyTree]:
        names = self.names
        kind: Any = dict if names else tuple | list
        if not isinstance(state, kind) or hasattr(state, "_fields"):
            what = f"a dict by {', '.join(names)}" if names else "a tuple"
            raise TypeError(wrong_state(self, state, f"{what} of its links' states"))
        if len(state) != len(self.links):
            raise ValueError(
                f"state of {len(state)} link(s) for a chain of {len(self.links)}; "
                "a state belongs to the transformation whose init made it"
            )
        if names and any(name not in state for name in names):
            raise ValueError(
                f"state of the links {', '.join(map(str, state))} for a chain of "
                f"{', '.join(names)}; a state belongs to the transformation whose init made it, "
                "and comes second in update(updates, state, params)"
            )
        return [state[name] for name in names] if names else list(state)

    def _pack(self, states: list[PyTree]) -> PyTree:
        return dict(zip(self.names, states, strict=True)) if self.names else tuple(states)

    def init(self, params: PyTree) -> PyTree:
        """The states of the links: a tuple, or a dict by their names.

        Raises TypeError for a module or nn.Parameters in the place of params, and for a link's
        state that holds a dataclass.
        """
        check_plain(params, self.built_by)
        return self._pack([begun(link, params) for link in self.links])

    @property
    def built_by(self) -> str:
        """chain or named_chain."""
        return "chain" if self.names is None else "named_chain"

    def update(
        self,
        updates: Updates,
        state: PyTree,
        params: PyTree,
        *,
        pulled: PyTree | None = None,
        **extra: Any,
    ) -> tuple[Updates, PyTree]:
        """Every link's update in turn, each seeing the updates of the one before it, the first
        those of `pullback`.

        pulled: the second result of `pullback`, of a chain that is a part of another: its updates
        are pulled back already.

        Raises ValueError for updates of another structure or shape than the params, TypeError for
        a state that is none of its own, and for a link that gives something else than updates and
        a state.
        """
        olds = self._states(state)
        if params is not None:
            check_match(updates, params, self.built_by)
        if pulled is None:
            updates, pulled = self.pullback(updates, state, params)
        states = []
        for link, old, own in zip(self.links, olds, pulled, strict=True):
            updates, new = updated(link, updates, old, params, **handed(own), **extra)
            states.append(new)
            if isinstance(updates, Tensor) and isinstance(params, dict | list | tuple):
                raise TypeError(
                    f"{name_of(link)}.update returned a tensor for the updates, expected a tree "
                    f"like params, a {type(params).__name__}; it returns (updates, state)"
                )
        return updates, self._pack(states)

    def weights(self, state: PyTree, params: Params) -> Params:
        """Every link's weights in turn. Raises TypeError for a module in the place of params."""
        check_tree(params, self.built_by)
        for link, own in zip(self.links, self._states(state), strict=True):
            made = link.weights(own, params)
            if made is None and params is not None:
                raise TypeError(f"{name_of(link)}.weights returned None, expected the weights")
            params = made
        return params

    def pullback(
        self, grads: PyTree, state: PyTree, params: PyTree, *, weights: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        """Every link's pullback from the last to the first, each at the params that its `weights`
        sees; and the tuple of their second results."""
        states = self._states(state)
        own: list[PyTree] = [()] * len(states)
        last = max([-1, *(i for i, link in enumerate(self.links) if pulls_back(link))])
        seen = [params]
        for link, old in zip(self.links[: max(last, 0)], states, strict=False):
            seen.append(link.weights(old, seen[-1]))
        made = [*seen[1:], weights if last + 1 == len(states) else None]
        for i in range(last, -1, -1):
            grads, own[i] = pull_back(self.links[i], grads, states[i], seen[i], made[i])
        return grads, tuple(own)

    @property
    def pulls_back(self) -> bool:
        """Whether one of its links does."""
        return any(map(pulls_back, self.links))


def _averages(link: Transformation) -> bool:
    """Whether it keeps an average of params + updates, which no link may move afterwards."""
    return any(hasattr(inside, "average_of") for inside in every_link(link))


def _passes(link: Transformation) -> bool:
    return bool(getattr(traits_of(link), "passes_updates", False))


def _rates(links: Iterable[Transformation]) -> Rates:
    """How many learning rates updates pass on their way through links, or to the prox link."""
    least, most = NO_RATE
    for link in links:
        low, high = rates_of(link)
        least, most = least + low, most + high
        if getattr(traits_of(link), "last", False):
            break
    return least, most


def chain(*links: Transformation) -> Chain:
    """Applies links in order: updates run through them from left to right.

    Raises TypeError for a link without init, update and weights, ValueError for a prox link in
    front of one that may change its updates, behind more than one learning rate, or behind links of
    which none takes one, and for a link that pulls gradients back itself behind one that may change
    them.

    >>> from parq_fn import chain, clip, sgd
    >>> chain(clip(1.0), sgd(0.1))
    chain(clip(1.0), sgd(0.1))
    """
    return Chain(links)


def named_chain(**links: Transformation) -> Chain:
    """A chain whose state is a dict by the links' names, in the order given.

    >>> from parq_fn import hard_prox, lsbq, named_chain, sgd
    >>> named_chain(base=sgd(0.1), prox=hard_prox(lsbq(2)))
    named_chain(base=sgd(0.1), prox=hard_prox(lsbq(2)))
    """
    return Chain(tuple(links.values()), tuple(links))


@value
class Composite(Link):
    """Base of transformations that are a chain of others: `expand` gives it."""

    def expand(self) -> Transformation:
        """The chain that this is short for."""
        raise NotImplementedError(f"{type(self).__name__} must define expand")

    @property
    def traits(self) -> TransformationTraits:
        """What the chain declares."""
        return shared([self.expand()])

    @property
    def rates(self) -> Rates:
        """Those of the chain."""
        return rates_of(self.expand())

    def init(self, params: PyTree) -> PyTree:
        """The state of the chain."""
        return self.expand().init(params)

    def update(
        self, updates: Updates, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[Updates, PyTree]:
        """The update of the chain."""
        return self.expand().update(updates, state, params, **extra)

    def weights(self, state: PyTree, params: Params) -> Params:
        """The weights of the chain."""
        return self.expand().weights(state, params)

    def pullback(
        self, grads: PyTree, state: PyTree, params: PyTree, *, weights: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        """The pullback of the chain."""
        return pull_back(self.expand(), grads, state, params, weights)

    @property
    def pulls_back(self) -> bool:
        """Whether the chain does. A class may say that its own never do."""
        return pulls_back(self.expand())

    def __init_subclass__(cls, **options: Any) -> None:
        if "expand" in vars(cls) and "pulls_back" not in vars(cls):
            # what a parent says is of the parent's chain
            cls.pulls_back = Composite.pulls_back  # type: ignore[method-assign] # a property
        super().__init_subclass__(**options)

    def children(self) -> dict[str, Transformation]:
        """The chain, as "expanded"."""
        return {"expanded": self.expand()}

    def with_children(self, children: Mapping[str, Transformation]) -> Transformation:
        """The chain given: the link is no more than short for one."""
        (expanded,) = in_place(self, children)
        return expanded

    def pinned(self, params: PyTree) -> Transformation:
        """The chain's; a class that has traits of its own is left as it is."""
        return super().pinned(params) if type(self).traits is Composite.traits else self

    def child_states(self, state: PyTree) -> dict[str, PyTree]:
        """Its state is the chain's."""
        return {"expanded": state}


def every_link(transformation: Any) -> Iterator[Any]:
    """The links that a transformation is made of, itself the first; a Composite's in its place.

    >>> from parq_fn import accumulate, sgd
    >>> [type(link).__name__ for link in every_link(accumulate(sgd(0.1), 2))]
    ['accumulate', 'Chain', 'scale_by_learning_rate']
    """
    if not isinstance(transformation, Composite):
        yield transformation
    for child in children_of(transformation).values():
        yield from every_link(child)


def every_state(transformation: Any, state: Any) -> Iterator[tuple[Any, Any]]:
    """The links that `every_link` gives, each with its own state, from the transformation's.

    >>> from parq_fn import chain, clip, sgd
    >>> transform = chain(clip(1.0), sgd(0.1))
    >>> [type(state).__name__ for _, state in every_state(transform, transform.init({}))]
    ['tuple', 'EmptyState', 'tuple', 'StepState']
    """
    if not isinstance(transformation, Composite):
        yield transformation, state
    if inside := children_of(transformation):
        states = transformation.child_states(state)
        for name, inner in inside.items():
            yield from every_state(inner, states[name])
