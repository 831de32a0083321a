"""Pullback: gradients at the weights become gradients at the params once, before the first link, at
the params that each link's weights saw; what links learn is handed back to them."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import parq_fn as pf
from parq_fn import Composite, EmptyState, Link, estimators
from parq_fn.foundation.tree import tree_map
from parq_fn.foundation.value import value
from parq_fn.proxmaps import hard
from parq_fn.transforms.transformation import pull_back, pulled_update, pulls_back

PARAMS = {"a": torch.tensor([[1.0, -3.0, 0.2]]), "b": torch.tensor([[0.5, 2.0, -1.0]])}
GRADS = {"a": torch.tensor([[0.3, -0.1, 2.0]]), "b": torch.tensor([[1.0, -2.0, 0.5]])}
DAMPED = pf.hard_prox(pf.lsbq(1), period=1, gradient=estimators.damped(0.5))
INSIDE = pf.hard_prox(pf.lsbq(1), period=1, gradient=estimators.inside())
PLAIN = pf.hard_prox(pf.lsbq(1), period=1)
TRACE = pf.trace(0.9)


def run(transform: Any, steps: int = 4, params: Any = None) -> Any:
    """(params, weights) after some steps with gradients that depend on the weights."""
    params = PARAMS if params is None else params
    state = transform.init(params)
    for _ in range(steps):
        weights = transform.weights(state, params)
        grads = {k: w.cos() + GRADS[k] for k, w in weights.items()}
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
    return params, transform.weights(state, params)


def same(one: Any, other: Any) -> bool:
    """Whether trees agree bit for bit."""
    flags = tree_map(torch.equal, one, other)
    return all(pf.tree.tree_leaves(flags))


def begun(transform: Any) -> tuple[Any, Any]:
    """(state, params) of a training under way."""
    params, state = PARAMS, transform.init(PARAMS)
    for _ in range(2):
        updates, state = transform.update(GRADS, state, params)
        params = pf.apply_updates(params, updates)
    return state, params


@value
class learner(Link):
    """Learns: its second result is the sum of gradients; it keeps what it is given of it."""

    name: str = "one"

    def init(self, params: Any) -> Any:
        return {"got": torch.zeros(()), "times": torch.zeros((), dtype=torch.int64)}

    def update(self, updates: Any, state: Any, params: Any, *, pulled: Any, **extra: Any) -> Any:
        times = state["times"] + 1
        return updates, {"got": torch.where(times > 0, pulled["sum"], 0.0), "times": times}

    def pullback(self, grads: Any, state: Any, params: Any, *, weights: Any = None) -> Any:
        total = sum(g.sum() for g in pf.tree.tree_leaves(grads))
        return tree_map(lambda g: g + 1, grads), {"sum": total}


def got(state: Any) -> list[float]:
    """What learners in a state have been given, in the order of the chain."""
    if isinstance(state, dict) and "got" in state:
        return [state["got"].item()]
    if isinstance(state, dict):
        return [x for one in state.values() for x in got(one)]
    return [x for one in state for x in got(one)] if isinstance(state, tuple) else []


# Chains


def test_a_chain_pulls_back_before_its_first_link() -> None:
    transform = pf.chain(pf.clip(0.4), TRACE, pf.scale(-0.1), DAMPED)
    state, params = begun(transform)
    weights = transform.weights(state, params)

    def pulled(g: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return torch.where(u.abs() <= w.abs().max(), g + 0.5 * (u - w), g)

    by_hand, _ = pf.clip(0.4).update(tree_map(pulled, GRADS, params, weights), EmptyState(), params)
    grads, _ = transform.pullback(GRADS, state, params)
    found, _ = pf.clip(0.4).update(grads, EmptyState(), params)
    assert same(found, by_hand)
    assert not same(found, pf.clip(0.4).update(GRADS, EmptyState(), params)[0])
    updates, _ = transform.update(GRADS, state, params)
    given = tree_map(pulled, GRADS, params, weights)
    assert same(updates, transform.update(given, state, params, pulled=((),) * 4)[0])


NESTED = {
    "flat": pf.chain(pf.clip(0.4), TRACE, pf.scale(-0.1), DAMPED),
    "named": pf.named_chain(clip=pf.clip(0.4), m=TRACE, rate=pf.scale(-0.1), prox=DAMPED),
    "in_two": pf.chain(pf.chain(pf.clip(0.4), TRACE), pf.chain(pf.scale(-0.1), DAMPED)),
    "in_three": pf.chain(pf.clip(0.4), pf.named_chain(x=pf.chain(TRACE, pf.scale(-0.1), DAMPED))),
    "masked": pf.chain(
        pf.clip(0.4), pf.masked(pf.chain(TRACE, pf.scale(-0.1), DAMPED), ["a", "b"])
    ),
    "masked_alone": pf.masked(pf.chain(pf.clip(0.4), TRACE, pf.scale(-0.1), DAMPED), ["a", "b"]),
    "parted": pf.chain(
        pf.clip(0.4),
        pf.partition({"x": pf.chain(TRACE, pf.chain(pf.scale(-0.1), DAMPED))}, {"*": "x"}),
    ),
    "parted_alone": pf.partition(
        {"x": pf.chain(pf.clip(0.4), TRACE, pf.scale(-0.1), DAMPED)}, {"*": "x"}
    ),
    "finite": pf.apply_if_finite(pf.chain(pf.clip(0.4), TRACE, pf.scale(-0.1), DAMPED)),
    "finite_inside": pf.chain(
        pf.clip(0.4), pf.apply_if_finite(pf.chain(TRACE, pf.scale(-0.1), DAMPED))
    ),
    "conditional": pf.conditionally(
        pf.chain(pf.clip(0.4), TRACE, pf.scale(-0.1), DAMPED), lambda t: t >= 0
    ),
    "conditional_link": pf.chain(
        pf.clip(0.4), TRACE, pf.scale(-0.1), pf.conditionally(DAMPED, True)
    ),
    "monitored": pf.monitor_flips(pf.chain(pf.clip(0.4), TRACE, pf.scale(-0.1), DAMPED)),
    "averaged": pf.averaged(pf.chain(pf.clip(0.4), TRACE, pf.scale(-0.1), DAMPED), 0.9),
    "averaged_inside": pf.chain(
        pf.clip(0.4), pf.averaged(pf.chain(TRACE, pf.scale(-0.1), DAMPED), 0.9)
    ),
    "averaged_link": pf.chain(pf.clip(0.4), TRACE, pf.scale(-0.1), pf.averaged(DAMPED, 0.9)),
    "accumulated": pf.accumulate(pf.chain(pf.clip(0.4), TRACE, pf.scale(-0.1), DAMPED), 1),
    "accumulated_outside": pf.chain(
        pf.identity(), pf.accumulate(pf.chain(pf.clip(0.4), TRACE, pf.scale(-0.1), DAMPED), 1)
    ),
    "finite_link": pf.chain(pf.clip(0.4), TRACE, pf.scale(-0.1), pf.apply_if_finite(DAMPED)),
}


@pytest.mark.parametrize("how", NESTED)
def test_however_chains_are_nested_it_is_done_once(how: str) -> None:
    assert same(run(NESTED[how]), run(NESTED["flat"]))


def test_a_composite_pulls_back_as_its_chain() -> None:
    @value
    class quantized(Composite):
        rate: float

        def expand(self) -> Any:
            return pf.chain(pf.sgd(self.rate), DAMPED)

    plain = pf.chain(pf.clip(0.4), pf.sgd(0.1), DAMPED)
    assert pulls_back(quantized(0.1))
    assert same(run(pf.chain(pf.clip(0.4), quantized(0.1))), run(plain))

    class subclass(pf.sgd):
        def expand(self) -> Any:
            return pf.chain(pf.sgd(self.learning_rate), DAMPED)

    assert not pulls_back(pf.sgd(0.1))
    assert pulls_back(subclass(0.1))
    assert same(run(pf.chain(pf.clip(0.4), subclass(0.1))), run(plain))


def test_every_link_pulls_back_at_the_params_that_its_weights_saw() -> None:
    """Of two prox links on one leaf the second sees the weights of the first."""
    seen: list[Tensor] = []

    def noting(g: Tensor, u: Tensor, w: Tensor, levels: Tensor, step: Tensor) -> Tensor:
        seen.extend([u, w])
        return 2 * g + u

    first, second = (pf.hard_prox(pf.lsbq(bits), period=1, gradient=noting) for bits in (2, 1))
    transform = pf.chain(pf.sgd(0.1), first, second)
    params = {"a": PARAMS["a"]}
    grads = {"a": GRADS["a"]}
    _, state = transform.update(grads, transform.init(params), params)
    middle = first.weights(state[1], params)["a"]
    end = transform.weights(state, params)["a"]
    seen.clear()
    found = transform.pullback(grads, state, params)[0]["a"]
    assert [*map(torch.equal, seen, [middle, end, params["a"], middle])] == [True] * 4
    assert torch.equal(found, 2 * (2 * grads["a"] + middle) + params["a"])


def test_an_estimator_that_computes_in_a_wider_dtype_changes_no_dtype() -> None:
    link = pf.hard_prox(pf.lsbq(1), period=1, gradient=lambda g, *_: 2 * g.double())
    _, state = link.update(GRADS, link.init(PARAMS), PARAMS)
    found, _ = link.pullback(GRADS, state, PARAMS)
    torch.testing.assert_close(found, tree_map(lambda g: 2 * g, GRADS))  # dtypes among it


def test_what_links_learn_is_handed_back_to_them() -> None:
    transform = pf.chain(
        pf.identity(),
        pf.masked(learner("a"), "a"),
        pf.scale(3.0),
        pf.partition(
            {"x": pf.chain(learner("b"), pf.sgd(0.1)), "y": learner("c")}, {"a": "x", "b": "y"}
        ),
        pf.averaged(pf.conditionally(pf.apply_if_finite(learner("d")), True), 0.9),
    )
    state = transform.init(PARAMS)
    grads, own = transform.pullback(GRADS, state, PARAMS)
    total = {k: g.sum() for k, g in GRADS.items()}
    # from the last to the first, each adding one to the three gradients of what it sees
    d = total["a"] + total["b"]
    b, c, a = total["a"] + 3, total["b"] + 3, total["a"] + 6
    wanted = (
        (), {"sum": a}, (), {"x": ({"sum": b}, ()), "y": {"sum": c}}, {"sum": d},
    )  # fmt: skip
    tree_map(torch.testing.assert_close, own, wanted)
    assert type(own) is tuple
    assert list(own[3]) == ["x", "y"]
    assert torch.equal(grads["a"], GRADS["a"] + 3)
    _, state = transform.update(GRADS, state, PARAMS)
    assert got(state[1]) == [a.item()]
    assert got(state[3]) == [b.item(), c.item()]
    assert got(state[4].inner.inner.inner) == [d.item()]


def test_the_second_result_of_a_chain_is_never_empty() -> None:
    for transform in (pf.chain(pf.sgd(0.1)), pf.chain(pf.chain(pf.scale(2.0)), DAMPED)):
        _, own = transform.pullback(GRADS, transform.init(PARAMS), PARAMS)
        assert own == ((),) * len(transform.links) or own == (((),), ())


def test_links_that_know_no_pullback_are_given_nothing() -> None:
    class plain:
        """No link."""

        def init(self, params: Any) -> Any:
            return ()

        def update(self, updates: Any, state: Any, params: Any) -> Any:
            return tree_map(lambda u: -u / 10, updates), state

        def weights(self, state: Any, params: Any) -> Any:
            return params

    class link(Link):
        def update(self, updates: Any, state: Any, params: Any) -> Any:  # type: ignore[override]
            return tree_map(lambda u: -u / 10, updates), state

    functions = pf.GradientTransformation(
        init=lambda params: EmptyState(),
        update=lambda u, state, params: (tree_map(lambda x: -x / 10, u), state),
    )
    wanted = run(pf.chain(pf.stateless(lambda u, p: tree_map(lambda x: -x / 10, u)), DAMPED))
    for one in (plain(), link(), functions):
        assert not pulls_back(one)
        assert pull_back(one, GRADS, (), PARAMS) == (GRADS, ())
        assert same(run(pf.chain(one, DAMPED)), wanted)
        assert same(run(pf.chain(pf.partition({"x": one}, {"*": "x"}), DAMPED)), wanted)


def test_functions_and_objects_may_have_a_pullback() -> None:
    def halve(grads: Any, state: Any, params: Any, *, weights: Any = None) -> Any:
        return tree_map(lambda g: g / 2, grads), ()

    one = pf.GradientTransformation(
        init=lambda params: EmptyState(), update=lambda u, s, p, **_: (u, s), pullback=halve
    )

    class plain:
        def init(self, params: Any) -> Any:
            return ()

        def update(self, updates: Any, state: Any, params: Any) -> Any:
            return updates, state

        def weights(self, state: Any, params: Any) -> Any:
            return params

        def pullback(self, grads: Any, state: Any, params: Any, *, weights: Any = None) -> Any:
            return halve(grads, state, params)

    wanted = run(pf.chain(pf.scale(0.5), pf.sgd(0.1)))
    for each in (one, plain()):
        assert pulls_back(each)
        assert same(run(pf.chain(pf.clip(10.0), pf.sgd(0.1), each)), wanted)


def test_one_that_is_no_chain_is_pulled_back_as_a_chain_of_it() -> None:
    state, params = begun(DAMPED)
    one = pulled_update(DAMPED, GRADS, state, params)
    other = pf.chain(DAMPED).update(GRADS, (state,), params)
    assert same(one[0], other[0])
    assert same(one[1], other[1][0])


# accumulate, apply_if_finite


def test_accumulate_pulls_back_the_mean() -> None:
    inner = pf.chain(pf.sgd(0.1), DAMPED)
    transform = pf.accumulate(inner, 2)
    params, state = PARAMS, transform.init(PARAMS)
    own = inner.init(PARAMS)
    for _ in range(3):
        given = [tree_map(lambda g, f=f: f * g, GRADS) for f in (1.0, 3.0)]
        assert transform.pullback(given[0], state, params) == (given[0], ())
        zeros, state = transform.update(given[0], state, params)
        assert not any(z.any() for z in zeros.values())
        updates, state = transform.update(given[1], state, params)
        wanted, own = inner.update(tree_map(lambda g: 2 * g, GRADS), own, params)
        assert same(updates, wanted)
        params = pf.apply_updates(params, updates)


def test_accumulate_pulls_back_for_a_link_that_is_no_chain() -> None:
    inner = pf.partition({"x": pf.chain(pf.sgd(0.1), DAMPED)}, {"*": "x"})
    assert same(run(pf.accumulate(inner, 1)), run(inner))


CLIPPED_LATE = {
    "behind": lambda inner: pf.chain(pf.clip(1.0), inner),
    "masked": lambda inner: pf.chain(pf.clip(1.0), pf.masked(inner, "a")),
    "nested": lambda inner: pf.chain(pf.clip(1.0), pf.chain(pf.identity(), inner)),
    "finite": lambda inner: pf.named_chain(clip=pf.clip(1.0), rest=pf.apply_if_finite(inner)),
    "twice": lambda inner: pf.chain(pf.sgd(1.0), pf.accumulate(inner, 2)),
}


@pytest.mark.parametrize("how", CLIPPED_LATE)
def test_accumulate_behind_links_that_change_updates_is_refused(how: str) -> None:
    inner = pf.accumulate(pf.chain(pf.sgd(0.1), DAMPED), 2)
    with pytest.raises(ValueError, match=r"pulls gradients back itself, and (clip|sgd).* in front"):
        CLIPPED_LATE[how](inner)
    CLIPPED_LATE[how](pf.accumulate(pf.chain(pf.sgd(0.1), PLAIN), 2))  # nothing to pull back
    pf.chain(pf.identity(), inner)
    pf.accumulate(inner, 2)


def test_a_skipped_update_looks_at_what_is_pulled_back_and_at_what_is_learned() -> None:
    finite = torch.tensor([[0.1, 0.2, torch.finfo(torch.float32).max]])
    for transform in (
        pf.apply_if_finite(pf.chain(pf.sgd(0.1), learner())),
        pf.chain(pf.identity(), pf.apply_if_finite(pf.chain(pf.sgd(0.1), learner()))),
    ):
        state = transform.init(PARAMS)
        for grads, skipped in (
            (GRADS, 0),
            ({"a": finite, "b": finite}, 1),  # each is finite, their sum is not
            ({"a": finite * torch.inf, "b": finite}, 2),
        ):
            updates, state = transform.update(grads, state, PARAMS)
            assert pf.read(state, "skipped") == skipped
            assert (updates["a"].count_nonzero() == 0) == (skipped > 0)


def test_a_saturated_gradient_may_be_anything() -> None:
    """`inside` takes it for 0, so that nothing is to be skipped."""
    for transform in (
        pf.apply_if_finite(pf.chain(pf.sgd(0.1), INSIDE)),
        pf.chain(pf.apply_if_finite(pf.chain(pf.sgd(0.1), INSIDE))),
    ):
        _, state = transform.update(GRADS, transform.init(PARAMS), PARAMS)
        spoiled = {"a": torch.tensor([[0.0, torch.nan, 0.0]]), "b": GRADS["b"]}
        _, state = transform.update(spoiled, state, PARAMS)
        assert pf.read(state, "skipped") == 0


# No cost


class Maps(NamedTuple):
    calls: list[int]
    link: Any


def counted(gradient: Any) -> Maps:
    """A prox link that notes each call of its map."""
    calls: list[int] = []

    def counting(u: Tensor, levels: Tensor, coefficient: Tensor) -> Tensor:
        calls.append(1)
        return hard(u, levels)

    return Maps(calls, pf.custom_prox(pf.lsbq(1), counting, 0.0, period=1, gradient=gradient))


@pytest.mark.parametrize(
    ("gradient", "maps"),
    [
        (estimators.straight_through(), 0),
        (estimators.inside(), 0),
        (estimators.by_level(), 0),
        (estimators.trust(), 1),
        (estimators.damped(0.1), 1),
    ],
    ids=repr,
)
def test_a_map_is_computed_only_for_estimators_that_look_at_weights(
    gradient: Any, maps: int
) -> None:
    calls, link = counted(gradient)
    transform = pf.chain(pf.sgd(0.1), pf.masked(link, "a"))
    state, params = begun(transform)
    weights = transform.weights(state, params)
    calls.clear()
    transform.update(GRADS, state, params)
    assert len(calls) == maps
    calls.clear()
    transform.pullback(GRADS, state, params, weights=weights)
    assert not calls


def test_weights_before_the_last_that_pulls_back_are_computed_once() -> None:
    calls, link = counted(estimators.damped(0.1))
    others, other = counted(estimators.damped(0.1))
    straight, last = counted(estimators.straight_through())
    transform = pf.chain(pf.sgd(0.1), link, other, last)
    state, params = begun(transform)
    for each in (calls, others, straight):
        each.clear()
    transform.update(GRADS, state, params)
    assert (len(calls), len(others), len(straight)) == (2, 2, 0)  # once a leaf


def operations(transform: Any) -> int:
    """How many a compiled update of the chain has."""
    torch.compiler.reset()
    count = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal count
        count += sum(node.op.startswith("call") for node in graph.graph.nodes)
        return graph.forward

    state = transform.init(PARAMS)
    torch.compile(transform.update, backend=backend, fullgraph=True)(GRADS, state, PARAMS)
    return count


@pytest.mark.rare
def test_a_compiled_update_has_no_operation_more_for_the_identity() -> None:
    whole = operations(pf.chain(pf.sgd(0.1), PLAIN))
    assert whole == operations(pf.sgd(0.1)) + operations(PLAIN)
    assert operations(pf.chain(pf.sgd(0.1), INSIDE)) > whole


# Before the map makes the weights


def test_before_the_map_makes_the_weights_gradients_are_as_they_came() -> None:
    prox = pf.parq_prox(
        pf.lsbq(1), anneal_start=2, anneal_end=4, warmup=1, period=1, gradient=DAMPED.gradient
    )
    transform = pf.chain(pf.sgd(0.1), prox)
    params, state = PARAMS, transform.init(PARAMS)
    for t in range(6):
        mapped = not same(transform.weights(state, params), params)
        grads, _ = transform.pullback(GRADS, state, params)
        assert (grads is GRADS) == (not mapped) == (t <= 2)
        updates, state = transform.update(GRADS, state, params)
        params = pf.apply_updates(params, updates)
