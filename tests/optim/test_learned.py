"""Learned levels in both adapters: as in the functional loop, saved, loaded, frozen and sharded."""

from __future__ import annotations

import copy
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
from parq_fn.optim import QuantOptimizer, TransformOptimizer, load_checkpoint, save_checkpoint
from tests.helpers import pairwise
from tests.optim.helpers import whole
from tests.processes import on_processes

SPAN: dict[str, Any] = {"anneal_start": 1, "anneal_end": 6, "period": 2}
LINKS = {
    "hard": pf.hard_prox(pf.uniform(2), period=2),
    "parq": pf.parq_prox(pf.lsbq(2), **SPAN),
    "soft": pf.soft_prox(pf.lloyd_max(2, symmetric=False), **SPAN, end_temperature=20.0),
    "integer": pf.parq_prox(pf.integer(4, "mean"), **SPAN, shrink=True),
}
ROWS = {"tensor": pf.per_tensor(), "channel": pf.per_channel(), "block": pf.per_block(2)}
HOW = {"code": pf.sgd(0.01, momentum=0.5), "map": pf.learn(pf.adam(0.003), gradient="map")}


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(6, 8, dtype=dtype), nn.Linear(8, 4, dtype=dtype)

    def loss(self, t: int = 1) -> Tensor:
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(9, 6, generator=generator, dtype=torch.float64).to(self.one.weight.dtype)
        return self(x).square().mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh()) - x[:, :4].sin()


def by_groups(net: Net, link: pf.Prox, **options: Any) -> QuantOptimizer:
    named = dict(net.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named.items() if "weight" in n], "prox": link},
        {"params": [(n, p) for n, p in named.items() if "bias" in n]},
    ]
    return QuantOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9), **options)


def by_links(net: Net, link: pf.Prox) -> TransformOptimizer:
    transform = pf.chain(pf.sgd(0.1, momentum=0.9), pf.masked(link, "*.weight"))
    return TransformOptimizer(net.named_parameters(), transform)


ADAPTERS: dict[str, Any] = {"QuantOptimizer": by_groups, "TransformOptimizer": by_links}


def train(net: Any, optimizer: Any, steps: int, first: int = 0) -> None:
    for t in range(first, first + steps):
        optimizer.zero_grad()
        net.loss(t).backward()
        optimizer.step()


def learning(link: str, rows: str, how: str) -> pf.Prox:
    return replace(LINKS[link], granularity=ROWS[rows], learn=HOW[how])


@pytest.mark.parametrize(
    ("link", "rows", "how", "adapter"), pairwise(list(LINKS), list(ROWS), list(HOW), list(ADAPTERS))
)
def test_levels_are_learned_as_in_the_functional_loop(
    link: str, rows: str, how: str, adapter: str
) -> None:
    prox, net = replace(learning(link, rows, how), learning_rate=0.1), Net()
    apply, params = pf.functional(net)
    transform = pf.chain(pf.sgd(0.1, momentum=0.9), pf.masked(prox, "*.weight"))
    state = transform.init(params)

    def loss(weights: Any, t: int) -> Tensor:
        generator = torch.Generator().manual_seed(t)
        return (
            apply(weights, torch.randn(9, 6, generator=generator, dtype=torch.float64))
            .square()
            .mean()
        )

    step, trained = pf.value_and_grad(loss, transform), Net()
    optimizer = ADAPTERS[adapter](trained, prox)
    for t in range(9):
        _, grads = step(params, state, t)
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        train(trained, optimizer, 1, t)
        weights = transform.weights(state, params)
        for name, p in trained.named_parameters():
            torch.testing.assert_close(p.detach(), weights[name], rtol=1e-9, atol=1e-10)
    levels = optimizer.levels(trained.one.weight)
    torch.testing.assert_close(levels, pf.levels_of(transform, state)["one.weight"])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_moves_levels_may_look_at_those_of_all_parameters(adapter: str) -> None:
    how = pf.chain(pf.clip_by_global_norm(1e-3), pf.sgd(1.0))
    prox, net = replace(LINKS["hard"], learn=how), Net()
    _, params = pf.functional(net)
    transform = pf.chain(pf.sgd(0.1, momentum=0.9), pf.masked(prox, "*.weight"))
    state, optimizer = transform.init(params), ADAPTERS[adapter](net, prox)
    for t in range(4):
        optimizer.zero_grad()
        net.loss(t).backward()
        named = dict(net.named_parameters())
        grads = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        optimizer.step()
        wanted = pf.levels_of(transform, state)["one.weight"]
        torch.testing.assert_close(optimizer.levels(net.one.weight), wanted, rtol=1e-12, atol=0)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_what_moves_levels_may_be_masked_by_names(adapter: str, frozen: bool) -> None:
    """Of all parameters of a link, though a step moves some of them."""
    how = pf.chain(pf.masked(pf.trace(0.5), "one.*"), pf.sgd(0.05), pf.masked(pf.freeze(), "two.*"))
    labels = {"one.*": "moved", "*": "still"}
    by_label = pf.partition({"moved": pf.sgd(0.05, 0.5), "still": pf.freeze()}, labels)
    found = []
    for own in (how, by_label):
        net = Net()
        optimizer = ADAPTERS[adapter](net, replace(LINKS["hard"], learn=own))
        train(net, optimizer, 2)
        before = [optimizer.levels(part.weight) for part in (net.one, net.two)]
        net.one.weight.requires_grad_(not frozen)
        other = Net()
        another = ADAPTERS[adapter](other, replace(LINKS["hard"], learn=own))
        other.load_state_dict(net.state_dict())
        another.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        other.one.weight.requires_grad_(not frozen)
        train(net, optimizer, 3, 2)
        train(other, another, 3, 2)
        levels = [optimizer.levels(part.weight) for part in (net.one, net.two)]
        assert torch.equal(before[0], levels[0]) == frozen
        assert torch.equal(before[1], levels[1])
        assert torch.equal(another.levels(other.one.weight), levels[0])
        found.append(levels[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", HOW)
def test_weights_are_on_levels_that_were_learned_bit_for_bit(how: str, dtype: torch.dtype) -> None:
    net = Net(dtype)
    optimizer = by_groups(net, learning("parq", "channel", how))
    train(net, optimizer, 4)
    before = optimizer.levels(net.one.weight)
    train(net, optimizer, 5, 4)
    levels = optimizer.levels(net.one.weight)
    assert not torch.equal(levels, before)
    assert bool((net.one.weight.unsqueeze(-1) == levels.unsqueeze(1)).any(-1).all())


def test_the_only_parameter_of_a_group_learns_with_a_count_of_its_own() -> None:
    net = Net()
    link = replace(LINKS["hard"], learn=pf.adam(0.01))
    optimizer = QuantOptimizer(
        torch.optim.SGD([{"params": [net.one.weight], "prox": link}], lr=0.1)
    )
    train(net, optimizer, 2)
    before = optimizer.levels(net.one.weight)
    train(net, optimizer, 1, 2)
    assert not torch.equal(optimizer.levels(net.one.weight), before)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "checkpoint"])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_resumed_run_learns_on_bit_for_bit(
    adapter: str, way: str, steps: int, tmp_path: Path
) -> None:
    link = learning("integer", "channel", "map")
    net = Net()
    optimizer = ADAPTERS[adapter](net, link)
    train(net, optimizer, steps)
    if way == "deepcopy":
        other, another = copy.deepcopy((net, optimizer))
    else:
        other = Net()
        another = ADAPTERS[adapter](other, link)
        if way == "state_dict":
            other.load_state_dict(net.state_dict())
            another.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        else:
            save_checkpoint(tmp_path / "run", net, optimizer)
            load_checkpoint(tmp_path / "run", other, another)
    for module, one in ((net, optimizer), (other, another)):
        train(module, one, 5, steps)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        one, two = optimizer.state[p], another.state[q]
        assert one.keys() == two.keys()
        for key, got in one.items():
            assert torch.equal(got, two[key]), key


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_parameter_without_a_gradient_keeps_its_levels(adapter: str) -> None:
    net = Net()
    optimizer = ADAPTERS[adapter](net, learning("hard", "channel", "code"))
    train(net, optimizer, 3)
    before = optimizer.levels(net.two.weight).clone()
    optimizer.zero_grad()
    net.loss().backward()
    net.two.weight.grad = None
    optimizer.step()
    assert torch.equal(optimizer.levels(net.two.weight), before)


def test_a_base_s_checkpoint_starts_training_with_learned_levels() -> None:
    net = Net()
    plain = torch.optim.SGD(net.named_parameters(), lr=0.1, momentum=0.9)
    train(net, plain, 2)
    optimizer = QuantOptimizer(
        torch.optim.SGD(
            [{"params": [*net.named_parameters()], "prox": learning("hard", "tensor", "code")}],
            lr=0.1,
            momentum=0.9,
        )
    )
    optimizer.load_state_dict(plain.state_dict())
    train(net, optimizer, 3)
    assert any(key.startswith("learn.") for key in optimizer.state[net.one.weight])


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("first", ["fitted", "learned"])
def test_a_run_goes_on_with_levels_learned_or_fitted_where_the_digest_is_deleted(
    adapter: str, first: str
) -> None:
    fitting = replace(learning("parq", "channel", "code"), learn=None)
    links = {"fitted": fitting, "learned": learning("parq", "channel", "code")}
    second = "learned" if first == "fitted" else "fitted"
    net, other = Net(), Net()
    optimizer, another = (
        ADAPTERS[adapter](net, links[first]),
        ADAPTERS[adapter](other, links[second]),
    )
    train(net, optimizer, 4)
    saved = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"trained with (an)?other prox link"):
        another.load_state_dict(saved)
    for entries in saved["state"].values():
        for key in ("link", "prox_links"):
            entries.pop(key, None)
    other.load_state_dict(net.state_dict())
    another.load_state_dict(saved)
    levels = another.levels(other.one.weight)
    assert torch.equal(levels, optimizer.levels(net.one.weight))
    train(other, another, 4, 4)
    assert not torch.equal(another.levels(other.one.weight), levels)
    learns = any("learn" in key for key in another.state[other.one.weight])
    assert learns == (second == "learned")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_run_goes_on_with_weights_held_and_levels_moved_otherwise(adapter: str) -> None:
    """What moved levels before has left what is named like the entries of what moves them now."""
    held = replace(LINKS["hard"], hold=pf.oscillation(0.01))
    ways = [held, replace(held, learn=pf.sgd(0.01)), replace(held, learn=HOW["code"])]
    for first, second in (ways[:2], ways[1:], ways[:0:-1], ways[1::-1]):
        net, other = Net(), Net()
        optimizer, another = ADAPTERS[adapter](net, first), ADAPTERS[adapter](other, second)
        train(net, optimizer, 4)
        saved = optimizer.state_dict()
        for entries in saved["state"].values():
            for key in ("link", "prox_links"):
                entries.pop(key, None)
        other.load_state_dict(net.state_dict())
        another.load_state_dict(saved)
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            for key, got in another.state[q].items():
                if "hold." in key or "oscillation." in key:
                    assert torch.equal(got, optimizer.state[p][key])
        train(other, another, 2, 4)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_state_that_has_lost_what_moves_levels_is_refused(adapter: str) -> None:
    """It was begun anew in silence, though the digest says that levels were learned so."""
    net = Net()
    optimizer = ADAPTERS[adapter](net, learning("hard", "channel", "code"))
    train(net, optimizer, 3)
    saved = optimizer.state_dict()
    for entries in saved["state"].values():
        for key in [key for key in entries if "learn" in key]:
            del entries[key]
    with pytest.raises(ValueError, match=r"learn.* missing; it was saved by another"):
        optimizer.load_state_dict(saved)


def test_a_link_may_have_the_name_of_what_is_learned() -> None:
    """Its state was not loaded, and begun anew in silence."""
    nets = [Net(), Net()]
    made = [
        TransformOptimizer(
            net.named_parameters(),
            pf.named_chain(base=pf.sgd(0.1), **{name: pf.masked(LINKS["hard"], "*.weight")}),
        )
        for net, name in zip(nets, ("prox", "learned"), strict=True)
    ]
    train(nets[0], made[0], 3)
    with pytest.raises(ValueError, match=r"learned\.count, .* missing"):
        made[1].load_state_dict(made[0].state_dict())


@pytest.mark.rare
@pytest.mark.usefixtures("graphs_alone")
def test_compiled_gradients_of_levels_are_the_eager_ones() -> None:
    for link, rows in (("parq", "channel"), ("integer", "tensor"), ("soft", "block")):
        for kind in ("code", "map"):
            torch.manual_seed(0)
            nets = [nn.Linear(600, 60, bias=False) for _ in range(2)]
            nets[1].load_state_dict(nets[0].state_dict())
            how = pf.learn(pf.sgd(1e-3), gradient=kind)
            prox = replace(LINKS[link], granularity=ROWS[rows], learn=how)
            made = [
                QuantOptimizer(
                    torch.optim.SGD([{"params": [net.weight], "prox": prox}], lr=0.1), compile=c
                )
                for net, c in zip(nets, (False, True), strict=True)
            ]
            for t in range(4):
                grad = torch.randn(60, 600, generator=torch.Generator().manual_seed(t))
                for net, optimizer in zip(nets, made, strict=True):
                    net.weight.grad = grad.clone()
                    optimizer.step()
            one, two = (o.state[n.weight]["qparams"] for o, n in zip(made, nets, strict=True))
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def same_as_alone() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cases = [
        ("parq", "tensor", "map"),
        ("hard", "channel", "code"),
        ("soft", "block", "code"),
        ("integer", "tensor", "code"),
    ]
    for build in ADAPTERS.values():
        for link, rows, how in cases:
            alone, net = Net(), Net()
            for part in (net.one, net.two, net):
                fully_shard(part, mesh=mesh)
            one, other = (build(m, learning(link, rows, how)) for m in (alone, net))
            for t in range(6):
                for module, optimizer in ((alone, one), (net, other)):
                    train(module, optimizer, 1, t)
                for p, q in zip(alone.parameters(), net.parameters(), strict=True):
                    torch.testing.assert_close(whole(q), p, rtol=1e-10, atol=1e-11)
                got, wanted = whole(other.levels(net.one.weight)), one.levels(alone.one.weight)
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.slow
def test_levels_of_a_sharded_module_are_learned_as_on_one_process(tmp_path: Path) -> None:
    on_processes(same_as_alone, 2, tmp_path)
