"""What other code does to parameters is kept: edits, exchanges, another order, and every way out
and in agrees with going on uninterrupted."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer, load_checkpoint, save_checkpoint
from tests.helpers import copies, equal, pairwise
from tests.optim.helpers import ADAPTERS as ON_SHARDS
from tests.optim.helpers import Net, sharded, whole
from tests.processes import on_processes

PROX = pf.parq_prox(pf.lsbq(2), anneal_start=2, anneal_end=9, period=3)


def network(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def quantized(net: nn.Module, prox: pf.Prox = PROX) -> QuantOptimizer:
    named = list(net.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if p.dim() > 1], "quant_bits": 2},
        {"params": [(n, p) for n, p in named if p.dim() == 1]},
    ]
    return QuantOptimizer(torch.optim.AdamW(groups, lr=0.05), prox)


def transformed(net: nn.Module, prox: pf.Prox = PROX) -> TransformOptimizer:
    transform = pf.chain(pf.adamw(0.05), pf.masked(prox, "*.weight"))
    return TransformOptimizer(net.named_parameters(), transform)


ADAPTERS: dict[str, Callable[..., Any]] = {
    "QuantOptimizer": quantized,
    "TransformOptimizer": transformed,
}


def train(net: nn.Module, optimizer: Any, steps: int) -> None:
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        net(x.to(next(net.parameters()).dtype)).square().sum().backward()
        optimizer.step()


def tensors(net: nn.Module, optimizer: Any) -> list[Tensor]:
    entries = [optimizer.state[p] for p in net.parameters()]
    return [*net.parameters(), *(one[key] for one in entries for key in sorted(one))]


def edit(net: nn.Module, _: Any = None) -> None:
    """Some rows of one matrix, all of another, a vector."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        net[0].weight[2:5] = torch.randn(3, 6, generator=draw)
        net[2].weight.copy_(torch.randn(3, 8, generator=draw))
        net[2].bias.add_(1.0)


def entry(net: nn.Module, optimizer: Any, name: str) -> tuple[dict[str, Tensor], str]:
    """The entries of the first matrix, and the key of one of them."""
    entries = optimizer.state[net[0].weight]
    return entries, next(key for key in entries if key.rpartition(".")[2] == name)


def put(net: nn.Module, optimizer: Any) -> None:
    entries, key = entry(net, optimizer, "latent")
    entries[key] = torch.randn(8, 6, generator=torch.Generator().manual_seed(5))


def written(net: nn.Module, optimizer: Any) -> None:
    entries, key = entry(net, optimizer, "latent")
    entries[key].copy_(torch.randn(8, 6, generator=torch.Generator().manual_seed(5)))


def some_rows(net: nn.Module, optimizer: Any) -> None:
    entries, key = entry(net, optimizer, "latent")
    entries[key][2:5].mul_(-0.5)


def other_levels(net: nn.Module, optimizer: Any) -> None:
    entries, key = entry(net, optimizer, "qparams")
    entries[key] = entries[key] + 0.25


def begun_anew(net: nn.Module, optimizer: Any) -> None:
    entries, key = entry(net, optimizer, "count")
    entries[key].zero_()


EDITS: dict[str, Callable[[Any, Any], None]] = {
    "weights": edit,
    "a latent put into the state": put,
    "a latent written": written,
    "rows of a latent": some_rows,
    "qparams": other_levels,
    "a count": begun_anew,
}


# Ways out and in


def by_state_dicts(net: Any, optimizer: Any, build: Any, _: Path) -> tuple[Any, Any]:
    saved = copy.deepcopy((optimizer.state_dict(), net.state_dict()))
    other = network(seed=1)
    again = build(other)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    return other, again


def module_first(net: Any, optimizer: Any, build: Any, _: Path) -> tuple[Any, Any]:
    saved = copy.deepcopy((optimizer.state_dict(), net.state_dict()))
    other = network(seed=1)
    again = build(other)
    other.load_state_dict(saved[1])
    again.load_state_dict(saved[0])
    return other, again


def built_last(net: Any, optimizer: Any, build: Any, _: Path) -> tuple[Any, Any]:
    saved = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    other = network(seed=1)
    other.load_state_dict(saved[0])
    again = build(other)
    again.load_state_dict(saved[1])
    return other, again


def by_checkpoint(net: Any, optimizer: Any, build: Any, folder: Path) -> tuple[Any, Any]:
    save_checkpoint(folder / "last", net, optimizer)
    other = network(seed=1)
    again = build(other)
    load_checkpoint(folder / "last", other, again)
    return other, again


def by_dcp(net: Any, optimizer: Any, build: Any, folder: Path) -> tuple[Any, Any]:
    model, state = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=folder / "dcp")
    other = network(seed=1)
    again = build(other)
    model, state = get_state_dict(other, again)
    saved = {"model": model, "optimizer": state}
    dcp.load(saved, checkpoint_id=folder / "dcp")
    set_state_dict(
        other, again, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
    )
    return other, again


def by_deepcopy(net: Any, optimizer: Any, build: Any, _: Path) -> tuple[Any, Any]:
    other, again = copy.deepcopy((net, optimizer))
    return other, again


def by_pickle(net: Any, optimizer: Any, build: Any, _: Path) -> tuple[Any, Any]:
    other, again = pickle.loads(pickle.dumps((net, optimizer)))
    return other, again


def by_its_own_state(net: Any, optimizer: Any, build: Any, _: Path) -> tuple[Any, Any]:
    optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does
    return net, optimizer


WAYS = {
    "optimizer first": by_state_dicts,
    "module first": module_first,
    "built last": built_last,
    "save_checkpoint": by_checkpoint,
    "torch.distributed.checkpoint": by_dcp,
    "deepcopy": by_deepcopy,
    "pickle": by_pickle,
    "its own state": by_its_own_state,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize(
    ("way", "steps", "edited", "adapter"),
    pairwise(list(WAYS), [0, 1, 5, 11], list(EDITS), list(ADAPTERS)),
)
def test_a1_what_was_edited_is_saved_and_loaded_and_goes_on_as_uninterrupted(
    adapter: str, way: str, steps: int, edited: str, tmp_path: Path
) -> None:
    straight, net = network(), network()
    its, optimizer = ADAPTERS[adapter](straight), ADAPTERS[adapter](net)
    for one, two in ((straight, its), (net, optimizer)):
        train(one, two, steps)
        EDITS[edited](one, two)
    net, optimizer = WAYS[way](net, optimizer, ADAPTERS[adapter], tmp_path)
    for _ in range(4):
        train(straight, its, 1)
        train(net, optimizer, 1)
        assert equal(tensors(straight, its), tensors(net, optimizer))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize(("adapter", "way"), pairwise(list(ADAPTERS), list(WAYS)))
def test_a1_weights_edited_after_loading_are_kept(adapter: str, way: str, tmp_path: Path) -> None:
    straight, net = network(), network()
    its, optimizer = ADAPTERS[adapter](straight), ADAPTERS[adapter](net)
    for one, two in ((straight, its), (net, optimizer)):
        train(one, two, 5)
    net, optimizer = WAYS[way](net, optimizer, ADAPTERS[adapter], tmp_path)
    edit(straight)
    edit(net)
    train(straight, its, 3)
    train(net, optimizer, 3)
    assert equal(tensors(straight, its), tensors(net, optimizer))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a1_what_a_module_that_was_not_loaded_holds_does_not_count(adapter: str) -> None:
    net, other = network(), network(seed=1)
    optimizer, again = ADAPTERS[adapter](net), ADAPTERS[adapter](other)
    train(net, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    again.load_state_dict(saved)
    now = again.state_dict()  # before the module is loaded
    for key, entries in saved["state"].items():
        assert all(torch.equal(entries[name], now["state"][key][name]) for name in entries)
    other.load_state_dict(net.state_dict())
    train(net, optimizer, 2)
    train(other, again, 2)
    assert equal(tensors(net, optimizer), tensors(other, again))


@pytest.mark.parametrize("first", ["optimizer", "module"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a1_frozen_in_mid_annealing_a_loaded_latent_is_kept(adapter: str, first: str) -> None:
    """Its weights are of an earlier step than the state that it shares with others."""
    net, other = network(), network(seed=1)
    optimizer, again = ADAPTERS[adapter](net), ADAPTERS[adapter](other)
    train(net, optimizer, 4)
    net[0].weight.requires_grad_(False)
    other[0].weight.requires_grad_(False)
    train(net, optimizer, 3)
    saved = copy.deepcopy((optimizer.state_dict(), net.state_dict()))
    loads = [lambda: again.load_state_dict(saved[0]), lambda: other.load_state_dict(saved[1])]
    for load in loads if first == "optimizer" else loads[::-1]:
        load()
    again.state_dict()  # looks at what the parameters hold
    for one, two in ((net, optimizer), (other, again)):
        one[0].weight.requires_grad_(True)
        train(one, two, 3)
    assert equal(tensors(net, optimizer), tensors(other, again))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a1_pretrained_weights_of_a_frozen_layer_become_its_latent(adapter: str) -> None:
    net = network()
    optimizer = ADAPTERS[adapter](net)
    train(net, optimizer, 4)
    net[0].weight.requires_grad_(False)
    train(net, optimizer, 2)
    new = 3 * torch.randn(8, 6, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        net[0].weight.copy_(new)
    assert torch.equal(optimizer.state_dict()["state"][0]["latent"], new)


# Sharded parameters


def pretrained(net: nn.Module) -> dict[str, Tensor]:
    """Weights of each parameter's name, sharded as it is; no elements of two are alike."""
    return {name: p.detach() * 0.5 + 2.0 for name, p in net.named_parameters()}


def copied(net: nn.Module, new: dict[str, Tensor], folder: str) -> None:
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(new[name])


def of_shards(net: nn.Module, new: dict[str, Tensor], folder: str) -> None:
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.to_local().copy_(new[name].to_local())


def by_load_state_dict(net: nn.Module, new: dict[str, Tensor], folder: str) -> None:
    net.load_state_dict(new)


def assigned(net: nn.Module, new: dict[str, Tensor], folder: str) -> None:
    set_model_state_dict(net, new)


def by_load_checkpoint(net: nn.Module, new: dict[str, Tensor], folder: str) -> None:
    dcp.save({"model": new}, checkpoint_id=folder)
    load_checkpoint(folder, net)


def in_place(net: nn.Module, new: dict[str, Tensor], folder: str) -> None:
    """No write that torch counts."""
    dcp.save({"model": new}, checkpoint_id=folder)
    dcp.load({"model": get_model_state_dict(net)}, checkpoint_id=folder)


def all_at_once(net: nn.Module, new: dict[str, Tensor], folder: str) -> None:
    """No write that torch counts, as of a step of another optimizer."""
    params = list(net.parameters())
    with torch.no_grad():
        torch._foreach_mul_(params, 0.5)
        torch._foreach_add_(params, 2.0)


UNCOUNTED = (in_place, all_at_once)
ROUTES = (copied, of_shards, by_load_state_dict, assigned, by_load_checkpoint, *UNCOUNTED)


def weights_of_sharded_modules_are_loaded(folder: str) -> None:
    for i, (adapter, route, steps) in enumerate(pairwise(list(ON_SHARDS), ROUTES, [0, 4])):
        net = sharded(Net(torch.float32), (2,))
        optimizer = ON_SHARDS[adapter](net, PROX)
        x = torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))
        for _ in range(steps):
            net(x).square().mean().backward()
            optimizer.step()
        new = pretrained(net)
        route(net, new, f"{folder}/{i}")
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        if steps and route in UNCOUNTED and adapter == "QuantOptimizer":
            optimizer.sync()
        elif steps and route in UNCOUNTED:
            optimizer.state_dict()
        optimizer.zero_grad()
        optimizer.step()
        for name, p in net.named_parameters():
            latent = optimizer.state[p].get("latent", p)
            assert torch.equal(whole(latent), whole(new[name])), (adapter, route, steps, name)


@pytest.mark.rare
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a2_weights_loaded_into_a_sharded_module_are_trained_on(tmp_path: Path) -> None:
    on_processes(weights_of_sharded_modules_are_loaded, 2, tmp_path, str(tmp_path))


# Narrow weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a3_no_element_of_a_new_matrix_keeps_an_old_latent(
    adapter: str, dtype: torch.dtype
) -> None:
    """Some of its elements are by chance what stood there, to one last place."""
    net = nn.Sequential(nn.Linear(256, 64)).to(dtype)
    optimizer = ADAPTERS[adapter](net, pf.hard_prox(pf.lsbq(2), period=1))
    p = net[0].weight
    p.grad = torch.ones_like(p)
    optimizer.step()
    new = torch.randn(64, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
    near = torch.rand(64, 256, generator=torch.Generator().manual_seed(4)) < 0.3
    new = torch.where(near, p.detach(), new)
    with torch.no_grad():
        p.copy_(new)
    assert torch.equal(optimizer.state_dict()["state"][0]["latent"], new.float())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a3_rows_of_which_less_than_half_was_edited_keep_the_other_latents(adapter: str) -> None:
    net = network()
    optimizer = ADAPTERS[adapter](net)
    train(net, optimizer, 5)
    p = net[0].weight
    latent = optimizer.state[p]["latent"].clone()
    with torch.no_grad():
        p[0, :3] = latent[0, :3] = 7.0  # of six
        p[1, :4] = 7.0
        latent[1] = p[1]
    assert torch.equal(optimizer.state_dict()["state"][0]["latent"], latent)


# Other orders, other parameters


@pytest.mark.parametrize("names", ["along", "without", "none"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a9_state_stays_with_parameters_put_in_another_order(adapter: str, names: str) -> None:
    def build(params: list[nn.Parameter]) -> Any:
        given: Any = params if names == "none" else [(f"w{i}", p) for i, p in enumerate(params)]
        if adapter == "QuantOptimizer":
            group = {"params": given, "quant_bits": 2}
            return QuantOptimizer(torch.optim.AdamW([group], lr=0.05), PROX)
        chosen = "0.0" if names == "none" else "w0"
        half = pf.masked(pf.scale(0.5), chosen)
        transform = pf.chain(half, pf.adamw(0.05), pf.masked(PROX, chosen))
        return TransformOptimizer(given, transform)

    runs = []
    for turned in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
        optimizer = build(params)
        for t in range(7):
            group = optimizer.param_groups[0]
            if turned and t in (2, 5):
                group["params"].reverse()
                if names == "along":
                    group["param_names"].reverse()
            for i, p in enumerate(params):
                p.grad = torch.sin(p.detach() + i)
            optimizer.step()
        if names != "none":
            now = dict(zip(group["param_names"], group["params"], strict=True))
            assert all(now[f"w{i}"] is p for i, p in enumerate(params))
        entries = [optimizer.state[p] for p in params]
        runs.append([*params, *(one[key] for one in entries for key in sorted(one))])
    assert equal(*runs)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a9_some_exchanged_and_others_in_another_order(adapter: str) -> None:
    straight, net = network(), network()
    its, optimizer = ADAPTERS[adapter](straight), ADAPTERS[adapter](net)
    train(straight, its, 3)
    train(net, optimizer, 3)
    old = net[0].weight
    net[0].weight = nn.Parameter(old.detach().clone())
    for group in optimizer.param_groups:
        group["params"] = [net[0].weight if p is old else p for p in group["params"][::-1]]
    train(straight, its, 3)
    train(net, optimizer, 3)
    assert equal(tensors(straight, its), tensors(net, optimizer))
    assert old not in optimizer.state


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a9_what_cannot_be_followed_is_refused(adapter: str) -> None:
    net = network()
    optimizer = ADAPTERS[adapter](net)
    train(net, optimizer, 1)
    before = copies(tensors(net, optimizer))
    group = optimizer.param_groups[0]
    kept = list(group["params"])
    group["params"][1] = group["params"][0]
    with pytest.raises(ValueError, match=rf"{adapter}: group 0 lacks \['.*'\] and has 0 new param"):
        optimizer.step()
    group["params"] = kept[:-1]
    fewer = rf"{adapter}: group 0 had \d parameters and has \d; build another optimizer"
    with pytest.raises(ValueError, match=fewer):
        optimizer.state_dict()
    group["params"] = kept
    assert equal(before, tensors(net, optimizer))


def test_a9_a_parameter_moved_to_a_group_of_other_bits_is_refused() -> None:
    a, b = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    groups = [{"params": [a], "quant_bits": 2}, {"params": [b], "quant_bits": 3}]
    optimizer = QuantOptimizer(torch.optim.SGD(groups, lr=0.1), PROX)
    one, other = optimizer.param_groups
    one["params"], other["params"] = [b], [a]
    with pytest.raises(ValueError, match="'0 of group 1' was moved to group 0, which is quantized"):
        optimizer.step()


# The same in both


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_two_parameters_of_one_name_are_refused(adapter: str) -> None:
    a, b = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    groups: Any = [{"params": [("w", p)], "quant_bits": 2, "lr": 0.1} for p in (a, b)]
    build = {
        "QuantOptimizer": lambda: QuantOptimizer(torch.optim.SGD(groups), PROX),
        "TransformOptimizer": lambda: TransformOptimizer(groups, pf.sgd(0.1)),
    }
    with pytest.raises(ValueError, match=f"{adapter}: two parameters are named 'w'"):
        build[adapter]()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_loading_keeps_unknown_entries_and_names_what_is_missing(adapter: str) -> None:
    net = network()
    optimizer = ADAPTERS[adapter](net)
    train(net, optimizer, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["of_tomorrow"] = torch.arange(3)
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["state"][0]["of_tomorrow"].tolist() == [0, 1, 2]
    before = copies(tensors(net, optimizer))
    rate = optimizer.param_groups[0]["lr"]
    key = next(key for key in saved["state"][1] if key.endswith("qparams") or key.endswith("first"))
    saved["state"][0]["latent"] = torch.zeros(8, 6)
    saved["param_groups"][0]["lr"] = 9.0
    del saved["state"][1][key]
    label = "2.weight" if adapter == "QuantOptimizer" else "0.bias"
    with pytest.raises(ValueError, match=f"parameter '{label}': {key} missing"):
        optimizer.load_state_dict(saved)
    assert equal(before, tensors(net, optimizer))
    assert optimizer.param_groups[0]["lr"] == rate


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_r9_a_latent_that_was_not_saved_is_taken_from_the_parameter(adapter: str) -> None:
    net = network()
    optimizer = ADAPTERS[adapter](net)
    train(net, optimizer, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0]["latent"]
    optimizer.load_state_dict(saved)
    assert torch.equal(optimizer.state[net[0].weight]["latent"], net[0].weight)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_writes_that_torch_does_not_count_are_found_by_sync(adapter: str) -> None:
    net = network()
    optimizer = ADAPTERS[adapter](net)
    train(net, optimizer, 5)
    new = torch.randn(8, 6, generator=torch.Generator().manual_seed(4))
    net[0].weight.data.copy_(new)
    optimizer.sync()
    assert torch.equal(optimizer.state[net[0].weight]["latent"], new)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_parameters_by_name(adapter: str) -> None:
    net = network()
    assert dict(ADAPTERS[adapter](net).named_parameters()) == dict(net.named_parameters())


@pytest.mark.parametrize("adapter", ["QuantOptimizer", "TransformOptimizer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a3_latents_are_kept_where_the_module_was_in_another_dtype_for_a_while(
    adapter: str, dtype: torch.dtype
) -> None:
    """For an evaluation in few bits, say: its weights are those written, in that dtype."""
    build = quantized if adapter == "QuantOptimizer" else transformed
    net = network()
    optimizer = build(net)
    train(net, optimizer, 3)
    before = copies(tensors(net, optimizer))
    net.to(dtype).float()
    optimizer.state_dict()
    after = tensors(net, optimizer)
    latents = [i for i, p in enumerate(net.parameters()) if p.dim() == 2]
    assert latents
    changed = [(a != b).double().mean().item() for a, b in zip(before, after, strict=True)]
    assert max(changed[len(list(net.parameters())) :]) == 0  # the weights alone are rounded
