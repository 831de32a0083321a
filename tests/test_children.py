"""Links know what they are made of: children, the same link around others, and their states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import parq_fn as pf
from parq_fn import Link
from parq_fn.foundation.traits import shared
from parq_fn.foundation.tree import ByName
from parq_fn.foundation.value import value
from parq_fn.optim import TransformOptimizer
from parq_fn.optim.leafwise import parts_of
from parq_fn.transforms.chain import every_link
from parq_fn.transforms.levels_of import prox_states
from parq_fn.transforms.transformation import children_of, in_place, pinned

PARAMS = {"a.weight": torch.tensor([[1.0, -3.0]]), "a.bias": torch.ones(2), "b": torch.ones(3)}
PROX = pf.hard_prox(pf.lsbq(1), period=1)


@value
class twice(Link):
    """A wrapper of a user's own that tells what is inside."""

    inner: Any

    @property
    def traits(self) -> Any:
        return shared([self.inner])

    def init(self, params: Any) -> Any:
        return {"own": self.inner.init(params)}

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        updates, inner = self.inner.update(updates, state["own"], params, **extra)
        return {name: 2 * u for name, u in updates.items()}, {"own": inner}

    def weights(self, state: Any, params: Any) -> Any:
        return self.inner.weights(state["own"], params)

    def children(self) -> dict[str, Any]:
        return {"own": self.inner}

    def with_children(self, children: Any) -> Any:
        (inner,) = in_place(self, children)
        return twice(inner)

    def child_states(self, state: Any) -> Any:
        return state


class plain:
    """No link: an object with the three methods."""

    def init(self, params: Any) -> Any:
        return ()

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        return updates, state

    def weights(self, state: Any, params: Any) -> Any:
        return params


#: {name: (a link, the names of its children)}
LINKS: dict[str, tuple[Any, list[str]]] = {
    "chain": (pf.chain(pf.clip(1.0), pf.sgd(0.1)), ["0", "1"]),
    "empty": (pf.chain(), []),
    "named_chain": (pf.named_chain(base=pf.adam(0.1), prox=PROX), ["base", "prox"]),
    "masked": (pf.masked(PROX, "*.weight"), ["inner"]),
    "partition": (pf.partition({"x": pf.sgd(0.1), "y": PROX}, {"b": "x", "*": "y"}), ["x", "y"]),
    "accumulate": (pf.accumulate(pf.sgd(0.1), 2), ["inner"]),
    "conditionally": (pf.conditionally(pf.sgd(0.1), lambda t: t > 1), ["inner"]),
    "monitor_flips": (pf.monitor_flips(PROX), ["inner"]),
    "lookahead": (pf.lookahead(pf.sgd(0.1)), ["inner"]),
    "schedule_free": (pf.schedule_free(pf.sgd(0.1)), ["inner"]),
    "averaged": (pf.averaged(pf.sgd(0.1), 0.9), ["inner"]),
    "apply_if_finite": (pf.apply_if_finite(pf.sgd(0.1)), ["inner"]),
    "composite": (pf.adamw(0.1), ["expanded"]),
    "own": (twice(pf.masked(pf.sgd(0.1), "b")), ["own"]),
    "single": (pf.scale(2.0), []),
    "prox": (PROX, []),
    "plain": (plain(), []),
}


@pytest.mark.parametrize("name", LINKS)
def test_children_go_by_name_and_can_be_exchanged(name: str) -> None:
    link, names = LINKS[name]
    children = children_of(link)
    assert list(children) == names
    if name == "plain":
        return
    same = link.with_children(children)
    assert same == (link.expand() if name == "composite" else link)
    states = link.child_states(link.init(PARAMS))
    assert list(states) == names
    for other in ({}, {**children, "more": pf.identity()}):
        if other.keys() != children.keys():
            with pytest.raises(ValueError, match="has the children"):
                link.with_children(other)
    if children:
        others = link.with_children(dict.fromkeys(names, pf.identity()))
        assert set(children_of(others).values()) <= {pf.identity()}
        with pytest.raises(TypeError, match="is 3, expected a transformation"):
            link.with_children(dict.fromkeys(names, 3))


def test_children_in_another_order_take_their_own_places() -> None:
    link = pf.named_chain(first=pf.scale(2.0), second=pf.clip(1.0))
    turned = dict(reversed(link.children().items()))
    assert link.with_children(turned) == link


def test_what_is_exchanged_is_checked_as_what_is_built() -> None:
    link = pf.chain(pf.sgd(0.1), PROX)
    with pytest.raises(ValueError, match="put it last"):
        link.with_children({"0": PROX, "1": pf.sgd(0.1)})


def test_a_link_with_children_alone_says_what_is_missing() -> None:
    @value
    class half(Link):
        def children(self) -> dict[str, Any]:
            return {"inner": pf.identity()}

    with pytest.raises(NotImplementedError, match="half must define with_children"):
        half().with_children(half().children())
    with pytest.raises(NotImplementedError, match="half must define child_states"):
        half().child_states(())


def test_every_link_is_found_once_and_a_composite_as_what_it_is_short_for() -> None:
    whole = pf.accumulate(twice(pf.chain(pf.sgd(0.1, momentum=0.9), pf.masked(PROX, "b"))), 2)
    kinds = [type(link).__name__ for link in every_link(whole)]
    assert kinds == [
        "accumulate", "twice", "Chain", "Chain", "trace", "scale_by_learning_rate", "masked",
        "hard_prox",
    ]  # fmt: skip


def test_wrappers_of_ones_own_are_seen_through() -> None:
    transform = twice(pf.named_chain(base=pf.sgd(0.5), prox=pf.masked(PROX, "a.weight")))
    ((link, state),) = prox_states(transform, transform.init(PARAMS))
    assert link is PROX
    assert state.count == 0
    own = [(name, torch.nn.Parameter(p)) for name, p in PARAMS.items()]
    assert TransformOptimizer(own, transform).param_groups[0]["lr"] == 0.5
    assert len(parts_of(transform, PARAMS)) > 1
    assert "hard_prox" in transform._repr_html_().split("<ul", 1)[1]


def test_masks_and_labels_are_pinned_to_names() -> None:
    inner = pf.masked(pf.trace(0.9), "*.bias")
    whole = pf.chain(pf.masked(pf.chain(inner, pf.sgd(0.1)), "a.*"), pf.scale(2.0))
    alone = pinned(whole, PARAMS)
    assert not whole.traits.leafwise
    assert alone.traits.leafwise
    grads = {name: torch.ones_like(p) for name, p in PARAMS.items()}
    together, _ = whole.update(grads, whole.init(PARAMS), PARAMS)
    for name, p in PARAMS.items():
        own = {name: p}
        updates, _ = alone.update({name: grads[name]}, alone.init(own), own)
        assert torch.equal(updates[name], together[name])
    mask = alone.links[0].mask
    assert mask == ByName({"a.weight": True, "a.bias": True, "b": False})


def test_a_function_of_values_cannot_be_pinned() -> None:
    for link in (
        pf.masked(pf.sgd(0.1), lambda name, p: bool(p.sum() > 0)),
        pf.partition({"x": pf.sgd(0.1)}, lambda name, p: "x"),
    ):
        assert pinned(link, PARAMS) is link
        assert not link.traits.leafwise


def test_a_mask_that_names_nothing_is_refused_where_it_is_pinned() -> None:
    with pytest.raises(ValueError, match="'c'"):
        pinned(pf.chain(pf.sgd(0.1), pf.masked(PROX, "c")), PARAMS)


def test_a_composite_with_traits_of_its_own_speaks_for_itself() -> None:
    @value
    class careful(pf.sgd):
        traits = pf.clip_by_global_norm(1.0).traits

    link = careful(0.1)
    assert pinned(link, PARAMS) is link
    assert len(parts_of(link, PARAMS)) == 1


def test_a_subclass_with_an_init_of_its_own_is_cut_too() -> None:
    @value
    class still_biases(pf.masked):
        def __init__(self) -> None:
            super().__init__(pf.freeze(), "*.bias")

    link = pf.chain(pf.sgd(0.1), still_biases())
    parts = parts_of(link, PARAMS)
    assert len(parts) > 1
    assert type(parts[0].transformation.links[1]) is still_biases
