"""TransformOptimizer: a chain as a torch optimizer, equal to the functional loop bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import parq_fn as pf
from parq_fn.optim import TransformOptimizer
from parq_fn.transforms.transformation import pulled_update
from tests.helpers import copies, equal
from tests.optim.helpers import PROXES

QUANTIZED = "*.weight"
TRANSFORMS = {
    "sgd": pf.sgd(0.1, momentum=0.9, dampening=0.2, weight_decay=0.01),
    "adam": pf.adam(0.05, amsgrad=True),
    "muon": pf.partition(
        {"m": pf.muon(0.02), "rest": pf.lion(0.01)}, {QUANTIZED: "m", "*": "rest"}
    ),
    "noisy": pf.chain(pf.add_noise(0.01, seed=5), pf.sgd(0.1)),
    "monitored": pf.chain(pf.sgd(0.1), pf.monitor_flips(pf.masked(PROXES["parq"], QUANTIZED))),
    "lookahead": pf.lookahead(pf.sgd(0.1), 3),
    "schedule_free": pf.chain(pf.schedule_free(pf.sgd(0.1)), pf.masked(PROXES["parq"], QUANTIZED)),
    "lion": pf.lion(0.01, weight_decay=0.1),
    "averaged": pf.averaged(pf.chain(pf.sgd(0.1, 0.9), pf.masked(PROXES["parq"], QUANTIZED)), 0.9),
    "scheduled": pf.adamw(pf.schedules.cosine(0.1, 0.0, 0, 10)),
    "clipped": pf.chain(pf.clip_by_global_norm(0.5), pf.sgd(0.1)),
    "named": pf.named_chain(
        base=pf.adamw(0.05), prox=pf.masked(pf.hard_prox(pf.lsbq(2), period=2), QUANTIZED)
    ),
    "accumulated": pf.accumulate(
        pf.chain(pf.sgd(0.1, 0.9), pf.masked(PROXES["parq"], QUANTIZED)), 2
    ),
    "if_finite": pf.apply_if_finite(pf.chain(pf.adam(0.1), pf.masked(PROXES["soft"], "0.weight"))),
    "limited": pf.apply_if_finite(pf.sgd(0.1), limit=2),
    "torch": pf.chain(pf.as_link(torch.optim.NAdam, lr=0.05), pf.masked(PROXES["soft"], QUANTIZED)),
    "conditional": pf.chain(
        pf.conditionally(pf.trace(0.9), pf.schedules.piecewise([0.0, 1.0], (4,))),
        pf.sgd(0.1),
        pf.conditionally(
            pf.masked(PROXES["hard"], QUANTIZED), pf.schedules.piecewise([1.0, 0.0, 1.0], (2, 5))
        ),
    ),
    "partition": pf.partition(
        {"q": pf.chain(pf.sgd(0.1), PROXES["hard"]), "rest": pf.adam(0.01)},
        {QUANTIZED: "q", "*": "rest"},
    ),
    **{
        f"prox_{name}": pf.chain(pf.adamw(0.1), pf.masked(prox, QUANTIZED))
        for name, prox in PROXES.items()
        if name not in ("parq_shrink", "parq_normal_map", "both")
    },
}


class Run:
    """A small network and its optimizer."""

    def __init__(self, transform: Any, dtype: torch.dtype = torch.float64, names: bool = True):
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
        self.x, self.y = torch.randn(9, 6, dtype=dtype), torch.randn(9, 3, dtype=dtype)
        params = self.net.named_parameters() if names else self.net.parameters()
        self.optimizer = TransformOptimizer(params, transform)

    def loss(self) -> Tensor:
        return (self.net(self.x) - self.y).square().mean()

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        entries = [self.optimizer.state[p] for p in self.net.parameters()]
        states = [e[key] for e in entries for key in sorted(e)]
        return [*self.net.parameters(), *states]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_equals_the_functional_loop_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    transform, run = TRANSFORMS[name], Run(TRANSFORMS[name], dtype)
    wide = torch.promote_types(dtype, torch.float32)
    params = {n: p.detach().to(wide, copy=True) for n, p in run.net.named_parameters()}
    state = transform.init(params)
    for _ in range(11):
        run.optimizer.zero_grad()
        run.loss().backward()
        grads = {n: p.grad.to(wide) for n, p in run.net.named_parameters()}
        held = {n: p.detach().clone() for n, p in run.net.named_parameters()}
        run.optimizer.step()
        updates, state = pulled_update(transform, grads, state, params, held)
        params = pf.apply_updates(params, updates)
        weights = transform.weights(state, params)
        for n, p in run.net.named_parameters():
            assert torch.equal(p, weights[n].to(dtype))
            assert torch.equal(run.optimizer.state[p].get("latent", p), params[n])


def test_a_flush_is_the_functional_one() -> None:
    inner = pf.chain(pf.sgd(0.1, 0.9), pf.masked(PROXES["parq"], QUANTIZED))
    transform = pf.accumulate(inner, 3)
    run = Run(transform)
    params = {n: p.detach().clone() for n, p in run.net.named_parameters()}
    state = transform.init(params)
    for t in range(6):
        run.step()
        grads = {n: p.grad for n, p in run.net.named_parameters()}
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        if t in (1, 2, 5):
            run.optimizer.flush()
            updates, state = transform.flush(state, params)
            params = pf.apply_updates(params, updates)
        weights = transform.weights(state, params)
        assert all(torch.equal(p, weights[n]) for n, p in run.net.named_parameters())
    assert pf.read(run.optimizer.transformation_state, "count") == 3
    with pytest.raises(ValueError, match=r"expected accumulate\(...\) .* got sgd\(0.1\)"):
        Run(pf.sgd(0.1)).optimizer.flush()


def test_groups_override_learning_rate_and_weight_decay() -> None:
    a, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [("a", a)]}, {"params": [("b", b)], "lr": 0.5, "weight_decay": 0.2}]
    optimizer = TransformOptimizer(groups, pf.sgd(0.1, weight_decay=0.01))
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full_like(a, 1 - 0.1 * 1.01).detach())
    torch.testing.assert_close(b.detach(), torch.full_like(b, 1 - 0.5 * 1.2).detach())


def test_a_weight_decay_that_no_link_takes_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"group 0 has weight_decay=0.2 and no link takes one"):
        TransformOptimizer([{"params": [p], "weight_decay": 0.2}], pf.sgd(0.1))


def test_shrink_takes_the_rate_of_its_parameters() -> None:
    prox = pf.hard_prox(pf.lsbq(1), period=1, shrink=True)
    transform = pf.chain(pf.sgd(0.1), pf.masked(prox, "a"))
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [("a", a)], "lr": 3.0}, {"params": [("b", b)], "lr": 0.5}]
    optimizer = TransformOptimizer(groups, transform)
    a.grad = b.grad = torch.zeros(2)
    optimizer.step()
    assert float(optimizer.state[a]["1.lr_sum"]) == 3.0
    assert a.tolist() == pytest.approx([1 / 3, 1 / 3])
    groups = [{"params": [("a", a)], "lr": 3.0}, {"params": [("b", b)], "lr": 0.5}]
    optimizer = TransformOptimizer(groups, pf.chain(pf.sgd(0.1), prox))
    with pytest.raises(ValueError, match="take one learning rate for all parameters"):
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 1, 5, 11])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["torch", "nested", "flattened"])
@pytest.mark.parametrize("name", ["sgd", "named", "partition", "prox_parq"])
def test_r5_r6_a_loaded_run_continues_bit_for_bit(name, way, dtype, steps) -> None:
    one, other = Run(TRANSFORMS[name], dtype), Run(TRANSFORMS[name], dtype)
    one.step(steps)
    if way == "torch":
        buffer = io.BytesIO()
        torch.save(one.optimizer.state_dict(), buffer)
        buffer.seek(0)
        other.optimizer.load_state_dict(torch.load(buffer, weights_only=True))
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=way == "flattened")
        saved = copy.deepcopy(get_optimizer_state_dict(one.net, one.optimizer, options=options))
        set_optimizer_state_dict(other.net, other.optimizer, saved, options=options)
    other.net.load_state_dict(one.net.state_dict())
    assert equal(one.tensors(), other.tensors())
    for _ in range(3):
        one.step()
        other.step()
        assert equal(one.tensors(), other.tensors())


def test_r1_r2_reading_the_state_changes_nothing_and_all_keys_exist() -> None:
    run = Run(TRANSFORMS["named"])
    before = copies(run.tensors())
    get_optimizer_state_dict(run.net, run.optimizer)
    assert equal(run.tensors(), before)
    shapes = [t.shape for t in run.tensors()]
    run.step(5)
    assert [t.shape for t in run.tensors()] == shapes
    weight = next(run.net.parameters())
    assert {"latent", "base.0.first", "prox.qparams", "prox.slope"} <= run.optimizer.state[
        weight
    ].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_r7_copies_continue_bit_for_bit_and_leave_the_original_alone(copied, name: str) -> None:
    one = Run(TRANSFORMS[name])
    one.step(3)
    other, before = copied(one), copies(one.tensors())
    other.step(3)
    assert equal(one.tensors(), before)
    one.step(3)
    assert equal(one.tensors(), other.tensors())


def test_r8_parameters_exchanged_in_the_groups_are_followed_by_position() -> None:
    one, other = Run(TRANSFORMS["named"]), Run(TRANSFORMS["named"])
    one.step(3)
    other.step(3)
    for layer in (one.net[0], one.net[2]):
        layer.weight = nn.Parameter(layer.weight.detach().clone())
        layer.bias = nn.Parameter(layer.bias.detach().clone())
    one.optimizer.param_groups[0]["params"] = list(one.net.parameters())
    one.step(3)
    other.step(3)
    assert equal(one.tensors(), other.tensors())


def test_r10_r11_schedulers_drive_a_learning_rate_that_is_a_number() -> None:
    one, other = Run(pf.sgd(0.1)), Run(pf.sgd(0.1))
    schedule = torch.optim.lr_scheduler.StepLR(one.optimizer, 1, 0.5)
    plain = torch.optim.SGD(other.net.parameters(), lr=0.1)
    theirs = torch.optim.lr_scheduler.StepLR(plain, 1, 0.5)
    for _ in range(4):
        one.step()
        schedule.step()
        plain.zero_grad()
        other.loss().backward()
        plain.step()
        theirs.step()
    for a, b in zip(one.net.parameters(), other.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert "lr" not in Run(TRANSFORMS["scheduled"]).optimizer.param_groups[0]


def test_r12_a_group_added_later_begins_and_leaves_the_others_their_state() -> None:
    one, other = Run(pf.adam(0.1)), Run(pf.adam(0.1))
    one.step(3)
    other.step(3)
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    one.optimizer.add_param_group({"params": [("extra", extra)]})
    assert one.optimizer.state[extra]["0.first"].shape == (2,)
    one.step(2)
    other.step(2)
    for a, b in zip(one.net.parameters(), other.net.parameters(), strict=True):
        assert torch.equal(a, b)


def test_r13_the_closure_runs_first_at_the_weights_and_its_value_is_returned() -> None:
    one, other = Run(TRANSFORMS["prox_parq"]), Run(TRANSFORMS["prox_parq"])

    def closure() -> Tensor:
        one.optimizer.zero_grad()
        loss = one.loss()
        loss.backward()
        return loss

    for _ in range(5):
        expected = one.loss().detach()
        assert torch.equal(one.optimizer.step(closure).detach(), expected)
        other.step()
    assert equal(one.tensors(), other.tensors())


def test_r14_a_parameter_without_a_gradient_is_not_moved() -> None:
    run = Run(pf.adam(0.1))
    run.step(2)
    run.net[0].requires_grad_(False)
    before = copies([*run.net[0].parameters()])
    run.step(2)
    assert equal(before, [*run.net[0].parameters()])


def test_parameters_without_names_go_by_group_and_position() -> None:
    run = Run(pf.chain(pf.sgd(0.1), pf.masked(PROXES["hard"], ["0.0", "0.2"])), names=False)
    run.step(3)
    assert run.net[0].weight.unique().numel() <= 4
    assert run.net[0].bias.unique().numel() == 6


def test_a_state_of_another_transformation_is_refused_and_changes_nothing() -> None:
    run = Run(TRANSFORMS["named"])
    run.step(2)
    before = copies(run.tensors())
    with pytest.raises(ValueError, match="missing; it was saved by another optimizer"):
        run.optimizer.load_state_dict(Run(pf.sgd(0.1)).optimizer.state_dict())
    assert equal(run.tensors(), before)
