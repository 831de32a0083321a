"""Estimators: each against autograd through weights written out for it, in whole trainings and
in every dtype; batched, differentiated and compiled; what they refuse and how they print."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import parq_fn as pf
from parq_fn import estimators, proxmaps, schedules
from parq_fn.foundation.tree import tree_map
from parq_fn.transforms.prox_state import in_rows
from tests.helpers import pairwise
from tests.twins.estimators import seen_through

ALL = {
    "straight_through": estimators.straight_through(),
    "inside": estimators.inside(),
    "trust": estimators.trust(),
    "half_trusted": estimators.trust(0.5),
    "by_level": estimators.by_level(),
    "damped": estimators.damped(0.2),
    "damped_by_schedule": estimators.damped(schedules.linear(0.0, 0.5, 2, 8)),
}
SPAN: dict[str, Any] = {"anneal_start": 2, "anneal_end": 7, "period": 3}
#: Of quantizers whose outer levels are no weights, for which rounding would decide what is inside.
LINKS = {
    "hard": pf.hard_prox(pf.lsbq(2), period=2, warmup=1),
    "one_bit": pf.hard_prox(pf.lsbq(1), period=2),
    "ternary": pf.hard_prox(pf.lsbq(0), period=1),
    "parq": pf.parq_prox(pf.lsbq(2), **SPAN),
    "shrunk": pf.soft_prox(pf.uniform(2), **SPAN, shrink=True, learning_rate=0.3),
    "binary_relax": pf.binary_relax_prox(pf.lloyd_max(1), **SPAN),
    "proxquant": pf.proxquant_prox(pf.lsbq(3), **SPAN, strength=0.1),
    "custom": pf.custom_prox(
        pf.uniform(2, center=True), lambda u, q, c: u + c * (proxmaps.hard(u, q) - u), 0.5
    ),
}
ROWS = {
    "tensor": pf.per_tensor(),
    "channel": pf.per_channel(),
    "input": pf.per_channel(1),
    "blocks": pf.per_block(6, along=(1, 2, 3)),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def loss(w: Tensor, x: Tensor) -> Tensor:
    """Whose gradient differs from weight to weight."""
    return ((w - x).square() * (1 + x.square())).sum() / 4


# Against autograd


@pytest.mark.slow
@pytest.mark.parametrize(("how", "link", "rows"), pairwise(list(ALL), list(LINKS), list(ROWS)))
def test_a_training_is_that_of_autograd(how: str, link: str, rows: str) -> None:
    """Latents by torch.optim.SGD, gradients by autograd, levels and maps called by hand."""
    prox: Any = replace(LINKS[link], granularity=ROWS[rows], gradient=ALL[how])
    transform, params = pf.chain(pf.sgd(0.3, momentum=0.5), prox), {"w": draw(4, 3, 2, 2)}
    gradient = pf.value_and_grad(lambda w, x: loss(w["w"], x), transform)
    state = transform.init(params)
    u = params["w"].clone().requires_grad_()
    optimizer = torch.optim.SGD([u], lr=0.3, momentum=0.5)
    levels, rates = torch.zeros(0), 0.0
    for t in range(10):
        x = draw(4, 3, 2, 2, seed=t)
        if t - 1 >= max(prox.warmup, float(prox.begins)):
            divided = u.detach() / (max(rates, 1.0) if prox.shrink else 1.0)
            seen = prox.granularity.rows(u + (divided - u).detach())  # whose derivative is 1
            mapped = prox.proxmap(seen.detach(), levels, prox.coefficient(torch.tensor(t - 1)))
            w, more = seen_through(ALL[how], seen, mapped, levels, t)
            total = loss(prox.granularity.restore(w, u), x) + more
        else:
            total = loss(u, x)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        rates += 0.3
        if t >= prox.warmup and (t - prox.warmup) % prox.period == 0:
            fitted = u.detach() / (max(rates, 1.0) if prox.shrink else 1.0)
            levels = prox.quantizer(prox.granularity.rows(fitted))

        _, grads = gradient(params, state, x)
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        torch.testing.assert_close(params["w"], u.detach(), rtol=1e-10, atol=1e-10)


TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.slow
@pytest.mark.parametrize(("how", "dtype", "rows"), pairwise(list(ALL), DTYPES, list(ROWS)))
def test_a_gradient_of_any_dtype_is_that_of_autograd_in_float64(
    how: str, dtype: torch.dtype, rows: str
) -> None:
    prox = pf.hard_prox(pf.uniform(2), period=1, granularity=ROWS[rows], gradient=ALL[how])
    params, grads = (
        {"w": draw(4, 3, 2, 2, dtype=dtype)},
        {"w": draw(4, 3, 2, 2, seed=1, dtype=dtype)},
    )
    _, state = prox.update(grads, prox.init(params), params)
    pulled, own = prox.pullback(grads, state, params)
    found = pulled["w"]
    assert found.dtype == dtype
    assert own == ()

    u, w = (
        prox.granularity.rows(t.double()) for t in (params["w"], prox.weights(state, params)["w"])
    )
    u.requires_grad_()
    levels = prox.quantizer.levels_in(in_rows(state.qparams["w"]), dtype)
    weights, more = seen_through(ALL[how], u, w, levels.double(), 1)
    ((weights * prox.granularity.rows(grads["w"].double())).sum() + more).backward()
    wanted = prox.granularity.restore(u.grad, params["w"])
    torch.testing.assert_close(found.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# Definitions, at the ends


Q = torch.tensor([[-1.0, 0.0, 2.0]])


def pulled(estimator: Any, *u: float, levels: Tensor = Q) -> list[float]:
    """Of gradients of 1, at latents whose weights are the nearest levels."""
    rows = torch.tensor([u])
    w = proxmaps.hard(rows, levels)
    return estimator(torch.ones_like(rows), rows, w, levels, torch.tensor(3))[0].tolist()


def test_the_ends_of_the_range_are_inside() -> None:
    assert pulled(estimators.inside(), -1.01, -1.0, 0.3, 2.0, 2.01) == [0, 1, 1, 1, 0]
    assert pulled(estimators.damped(0.5), -1.01, -0.8, 2.01) == [1, pytest.approx(1.1), 1]


def test_trust_goes_half_a_cell_from_the_weight_and_beyond_the_levels_half_the_outer_one() -> None:
    assert pulled(estimators.trust(), -1.51, -1.5, -0.5, 1.0, 1.01, 3.0, 3.01) == [
        0, 1, 1, 1, 1, 1, 0,
    ]  # fmt: skip
    assert pulled(estimators.trust(0.5), -1.26, -1.25, 0.5, 0.51, 1.5, 2.5) == [0, 1, 1, 0, 1, 1]
    assert pulled(estimators.trust(0.0), -1.0, -0.9) == [1, 0]
    one = torch.tensor([[0.5]])
    assert pulled(estimators.trust(), 0.5, 0.6, levels=one) == [1, 0]


def test_a_gradient_is_multiplied_by_the_magnitude_of_its_level() -> None:
    assert pulled(estimators.by_level(), -5.0, -0.5, -0.4, 1.0, 1.1) == [1, 1, 1, 1, 2]
    assert pulled(estimators.by_level(), 7.0, levels=torch.tensor([[-3.0]])) == [3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", ALL)
def test_gradients_keep_their_dtype(how: str, dtype: torch.dtype) -> None:
    u, grads = draw(1, 5, dtype=torch.float32), draw(1, 5, dtype=dtype)
    w = proxmaps.hard(u, Q).to(torch.bfloat16)
    assert ALL[how](grads, u, w, Q, torch.tensor(5)).dtype == dtype


@pytest.mark.parametrize("how", ALL)
def test_rows_without_finite_levels_spoil_no_other(how: str) -> None:
    u = draw(2, 5)
    levels = torch.tensor([[-1.0, 1.0], [torch.nan, torch.nan]], dtype=torch.float64)
    w = proxmaps.hard(u, levels)
    found = ALL[how](torch.ones_like(u), u, w, levels, torch.tensor(5))
    alone = ALL[how](torch.ones_like(u[:1]), u[:1], w[:1], levels[:1], torch.tensor(5))
    assert torch.equal(found[:1], alone)


def test_a_gradient_of_a_sparse_embedding_is_pulled_back() -> None:
    prox = pf.hard_prox(pf.lsbq(1), period=1, gradient=estimators.inside())
    params = {"w": torch.tensor([[0.1, 9.0], [0.3, -0.2]])}
    _, state = prox.update(params, prox.init(params), params)
    sparse = torch.eye(2).to_sparse()
    found = prox.pullback({"w": sparse}, state, params)[0]["w"]
    assert torch.equal(found, prox.pullback({"w": sparse.to_dense()}, state, params)[0]["w"])


# vmap, grad, compile


START, GOAL = draw(4, 6), draw(4, 6, seed=9)


def trained(strength: Any, gradient: Any = estimators.damped, seed: Any = 0) -> Tensor:
    prox = pf.parq_prox(pf.lsbq(2), **SPAN, gradient=gradient(strength))
    transform, params = pf.chain(pf.sgd(0.3), prox), {"w": START + seed}
    state = transform.init(params)
    gradient = pf.value_and_grad(lambda w: loss(w["w"], GOAL), transform)
    for _ in range(9):
        _, grads = gradient(params, state)
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
    return transform.weights(state, params)["w"] + params["w"]


@pytest.mark.parametrize("kind", [estimators.damped, estimators.trust])
def test_hyperparameters_are_batched(kind: Any) -> None:
    strengths = torch.tensor([0.0, 0.1, 0.8], dtype=torch.float64)
    batched = torch.vmap(lambda s: trained(s, kind))(strengths)
    for one, strength in zip(batched, strengths, strict=True):
        torch.testing.assert_close(one, trained(strength, kind), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ALL)
def test_params_are_batched(how: str) -> None:
    seeds = torch.tensor([0.0, 0.4], dtype=torch.float64)
    batched = torch.vmap(lambda seed: trained(0, lambda _: ALL[how], seed))(seeds)
    for one, seed in zip(batched, seeds, strict=True):
        alone = trained(0, lambda _: ALL[how], seed)
        torch.testing.assert_close(one, alone, rtol=1e-10, atol=1e-10)


def test_it_is_differentiated_in_its_strength() -> None:
    strength = torch.tensor(0.3, dtype=torch.float64)
    slope = torch.func.grad(lambda s: trained(s).sum())(strength)
    step = 1e-7
    around = [trained(strength + d).sum() for d in (step, -step)]
    torch.testing.assert_close(slope, (around[0] - around[1]) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.rare
@pytest.mark.parametrize("how", ["inside", "half_trusted", "by_level", "damped_by_schedule"])
def test_a_compiled_step_is_the_eager_one(how: str) -> None:
    torch.compiler.reset()
    prox = pf.parq_prox(pf.lsbq(2), **SPAN, gradient=ALL[how], granularity=pf.per_channel())
    transform, params = pf.chain(pf.sgd(0.3, 0.5), prox), {"w": draw(4, 6)}

    def step(params: Any, state: Any, x: Tensor) -> Any:
        _, grads = pf.value_and_grad(lambda w: loss(w["w"], x), transform)(params, state)
        updates, state = transform.update(grads, state, params)
        return pf.apply_updates(params, updates), state

    compiled = torch.compile(step, fullgraph=True)
    state = transform.init(params)
    other, others = params, state
    for t in range(9):
        params, state = step(params, state, draw(4, 6, seed=t))
        other, others = compiled(other, others, draw(4, 6, seed=t))
        tree_map(
            lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12), params, other
        )


# Values


@pytest.mark.parametrize("how", ALL)
def test_they_are_values(how: str) -> None:
    one = ALL[how]
    assert one == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(pickle.loads(pickle.dumps(one)))
    names = {**vars(estimators), "linear": schedules.linear}
    assert eval(repr(one), names) == one
    assert one != estimators.trust(2.0)


def test_a_link_shows_its_estimator_where_it_is_not_the_default() -> None:
    link = pf.hard_prox(pf.lsbq(2), gradient=estimators.straight_through())
    assert repr(link) == "hard_prox(lsbq(2))"
    link = replace(link, gradient=estimators.trust(0.5))
    assert repr(link) == "hard_prox(lsbq(2), gradient=trust(factor=0.5))"
    assert "gradient=trust(factor=0.5)" in pf.chain(pf.sgd(0.1), link)._repr_html_()
    assert "gradient=trust(factor=0.5)" in repr(pf.chain(pf.sgd(0.1), link))
    assert link == pickle.loads(pickle.dumps(link)) != replace(link, gradient=ALL["inside"])


def test_a_function_of_ones_own_is_an_estimator() -> None:
    def halved(grads: Tensor, u: Tensor, w: Tensor, levels: Tensor, step: Tensor) -> Tensor:
        assert u.shape == w.shape == grads.shape == (2, 3)
        assert (levels.shape, step.item()) == ((2, 2), 1)
        return grads / 2

    prox = pf.hard_prox(pf.lsbq(1), period=1, granularity=pf.per_channel(), gradient=halved)
    params = {"w": draw(2, 3)}
    _, state = prox.update(params, prox.init(params), params)
    assert torch.equal(prox.pullback(params, state, params)[0]["w"], params["w"] / 2)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: estimators.trust(-1), ValueError, r"trust: factor must lie in \[0, inf\), got -1"),
        (lambda: estimators.trust("x"), TypeError, "trust: factor must be a number, .* got 'x'"),
        (lambda: estimators.damped("x"), TypeError, "damped: strength .* or a schedule, got 'x'"),
        (lambda: estimators.damped(-0.1), ValueError, "damped: strength must lie in"),
        (lambda: estimators.damped(torch.ones(2)), ValueError, "vmap over it to try several"),
        (
            lambda: pf.hard_prox(pf.lsbq(1), gradient=3),
            TypeError,
            r"hard_prox: expected an estimator such as gradient=estimators.inside\(\), got 3",
        ),
        (
            lambda: pf.hard_prox(pf.lsbq(1), gradient=estimators.inside),
            TypeError,
            "hard_prox: expected an estimator",
        ),
        (lambda: pf.hard_prox(pf.lsbq(1), gradient=None), TypeError, "got None"),
    ],
)
def test_bad_values_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
