"""Frozen parameters, and those that are no weights: left alone, and kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer, load_checkpoint, save_checkpoint
from tests.optim.adapters import (
    ADAPTERS,
    LATE,
    SOON,
    ones_for,
    parameters,
    quantized,
    saved_with_a_frozen_layer,
    transformed,
)


def test_frozen_integers_beside_quantized_weights() -> None:
    (a,) = parameters(1)
    codes = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    base = torch.optim.AdamW([{"params": [a], "quant_bits": 2}, {"params": [codes]}], lr=0.1)
    optimizer = QuantOptimizer(base, SOON)
    ones_for(a)
    optimizer.step()
    assert bool((codes == 1).all())


def test_frozen_in_turn_parameters_keep_sums_of_their_own() -> None:
    a, b = parameters()
    link = pf.hard_prox(pf.lsbq(2), period=1, shrink=True)
    optimizer = quantized([a, b], link, torch.optim.SGD)
    for t, rate in enumerate([8.0, 8.0, 1.0, 1.0, 1.0]):
        optimizer.param_groups[0]["lr"] = rate
        a.requires_grad_(t not in (0, 1))
        b.requires_grad_(t not in (2, 3))
        optimizer.step()
    assert float(optimizer.state[a]["lr_sum"]) == 3
    assert float(optimizer.state[b]["lr_sum"]) == 17


def test_weight_decay_anneals_with_the_parameters_that_move() -> None:
    a, b = parameters()
    a.requires_grad_(False)
    group = {"params": [a, b], "quant_bits": 2}
    base = torch.optim.SGD([group], lr=0.1, weight_decay=0.1)
    seen: list[float] = []
    base.register_step_pre_hook(lambda o, *_: seen.append(o.param_groups[0]["weight_decay"]))
    optimizer = QuantOptimizer(base, SOON, anneal_weight_decay=1.0)
    for _ in range(8):
        ones_for(b)
        optimizer.step()
    assert seen[0] == 0.1
    assert seen[-1] == 0.0
    assert optimizer.param_groups[0]["inverse_slope"] == 0.0


def test_transformations_leave_frozen_parameters_alone() -> None:
    a, b = parameters()
    a.requires_grad_(False)
    before = a.clone()
    a.grad = torch.ones_like(a)  # an old one
    optimizer = transformed([a, b])
    for _ in range(8):
        ones_for(b)
        optimizer.step()
    assert torch.equal(a, before)
    assert b.unique().numel() <= 4


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_state_of_frozen_parameters_is_restored(adapter: str, tmp_path: Path) -> None:
    net, optimizer = saved_with_a_frozen_layer(adapter)
    for t in range(6):
        net[0].requires_grad_(t < 4)
        ones_for(*net.parameters())
        optimizer.step()
    save_checkpoint(tmp_path / "half", net, optimizer)
    other, again = saved_with_a_frozen_layer(adapter)
    other[0].requires_grad_(False)
    load_checkpoint(tmp_path / "half", other, again)
    assert [p.requires_grad for p in other.parameters()] == [False, True]
    for module, its in ((net, optimizer), (other, again)):
        module.requires_grad_(True)
        for _ in range(4):
            ones_for(*module.parameters())
            its.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, got in optimizer.state[p].items():
            assert torch.equal(got, again.state[q][key]), key


def test_the_state_of_frozen_parameters_is_restored_in_a_plain_optimizer_too(
    tmp_path: Path,
) -> None:
    def built() -> tuple[nn.Module, torch.optim.Optimizer]:
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        return net, torch.optim.AdamW(net.parameters(), lr=0.1)

    (net, optimizer), (other, again) = built(), built()
    ones_for(*net.parameters())
    optimizer.step()
    for module in (net, other):
        module[0].requires_grad_(False)
    save_checkpoint(tmp_path / "frozen", net, optimizer)
    load_checkpoint(tmp_path / "frozen", other, again)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == again.state[q].keys()
        assert torch.equal(optimizer.state[p]["exp_avg"], again.state[q]["exp_avg"])


def test_accumulated_updates_leave_frozen_parameters_alone() -> None:
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    inner = pf.chain(pf.adamw(0.1, weight_decay=0.5), pf.masked(LATE, "p"))
    optimizer = TransformOptimizer([("p", p), ("q", q)], pf.accumulate(inner, 1))
    p.requires_grad_(False)
    for _ in range(5):
        ones_for(q)
        optimizer.step()
    p.requires_grad_(True)
    p.grad, q.grad = torch.zeros(2), torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2,), 0.95))  # one step's decay


def test_whole_numbers_beside_a_transformation_are_left_alone() -> None:
    i, w = nn.Parameter(torch.arange(4), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer = TransformOptimizer([("i", i), ("w", w)], pf.masked(pf.sgd(0.1), "w"))
    i.add_(1)
    ones_for(w)
    optimizer.step()
    assert i.tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.9))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a7_weight_decay_anneals_with_each_parameters_own_slope(
    dtype: torch.dtype, turned: bool
) -> None:
    """In one group as in a group of its own, after one of them was frozen for a while."""
    runs = []
    for together in (True, False):
        params = parameters(2, dtype)
        parts = [params[::-1] if turned else params] if together else [[p] for p in params]
        groups = [{"params": part, "quant_bits": 2} for part in parts]
        base = torch.optim.SGD(groups, lr=0.1, weight_decay=0.5)
        optimizer = QuantOptimizer(base, SOON, anneal_weight_decay=1.0)
        for t in range(6):
            params[0].requires_grad_(t >= 3)
            ones_for(*params)
            optimizer.step()
            assert [group["weight_decay"] for group in base.param_groups] == [0.5] * len(groups)
        runs.append([optimizer.state[p]["latent"] for p in params])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_parameter_that_was_frozen_as_levels_were_first_fitted_has_levels(adapter: str) -> None:
    """The counts of a transformation, by which fits are due, go on without it."""
    params = parameters()
    optimizer = ADAPTERS[adapter](params, pf.hard_prox(pf.lsbq(2), period=100))
    before = params[0].detach().clone()
    for t in range(3):
        params[0].requires_grad_(t == 2)
        ones_for(*params)
        optimizer.step()
        if t == 1:
            assert torch.equal(params[0], before)
    assert params[0].unique().numel() == 4


@pytest.mark.parametrize("calls", [(), (2, 3)])
def test_gradients_that_were_gathered_before_a_parameter_was_frozen_count_once(
    calls: tuple[int, ...],
) -> None:
    """They were kept over the update that they belong to, and added to those of the next one."""
    p, q = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = TransformOptimizer([("p", p), ("q", q)], pf.accumulate(pf.sgd(1.0), 4))
    for t in range(8):
        p.requires_grad_(t not in calls)
        ones_for(p, q)
        optimizer.step()
    assert p.item() == (-1 if calls else -2)
    assert q.item() == -2
