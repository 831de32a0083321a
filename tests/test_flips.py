"""How many weights change their level in an update."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.optim import FlipCounter, QuantOptimizer, TransformOptimizer
from parq_fn.proxmaps.levels import nearest
from parq_fn.transforms.prox_state import in_rows

SPAN: dict[str, Any] = {"anneal_start": 0, "anneal_end": 20, "period": 2}
PROXES = {
    "tensor": pf.parq_prox(pf.lsbq(2), **SPAN),
    "warm": pf.hard_prox(pf.uniform(3), warmup=3, period=1),
    "blocks": pf.parq_prox(pf.lsbq(1), **SPAN, granularity=pf.per_block(4)),
    "shrink": pf.hard_prox(pf.lsbq(2), period=3, shrink=True, learning_rate=0.3),
    "single": pf.hard_prox(pf.lloyd_max(4), period=1, granularity=pf.per_channel()),
}


def indices(link: Any, state: Any, latent: Tensor) -> Tensor:
    """Of the nearest level of each weight, one by one."""
    levels = link.quantizer.levels(in_rows(state.qparams["w"]))
    divisor = link.divisor(state)
    rows = link.granularity.rows(latent if divisor is None else latent / divisor)
    at = nearest(rows, levels)
    return (at.unsqueeze(-1) == levels.unsqueeze(-2)).to(torch.int8).argmax(-1)


@pytest.mark.parametrize("name", PROXES)
def test_flips_are_the_share_of_weights_whose_level_changed(name: str) -> None:
    prox = PROXES[name]
    transform = pf.monitor_flips(pf.chain(pf.sgd(0.3, 0.5), pf.masked(prox, "w")))
    generator = torch.Generator().manual_seed(0)
    params = {"w": torch.randn(6, 8, generator=generator).double(), "b": torch.ones(3).double()}
    state = transform.init(params)
    seen = []
    for _ in range(8):
        grads = {k: torch.randn(p.shape, generator=generator).double() for k, p in params.items()}
        updates, new = transform.update(grads, state, params)
        moved = pf.apply_updates(params, updates)
        old, now = state.inner[1], new.inner[1]
        flips = pf.read(new, "flips")["w"]
        if int(old.count) <= prox.warmup:
            assert flips == 0
        else:
            turned = indices(prox, old, params["w"]) != indices(prox, now, moved["w"])
            torch.testing.assert_close(flips, turned.float().mean())
        seen.append(float(flips))
        state, params = new, moved
    assert max(seen) > 0
    assert list(pf.tree.tree_leaves(pf.read(state, "flips"))) == [flips]
    kinds = [optree.tree_map(lambda x: x.dtype, of) for of in (state, transform.init(params))]
    assert kinds[0] == kinds[1]


def test_the_only_weight_of_a_leaf_and_a_leaf_of_none() -> None:
    transform = pf.monitor_flips(pf.chain(pf.sgd(1.0), pf.hard_prox(pf.lsbq(1), period=1)))
    params = {"one": torch.ones(1), "none": torch.ones(0)}
    state = transform.init(params)
    for g in (0.0, 3.0):
        grads = {k: torch.full_like(p, g) for k, p in params.items()}
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
    assert pf.read(state, "flips") == {"one": 1.0, "none": 0.0}


def test_flips_of_an_adapter_are_in_the_state_of_its_parameters() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, -3.0, 2.0, 2.0]]))
    prox = pf.hard_prox(pf.lsbq(1), period=1)
    optimizer = TransformOptimizer([("w", weight)], pf.monitor_flips(pf.chain(pf.sgd(1.0), prox)))
    for g in (0.0, 1.5):
        weight.grad = torch.full_like(weight, g)
        optimizer.step()
    assert optimizer.state[weight]["flips"] == 0.25
    assert pf.read(optimizer.transformation_state, "flips") == {"w": torch.tensor(0.25)}


@pytest.mark.parametrize("name", PROXES)
def test_a_counter_beside_either_adapter_counts_what_the_link_counts(name: str) -> None:
    prox = PROXES[name]
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(6, 8, generator=generator).double()
    w, v = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    inner = pf.monitor_flips(pf.chain(pf.sgd(0.3, 0.5), prox))
    one = TransformOptimizer([("w", w)], inner)
    groups = [{"params": [v], "prox": prox}]
    other = QuantOptimizer(torch.optim.SGD(groups, lr=0.3, momentum=0.5))
    counters, seen = [FlipCounter(one), FlipCounter(other)], []
    for _ in range(8):
        w.grad = torch.randn(w.shape, generator=generator).double()
        v.grad = w.grad.clone()
        one.step()
        other.step()
        flips = float(one.state[w]["flips"])
        torch.testing.assert_close([counter() for counter in counters], [flips, flips])
        seen.append(flips)
    assert max(seen) > 0
    assert {kept.dtype for one in counters for kept in one._seen.values()} == {torch.uint8}
    with pytest.raises(ValueError, match="FlipCounter: the optimizer quantizes no weights"):
        FlipCounter(TransformOptimizer([("w", w)], pf.sgd(0.1)))


def test_without_levels_there_is_nothing_to_monitor() -> None:
    with pytest.raises(ValueError, match=r"no prox link in sgd\(0.1\), .* the whole chain"):
        pf.monitor_flips(pf.sgd(0.1)).init({"w": torch.ones(2)})
