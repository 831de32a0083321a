"""Weights whose level keeps turning back are held: against a loop over single weights, in both
adapters, saved and sharded."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import parq_fn as pf
from parq_fn.foundation.tree import tree_map
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from parq_fn.transforms.learn import moved
from tests.optim.helpers import whole
from tests.processes import on_processes

FLOAT64 = torch.float64
HOLD = pf.oscillation(0.3, momentum=0.2)
LINK = pf.hard_prox(pf.uniform(2), granularity=pf.per_channel(), period=3, hold=HOLD)
LINKS = {
    "hard": LINK,
    "parq": pf.parq_prox(
        pf.lsbq(2), anneal_start=1, anneal_end=6, granularity=pf.per_channel(), hold=HOLD
    ),
    "learned": replace(LINK, learn=pf.sgd(0.01)),
    "pulled": replace(LINK, pull=0.5, learning_rate=0.3),
    "scheduled": replace(LINK, hold=pf.oscillation(lambda t: 0.2 + 0.4 * (t % 3 == 0), 0.3)),
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


START = 0.6 * draw(4, 6)


def gradient(w: Tensor, t: int) -> Tensor:
    """So large that weights turn back at every other step."""
    return (w - 0.3) + 0.8 * draw(*w.shape, seed=50 + t)


def functional(link: Any, steps: int) -> Any:
    """(params, weights, state) step by step."""
    transform, params = pf.chain(pf.sgd(0.3), link), {"w": START}
    state = transform.init(params)
    for t in range(steps):
        grads = {"w": gradient(transform.weights(state, params)["w"], t)}
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        yield params["w"], transform.weights(state, params)["w"], state


@pytest.mark.parametrize("scheduled", [False, True])
def test_each_weight_is_held_as_a_loop_over_single_weights_holds_it(scheduled: bool) -> None:
    rates, bounds = [0.2] * 9, [0.3] * 9
    link = LINK
    if scheduled:  # at a threshold of 0 what turned back once
        rates, bounds = [0.9, 0.1, 0.3] * 3, [0.3] * 5 + [0.2] * 2 + [0.0] * 2
        threshold, momentum = (lambda t, of=of: torch.tensor(of)[t] for of in (bounds, rates))
        link = replace(LINK, hold=pf.oscillation(threshold, momentum))
    quantizer, (r, n) = pf.uniform(2), START.shape
    u, w = START.clone(), START.clone()
    code = [[-1] * n for _ in range(r)]
    last = [[0] * n for _ in range(r)]
    often = [[0.0] * n for _ in range(r)]
    mean = [[0.0] * n for _ in range(r)]
    held = [[False] * n for _ in range(r)]
    levels = torch.zeros(r, 4, dtype=FLOAT64)
    for t, (params, weights, state) in enumerate(functional(link, 9)):
        m, g = rates[t], gradient(w, t)
        for i in range(r):
            for j in range(n):
                u[i, j] -= 0.0 if held[i][j] else 0.3 * g[i, j]
        if t % 3 == 0:
            levels = quantizer(u)
        for i in range(r):
            for j in range(n):
                k = int((levels[i] - u[i, j]).abs().argmin())
                old = code[i][j]
                if held[i][j]:
                    w[i, j] = levels[i, old]
                    continue
                if old < 0:
                    mean[i][j] = float(k)
                else:
                    way = (k > old) - (k < old)
                    back = way != 0 and way == -last[i][j]
                    often[i][j] = m * back + (1 - m) * often[i][j]
                    mean[i][j] = m * k + (1 - m) * mean[i][j]
                    last[i][j] = way or last[i][j]
                code[i][j] = k
                if old >= 0 and often[i][j] > bounds[t]:
                    held[i][j], code[i][j] = True, math.ceil(mean[i][j] - 0.5)
                w[i, j] = levels[i, code[i][j]]
        torch.testing.assert_close(params, u, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(weights, w, rtol=1e-12, atol=1e-12)
        free = ~torch.tensor(held)
        torch.testing.assert_close(
            pf.read(state, "frequency")["w"][free], torch.tensor(often)[free]
        )
    count = sum(map(sum, held))
    assert 0 < count < r * n


@pytest.mark.parametrize("name", LINKS)
def test_a_held_weight_stays_on_its_level_and_its_latent_where_it_is(name: str) -> None:
    before: Any = None
    for u, w, state in functional(LINKS[name], 25):
        held, code = pf.read(state, "held")["w"], pf.read(state, "code")["w"]
        if before is not None:
            was, where, index = before
            assert torch.equal(u[was], where[was])
            assert torch.equal(code[was], index[was])
            levels = LINKS[name].quantizer.levels(pf.read(state, "qparams")["w"])
            assert torch.equal(w[was], levels.gather(-1, code.long())[was])
        before = held, u, code
    assert bool(before[0].any())


@pytest.mark.parametrize("kind", ["code", "map"])
@pytest.mark.parametrize("quantizer", [pf.uniform(2), pf.affine(2)], ids=repr)
def test_a_held_weight_moves_the_level_that_it_is_on(quantizer: Any, kind: Any) -> None:
    """And not the one that is nearest to its latent."""
    how = pf.learn(pf.sgd(0.02), kind, normalize=False)
    link = replace(LINK, quantizer=quantizer, period=1000, learn=how)
    elsewhere, before = False, None
    for t, (u, w, state) in enumerate(functional(link, 25)):
        if before is not None:
            old, at, q, held, code = before
            own = q.clone().requires_grad_()
            levels = quantizer.levels(own)
            near = (old.unsqueeze(-1) - levels.detach().unsqueeze(1)).abs().argmin(-1)
            index = torch.where(held, code.long(), near)
            elsewhere |= bool((index != near).any())
            made = levels.gather(-1, index)
            torch.testing.assert_close(made.detach(), at)
            (d,) = torch.autograd.grad((made * gradient(at, t)).sum(), own)
            wanted = moved(quantizer, q, -0.02 * d)
            torch.testing.assert_close(pf.read(state, "qparams")["w"], wanted)
        held, code, q = (pf.read(state, name)["w"] for name in ("held", "code", "qparams"))
        before = u, w, q, held, code
    assert elsewhere


@pytest.mark.parametrize("kind", ["code", "map"])
def test_levels_learn_of_held_weights_as_autograd_does(kind: Any) -> None:
    span = pf.parq_prox(pf.lsbq(2), anneal_start=1, anneal_end=40, granularity=pf.per_channel())
    link = replace(span, hold=HOLD, learn=pf.learn(pf.sgd(0.01), kind, normalize=False))
    *_, (u, _, (_, state)) = functional(link, 12)
    held, code = state.oscillation.held["w"], state.oscillation.code["w"].long()
    assert 0 < int(held.sum()) < held.numel()
    g = draw(4, 6, seed=7)

    def total(qparams: Tensor) -> Tensor:
        levels = link.quantizer.levels(qparams)
        near = (u.unsqueeze(-1) - levels.detach().unsqueeze(1)).abs().argmin(-1)
        free = levels.gather(-1, near)
        if kind == "map":
            free = link.proxmap(u, levels, state.slope)
        return (g * torch.where(held, levels.gather(-1, code), free)).sum()

    _, own = link.pullback({"w": g}, state, {"w": u})
    torch.testing.assert_close(own["w"], torch.func.grad(total)(state.qparams["w"]))


def built(adapter: str, p: nn.Parameter, link: Any) -> Any:
    if adapter == "TransformOptimizer":
        return TransformOptimizer([("w", p)], pf.chain(pf.sgd(0.3), link))
    return QuantOptimizer(torch.optim.SGD([{"params": [("w", p)], "prox": link}], lr=0.3))


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("adapter", ["QuantOptimizer", "TransformOptimizer"])
def test_adapters_hold_what_the_functional_loop_holds(adapter: str, name: str) -> None:
    p = nn.Parameter(START.clone())
    optimizer = built(adapter, p, LINKS[name])
    for t, (u, w, _state) in enumerate(functional(LINKS[name], 25)):
        p.grad = gradient(p.detach(), t)
        optimizer.step()
        torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)
        latent = optimizer.state[p]["latent"]
        torch.testing.assert_close(latent, u, rtol=1e-12, atol=1e-12)
        if t == 12:  # as saved and loaded
            saved = copy.deepcopy(optimizer.state_dict())
            q = nn.Parameter(p.detach().clone())
            optimizer, p = built(adapter, q, LINKS[name]), q
            optimizer.load_state_dict(saved)
    assert any(bool(got.any()) for key, got in optimizer.state[p].items() if key.endswith("held"))


@pytest.mark.parametrize("adapter", ["QuantOptimizer", "TransformOptimizer"])
def test_held_weights_are_on_their_level_in_averages_and_roundings_too(adapter: str) -> None:
    p = nn.Parameter(START.clone())
    if adapter == "QuantOptimizer":
        group = {"params": [("w", p)], "prox": LINK}
        optimizer: Any = QuantOptimizer(torch.optim.SGD([group], lr=0.3), average=0.9)
    else:
        optimizer = built(adapter, p, LINK)
        transform = pf.averaged(optimizer.transformation, 0.9)
        optimizer = TransformOptimizer([("w", p)], transform)
    for t in range(25):
        p.grad = gradient(p.detach(), t)
        optimizer.step()
    held = next(got for key, got in optimizer.state[p].items() if key.endswith("held"))
    assert bool(held.any())
    weights = p.detach().clone()
    for lent in (optimizer.averaged_weights, optimizer.rounded):
        with lent():
            assert torch.equal(p[held], weights[held])


def sharded_as_alone() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for adapter in ("QuantOptimizer", "TransformOptimizer"):
        whole_rows = replace(LINK, granularity=pf.per_tensor())
        for link in (LINK, whole_rows, replace(whole_rows, learn=pf.sgd(0.01))):
            alone, net = (nn.Linear(6, 4, bias=False, dtype=FLOAT64) for _ in range(2))
            for module in (alone, net):
                module.weight.data.copy_(START)
            fully_shard(net, mesh=mesh)
            one, other = (built(adapter, m.weight, link) for m in (alone, net))
            x = draw(7, 6, seed=9)
            for t in range(20):
                for module, optimizer in ((alone, one), (net, other)):
                    optimizer.zero_grad()
                    (module(x) - 3 * draw(7, 4, seed=t)).square().mean().backward()
                    optimizer.step()
                torch.testing.assert_close(whole(net.weight), alone.weight, rtol=1e-11, atol=1e-12)


@pytest.mark.slow
def test_a_sharded_module_holds_what_one_process_holds(tmp_path: Path) -> None:
    on_processes(sharded_as_alone, 2, tmp_path)


def test_many_are_held_by_vmap_as_each_alone() -> None:
    def last(start: Tensor) -> Tensor:
        transform, params = pf.chain(pf.sgd(0.3), LINK), {"w": start}
        state = transform.init(params)
        for t in range(15):
            grads = {"w": transform.weights(state, params)["w"] - 0.3 + NOISE[t]}
            updates, state = transform.update(grads, state, params)
            params = pf.apply_updates(params, updates)
        return transform.weights(state, params)["w"]

    many = torch.stack([START, -START])
    torch.testing.assert_close(torch.vmap(last)(many), torch.stack([*map(last, many)]))


NOISE = 0.8 * draw(15, 4, 6, seed=3)


def test_an_example_of_a_batch_is_looked_at_from_its_own_count_of_updates_on() -> None:
    transform = pf.chain(pf.sgd(0.3), replace(LINK, warmup=2))
    params, state = {"w": START}, transform.init({"w": START})
    kept = []
    for t in range(8):
        kept.append(({"w": gradient(params["w"], t)}, state, params))
        updates, state = transform.update(*kept[t])
        params = pf.apply_updates(params, updates)
    some = kept[0], kept[7]
    wanted = tree_map(lambda *of: torch.stack(of), *(transform.update(*one) for one in some))
    together = tree_map(lambda *of: torch.stack(of), *some)
    torch.testing.assert_close(torch.vmap(transform.update)(*together), wanted)


def test_leaves_of_one_number_and_of_none_keep_their_dtypes() -> None:
    transform = pf.chain(pf.sgd(0.3), pf.hard_prox(pf.uniform(2), period=1, hold=HOLD))
    params = {"one": torch.tensor(1.0), "none": torch.zeros(2, 0)}
    state = transform.init(params)
    assert pf.read(state, "code")["one"] == -1
    dtypes = tree_map(lambda leaf: leaf.dtype, state)
    for t in range(3):
        grads = tree_map(lambda p, t=t: (p + t).cos(), params)
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        assert tree_map(lambda leaf: leaf.dtype, state) == dtypes
        assert transform.weights(state, params)["none"].shape == (2, 0)


@pytest.mark.parametrize("before", ["hard", "learned"])
def test_the_state_of_a_link_that_holds_nothing_is_refused(before: str) -> None:
    link, params = LINKS[before], {"w": START}
    other = pf.chain(pf.sgd(0.3), replace(link, hold=None))
    _, state = other.update(params, other.init(params), params)
    transform = pf.chain(pf.sgd(0.3), link)
    assert torch.equal(transform.weights(state, params)["w"], other.weights(state, params)["w"])
    with pytest.raises(ValueError, match=r"hard_prox: its state is of a link without hold="):
        transform.update(params, state, params)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pf.oscillation(-1.0), ValueError, "threshold"),
        (lambda: pf.oscillation(0.1, momentum=2.0), ValueError, "momentum"),
        (lambda: pf.hard_prox(pf.uniform(2), hold=0.1), TypeError, "hold=oscillation"),
    ],
)
def test_bad_values_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
