"""State dicts: of other bases, names and dtypes; what does not fit changes nothing."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from parq_fn.optim.state import BEYOND
from tests.optim.adapters import ADAPTERS, LATE, ones_for, parameters, quantized, transformed


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


def test_the_state_of_full_precision_training_is_loaded() -> None:
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


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_state_dicts_with_missing_or_complex_parts_raise(adapter: str) -> None:
    optimizer = ADAPTERS[adapter](parameters(1))
    for wrong, message in (
        ({}, "has no param_groups and no state: it has nothing; expected what"),
        ({"model": 1, "optimizer": 2}, "no state: it has model, optimizer; expected what"),
        (dict.fromkeys("abcde", 0), "no state: it has a, b, c, d, e; expected what"),
        (dict.fromkeys("abcdef", 0), "no state: it has a, b, c, d, e, ...; expected what"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(wrong)
    for other in (None, [], optimizer):
        with pytest.raises(
            TypeError, match=f"{adapter}.load_state_dict: got {type(other).__name__}"
        ):
            optimizer.load_state_dict(other)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["latent"] = saved["state"][0]["latent"].to(torch.complex64)
    with pytest.raises(ValueError, match="latent is complex"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("adapter", [QuantOptimizer, TransformOptimizer])
def test_names_in_another_order_than_the_optimizer_s_are_refused(adapter: Any) -> None:
    """By position each parameter would get the other's latent."""

    def built(*names: str) -> Any:
        group = {"params": [(name, nn.Parameter(torch.ones(2, 2))) for name in names]}
        if adapter is TransformOptimizer:
            return TransformOptimizer([group], pf.sgd(0.1))
        return QuantOptimizer(torch.optim.SGD([group | {"quant_bits": 1}], lr=0.1), LATE)

    saved = built("a", "b").state_dict()
    built("a", "b").load_state_dict(saved)
    with pytest.raises(ValueError, match="in another order: a, b, the optimizer b, a"):
        built("b", "a").load_state_dict(saved)


def test_names_in_another_order_over_the_groups_are_refused() -> None:
    def built(*names: str) -> QuantOptimizer:
        groups = [{"params": [(name, nn.Parameter(torch.ones(2, 2)))]} for name in names]
        for group in groups:
            group["quant_bits"] = 1
        return QuantOptimizer(torch.optim.SGD(groups, lr=0.1), LATE)

    with pytest.raises(ValueError, match="group 0 in another order: a, the optimizer b"):
        built("b", "a").load_state_dict(built("a", "b").state_dict())


def wide_of(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("first", ["module", "optimizer"])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize(
    ("saved", "now"), [(a, b) for a in DTYPES for b in DTYPES if a != b], ids=str
)
def test_a_state_goes_on_in_a_module_of_another_dtype(
    adapter: str, saved: torch.dtype, now: torch.dtype, first: str
) -> None:
    """In mid-annealing: latents are those that were saved, in the dtype that they have now, and
    training goes on with all else in that dtype too."""
    nets = [nn.Linear(4, 4, bias=False, dtype=dtype) for dtype in (saved, now)]
    one, two = (ADAPTERS[adapter]([net.weight]) for net in nets)
    p, q = (net.weight for net in nets)
    for i in range(3):
        p.grad = torch.sin(torch.arange(16.0).view(4, 4) + i).to(saved)
        one.step()
    state, module = copy.deepcopy(one.state_dict()), copy.deepcopy(nets[0].state_dict())
    if first == "module":
        nets[1].load_state_dict(module)
    two.load_state_dict(state)
    if first == "optimizer":
        nets[1].load_state_dict(module)
    expected = state["state"][0].get("latent", p.detach()).to(wide_of(now))
    assert torch.equal(two.state_dict()["state"][0].get("latent", q.detach()), expected)
    for _ in range(4):
        q.grad = torch.ones_like(q)
        two.step()
    entries = two.state[q].values()
    numbers = [got for got in entries if got.is_floating_point() and got.dim()]
    assert {got.dtype for got in numbers} == {wide_of(now)}
    assert q.isfinite().all()
    assert q.unique().numel() <= 4  # annealing ended


@pytest.mark.parametrize("baseline", ["no link", "16 bits"])
def test_a_baseline_s_state_starts_quantized_training(baseline: str) -> None:
    """As one of the base optimizer alone does: its moments and count of steps are taken over."""

    def base(p: nn.Parameter, **group: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW([{"params": [p], **group}], lr=0.02)

    (a,) = parameters(1)
    more = {"quant_bits": 16, "quant_block_size": 2} if baseline == "16 bits" else {}
    plain = QuantOptimizer(base(a, **more), LATE if more else None)
    for _ in range(3):
        ones_for(a)
        plain.step()
    (b,) = parameters(1)
    optimizer = QuantOptimizer(base(b, quant_bits=2), LATE)
    with torch.no_grad():
        b.copy_(a)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["quant_bits"] == 2
    assert "quant_block_size" not in optimizer.param_groups[0]
    for _ in range(3):  # not annealed yet: the same training
        for p, one in ((a, plain), (b, optimizer)):
            ones_for(p)
            one.step()
    assert torch.equal(a, b)
    assert torch.equal(optimizer.state[b]["exp_avg"], plain.state[a]["exp_avg"])
    assert int(optimizer.state[b]["updates"]) == 6


def test_a_quantized_state_is_refused_where_the_group_is_not_quantized() -> None:
    (a,) = parameters(1)
    saved = QuantOptimizer(torch.optim.SGD([{"params": [a], "prox": LATE}], lr=0.1)).state_dict()
    (b,) = parameters(1)
    optimizer = QuantOptimizer(torch.optim.SGD([{"params": [b]}], lr=0.1))
    with pytest.raises(ValueError, match="'0 of group 0': it was quantized and is not in this"):
        optimizer.load_state_dict(saved)


def part_of(state: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        state = state[key]
    return state


MALFORMED: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "no state": (("state",), None, "has a NoneType for state and a list for param_groups"),
    "one group": (("param_groups",), {}, "has a dict for state and a dict for param_groups"),
    "a group that is none": (("param_groups", 0), None, "group 0 is a NoneType, expected a dict"),
    "a group without params": (
        ("param_groups", 0),
        {"lr": 1.0},
        "group 0 is a dict, expected a di",
    ),
    "a tensor for params": (
        ("param_groups", 0, "params"),
        torch.zeros(2),
        "group 0 has params=tensor",
    ),
    "a dict for params": (("param_groups", 0, "params"), {0: 0, 1: 1}, "has params={0: 0, 1: 1}"),
    "a list among params": (("param_groups", 0, "params"), [0, [1]], r"has params=\[0, \[1\]\]"),
    "a tuple among params": (("param_groups", 0, "params"), [0, (1,)], r"params=\[0, \(1,\)\]"),
    "one parameter twice": (("param_groups", 0, "params"), [0, 0], "0 is in its groups 2 times"),
    "a word for names": (
        ("param_groups", 0, "param_names"),
        "ab",
        "has param_names='ab', expected",
    ),
    "a number among names": (
        ("param_groups", 0, "param_names"),
        ["p0", 1],
        "param_names=.'p0', 1.,",
    ),
    "a number for what is beyond": (
        ("param_groups", 0, BEYOND),
        3.0,
        f"group 0 has a float for {BEYOND}, not a dict",
    ),
    "a tensor for names": (
        ("param_groups", 0, "param_names"),
        torch.zeros(2),
        r"group 0 has param_names=tensor\(\[0., 0.\]\), expected a name for each of 2",
    ),
    "few names": (("param_groups", 0, "param_names"), ["p0"], r"param_names=\['p0'\], expected a"),
    "no rate": (("param_groups", 0, "lr"), None, "group 0: lr is None, expected a number"),
    "a rate in words": (
        ("param_groups", 0, "lr"),
        "0.1",
        "group 0: lr is '0.1', expected a number",
    ),
    "NaN for a rate": (
        ("param_groups", 0, "lr"),
        math.nan,
        "group 0: lr is nan, expected a number",
    ),
    "a complex rate": (
        ("param_groups", 0, "lr"),
        torch.tensor(1j),
        "group 0: lr is tensor",
    ),
    "a rate on meta": (
        ("param_groups", 0, "lr"),
        torch.tensor(0.1, device="meta"),
        "group 0: lr is tensor",
    ),
    "two rates": (
        ("param_groups", 0, "lr"),
        torch.ones(2),
        "group 0: lr is tensor",
    ),
    "infinity in a tensor for a rate": (
        ("param_groups", 0, "lr"),
        torch.tensor(math.inf),
        r"group 0: lr is tensor\(inf\)",
    ),
    "a tensor for a parameter's state": (
        ("state", 0),
        torch.zeros(2),
        "parameter 0 has a Tensor for its state, expected a dict",
    ),
    "state of no parameter": (("state", 7), {}, "state of parameter 7, which is in none of its gr"),
    "a latent on meta": (
        ("state", 0, "latent"),
        torch.zeros(4, 4, device="meta"),
        "parameter '.*0.*': latent is on the meta device",
    ),
    "a sparse latent": (
        ("state", 0, "latent"),
        torch.eye(4).to_sparse(),
        "parameter '.*0.*': latent is of torch.sparse_coo, expected torch.strided",
    ),
    "a latent of whole numbers": (
        ("state", 0, "latent"),
        torch.ones(4, 4, dtype=torch.int64),
        "parameter '.*0.*': latent is of torch.int64, expected torch.float32",
    ),
    "NaN for a count": (
        ("state", 0, "count"),
        math.nan,
        "'.*0.*': .*count is nan, expected a whole",
    ),
    "a count below 0": (("state", 0, "count"), -1, "'.*0.*': .*count is -1, expected 0 or more"),
    "a count beyond int64": (
        ("state", 0, "count"),
        2**70,
        "'.*0.*': .*count is 1180.*, expected a",
    ),
    "NaN for a slope": (("state", 0, "slope"), math.nan, "'.*0.*': .*slope is nan, expected a fin"),
    "a slope in words": (
        ("state", 0, "slope"),
        "1",
        "'.*0.*': .*slope is a str, expected a tensor",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_malformed_state_is_refused_by_name_and_changes_nothing(adapter: str, case: str) -> None:
    params = parameters()
    optimizer = ADAPTERS[adapter](params)
    ones_for(*params)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(([*params], state, optimizer.param_groups))
    (*path, last), wrong, message = MALFORMED[case]
    place = part_of(state, tuple(path))
    last = next((key for key in place if str(key).endswith(f".{last}")), last)
    place[last] = wrong
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    now = ([*params], optimizer.state_dict(), optimizer.param_groups)
    assert repr(now) == repr(before)  # to the digits that are shown
    ones_for(*params)
    optimizer.step()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_rate_in_a_tensor_is_loaded_and_what_a_group_has_no_number_for(adapter: str) -> None:
    optimizer = ADAPTERS[adapter](parameters(1))
    state = copy.deepcopy(optimizer.state_dict())
    (group,) = state["param_groups"]
    group |= {"lr": torch.tensor(0.25), "param_names": []}
    if "weight_decay" in group:
        group["weight_decay"] = None
    optimizer.load_state_dict(state)
    (now,) = optimizer.param_groups
    assert float(now["lr"]) == 0.25
    assert now.get("weight_decay") is None


def test_what_a_state_holds_more_than_the_base_knows_does_not_bind_later_ones() -> None:
    (p,) = parameters(1)
    optimizer = quantized([p])
    ones_for(p)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    more = copy.deepcopy(state)
    more["state"][0]["of_tomorrow"] = torch.ones(4, 4)
    optimizer.load_state_dict(more)
    optimizer.load_state_dict(state)
    assert "of_tomorrow" not in optimizer.state[p]
