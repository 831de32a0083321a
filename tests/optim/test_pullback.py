"""Gradients pulled back in both adapters: as in the functional loop, with `p.grad` left alone, at
the price of no map."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn import estimators
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from parq_fn.optim.leafwise import parts_of
from parq_fn.proxmaps import hard
from tests.helpers import copies, equal

HARD = pf.hard_prox(pf.lsbq(2), period=2)
ESTIMATORS = {
    "straight_through": estimators.straight_through(),
    "inside": estimators.inside(),
    "trust": estimators.trust(0.8),
    "by_level": estimators.by_level(),
    "damped": estimators.damped(0.3),
}


class Net(nn.Module):
    """Two matrices, a bias, and a vector that takes no part in the loss."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 8, dtype=dtype), nn.Linear(8, 3, dtype=dtype)
        self.idle = nn.Parameter(torch.ones(2, dtype=dtype))

    def loss(self, seed: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(9, 6, dtype=self.idle.dtype, generator=generator)
        return (self.two(self.one(x).tanh()) - x[:, :3]).square().mean()


def by_groups(net: Net, prox: Any) -> QuantOptimizer:
    groups = [
        {"params": [net.one.weight, net.two.weight, net.idle], "quant_bits": 2},
        {"params": [net.one.bias, net.two.bias]},
    ]
    return QuantOptimizer(torch.optim.SGD(groups, lr=0.2, momentum=0.5), prox)


def by_links(net: Net, prox: Any) -> TransformOptimizer:
    transform = pf.chain(pf.sgd(0.2, momentum=0.5), pf.masked(prox, ["*.weight", "idle"]))
    return TransformOptimizer(net.named_parameters(), transform)


ADAPTERS = {"QuantOptimizer": by_groups, "TransformOptimizer": by_links}


def step(net: Net, optimizer: Any, seed: int = 1) -> None:
    optimizer.zero_grad()
    net.loss(seed).backward()
    optimizer.step()


@pytest.mark.parametrize("how", ESTIMATORS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_latents_move_by_what_is_pulled_back(adapter: str, how: str) -> None:
    """Against a loop of torch.optim.SGD on latents, whose gradients the link pulls back by hand."""
    prox: Any = replace(HARD, gradient=ESTIMATORS[how])
    net, other = Net(), Net()
    optimizer = ADAPTERS[adapter](net, prox)
    names = [n for n, _ in net.named_parameters()]
    latents = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    quantized = [n for n in names if not n.endswith("bias")]
    base = torch.optim.SGD(latents.values(), lr=0.2, momentum=0.5)
    state = prox.init({n: latents[n].detach() for n in quantized})
    moved = 0
    for t in range(7):
        step(net, optimizer, t)
        other.zero_grad()
        other.loss(t).backward()
        grads = {n: p.grad for n, p in other.named_parameters()}
        own = {n: latents[n].detach() for n in quantized}
        pulled, _ = prox.pullback({n: grads[n] for n in quantized}, state, own)
        moved += any(
            not torch.equal(pulled[n], grads[n]) for n in quantized if grads[n] is not None
        )
        for n, latent in latents.items():
            latent.grad = pulled[n] if n in pulled else grads[n]
        base.step()
        now = {n: latents[n].detach() for n in quantized}
        state = prox.advance(state, torch.tensor(0.2))
        state = prox.refit(state, now)
        weights = prox.weights(state, now)
        with torch.no_grad():
            for n, p in other.named_parameters():
                p.copy_(weights.get(n, latents[n]))
        for (n, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
            latent = optimizer.state[p].get("latent", p)
            torch.testing.assert_close(latent, latents[n].detach(), rtol=1e-12, atol=1e-12)
    assert (moved > 0) == (how != "straight_through")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_p_grad_stays_as_it_is(adapter: str, dtype: torch.dtype) -> None:
    net = Net(dtype)
    optimizer = ADAPTERS[adapter](net, replace(HARD, gradient=estimators.damped(0.5)))
    for t in range(4):
        optimizer.zero_grad()
        net.loss(t).backward()
        held = [p.grad for p in net.parameters()]
        before = copies(g for g in held if g is not None)
        optimizer.step()
        assert all(p.grad is g for p, g in zip(net.parameters(), held, strict=True))
        assert equal([g for g in held if g is not None], before)
        assert all(p.grad.dtype == dtype for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_closure_gives_the_gradients_that_are_pulled_back(adapter: str) -> None:
    prox = replace(HARD, gradient=estimators.damped(0.5))
    one, two = Net(), Net()
    by_step, by_closure = ADAPTERS[adapter](one, prox), ADAPTERS[adapter](two, prox)
    for t in range(4):
        step(one, by_step, t)

        def closure(t: int = t) -> Tensor:
            by_closure.zero_grad()
            loss = two.loss(t)
            loss.backward()
            return loss

        by_closure.step(closure)
    assert equal(copies(one.parameters()), copies(two.parameters()))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_scale_of_the_loss_is_undone_before(adapter: str) -> None:
    """As a GradScaler does: a term that is added knows nothing of it."""
    prox = replace(HARD, gradient=estimators.damped(0.5))
    one, two = Net(), Net()
    plain, scaled = ADAPTERS[adapter](one, prox), ADAPTERS[adapter](two, prox)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(4):
        step(one, plain, t)
        scaled.zero_grad()
        scaler.scale(two.loss(t)).backward()
        scaler.step(scaled)
        scaler.update()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)


def test_hooks_of_the_base_see_the_gradients_of_the_latents() -> None:
    net = Net()
    optimizer = by_groups(net, replace(HARD, gradient=estimators.by_level()))
    step(net, optimizer)
    seen: list[Tensor] = []

    def hook(inner: Any, args: Any, kwargs: Any) -> None:
        seen.append(inner.param_groups[0]["params"][0].grad.clone())

    optimizer.base.register_step_pre_hook(hook)
    levels = optimizer.levels(net.one.weight)
    u = optimizer.state[net.one.weight]["latent"].clone()
    step(net, optimizer)
    sizes = hard(u.view(1, -1), levels.view(1, -1)).abs().view_as(u)
    assert torch.equal(seen[0], net.one.weight.grad * sizes)
    assert optimizer.state[net.one.weight]["latent"].grad is None


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("how", ESTIMATORS)
def test_no_map_is_computed_for_it(adapter: str, how: str) -> None:
    calls: list[int] = []

    def counting(u: Tensor, levels: Tensor, coefficient: Tensor) -> Tensor:
        calls.append(1)
        return hard(u, levels)

    prox = pf.custom_prox(pf.lsbq(2), counting, 0.0, period=1, gradient=ESTIMATORS[how])
    net = Net()
    optimizer = ADAPTERS[adapter](net, prox)
    step(net, optimizer)
    calls.clear()
    step(net, optimizer)
    assert len(calls) == 3  # one for each parameter, of the weights that the step writes


@pytest.mark.parametrize("how", ESTIMATORS)
def test_a_transformation_is_still_cut_into_parts(how: str) -> None:
    transform = pf.chain(
        pf.sgd(0.1), pf.masked(replace(HARD, gradient=ESTIMATORS[how]), "*.weight")
    )
    params = {n: p.detach() for n, p in Net().named_parameters()}
    assert len(parts_of(transform, params)) > 1


def test_a_pullback_of_a_subclass_is_not_taken_for_leafwise() -> None:
    class normed(pf.hard_prox):
        def pullback(self, grads: Any, state: Any, params: Any, *, weights: Any = None) -> Any:
            norm = pf.global_norm(grads)
            return {n: g if g is None else g / norm for n, g in grads.items()}, ()

    transform = pf.chain(pf.sgd(0.1), normed(pf.lsbq(1)))
    params = {n: p.detach() for n, p in Net().named_parameters()}
    assert len(parts_of(transform, params)) == 1


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_frozen_parameter_is_left_alone(adapter: str) -> None:
    net = Net()
    optimizer = ADAPTERS[adapter](net, replace(HARD, gradient=estimators.damped(0.5)))
    step(net, optimizer)
    net.one.requires_grad_(False)
    before = copies([net.one.weight, optimizer.state[net.one.weight]["latent"]])
    step(net, optimizer)
    assert equal([net.one.weight.detach(), optimizer.state[net.one.weight]["latent"]], before)


def test_a_sparse_gradient_of_an_embedding() -> None:
    def trained(sparse: bool) -> list[Tensor]:
        torch.manual_seed(0)
        table = nn.Embedding(5, 4, sparse=sparse)
        groups = [{"params": [table.weight], "quant_bits": 2}]
        optimizer = QuantOptimizer(
            torch.optim.SGD(groups, lr=0.2), replace(HARD, gradient=estimators.damped(0.5))
        )
        for _ in range(4):
            optimizer.zero_grad()
            table(torch.tensor([0, 2, 2])).square().sum().backward()
            optimizer.step()
        return copies([table.weight, optimizer.state[table.weight]["latent"]])

    for one, other in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(one, other)


def test_a_link_that_was_pickled_without_an_estimator_has_the_default() -> None:
    old = replace(HARD)
    del vars(old)["gradient"]
    assert old == HARD
    assert repr(old) == repr(HARD)
    one, two = Net(), Net()
    for net, prox in ((one, old), (two, HARD)):
        optimizer = by_groups(net, prox)
        for t in range(3):
            step(net, optimizer, t)
    assert equal(copies(one.parameters()), copies(two.parameters()))
