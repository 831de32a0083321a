"""States and values of one's own: saved and read safely, found by name, or refused."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import parq_fn as pf
from parq_fn.foundation.scalar import new_count
from parq_fn.foundation.tree import PyTree, tree_map
from parq_fn.foundation.value import Value, state_class, value

PARAMS = {"w": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), "a.b": torch.ones(2)}


@state_class
class SlowState(NamedTuple):
    """State of `slow`."""

    count: Tensor  # [], int64: updates so far
    mean: PyTree  # like params: mean of the updates so far


@value
class slow(pf.Link):
    """The mean of the updates so far, kept in a NamedTuple."""

    rate: float = 0.1

    def init(self, params: Any) -> SlowState:
        return SlowState(new_count(), tree_map(torch.zeros_like, params))

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        count = state.count + 1
        mean = tree_map(lambda m, u: m + (u - m) / count, state.mean, updates)
        return tree_map(lambda m: -self.rate * m, mean), SlowState(count, mean)


@value
class slow_in_a_dict(slow):
    """The same, kept in a dict."""

    def init(self, params: Any) -> Any:
        return super().init(params)._asdict()

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        updates, state = super().update(updates, SlowState(**state), params)
        return updates, state._asdict()


PROX = pf.hard_prox(pf.lsbq(1), period=1)
AROUND: dict[str, Any] = {
    "alone": lambda link: link,
    "chain": lambda link: pf.chain(link, PROX),
    "named_chain": lambda link: pf.named_chain(mine=link, rest=pf.identity()),
    "masked": lambda link: pf.masked(link, "w"),
    "partition": lambda link: pf.partition(
        {"x": link, "y": pf.sgd(0.1, 0.9)}, {"w": "x", "*": "y"}
    ),
    "accumulate": lambda link: pf.accumulate(pf.chain(link), 1),
    "apply_if_finite": lambda link: pf.apply_if_finite(link),
    "deep": lambda link: pf.chain(pf.named_chain(x=pf.masked(pf.chain(link), "w")), pf.identity()),
}


def trained(link: Any) -> Any:
    return link.update(PARAMS, link.init(PARAMS), PARAMS)[1]


@pytest.mark.parametrize("how", AROUND)
@pytest.mark.parametrize("link", [slow(), slow_in_a_dict()])
def test_states_of_ones_own_are_read_by_torch_s_safe_default(link: Any, how: str) -> None:
    state = trained(AROUND[how](link))
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert type(loaded) is type(state)
    assert str(loaded) == str(state)


@pytest.mark.parametrize("how", AROUND)
@pytest.mark.parametrize("link", [slow(), slow_in_a_dict()])
def test_fields_and_keys_of_own_states_are_found_by_name(link: Any, how: str) -> None:
    state = trained(AROUND[how](link))
    mean, name = pf.read(state, "mean"), "mean.w"
    assert torch.equal(mean["w"], PARAMS["w"])
    assert torch.equal(pf.read(state, name), PARAMS["w"])
    if how != "chain":  # where the prox link has one too
        assert pf.read(state, "count") == 1
    with pytest.raises(KeyError, match=r"no state is named 'means'; there are: .*"):
        pf.read(state, "means")


def test_keys_are_told_apart_by_what_stands_before_them() -> None:
    state = trained(pf.named_chain(one=slow_in_a_dict(), two=slow_in_a_dict(), prox=PROX))
    assert pf.read(state, "one.count") is state["one"]["count"]
    assert pf.read(state, "two.mean") is state["two"]["mean"]
    assert pf.read(state, "two.mean.a.b") is state["two"]["mean"]["a.b"]
    assert pf.read(state, "two") is state["two"]
    with pytest.raises(KeyError, match=r"3 states are named 'count': one\.count, two\.count, prox"):
        pf.read(state, "count")
    unnamed = trained(pf.chain(slow_in_a_dict(), PROX))
    assert pf.read(unnamed, "0.count") is unnamed[0]["count"]
    assert pf.read(unnamed, "prox.count") is unnamed[1].count
    with pytest.raises(KeyError, match=r"2 states are named 'count': 0\.count, 1\.prox\.count"):
        pf.read(unnamed, "count")


def test_a_key_goes_before_a_parameter_of_its_name() -> None:
    params = {"count": torch.ones(2), "mean": torch.zeros(2)}
    for link in (slow(), slow_in_a_dict()):
        state = link.init(params)
        assert pf.read(state, "count").dtype == torch.int64
        assert set(pf.read(state, "mean")) == {"count", "mean"}
        assert pf.read(state, "mean.mean").shape == (2,)


def test_a_field_goes_before_the_link_of_its_name() -> None:
    state = pf.named_chain(trace=pf.trace(0.9), rate=pf.scale(-0.1), qparams=PROX).init(PARAMS)
    assert pf.read(state, "trace") is state["trace"].trace
    assert pf.read(state, "qparams") is state["qparams"].qparams


def test_the_names_there_are_do_not_list_thousands() -> None:
    params = {f"layer{i}": torch.ones(1) for i in range(100)}
    with pytest.raises(KeyError) as error:
        pf.read(slow_in_a_dict().init(params), "nothing")
    assert "count, " in str(error.value)
    assert len(str(error.value)) < 400


# @value


class mixin:
    def doubled(self) -> float:
        return 2 * self.factor  # type: ignore[attr-defined,no-any-return] # of what it is mixed into


@pytest.mark.parametrize("bases", [(), (mixin,)])
def test_value_without_its_base_is_refused(bases: tuple[type, ...]) -> None:
    with pytest.raises(TypeError, match=r"write class half\(Value(, mixin)?\), or one of Link"):
        value(type("half", bases, {"__annotations__": {"factor": float}}))


@value
class half(Value, mixin):
    factor: float = 0.5


def test_value_with_its_base_is_one() -> None:
    assert repr(half(0.25)) == "half(factor=0.25)"
    assert half() == half(0.5) != half(0.25)
    assert hash(half()) == hash(half(0.5))
    assert pickle.loads(pickle.dumps(half())) == half()
    assert replace(half(), factor=2.0).doubled() == 4.0
