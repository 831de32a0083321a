"""Gradient transformations: the contract, and the links that are nothing but it.

params are the latent, full-precision weights; weights are what the model computes with. A
transformation is pure functions over pytrees:

    init(params) -> state
    update(updates, state, params, **extra) -> updates, state    # increments to params
    weights(state, params) -> weights                            # identity for ordinary links
    pullback(grads, state, params, *, weights=None) -> grads, own  # its transpose; optional

`pullback` takes gradients at the weights to those at the params, and gives besides the gradient of
what the state learns, () where it learns nothing. `weights` are the transformation's, where the
caller has them. The outermost chain pulls back once, before its first link sees the gradients, and
hands every link its own second result as the extra argument `pulled` of `update`, where it is not
().

A link ignores the extra arguments it does not know. Links, like all values of this library,
are frozen dataclasses; states are NamedTuples of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from parq_fn.foundation.checks import instead_of
from parq_fn.foundation.reading import check_nodes
from parq_fn.foundation.torch_private import is_optimizer
from parq_fn.foundation.traits import PER_LEAF, TransformationTraits, traits_of
from parq_fn.foundation.tree import Params, PyTree, Updates, check_plain, tree_map
from parq_fn.foundation.value import Value, attribute, briefly, state_class, value


@runtime_checkable
class Transformation(Protocol):
    """Any object with these three pure methods; `pullback` may be a fourth."""

    def init(self, params: PyTree) -> PyTree:
        """The state before the first update."""

    def update(
        self, updates: Updates, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[Updates, PyTree]:
        """The transformed updates and the next state."""

    def weights(self, state: PyTree, params: Params) -> Params:
        """The weights that the model computes with."""


#: How many learning rates, each of which turns gradients into increments, updates pass in a link:
#: at least and at most; of one with a prox link inside, those before that.
Rates = tuple[float, float]
NO_RATE: Rates = (0, 0)
ANY_RATES: Rates = (0, math.inf)  # of a link that does not say


@state_class
class EmptyState(NamedTuple):
    """State of a link that keeps none."""


@value
class Link(Value):
    """Base of the links: no state, updates passed through, weights = params.

    >>> import torch
    >>> from parq_fn import Link
    >>> from parq_fn.foundation.tree import tree_map
    >>> class flip(Link):
    ...     def update(self, updates, state, params, **extra):
    ...         return tree_map(torch.neg, updates), state  # a missing gradient, None, stays one
    >>> flip().update({"w": torch.ones(1)}, flip().init({"w": torch.ones(1)}), None)
    ({'w': tensor([-1.])}, EmptyState())
    """

    @attribute
    def traits(self) -> TransformationTraits:
        """What it declares, for `parq_fn.testing`: of the base what every transformation must."""
        return TransformationTraits()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "pullback" in vars(cls) and "pulls_back" not in vars(cls):
            cls.pulls_back = True  # type: ignore[method-assign]
        if "update" in vars(cls) and "rates" not in vars(cls):
            # what a parent says is of the parent's update
            cls.rates = ANY_RATES  # type: ignore[method-assign]

    def init(self, params: PyTree) -> PyTree:
        """The empty state."""
        check_plain(params, type(self).__name__)
        return EmptyState()

    def update(
        self, updates: Updates, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[Updates, PyTree]:
        """(updates, state) after this link; of the base as they came."""
        del params, extra
        return updates, state

    def weights(self, state: PyTree, params: Params) -> Params:
        """The weights the model computes with; of the base the params."""
        del state
        return params

    def pullback(
        self, grads: PyTree, state: PyTree, params: PyTree, *, weights: PyTree | None = None
    ) -> tuple[PyTree, PyTree]:
        """(gradients at the params, from gradients at the weights; those of what it learns); of
        the base (grads, ())."""
        del state, params, weights
        return grads, ()

    @attribute
    def pulls_back(self) -> bool:
        """Whether `pullback` may be another than the base's; where not, it is not called. A class
        that defines a `pullback` and does not say has True."""
        return False

    @attribute
    def rates(self) -> Rates:
        """How many learning rates updates pass in it, see `Rates`; of the base any number."""
        return ANY_RATES

    # What it is made of.

    def children(self) -> dict[str, Transformation]:
        """The transformations inside this one, by name; of the base none."""
        return {}

    def with_children(self, children: Mapping[str, Transformation]) -> Transformation:
        """The same around these, which go by the names that `children` gives.

        Raises ValueError for other names.
        """
        if in_place(self, children):
            raise NotImplementedError(f"{type(self).__name__} must define with_children")
        return self

    def child_states(self, state: PyTree) -> dict[str, PyTree]:
        """The states of its children, by their names, from its own."""
        del state
        if self.children():
            raise NotImplementedError(f"{type(self).__name__} must define child_states")
        return {}

    def pinned(self, params: PyTree) -> Transformation:
        """The same for some of these params too: masks and labels, which go by the names of all,
        say of each what they say of it now."""
        inside = {name: pinned(child, params) for name, child in self.children().items()}
        return self.with_children(inside) if inside else self


def children_of(transformation: Any) -> dict[str, Any]:
    """Its children, by name; none of an object that does not tell.

    >>> from parq_fn import chain, clip, sgd
    >>> children_of(chain(clip(1.0), sgd(0.1)))
    {'0': clip(1.0), '1': sgd(0.1)}
    """
    return transformation.children() if hasattr(transformation, "with_children") else {}


def pinned(transformation: Any, params: PyTree) -> Any:
    """See `Link.pinned`; an object without it is as it was."""
    method = getattr(transformation, "pinned", None)
    return transformation if method is None else method(params)


def pulls_back(transformation: Any) -> bool:
    """See `Link.pulls_back`; an object that does not say does where it has a `pullback`."""
    return bool(getattr(transformation, "pulls_back", hasattr(transformation, "pullback")))


def rates_of(*alternatives: Any) -> Rates:
    """Those of a link, or of one of several: of one with a prox link, if there are such."""
    ending = [link for link in alternatives if getattr(traits_of(link), "last", False)]
    rates: list[Rates] = [getattr(link, "rates", ANY_RATES) for link in ending or alternatives]
    if not rates:
        return NO_RATE
    least, most = rates[0]
    for low, high in rates[1:]:  # a compiler that traces a chain being built knows these
        least, most = min(least, low), max(most, high)
    return least, most


def pull_back(
    transformation: Any,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    weights: PyTree | None = None,
) -> tuple[PyTree, PyTree]:
    """Its `pullback`; (grads, ()) of what has none."""
    if not pulls_back(transformation):
        return grads, ()
    got = transformation.pullback(grads, state, params, weights=weights)
    return _two(
        got, transformation, "pullback", "(grads, own), own being () where it learns nothing"
    )


def begun(link: Any, params: PyTree) -> PyTree:
    """Its `init`; TypeError for a state that holds a dataclass."""
    state = link.init(params)
    check_nodes(state, f"the state that {name_of(link)}.init gave")
    return state


def updated(
    link: Any, updates: PyTree, state: PyTree, params: PyTree, **extra: Any
) -> tuple[PyTree, PyTree]:
    """Its `update`; TypeError unless that gives two things, updates and a state."""
    got = link.update(updates, state, params, **extra)
    return _two(got, link, "update", "(updates, state)")


def _two(got: Any, link: Any, method: str, expected: str) -> tuple[PyTree, PyTree]:
    if type(got) is tuple and len(got) == 2:
        return got
    kind = f"a tuple of {len(got)}" if isinstance(got, tuple) else f"a {type(got).__name__}"
    raise TypeError(f"{name_of(link)}.{method} returned {kind}, expected {expected}")


def name_of(link: Any) -> str:
    """What builds it, for errors: most often its class."""
    return str(getattr(link, "built_by", type(link).__name__))


def check_state(link: Any, state: Any, kind: type) -> None:
    """Raises TypeError unless a link's state is of this kind."""
    if not isinstance(state, kind):
        raise TypeError(wrong_state(link, state, f"the {kind.__name__} that its init gave"))


def wrong_state(link: Any, state: Any, expected: str) -> str:
    """What to say of a state that is none of a link's."""
    return (
        f"{name_of(link)}: its state is a {type(state).__name__}, expected {expected}; the order "
        "is update(updates, state, params) and weights(state, params)"
    )


def handed(own: PyTree) -> dict[str, PyTree]:
    """The extra argument that a link is given for the second result of its pullback."""
    return {} if type(own) is tuple and not own else {"pulled": own}


def pulled_update(
    transformation: Transformation,
    grads: PyTree,
    state: PyTree,
    params: PyTree,
    weights: PyTree | None = None,
    **extra: Any,
) -> tuple[PyTree, PyTree]:
    """(updates, state) from gradients at the weights: what a chain of this one link gives."""
    grads, own = pull_back(transformation, grads, state, params, weights)
    return updated(transformation, grads, state, params, **handed(own), **extra)


def in_place(link: Link, children: Mapping[str, Transformation]) -> list[Transformation]:
    """New children in the order of a link's own; ValueError where their names are others."""
    own = link.children()
    if children.keys() != own.keys():
        raise ValueError(
            f"{type(link).__name__} has the children {list(own)}, got {list(children)}"
        )
    for name, child in children.items():
        check_transformation(child, f"the child {name!r} of {type(link).__name__}")
    return [children[name] for name in own]


@value
class identity(Link):
    """updates -> updates.

    >>> identity()
    identity()
    """

    traits = replace(PER_LEAF, passes_updates=True)
    rates = NO_RATE


@value
class freeze(Link):
    """updates -> 0: what it stands behind stays as it is; see `masked` and `partition`.

    >>> import torch
    >>> freeze().update({"w": torch.ones(1)}, EmptyState(), None)[0]
    {'w': tensor([0.])}
    """

    traits = PER_LEAF
    rates = (-math.inf, math.inf)  # what came before is nothing now

    def update(
        self, updates: Updates, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[Updates, PyTree]:
        del params, extra
        check_state(self, state, EmptyState)
        return tree_map(torch.zeros_like, updates), state


@value
class stateless(Link):
    """updates -> function(updates, params), a pure function of trees.

    >>> import torch
    >>> double = stateless(lambda updates, params: {k: 2 * u for k, u in updates.items()})
    >>> double.update({"w": torch.ones(1)}, double.init(None), None)[0]
    {'w': tensor([2.])}
    """

    #: (updates, params) -> updates.
    function: Callable[[PyTree, PyTree], PyTree]
    traits = TransformationTraits(plain_weights=True)

    def update(
        self, updates: Updates, state: PyTree, params: PyTree, **extra: Any
    ) -> tuple[Updates, PyTree]:
        del extra
        check_state(self, state, EmptyState)
        return self.function(updates, params), state


def _same(state: PyTree, params: PyTree) -> PyTree:
    del state
    return params


def _untouched(
    grads: PyTree, state: PyTree, params: PyTree, *, weights: PyTree | None = None
) -> tuple[PyTree, PyTree]:
    del state, params, weights
    return grads, ()


@value
class GradientTransformation(Value):
    """A transformation from functions; `weights` is the identity where it is not given, and so is
    `pullback`.

    >>> halve = GradientTransformation(
    ...     init=lambda params: EmptyState(),
    ...     update=lambda updates, state, params, **_: (tree_map(lambda u: u / 2, updates), state),
    ... )
    >>> halve.update({"w": 1.0}, halve.init(None), None)[0]
    {'w': 0.5}
    """

    #: params -> state.
    init: Callable[[PyTree], PyTree]
    #: (updates, state, params, **extra) -> updates, state.
    update: Callable[..., tuple[PyTree, PyTree]]
    #: (state, params) -> weights; by default the params.
    weights: Callable[[PyTree, PyTree], PyTree] = _same
    #: (grads, state, params, *, weights=None) -> grads, what it learns; by default grads, ().
    pullback: Callable[..., tuple[PyTree, PyTree]] = _untouched

    @property
    def pulls_back(self) -> bool:
        """Whether it was given a pullback."""
        return vars(self).get("pullback", _untouched) is not _untouched


def check_transformation(link: Any, where: str) -> None:
    """Raises TypeError unless the link is an object with init, update and weights."""
    if is_optimizer(link):
        raise TypeError(f"{where} is {instead_of(link)}")
    if isinstance(link, type):
        raise TypeError(f"{where} is the class {link.__name__}; call it: {link.__name__}(...)")
    missing = [m for m in ("init", "update", "weights") if not callable(getattr(link, m, None))]
    if missing:
        raise TypeError(
            f"{where} is {briefly(link)}, expected a transformation; it lacks "
            f"{', '.join(missing)}{_remedy(link, missing)}"
        )


def _remedy(link: Any, missing: list[str]) -> str:
    pair = type(link) in (tuple, list) and len(link) == 2 and all(map(callable, link))
    if missing == ["weights"] or (pair and not any(hasattr(part, "init") for part in link)):
        return "; of an (init, update) pair make GradientTransformation(init=..., update=...)"
    if isinstance(link, tuple | list):
        return "; give links one by one: chain(*links)"
    if hasattr(link, "num_levels"):
        return "; a quantizer belongs into a prox link: hard_prox(quantizer)"
    return ""
