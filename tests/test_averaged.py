"""Averages of latents: the definition's, and mapped after averaging."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import parq_fn as pf
from parq_fn.foundation.tree import tree_map

PARAMS = {
    "w": torch.tensor([[1.0, -3.0, 0.2, 2.0]], dtype=torch.float64),
    "b": torch.tensor([0.5, -1.0], dtype=torch.float64),
}
PROX = pf.masked(pf.hard_prox(pf.lsbq(1), period=2), "w")


def steps(transform: Any, count: int, params: Any = PARAMS) -> list[tuple[Any, Any]]:
    """(state, params) after each update."""
    found, state = [], transform.init(params)
    for t in range(count):
        grads = tree_map(lambda p, t=t: (p + t).cos(), params)
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        found.append((state, params))
    return found


DECAYS = {
    "fixed": 0.7,
    "tensor": torch.tensor(0.2),
    "none": 0.0,
    "mean": lambda t: t / (t + 1),
    "falling": pf.schedules.linear(0.9, 0.1, 0, 6),
    "late": lambda t: torch.where(t < 2, 1.0, 0.5),
}


@pytest.mark.parametrize("name", DECAYS)
def test_the_average_is_the_weighted_mean_of_the_latents_so_far(name: str) -> None:
    decay = DECAYS[name]
    found = steps(pf.averaged(pf.sgd(0.1), decay), 8)
    weights: list[float] = []
    for t, (state, _) in enumerate(found):
        now = float(decay(torch.tensor(t)) if callable(decay) else decay)
        weights = [now * w for w in weights] + [1.0 - now]
        total = sum(weights)
        for key in PARAMS:
            latents = [params[key] for _, params in found[: t + 1]]
            mean = sum(w * p for w, p in zip(weights, latents, strict=True)) / (total or 1.0)
            wanted = mean if total else PARAMS[key]
            torch.testing.assert_close(state.average[key], wanted, rtol=1e-12, atol=1e-12)
        assert state.total.item() == pytest.approx(total, abs=1e-12)


WHERE = {
    "around": lambda inner: pf.averaged(inner, 0.9),
    "in_a_chain": lambda inner: pf.chain(pf.identity(), pf.averaged(inner, 0.9)),
    "finite": lambda inner: pf.apply_if_finite(pf.averaged(inner, 0.9)),
    "accumulated": lambda inner: pf.accumulate(pf.averaged(inner, 0.9), 1),
    "parted": lambda inner: pf.partition({"all": pf.averaged(inner, 0.9)}, {"*": "all"}),
    "last": lambda inner: pf.chain(*inner.links[:-1], pf.averaged(inner.links[-1], 0.9)),
}


@pytest.mark.parametrize("how", WHERE)
def test_weights_of_an_average_are_mapped_after_averaging(how: str) -> None:
    inner = pf.chain(pf.sgd(0.1), PROX)
    transform = WHERE[how](inner)
    state, params = steps(transform, 5)[-1]
    plain, same = steps(inner, 5)[-1]
    assert all(torch.equal(params[key], same[key]) for key in PARAMS)
    average = pf.read(state, "average")
    found = pf.weights_of_average(transform, state, params)
    wanted = inner.weights(plain, average)
    assert all(torch.equal(found[key], wanted[key]) for key in PARAMS)
    levels = pf.levels_of(transform, state)["w"]
    assert torch.isin(found["w"], levels).all()
    assert torch.equal(found["b"], average["b"])
    assert not torch.equal(found["b"], params["b"])


@pytest.mark.parametrize(
    "links",
    [
        (pf.sgd(0.1), pf.masked(pf.averaged(pf.identity(), 0.5), "w")),
        (pf.masked(pf.schedule_free(pf.sgd(0.1)), "w"),),
    ],
)
def test_leaves_that_no_average_sees_have_their_own_weights(links: Any) -> None:
    transform = pf.chain(*links, PROX)
    state, params = steps(transform, 4)[-1]
    found = pf.weights_of_average(transform, state, params)
    assert torch.equal(found["b"], params["b"])
    assert torch.isin(found["w"], pf.levels_of(transform, state)["w"]).all()


def test_averages_of_narrow_params_are_wide() -> None:
    params = tree_map(lambda p: p.bfloat16(), PARAMS)
    transform = pf.averaged(pf.chain(pf.sgd(0.1), PROX), 0.999)
    state, params = steps(transform, 3, params)[-1]
    assert state.average["w"].dtype == torch.float32
    found = pf.weights_of_average(transform, state, params)["w"]
    assert found.dtype == torch.bfloat16
    assert torch.isin(found, pf.levels_of(transform, state)["w"].bfloat16()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_latents_that_are_kept_have_memory_of_their_own_and_full_precision(
    dtype: torch.dtype,
) -> None:
    params = {"w": torch.ones(2, 3, dtype=dtype)}
    wrappers = {
        "average": pf.averaged(pf.sgd(0.1), 0.5),
        "slow": pf.lookahead(pf.sgd(0.1), 1),
        "fast": pf.schedule_free(pf.sgd(0.1)),
    }
    for name, transform in wrappers.items():
        state = transform.init(params)
        kept = pf.read(state, name)["w"]
        assert kept.dtype == torch.float32
        assert kept.data_ptr() != params["w"].data_ptr()
        if name != "slow":  # of params that were loaded since the average is theirs
            found = pf.weights_of_average(transform, state, {"w": 2 * params["w"]})
            assert torch.equal(found["w"], 2 * params["w"])
        updates, state = transform.update(params, state, params)
        assert updates["w"].dtype == dtype
        assert pf.read(state, name)["w"].dtype == torch.float32


def test_a_first_step_of_no_weight_leaves_the_average_at_the_start() -> None:
    transform = pf.schedule_free(pf.sgd(0.1), weight=lambda t: t.double())
    ((state, params),) = steps(transform, 1)
    assert not torch.equal(params["b"], PARAMS["b"])
    torch.testing.assert_close(pf.weights_of_average(transform, state, params), PARAMS)


def test_where_nothing_averages_there_are_no_weights_of_an_average() -> None:
    transform = pf.chain(pf.sgd(0.1), PROX)
    with pytest.raises(ValueError, match=r"nothing averages in chain\(.* averaged\("):
        pf.weights_of_average(transform, transform.init(PARAMS), PARAMS)
    with pytest.raises(TypeError, match=r"weights_of_average: the transformation is 0.9, exp"):
        pf.weights_of_average(0.9, transform.init(PARAMS), PARAMS)  # type: ignore[arg-type]
    for wrapper in (pf.averaged(pf.sgd(0.1), 0.9), pf.schedule_free(pf.sgd(0.1))):
        with pytest.raises(TypeError, match="its state is a dict, expected"):
            pf.weights_of_average(wrapper, PARAMS, PARAMS)
    with pytest.raises(ValueError, match=r"averaged: decay must lie in \[0, 1\], got 1.5"):
        pf.averaged(pf.sgd(0.1), 1.5)
    with pytest.raises(ValueError, match=r"or averages them, and clip\(1.0\) behind it"):
        pf.chain(pf.averaged(pf.sgd(0.1), 0.9), pf.clip(1.0))


@pytest.mark.parametrize(
    "average", [lambda t: pf.averaged(t, 0.9), pf.schedule_free, lambda t: pf.lookahead(t, 2)]
)
@pytest.mark.parametrize("how", ["pull", "normal_map", "hold"])
def test_no_prox_link_moves_latents_behind_an_average_of_them(average: Any, how: str) -> None:
    """They were averaged as they would have been without it."""
    moves = {"pull": 0.5, "normal_map": 2.0, "hold": pf.oscillation(0.1)}
    link: Any = pf.hard_prox(pf.lsbq(1), learning_rate=0.1, **{how: moves[how]})
    links = average(pf.sgd(0.1)), PROX, pf.masked(link, "w")
    if isinstance(links[0], pf.lookahead):  # goes back from where it finds params
        pf.chain(*links)
        return
    with pytest.raises(
        ValueError, match=r"or averages them, and masked\(hard_prox\(.* put it last"
    ):
        pf.chain(*links)
    pf.averaged(pf.chain(pf.sgd(0.1), link), 0.9)
