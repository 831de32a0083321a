"""Every method of examples/methods.py against its autograd twin: in the functional loop, in both
adapters, and on two ranks; and the page that lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from examples.methods import methods
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from tests.helpers import python_blocks, run_blocks, sampled, spread
from tests.optim.helpers import whole
from tests.processes import on_processes
from tests.twins.methods import TWINS, Seq, Step, Twin, train

SEED, STEPS, RATE, OF_LEVELS = 2, 50, 0.05, 0.004
EXACT = {"rtol": 1e-12, "atol": 1e-12}
#: Each method once, and again where bits give it another form.
CASES = [(name, 0 if name in ("TTQ", "saturated") else 2) for name in TWINS]
CASES += [("LSQ", 1), ("LSQ", 0), ("LSQ", 3), ("SEQ", 0), ("QuEST", 0), ("LQ-Nets", 0)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Linear(24, n, dtype=torch.float64) for n in (24, 4))
        generator = torch.Generator().manual_seed(SEED)
        for p in self.parameters():
            p.data.normal_(0, 0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())


WEIGHTS = ["one.weight", "two.weight"]
INPUTS = torch.randn(STEPS, 9, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss_of(outputs: Tensor, t: int) -> Tensor:
    return 4 * (outputs - INPUTS[t][:, :4].sin()).square().mean()


def twin_of(name: str, bits: int) -> Twin:
    return (Seq if (name, bits) == ("LSQ", 1) else TWINS[name])(bits, STEPS)


def link_of(name: str, bits: int) -> pf.Prox:
    """The method with rates that are the twin's, of levels by plain gradient descent."""
    link, twin = methods(bits, STEPS, RATE)[name], twin_of(name, bits)
    if link.learning_rate is not None:
        link = replace(link, learning_rate=RATE)
    if twin.learns:
        normalized = name not in ("TTQ", "LQ-Nets", "free levels")
        kind = getattr(link.learn, "gradient", "code")
        how = pf.learn(pf.sgd(OF_LEVELS / twin.ratio**2), kind, normalize=normalized)
        link = replace(link, learn=how)
    return link


def by_twin(name: str, bits: int) -> Iterator[Step]:
    apply, params = pf.functional(Net())
    loss = lambda weights, t: loss_of(apply(weights, INPUTS[t]), t)  # noqa: E731
    return train(twin_of(name, bits), params, WEIGHTS, loss, RATE, OF_LEVELS)


Found = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


def in_a_loop(link: pf.Prox) -> Iterator[Found]:
    apply, params = pf.functional(Net())
    transform = pf.chain(pf.sgd(RATE), pf.masked(link, WEIGHTS))
    state = transform.init(params)
    step = pf.value_and_grad(lambda w, t: loss_of(apply(w, INPUTS[t]), t), transform)
    for t in range(STEPS):
        _, grads = step(params, state, t)
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        levels = pf.levels_of(transform, state)
        yield params, transform.weights(state, params), {name: levels[name] for name in WEIGHTS}


def by_groups(net: nn.Module, link: pf.Prox) -> QuantOptimizer:
    named = dict(net.named_parameters())
    groups = [
        {"params": [named[name] for name in WEIGHTS], "prox": link},
        {"params": [p for name, p in named.items() if name not in WEIGHTS]},
    ]
    return QuantOptimizer(torch.optim.SGD(groups, lr=RATE))


def by_links(net: nn.Module, link: pf.Prox) -> TransformOptimizer:
    transform = pf.chain(pf.sgd(RATE), pf.masked(link, WEIGHTS))
    return TransformOptimizer(net.named_parameters(), transform)


def in_torch(build: Callable[..., Any], link: pf.Prox, sharded: bool = False) -> Iterator[Found]:
    net: Any = Net()
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for part in (net.one, net.two, net):
            fully_shard(part, mesh=mesh)
    optimizer = build(net, link)
    for t in range(STEPS):
        optimizer.zero_grad()
        loss_of(net(INPUTS[t]), t).backward()
        optimizer.step()
        named = dict(net.named_parameters())
        latents = {name: optimizer.state[p].get("latent", p) for name, p in named.items()}
        yield (
            {name: whole(p).detach() for name, p in latents.items()},
            {name: whole(p).detach() for name, p in named.items()},
            {name: whole(optimizer.levels(named[name])) for name in WEIGHTS},
        )


WAYS: dict[str, Callable[..., Iterator[Found]]] = {
    "a loop": in_a_loop,
    "QuantOptimizer": lambda link, *more: in_torch(by_groups, link, *more),
    "TransformOptimizer": lambda link, *more: in_torch(by_links, link, *more),
}


ADAPTERS = ["QuantOptimizer", "TransformOptimizer"]


def hold(name: str, bits: int, ways: list[str], *more: bool) -> None:
    """Every step of each way to the twin's: latents, weights and levels."""
    link = link_of(name, bits)
    runs = [WAYS[way](link, *more) for way in ways]
    for wanted, *all_found in zip(by_twin(name, bits), *runs, strict=True):
        assert wanted.least > 1e-9
        for found in all_found:
            torch.testing.assert_close(found, wanted[:3], **EXACT)
    assert not torch.allclose(wanted.latents["one.weight"], Net().one.weight, atol=0.1)


@pytest.mark.parametrize(("case", "adapter"), spread(CASES, ADAPTERS), ids=str)
def test_a_method_is_its_autograd_twin(case: tuple[str, int], adapter: str) -> None:
    hold(*case, ["a loop", adapter])


def each_on_ranks(cases: list[tuple[tuple[str, int], str]]) -> None:
    for case, adapter in cases:
        hold(*case, [adapter], True)


@pytest.mark.rare  # each takes two seconds on each rank
def test_methods_on_two_ranks_are_their_autograd_twins(tmp_path: Path) -> None:
    on_processes(each_on_ranks, 2, tmp_path, sampled(spread(CASES, ADAPTERS), 3))


def test_every_method_has_a_twin() -> None:
    assert set().union(*(methods(bits, 50, 0.1) for bits in range(4))) == set(TWINS)


def test_the_page_lists_the_methods_that_the_program_trains() -> None:
    page = Path(__file__).parents[1] / "notebooks" / "methods.md"
    found = run_blocks(python_blocks(page.read_text()))
    of_bits = {2: found["methods"], 0: found["ternary"], 1: found["one_bit"]}
    names = set()
    for bits, links in of_bits.items():
        trained = methods(bits, 1000, 3e-3)
        for name, link in links.items():
            assert str(replace(link, granularity=pf.per_channel())) == str(trained[name])
        names |= set(links)
    assert names == set(TWINS)
