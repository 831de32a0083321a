"""Parameters that hold other weights for a while: the nearest levels, or those of averages."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn import export
from parq_fn.optim import QuantOptimizer, TransformOptimizer, load_checkpoint, save_checkpoint
from parq_fn.proxmaps.levels import nearest
from tests.helpers import copies, equal

PROX = pf.parq_prox(pf.lsbq(2), anneal_start=2, anneal_end=12, period=3, warmup=1)
DECAY = 0.8


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def quantized(net: nn.Sequential, average: Any = DECAY) -> QuantOptimizer:
    groups = [
        {"params": [net[0].weight], "quant_bits": 2},
        {"params": [net[0].bias, *net[2].parameters()]},
    ]
    return QuantOptimizer(torch.optim.SGD(groups, 0.1, 0.9), PROX, average=average)


def transformed(net: nn.Sequential, average: Any = DECAY) -> TransformOptimizer:
    inner = pf.chain(pf.sgd(0.1, 0.9), pf.masked(PROX, "0.weight"))
    transform = inner if average is None else pf.averaged(inner, average)
    return TransformOptimizer(net.named_parameters(), transform)


ADAPTERS = {"QuantOptimizer": quantized, "TransformOptimizer": transformed}
both = pytest.mark.parametrize("adapter", ADAPTERS)


def train(net: nn.Sequential, optimizer: Any, steps: int) -> None:
    dtype = next(net.parameters()).dtype
    x = torch.randn(4, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def held(net: nn.Sequential, optimizer: Any) -> list[Tensor]:
    """Parameters, and all of the optimizer's state."""
    entries = [optimizer.state[p] for p in net.parameters()]
    state = [e[key] for e in entries for key in sorted(e) if isinstance(e[key], Tensor)]
    return copies([*net.parameters(), *state])


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 1, 2, 6, 14])
def test_rounded_parameters_are_the_nearest_levels_and_then_as_before(
    adapter: str, dtype: torch.dtype, steps: int
) -> None:
    net = network(dtype)
    optimizer = ADAPTERS[adapter](net)
    train(net, optimizer, steps)
    before = held(net, optimizer)
    with optimizer.rounded():
        weight = net[0].weight.detach()
        assert weight.unique().numel() <= 4
        if steps > 1:
            latent = optimizer.state[net[0].weight]["latent"]
            levels = optimizer.levels(net[0].weight).reshape(1, -1)
            assert torch.equal(
                weight.reshape(1, -1), nearest(latent.reshape(1, -1), levels).to(dtype)
            )
        assert equal(copies(net.parameters())[1:], before[1:4])
        assert optimizer.state_dict()["param_groups"]
    assert equal(held(net, optimizer), before)
    twin = network(dtype)
    other = ADAPTERS[adapter](twin)
    train(twin, other, steps + 3)
    train(net, optimizer, 3)
    assert equal(held(net, optimizer), held(twin, other))


@both
def test_rounded_parameters_are_exported(adapter: str, tmp_path: Path) -> None:
    net = network()
    optimizer = ADAPTERS[adapter](net)
    train(net, optimizer, 5)
    with optimizer.rounded():
        export.save(export.pack(net, optimizer), tmp_path / "net.safetensors")
        wanted = copies(net.parameters())
    fresh = network()
    export.load_into(fresh, tmp_path / "net.safetensors")
    assert equal(copies(fresh.parameters()), wanted)


@both
@pytest.mark.parametrize("block", ["rounded", "averaged_weights"])
def test_an_error_and_edits_inside_leave_parameters_as_they_were(adapter: str, block: str) -> None:
    net = network()
    optimizer = ADAPTERS[adapter](net)
    train(net, optimizer, 5)
    before = held(net, optimizer)

    def spoiled() -> None:
        with torch.inference_mode(), getattr(optimizer, block)():
            net[0].weight.fill_(3.0)
            raise KeyError

    with pytest.raises(KeyError):
        spoiled()
    assert equal(held(net, optimizer), before)
    optimizer.sync()
    assert equal(held(net, optimizer), before)


@both
def test_an_error_on_the_way_in_leaves_parameters_as_they_were(
    adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network()
    optimizer = ADAPTERS[adapter](net)
    train(net, optimizer, 5)
    before, rounded = held(net, optimizer), optimizer._rounded

    def stops_after_one() -> Iterator[tuple[Tensor, Tensor]]:
        yield from islice(rounded(), 1)
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer, "_rounded", stops_after_one)
    with pytest.raises(KeyboardInterrupt), optimizer.rounded():
        pass
    assert equal(held(net, optimizer), before)
    train(net, optimizer, 1)


@both
def test_the_optimizer_is_not_moved_or_copied_inside(adapter: str) -> None:
    net = network()
    optimizer = ADAPTERS[adapter](net)
    train(net, optimizer, 3)
    state = optimizer.state_dict()
    before = held(net, optimizer)
    extra = {"params": [("more", nn.Parameter(torch.ones(2)))]}
    for call in (
        optimizer.step,
        lambda: optimizer.load_state_dict(state),
        lambda: optimizer.add_param_group(extra),
        lambda: copy.deepcopy(optimizer),
        lambda: pickle.dumps(optimizer),
        lambda: optimizer.averaged_weights().__enter__(),
    ):
        with optimizer.rounded(), pytest.raises(RuntimeError, match=r"inside .* leave the block"):
            call()
        assert equal(held(net, optimizer), before)


# Averages


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.8, pf.schedules.linear(0.0, 0.9, 0, 5)], ids=repr)
def test_averaged_weights_are_those_of_the_functional_average(
    adapter: str, dtype: torch.dtype, decay: Any
) -> None:
    net, twin = network(dtype), network(dtype)
    optimizer, base = ADAPTERS[adapter](net, decay), ADAPTERS[adapter](twin, None)
    average, total = {}, 0.0
    for t in range(9):
        train(net, optimizer, 1)
        train(twin, base, 1)
        now = float(decay(torch.tensor(t)) if callable(decay) else decay)
        total = now * total + 1 - now
        for name, p in twin.named_parameters():
            latent = base.state[p].get("latent", p).detach().double()
            old = average.get(name, latent)
            average[name] = old + (1 - now) / total * (latent - old)
    assert equal(copies(net.parameters()), copies(twin.parameters()))
    with optimizer.averaged_weights():
        found = dict(zip(average, copies(net.parameters()), strict=True))
        levels = optimizer.levels(net[0].weight)
    some = (
        {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.01, "atol": 1e-3}
    )
    for name in ("0.bias", "2.weight", "2.bias"):
        torch.testing.assert_close(found[name].double(), average[name], **some)
    state = pf.ProxState(*(optimizer_entry(base, twin, key) for key in pf.ProxState._fields))
    wanted = PROX.weights(
        state, [average["0.weight"].to(torch.promote_types(dtype, torch.float32))]
    )
    torch.testing.assert_close(found["0.weight"], wanted[0].to(dtype), **some)
    train(net, optimizer, 5)  # all on levels now
    with optimizer.averaged_weights():
        levels = optimizer.levels(net[0].weight)
        assert torch.isin(net[0].weight, levels).all()
        assert not torch.equal(net[0].weight, optimizer.state[net[0].weight].get("latent"))


def optimizer_entry(optimizer: Any, net: nn.Sequential, key: str) -> Any:
    entries = optimizer.state[net[0].weight]
    got = next(got for name, got in entries.items() if name.rpartition(".")[2] == key)
    return [got] if key == "qparams" else got


@both
def test_averages_are_saved_and_loaded(adapter: str, tmp_path: Path) -> None:
    net, twin, third = network(), network(), network()
    optimizer, other, fresh = (ADAPTERS[adapter](one) for one in (net, twin, third))
    train(net, optimizer, 4)
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    save_checkpoint(tmp_path / "at", net, optimizer)
    load_checkpoint(tmp_path / "at", third, fresh)
    for one, its in ((net, optimizer), (twin, other), (third, fresh)):
        train(one, its, 3)
    assert equal(held(net, optimizer), held(twin, other))
    assert equal(held(net, optimizer), held(third, fresh))
    copied = pickle.loads(pickle.dumps(optimizer))
    with copied.averaged_weights(), optimizer.averaged_weights():
        wanted = [p for group in optimizer.param_groups for p in group["params"]]
        found = [p for group in copied.param_groups for p in group["params"]]
        assert equal(copies(found), copies(wanted))


@both
def test_a_loaded_average_goes_on_with_the_decay_of_the_optimizer(adapter: str) -> None:
    net, twin = network(), network()
    optimizer, other = ADAPTERS[adapter](net, 0.8), ADAPTERS[adapter](twin, 0.5)
    train(net, optimizer, 4)
    twin.load_state_dict(net.state_dict())
    other.load_state_dict(optimizer.state_dict())

    def entries(its: Any, one: nn.Sequential) -> tuple[Tensor, Tensor]:
        own = its.state[one[2].weight]
        names = [next(k for k in own if k.endswith(end)) for end in ("average", "total")]
        average, total = (own[name] for name in names)
        return average, total

    average, total = entries(optimizer, net)
    assert total == pytest.approx(1 - 0.8**4)
    train(twin, other, 1)
    new = 0.5 * total + 0.5
    latent = other.state[twin[2].weight].get("latent", twin[2].weight).detach()
    wanted = average + 0.5 / new * (latent - average)
    found, so_far = entries(other, twin)
    assert so_far == pytest.approx(float(new))
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-6, atol=1e-7)


def test_entries_of_links_that_a_transformation_has_not_are_named() -> None:
    """They are kept as they were saved, and go stale."""
    p = network()[0].weight
    scale = pf.scale(-0.1)
    saved = TransformOptimizer([("p", p)], pf.chain(pf.averaged(scale, 0.9), PROX)).state_dict()
    plain = TransformOptimizer([("p", p)], pf.chain(scale, PROX))
    with pytest.warns(UserWarning, match=r"'p' .* has no 0\.average, 0\.samples, 0\.total;"):
        plain.load_state_dict(saved)
    assert "0.average" in plain.state[p]


def test_a_state_without_averages_begins_them_and_none_with_them_loses_them(tmp_path: Path) -> None:
    """Of QuantOptimizer, whose average is an option; a transformation has it or is another."""
    net, twin = network(), network()
    plain, keeping = quantized(net, None), quantized(twin)
    train(net, plain, 4)
    save_checkpoint(tmp_path / "plain", net, plain)
    twin.load_state_dict(net.state_dict())
    keeping.load_state_dict(plain.state_dict())
    train(net, plain, 1)
    train(twin, keeping, 1)
    for p in twin.parameters():
        assert torch.equal(keeping.state[p]["average"], keeping.state[p].get("latent", p))
    load_checkpoint(tmp_path / "plain", twin, keeping)
    assert keeping.state[twin[0].weight]["average_count"] == 0
    save_checkpoint(tmp_path / "kept", twin, keeping)
    before = copies(held(net, plain))
    with pytest.raises(
        ValueError, match=r"'0 of group 0': it has an average .* optimizer keeps none"
    ):
        plain.load_state_dict(keeping.state_dict())
    with pytest.raises(ValueError, match=r"an average of the latents of parameter '0\.weight'"):
        load_checkpoint(tmp_path / "kept", net, plain)
    assert equal(held(net, plain), before)
    state = keeping.state_dict()
    for entries in state["state"].values():  # as the error says
        for key in ("average", "average_count", "average_total"):
            del entries[key]
    plain.load_state_dict(state)
    with pytest.raises(ValueError, match="no average is kept"), plain.averaged_weights():
        pass
    with pytest.raises(ValueError, match=r"QuantOptimizer: average must lie in \[0, 1\], got 2"):
        quantized(net, 2.0)
