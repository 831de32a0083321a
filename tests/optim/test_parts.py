"""A transformation cut along its leaves: the numbers of the functional loop, or no cut."""

from __future__ import annotations

from typing import Any, NamedTuple

import optree
import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn import Composite, EmptyState, Link
from parq_fn.foundation.traits import PER_LEAF
from parq_fn.foundation.tree import tree_map
from parq_fn.foundation.value import value
from parq_fn.optim import TransformOptimizer
from parq_fn.optim.leafwise import parts_of

TWO = {"a": torch.ones(2), "c": torch.ones(2)}


@value
class two_speed(Composite):
    """Several rates made of one."""

    learning_rate: float

    def expand(self) -> Any:
        slow, fast = pf.sgd(self.learning_rate), pf.sgd(2 * self.learning_rate)
        return pf.partition({"slow": slow, "fast": fast}, {"c": "fast", "*": "slow"})


@value
class clipped_sgd(pf.sgd):
    """A subclass that looks at all leaves; its traits are those of its parent."""

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        clipped, _ = pf.clip_by_global_norm(1.0).update(updates, EmptyState(), params)
        return super().update(clipped, state, params, **extra)


@value
class clipped_trace(pf.trace):
    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        clipped, _ = pf.clip_by_global_norm(1.0).update(updates, EmptyState(), params)
        return super().update(clipped, state, params, **extra)


@value
class listed_momentum(Link):
    """Keeps a list of its leaves, which are no dict by name."""

    traits = PER_LEAF

    def init(self, params: Any) -> list[Tensor]:
        return [torch.zeros_like(p) for p in optree.tree_leaves(params)]

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        leaves, spec = optree.tree_flatten(updates)
        new = [0.9 * m + g for m, g in zip(state, leaves, strict=True)]
        return optree.tree_unflatten(spec, new), new


class Taken(NamedTuple):
    latent: Any


@value
class own_latent(Link):
    traits = PER_LEAF

    def init(self, params: Any) -> Taken:
        return Taken(tree_map(torch.zeros_like, params))


class Counted(NamedTuple):
    n: int


@value
class counting(Link):
    """Keeps a plain number."""

    traits = PER_LEAF

    def init(self, params: Any) -> Counted:
        return Counted(0)

    def update(self, updates: Any, state: Counted, params: Any, **extra: Any) -> Any:
        return updates, Counted(state.n + 1)


FROZEN_BELOW = pf.masked(pf.freeze(), lambda name, x: bool((x < 0.85).all()) or name == "c")
TRANSFORMS = {
    "two_rates": pf.partition(
        {"x": pf.sgd(0.1), "y": pf.sgd(torch.tensor(0.5))}, {"c": "y", "*": "x"}
    ),
    "two_speed": two_speed(0.1),
    "clipped_sgd": clipped_sgd(0.1),
    "clipped_trace": pf.chain(clipped_trace(0.9), pf.sgd(0.1)),
    "listed": pf.chain(listed_momentum(), pf.sgd(1.0)),
    "predicate": pf.chain(pf.sgd(0.1), FROZEN_BELOW),
    "labels": pf.partition(
        {"go": pf.sgd(0.1), "stop": pf.freeze()}, lambda _, x: "stop" if x.norm() < 1.2 else "go"
    ),
    "counting": pf.chain(counting(), pf.sgd(0.1)),
    "nested": pf.masked(pf.chain(pf.masked(pf.trace(0.9), "a"), pf.sgd(0.1)), ["a", "c"]),
    "shrunk": pf.chain(
        pf.adamw(0.3), pf.masked(pf.hard_prox(pf.lsbq(1), period=1, shrink=True), "c")
    ),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_equals_the_functional_loop(name: str) -> None:
    transform, params = TRANSFORMS[name], dict(TWO)
    own = {n: nn.Parameter(p.clone()) for n, p in params.items()}
    optimizer, state = TransformOptimizer(own.items(), transform), transform.init(params)
    rate = optimizer.param_groups[0].get("lr")
    for t in range(6):
        grads = {n: torch.full((2,), float(t + len(n))) for n in params}
        for n, p in own.items():
            p.grad = grads[n].clone()
        optimizer.step()
        extra = {} if rate is None else {"learning_rate": rate}
        updates, state = transform.update(grads, state, params, **extra)
        params = pf.apply_updates(params, updates)
        weights = transform.weights(state, params)
        assert all(torch.equal(own[n], weights[n]) for n in own), t


def test_what_is_cut_and_what_is_not() -> None:
    cut = {name for name, one in TRANSFORMS.items() if len(parts_of(one, TWO)) > 1}
    assert cut == {"two_rates", "two_speed", "counting", "nested", "shrunk"}


def test_one_rate_of_several_stands_in_for_none() -> None:
    for name in ("two_rates", "two_speed"):
        own = [(n, nn.Parameter(p.clone())) for n, p in TWO.items()]
        assert "lr" not in TransformOptimizer(own, TRANSFORMS[name]).param_groups[0]


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (own_latent(), "has a field named 'latent'"),
        (
            pf.partition(
                {
                    "m": pf.chain(pf.accumulate(pf.sgd(0.1), 2)),
                    "m.0": pf.accumulate(pf.sgd(0.1), 3),
                },
                {"c": "m.0", "*": "m"},
            ),
            r"two fields of the transformation's state are both 'm\.0\.inner\.0\.step'",
        ),
    ],
)
def test_fields_of_one_name_are_refused(transform: Any, message: str) -> None:
    own = [(n, nn.Parameter(p.clone())) for n, p in TWO.items()]
    with pytest.raises(ValueError, match=message):
        TransformOptimizer(own, transform)


def test_plain_numbers_in_a_state_go_through_exchanges_and_new_groups() -> None:
    w, v = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = TransformOptimizer([("w", w)], pf.chain(counting(), pf.sgd(0.1)))
    w.grad = torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [("v", v)]})
    new = nn.Parameter(w.detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    new.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(new.detach(), torch.full((2,), 0.8))
    assert optimizer.transformation_state[0].n == 2
