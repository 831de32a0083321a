"""Adapters under use that nobody planned: each test is a fault that a review found."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer, load_checkpoint, save_checkpoint

LATE = pf.parq_prox(pf.lsbq(2), anneal_start=1000, anneal_end=2000)
SOON = pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=5)


def parameters(count: int = 2, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(4, 4, dtype=dtype)) for _ in range(count)]


def ones_for(*params: Tensor) -> None:
    for p in params:
        p.grad = torch.ones_like(p)


def quantized(params: list[Any], prox: pf.Prox = SOON, base: Any = None, **options: Any):
    base = torch.optim.AdamW if base is None else base
    return QuantOptimizer(base([{"params": params, "quant_bits": 2}], lr=0.05), prox, **options)


def transformed(params: list[Any], prox: pf.Prox = SOON) -> TransformOptimizer:
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    return TransformOptimizer(named, pf.chain(pf.adamw(0.05), prox))


ADAPTERS = {"QuantOptimizer": quantized, "TransformOptimizer": transformed}


# Parameters changed by another hand


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_weights_loaded_after_the_optimizer_was_built_are_trained_on(
    adapter: str, dtype: torch.dtype, steps: int
) -> None:
    a, b = parameters(2, dtype)
    optimizer = ADAPTERS[adapter]([a, b], LATE)
    for _ in range(steps):
        ones_for(a, b)
        optimizer.step()
    pretrained = torch.full((4, 4), 7.0, dtype=dtype)
    with torch.no_grad():
        a.copy_(pretrained)
        kept = b.clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    ones_for(a, b)
    optimizer.step()
    assert torch.equal(a, pretrained)
    assert torch.equal(b, kept)
    assert torch.equal(optimizer.state[a]["latent"], pretrained.to(optimizer.state[a]["latent"]))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_elements_changed_in_mid_annealing_become_latents_and_the_others_keep_theirs(
    adapter: str,
) -> None:
    (a,) = parameters(1)
    optimizer = ADAPTERS[adapter]([a])
    for _ in range(4):
        ones_for(a)
        optimizer.step()
    before = optimizer.state[a]["latent"].clone()
    with torch.no_grad():
        a[0, 0] = 3.0
        a[1] *= 1 + 1e-7  # within rounding
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    ones_for(a)
    optimizer.step()
    before[0, 0] = 3.0
    assert torch.equal(optimizer.state[a]["latent"], before)


# Groups


def test_a_base_that_was_loaded_behind_our_back_is_told() -> None:
    (a,) = parameters(1)
    optimizer = quantized([a])
    optimizer.base.load_state_dict(optimizer.base.state_dict())
    ones_for(a)
    with pytest.raises(ValueError, match="new param_groups; load a state through the QuantOpt"):
        optimizer.step()


def test_groups_added_to_the_base_are_told_and_reordered_parameters_followed() -> None:
    a, b, c = parameters(3)
    optimizer = quantized([a, b], LATE)
    ones_for(a, b)
    optimizer.step()
    entries = optimizer.state[a], optimizer.state[b]
    optimizer.param_groups[0]["params"].reverse()
    ones_for(a, b)
    optimizer.step()
    assert optimizer.state[a]["latent"] is entries[0]["latent"]
    assert int(optimizer.state[b]["updates"]) == 2
    optimizer.base.add_param_group({"params": [c]})
    with pytest.raises(ValueError, match="had 1 groups and has 2; add groups with its own"):
        optimizer.step()


def test_parameters_of_one_name_in_two_groups_are_refused() -> None:
    a, b = parameters()
    groups = [{"params": [("weight", a)]}, {"params": [("weight", b)]}]
    with pytest.raises(ValueError, match="two parameters are named 'weight'"):
        TransformOptimizer(groups, pf.sgd(0.0))


def test_a_group_added_to_prox_links_in_mid_training_is_refused() -> None:
    a, b = parameters()
    optimizer = transformed([a], pf.hard_prox(pf.lsbq(2), period=10))
    ones_for(a)
    optimizer.step()
    with pytest.raises(ValueError, match="have taken steps, and a parameter added now"):
        optimizer.add_param_group({"params": [("b", b)]})
    optimizer.step()
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_exchange_that_would_lose_trained_state_is_refused(adapter: str) -> None:
    a, b = parameters()
    optimizer = ADAPTERS[adapter]([a])
    optimizer.param_groups[0]["params"][0] = nn.Parameter(b.detach()[:2])
    ones_for(optimizer.param_groups[0]["params"][0])
    optimizer.step()  # nothing to lose
    optimizer.param_groups[0]["params"][0] = b
    with pytest.raises(ValueError, match=r"exchanged for a Parameter of shape .* after it was tr"):
        optimizer.step()


def test_a_rate_of_one_group_stands_in_for_it_alone() -> None:
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    transform = pf.partition({"x": pf.sgd(0.1), "y": pf.sgd(0.01)}, {"a": "x", "b": "y"})
    groups = [{"params": [("a", a)], "lr": 5.0}, {"params": [("b", b)]}]
    optimizer = TransformOptimizer(groups, transform)
    ones_for(a, b)
    optimizer.step()
    assert torch.equal(a, torch.full((2,), -5.0))
    assert torch.equal(b, torch.full((2,), -0.01))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"quant_per_channel": True}, r"group 0 has quant_per_channel; expected quant_bits and"),
        ({"quant_bits": "2"}, r"quant_bits='2', expected a whole number in 0\.\.8"),
        ({"quant_bits": 9}, r"quant_bits=9, expected"),
        ({"quant_block_size": 0}, r"quant_block_size=0, expected 1 or more"),
    ],
)
def test_group_keys_that_mean_nothing_are_refused(group: dict[str, Any], message: str) -> None:
    base = torch.optim.SGD([{"params": parameters(1), "quant_bits": 2, **group}], lr=0.1)
    with pytest.raises(ValueError, match=message):
        QuantOptimizer(base, SOON)


def test_bases_that_cannot_be_wrapped_are_refused() -> None:
    (a,) = parameters(1)
    with pytest.raises(TypeError, match="other than LBFGS and SparseAdam, got SparseAdam"):
        QuantOptimizer(torch.optim.SparseAdam([a]), SOON)
    with pytest.raises(TypeError, match="got QuantOptimizer"):
        QuantOptimizer(quantized([a]), SOON)
    base = torch.optim.SGD([{"params": [a], "quant_bits": 2}], lr=0.1, differentiable=True)
    with pytest.raises(ValueError, match="group 0 is differentiable"):
        QuantOptimizer(base, SOON)


def test_frozen_integers_beside_quantized_weights() -> None:
    (a,) = parameters(1)
    codes = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
    base = torch.optim.AdamW([{"params": [a], "quant_bits": 2}, {"params": [codes]}], lr=0.1)
    optimizer = QuantOptimizer(base, SOON)
    ones_for(a)
    optimizer.step()
    assert bool((codes == 1).all())


def test_no_parameters_at_all() -> None:
    optimizer = TransformOptimizer([{"params": []}], pf.sgd(0.1))
    assert optimizer.step(lambda: 3.0) == 3.0


# What parameters of one group share, and what not


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


# The base optimizer's own account


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


# Loading


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_hooks_around_loading_run(adapter: str) -> None:
    optimizer = ADAPTERS[adapter](parameters(1))
    seen: list[str] = []
    optimizer.register_load_state_dict_pre_hook(lambda o, state: seen.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after"]


def test_a_base_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    (a,) = parameters(1)
    ones_for(a)
    other, optimizer = quantized([a], base=torch.optim.SGD), quantized([a])
    other.step()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="'0 of group 0': exp_avg, exp_avg_sq, step missing"):
        optimizer.load_state_dict(other.state_dict())
    for key, wrong, message in (
        ("exp_avg", torch.zeros(7), r"exp_avg has shape \(7,\), expected \(4, 4\)"),
        ("exp_avg", np.zeros((4, 4)), "exp_avg is a ndarray, expected a tensor"),
        ("latent", 3.0, "latent is a float, expected a tensor"),
    ):
        state = copy.deepcopy(optimizer.state_dict())
        state["state"][0][key], state["param_groups"][0]["lr"] = wrong, 9.0
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, got in before["state"][0].items():
        assert torch.equal(after["state"][0][key], got)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_scalars_saved_as_numbers_are_tensors_again(adapter: str) -> None:
    (a,) = parameters(1)
    optimizer = ADAPTERS[adapter]([a])
    for _ in range(2):
        ones_for(a)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    entries = state["state"][0]
    state["state"][0] = {k: v.item() if v.dim() == 0 else v for k, v in entries.items()}
    optimizer.load_state_dict(state)
    for key, got in optimizer.state[a].items():
        assert got.dtype == entries[key].dtype
        assert torch.equal(got, entries[key])
    ones_for(a)
    optimizer.step()


def test_the_state_of_full_precision_training_is_taken_over() -> None:
    a, b = parameters()
    plain = torch.optim.AdamW([{"params": [a]}, {"params": [b]}], lr=0.02)
    for _ in range(3):
        ones_for(a, b)
        plain.step()
    groups = [{"params": [a], "quant_bits": 2}, {"params": [b]}]
    optimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=0.5), LATE)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["quant_bits"] == 2
    assert optimizer.param_groups[0]["lr"] == 0.02
    for _ in range(3):  # not annealed yet: the same training
        ones_for(a, b)
        optimizer.step()
    c, d = parameters()
    alone = torch.optim.AdamW([{"params": [c]}, {"params": [d]}], lr=0.02)
    for _ in range(6):
        ones_for(c, d)
        alone.step()
    assert torch.equal(a, c)
    assert torch.equal(b, d)


def test_shared_fields_come_from_any_parameter_that_was_saved() -> None:
    a, b = parameters()
    optimizer = transformed([a, b])
    for _ in range(7):
        ones_for(a, b)
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]
    optimizer = transformed([a, b])
    optimizer.load_state_dict(state)
    ones_for(a, b)
    optimizer.step()
    assert int(pf.read(optimizer.transformation_state, "prox.count")) == 8
    assert b.unique().numel() <= 4


# Checkpoints


def saved_with_a_frozen_layer(adapter: str) -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    return net, ADAPTERS[adapter]([net[0].weight, net[1].weight])


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


def test_nothing_but_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    net, optimizer = saved_with_a_frozen_layer("QuantOptimizer")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_text("a month of work")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for name in ("out", "file", "link"):
        with pytest.raises(ValueError, match="is no checkpoint, and would be deleted"):
            save_checkpoint(tmp_path / name, net, optimizer)
    assert (tmp_path / "out" / "results.csv").read_text() == "a month of work"
    (tmp_path / "empty").mkdir()
    left_over = tmp_path / ".empty.parq_fn-unfinished"
    left_over.mkdir()
    (left_over / "__0_0.distcp").write_text("")
    for name in ("old-empty", "unfinished-empty"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes").write_text("another's")
    save_checkpoint(tmp_path / "empty", net, optimizer)
    save_checkpoint(tmp_path / "empty", net, optimizer)
    load_checkpoint(tmp_path / "empty", net, optimizer)
    assert {p.name for p in tmp_path.iterdir()} == {
        "empty", "file", "link", "out", "old-empty", "unfinished-empty"
    }  # fmt: skip
    assert (tmp_path / "old-empty" / "notes").exists()
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    left_over.mkdir()
    (left_over / "notes").write_text("another's")
    for name in ("broken", "empty"):
        with pytest.raises(ValueError, match="is no checkpoint, and would be deleted"):
            save_checkpoint(tmp_path / name, net, optimizer)
    assert not (tmp_path / ".broken.parq_fn-unfinished").exists()
    for place in (Path("."), Path.cwd().parent, Path("/")):
        with pytest.raises(ValueError, match="holds the working directory"):
            save_checkpoint(place, net, optimizer)


def test_others_that_fit_no_checkpoint_are_told(tmp_path: Path) -> None:
    net, optimizer = saved_with_a_frozen_layer("QuantOptimizer")
    with pytest.raises(TypeError, match=r"epoch is a int, expected .* epoch={\"value\": ...}"):
        save_checkpoint(tmp_path / "last", net, optimizer, epoch=3)
    save_checkpoint(tmp_path / "last", net, optimizer, progress={"epoch": 3})
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"last does not fit: Missing key .*: other"):
        load_checkpoint(tmp_path / "last", net, optimizer, other={"epoch": 0})
    with pytest.raises(ValueError, match="last does not fit"):
        load_checkpoint(tmp_path / "last", *saved_with_a_frozen_layer("TransformOptimizer"))
    for key, got in before["state"][0].items():
        assert torch.equal(optimizer.state_dict()["state"][0][key], got)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_state_is_where_exchanged_parameters_are(adapter: str) -> None:
    params = parameters()
    optimizer = ADAPTERS[adapter](params)
    ones_for(*params)
    optimizer.step()
    there = [nn.Parameter(torch.empty_like(p, device="meta")) for p in params]
    for group in optimizer.param_groups:
        group["params"] = there
    for entries in optimizer.state_dict()["state"].values():
        kept = [got for got in entries.values() if isinstance(got, Tensor) and got.dim()]
        assert len(kept) >= 3  # latent, moments, levels
        assert {got.device.type for got in kept} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_module_moved_to_another_device_after_the_optimizer_was_built(adapter: str) -> None:
    runs = []
    for device in ("cpu", "cuda"):
        module = nn.ParameterList(parameters())
        optimizer = ADAPTERS[adapter](list(module))
        module.to(device)
        for _ in range(8):
            ones_for(*module)
            optimizer.step()
        runs.append([p.detach().cpu() for p in module])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)


# A second review


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


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_small_changes_of_bfloat16_weights_are_seen(adapter: str) -> None:
    w = nn.Parameter(torch.tensor([[1.0, 0.05, 0.03, -0.05]], dtype=torch.bfloat16))
    optimizer = ADAPTERS[adapter]([w], LATE)
    new = torch.tensor([[1.0, 0.0, -0.03, -0.02]], dtype=torch.bfloat16)
    with torch.no_grad():
        w.copy_(new)
    optimizer.step()  # without a gradient
    assert torch.equal(w, new)
    assert torch.equal(optimizer.state[w]["latent"], new.float())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_good_weights_loaded_over_infinite_ones_are_taken(adapter: str) -> None:
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = ADAPTERS[adapter]([w], LATE)
    with torch.no_grad():
        optimizer.state[w]["latent"].copy_(torch.tensor([[torch.inf, torch.nan], [0.5, 0.5]]))
    optimizer.step()
    assert w[0, 0] == torch.inf
    with torch.no_grad():
        w.copy_(torch.ones(2, 2))
    optimizer.step()
    assert torch.equal(w, torch.ones(2, 2))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_row_without_a_number_leaves_the_latents_of_others_alone_in_a_copy(adapter: str) -> None:
    torch.manual_seed(0)
    net = nn.Linear(8, 4, bias=False)
    prox = pf.hard_prox(pf.lsbq(2), granularity=pf.per_channel())
    optimizer = ADAPTERS[adapter]([net.weight], prox)
    for bad in (1.0, torch.nan):
        net.weight.grad = torch.randn(4, 8)
        net.weight.grad[0, 0] *= bad
        optimizer.step()
    other, its = copy.deepcopy((net, optimizer))
    for one, two in ((net, optimizer), (other, its)):
        one.weight.grad = torch.zeros(4, 8)
        two.step()
    latents = [o.state[n.weight]["latent"][1:] for n, o in ((net, optimizer), (other, its))]
    assert torch.equal(*latents)


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


class Keeping(torch.optim.Optimizer):
    """Keeps a count under a name of its choice."""

    def __init__(self, params: Any, lr: float = 0.1, key: str = "count") -> None:
        super().__init__(params, {"lr": lr})
        self.key = key

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p][self.key] = self.state[p].get(self.key, 0) + 1


@pytest.mark.parametrize("key", ["count", "updates", "levels", "latent"])
def test_a_base_that_keeps_entries_of_our_names_is_refused(key: str) -> None:
    def base(groups: Any, lr: float) -> Keeping:
        return Keeping(groups, lr, key)

    with pytest.raises(ValueError, match=f"Keeping keeps {key} of parameter '0 of group 0'"):
        quantized(parameters(1), base=base)


@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.Adagrad])
def test_the_state_of_narrow_training_is_widened_when_it_is_loaded(base: Any) -> None:
    (p,) = parameters(1, torch.bfloat16)
    plain = base([p], lr=0.05)
    ones_for(p)
    plain.step()
    saved = copy.deepcopy(plain.state_dict())
    wrapped = QuantOptimizer(base([{"params": [p], "quant_bits": 2}], lr=0.05), LATE)
    wrapped.load_state_dict(saved)
    ones_for(p)
    wrapped.step()
    kept = wrapped.state[p].items()
    assert all(got.dtype == torch.float32 for key, got in kept if got.shape == p.shape)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_weights_loaded_before_a_group_is_added_or_a_parameter_exchanged(adapter: str) -> None:
    w, v = parameters()
    optimizer = ADAPTERS[adapter]([w], LATE)
    seven, three = torch.full((4, 4), 7.0), nn.Parameter(torch.full((4, 4), 3.0))
    with torch.no_grad():
        w.copy_(seven)
    named = adapter == "TransformOptimizer"
    optimizer.add_param_group({"params": [("v", v)] if named else [v], "quant_bits": 2})
    optimizer.step()
    assert torch.equal(w, seven)
    optimizer.param_groups[0]["params"][0] = three
    optimizer.step()
    assert torch.equal(three, torch.full((4, 4), 3.0))


def test_bits_changed_by_hand_are_told() -> None:
    (w,) = parameters(1)
    optimizer = quantized([w])
    for bits in (4, 16):
        optimizer.param_groups[0]["quant_bits"] = bits
        with pytest.raises(ValueError, match=rf"= \({bits}, None\) and was built with \(2, None\)"):
            optimizer.step()


def test_a_saved_rate_does_not_replace_a_schedule() -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    one = TransformOptimizer([("w", a)], pf.sgd(0.1, 0.9))
    other = TransformOptimizer([("w", b)], pf.sgd(pf.schedules.cosine(0.5, 0.0, 0, 10), 0.9))
    other.load_state_dict(one.state_dict())
    assert "lr" not in other.param_groups[0]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_state_saved_under_other_names_goes_by_position(adapter: str) -> None:
    net, other = nn.Linear(4, 4), nn.Linear(4, 4)

    def build(module: nn.Module, front: str) -> Any:
        named = [(front + name, p) for name, p in module.named_parameters()]
        if adapter == "TransformOptimizer":
            return TransformOptimizer(named, pf.sgd(0.1, 0.9))
        base = torch.optim.SGD([{"params": named, "quant_bits": 2}], lr=0.1, momentum=0.9)
        return QuantOptimizer(base, LATE)

    one, two = build(net, "module."), build(other, "")
    two.load_state_dict(one.state_dict())
    assert two.param_groups[0]["param_names"] == ["weight", "bias"]
    two.step()


def test_a_checkpoint_quantized_otherwise_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    def build(bits: int, seed: int) -> tuple[nn.Linear, QuantOptimizer]:
        torch.manual_seed(seed)
        net = nn.Linear(8, 4)
        groups = [
            {"params": [net.weight], "quant_bits": 2},
            {"params": [net.bias], "quant_bits": bits},
        ]
        return net, QuantOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9), SOON)

    save_checkpoint(tmp_path / "last", *build(16, 0))
    net, optimizer = build(32, 1)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="has quant_bits=16 in group 1, the optimizer 32"):
        load_checkpoint(tmp_path / "last", net, optimizer)
    assert all(torch.equal(got, before[name]) for name, got in net.state_dict().items())


def test_others_are_filled_with_all_that_was_saved(tmp_path: Path) -> None:
    net, optimizer = saved_with_a_frozen_layer("QuantOptimizer")
    saved = {"epoch": 3, "best": {"loss": 0.5, "at": torch.arange(3)}, "names": ["a", "b"]}
    save_checkpoint(tmp_path / "last", net, optimizer, progress=saved)
    for progress in ({}, {"epoch": 0}):
        load_checkpoint(tmp_path / "last", net, optimizer, progress=progress)
        assert torch.equal(progress["best"].pop("at"), torch.arange(3))
        assert progress == {"epoch": 3, "best": {"loss": 0.5}, "names": ["a", "b"]}
    with pytest.raises(ValueError, match=r"Missing key in checkpoint state_dict: progress\.mine"):
        load_checkpoint(tmp_path / "last", net, optimizer, progress={"mine": 1})


def test_whole_numbers_beside_a_transformation_are_left_alone() -> None:
    i, w = nn.Parameter(torch.arange(4), requires_grad=False), nn.Parameter(torch.ones(3))
    optimizer = TransformOptimizer([("i", i), ("w", w)], pf.masked(pf.sgd(0.1), "w"))
    i.add_(1)
    ones_for(w)
    optimizer.step()
    assert i.tolist() == [1, 2, 3, 4]
    torch.testing.assert_close(w.detach(), torch.full((3,), 0.9))


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


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_conversions_after_the_optimizer_was_built_are_told(adapter: str) -> None:
    net = nn.Linear(4, 4, bias=False)
    optimizer = ADAPTERS[adapter]([net.weight])
    net.double()
    with pytest.raises(ValueError, match=r"is torch\.float64 now and its latent torch\.float32"):
        optimizer.step()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_state_dict_that_is_none_is_told(adapter: str) -> None:
    optimizer = ADAPTERS[adapter](parameters(1))
    with pytest.raises(ValueError, match="loaded state dict has no param_groups and no state"):
        optimizer.load_state_dict({})
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["latent"] = saved["state"][0]["latent"].to(torch.complex64)
    with pytest.raises(ValueError, match="latent is complex"):
        optimizer.load_state_dict(saved)
