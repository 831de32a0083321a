"""The optimizer that QuantOptimizer wraps: its steps, its state, its own account."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer
from tests.optim.adapters import LATE, SOON, ones_for, parameters, quantized


def test_bases_that_cannot_be_wrapped_are_refused() -> None:
    (a,) = parameters(1)
    with pytest.raises(TypeError, match=r"other than LBFGS and SparseAdam, .*got SparseAdam"):
        QuantOptimizer(torch.optim.SparseAdam([a]), SOON)
    with pytest.raises(TypeError, match="got QuantOptimizer"):
        QuantOptimizer(quantized([a]), SOON)
    base = torch.optim.SGD([{"params": [a], "quant_bits": 2}], lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match="group 0 is differentiable"):
        QuantOptimizer(base, SOON)


def test_a_base_that_was_trained_before_keeps_what_it_learned() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        a, b = parameters(2, dtype)
        base = torch.optim.AdamW([{"params": [a], "quant_bits": 2}, {"params": [b]}], lr=0.01)
        for _ in range(5):
            ones_for(a, b)
            base.step()
        moments = [base.state[p]["exp_avg"].clone() for p in (a, b)]
        optimizer = QuantOptimizer(base, LATE)
        for p, moment in zip((a, b), moments, strict=True):
            assert torch.equal(optimizer.state_dict()["state"][int(p is b)]["exp_avg"], moment)
        ones_for(a, b)
        optimizer.step()
        assert [float(optimizer.state[p]["step"]) for p in (a, b)] == [6, 6]
        assert len(base.state) == 2


class Counting(torch.optim.SGD):
    """Keeps account of its steps in its groups and in itself."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.calls = [0]

    def step(self, closure: Any = None) -> Any:
        self.calls[0] += 1
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("prox", [SOON, pf.hard_prox(pf.lsbq(2), normal_map=2.0)])
def test_a_step_is_one_step_of_an_optimizer_that_counts(prox: pf.Prox) -> None:
    params = parameters(5, torch.bfloat16)
    optimizer = quantized(params, prox, Counting)
    assert optimizer.base.calls == [0]
    for _ in range(3):
        ones_for(*params)
        optimizer.step()
    assert optimizer.param_groups[0]["k"] == 3
    assert optimizer.base.calls == [3]
    params[0].grad = None
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.base.calls == [4]


def test_hooks_of_a_torch_optimizer_run_once_a_step() -> None:
    params, seen = parameters(5, torch.bfloat16), []
    optimizer = quantized(params)
    optimizer.base.register_step_post_hook(lambda *_: seen.append(1))
    ones_for(*params)
    optimizer.step()
    assert seen == [1]


class Reassigning(torch.optim.Optimizer):
    """Gives its parameters new memory."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad


def test_a_base_that_gives_parameters_new_memory_moves_the_weights() -> None:
    w = nn.Parameter(torch.zeros(4, 4))
    optimizer = quantized([w], LATE, Reassigning)
    for _ in range(3):
        ones_for(w)
        optimizer.step()
    torch.testing.assert_close(w.detach(), torch.full((4, 4), -0.15))


class Keeping(torch.optim.Optimizer):
    """Keeps a count under a name of its choice."""

    def __init__(self, params: Any, lr: float = 0.1, key: str = "count") -> None:
        super().__init__(params, {"lr": lr})
        self.key = key

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p][self.key] = self.state[p].get(self.key, 0) + 1


@pytest.mark.parametrize("key", ["count", "updates", "qparams", "latent"])
def test_a_base_that_keeps_entries_of_our_names_is_refused(key: str) -> None:
    def base(groups: Any, lr: float) -> Keeping:
        return Keeping(groups, lr, key)

    with pytest.raises(ValueError, match=f"Keeping keeps {key} of parameter '0 of group 0'"):
        quantized(parameters(1), base=base)


class Prepared(torch.optim.Optimizer):
    """Makes its state when it is built, and appends to a list in its group."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "history": []})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["sum"] = torch.full_like(p, 2.0)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["history"].append(1)
            for p in group["params"]:
                self.state[p]["sum"].add_(1)


def test_a_base_that_makes_its_state_when_built_keeps_it() -> None:
    (w,) = parameters(1)
    optimizer = quantized([w], base=Prepared)
    assert optimizer.param_groups[0]["history"] == []
    assert torch.equal(optimizer.state[w]["sum"], torch.full((4, 4), 2.0))
    ones_for(w)
    optimizer.step()
    assert torch.equal(optimizer.state[w]["sum"], torch.full((4, 4), 3.0))
