"""Latents in bfloat16: rounded stochastically, by draws that follow from the state alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, load_checkpoint, save_checkpoint
from parq_fn.transforms.noise import mixed
from parq_fn.transforms.stochastic_rounding import round_into
from tests.helpers import sampled
from tests.optim import bases
from tests.optim.helpers import BITS, PROXES, Net, check_same, sharded, train
from tests.processes import on_processes

BF16 = torch.bfloat16
LINKS = {name: link for name, link in PROXES.items() if name != "proxquant"} | {
    "hold": pf.hard_prox(pf.lsbq(2), period=1, hold=pf.oscillation(0.1, momentum=0.5)),
    "learn": pf.hard_prox(pf.uniform(2), learn=pf.sgd(1e-3)),
    "pull": pf.hard_prox(pf.lsbq(2), period=1, pull=2.0),
}


def rounded(x: Tensor, key: int | Tensor) -> Tensor:
    found = torch.empty(x.shape, dtype=BF16)
    round_into(found, x, torch.as_tensor(key), found)
    return found


def built(
    net: nn.Module, link: pf.Prox, base: Any = torch.optim.AdamW, **options: Any
) -> QuantOptimizer:
    named = list(net.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if n in BITS], "quant_bits": 2},
        {"params": [(n, p) for n, p in named if n not in BITS]},
    ]
    return QuantOptimizer(base(groups, lr=0.05), link, **options)


# The rounding


@given(st.lists(st.floats(width=32), min_size=1, max_size=8), st.integers(-(2**63), 2**63 - 1))
def test_a_number_goes_to_a_neighbour_in_bfloat16_and_one_of_it_stays(
    numbers: list[float], key: int
) -> None:
    x = torch.tensor(numbers)
    found = rounded(x, key).float()
    exact = x == x.to(BF16).float()
    assert torch.equal(found[exact], x[exact])
    assert torch.equal(found.isnan(), x.isnan())
    bits = x.view(torch.int32)
    down = (bits & ~0xFFFF).view(torch.float32)  # towards zero
    up = ((bits & ~0xFFFF) + 0x10000).view(torch.float32)
    assert bool(((found == down) | (found == up) | x.isnan() | x.isinf()).all())


def test_nan_with_all_its_bits_set_stays_nan() -> None:
    x = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert all(rounded(x, key).isnan().all() for key in range(20))


def test_no_two_rows_have_draws_in_common() -> None:
    """However one is moved along the other: those of 64 columns agree by chance in half."""
    found = rounded(torch.full((20, 128), 1 + 0.5 / 128), 5) > 1
    for i, row in enumerate(found):
        for other in found[i + 1 :]:
            for by in range(-64, 65):
                one, two = (row[by:], other) if by >= 0 else (row, other[-by:])
                same = (one[:64] == two[:64]).sum()
                assert 8 < int(same) < 56, (i, by)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_it_goes_up_as_often_as_it_is_near_the_upper_one(share: float) -> None:
    count = 40_000
    x = torch.full((count,), 1 + share / 128)
    by_index = (rounded(x, 3) > 1).double().mean()
    by_key = torch.stack([rounded(x[:100], key) > 1 for key in range(count // 100)]).double().mean()
    deviation = (share * (1 - share) / count) ** 0.5
    assert abs(by_index - share) < 5 * deviation
    assert abs(by_key - share) < 5 * deviation


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 3, 4), (300, 1000)])
def test_draws_depend_on_the_place_alone(shape: tuple[int, ...]) -> None:
    """Whatever the memory format; one number in all places shows it."""
    x = torch.full(shape, 1 + 0.5 / 128)
    found = rounded(x, 7)
    if x.dim() == 2:
        assert torch.equal(found[:2], rounded(x[:2], 7))
        assert x.numel() < 100 or 0.45 < (found > 1).double().mean() < 0.55
        turned = torch.empty(*reversed(shape), dtype=BF16).t()
        round_into(turned, x, torch.tensor(7), turned)
        assert torch.equal(turned, found)


# The optimizer


@pytest.mark.parametrize("base", ["AdamW", "SGD", "Packs"])
@pytest.mark.parametrize("name", sampled(LINKS, 3))
def test_a_step_is_that_of_latents_in_float32_rounded_once(name: str, base: str) -> None:
    make: Any = {"Packs": bases.Packs}.get(base) or getattr(torch.optim, base)
    narrow_net, wide_net = Net(BF16), Net(BF16)
    narrow = built(narrow_net, LINKS[name], make, latent_dtype=BF16)
    wide = built(wide_net, LINKS[name], make)
    for _ in range(8):
        wide_net.load_state_dict(narrow_net.state_dict())
        wide.load_state_dict(narrow.state_dict())
        train(narrow_net, narrow, 1)
        train(wide_net, wide, 1)
        for (n, p), q in zip(narrow_net.named_parameters(), wide_net.parameters(), strict=True):
            mine, theirs = narrow.state[p], wide.state[q]
            if n in BITS:
                assert mine["latent"].dtype == BF16
                key = mixed(mine["rounding"] + mine["updates"])
                assert torch.equal(mine["latent"], rounded(theirs["latent"], key)), n
            own = narrow.base.state[narrow._latents[p]]
            assert own is mine
            for entry, got in theirs.items():
                if entry in ("exp_avg", "exp_avg_sq", "step", "updates", "count"):
                    assert torch.equal(mine[entry], got), (n, entry)
    assert narrow.base.state.keys() == {narrow._latents[p] for p in narrow_net.parameters()}


def test_steps_smaller_than_a_last_place_are_not_lost() -> None:
    def after(**options: Any) -> float:
        p = nn.Parameter(torch.ones(64, 64, dtype=BF16))
        base = torch.optim.SGD([{"params": [p], "quant_bits": 2}], lr=1e-4)
        late = pf.parq_prox(pf.lsbq(2), anneal_start=1000, anneal_end=2000, period=1000)
        optimizer = QuantOptimizer(base, late, **options)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        return float(optimizer.state[p]["latent"].double().mean())

    # 4,096 weights one step of 1/256 below 1, or none: 0.01 up to 5 deviations of their mean
    assert abs(after(latent_dtype=BF16) - 0.99) < 5 * 0.01 / 64
    assert abs(after() - 0.99) < 1e-4


def test_nothing_is_drawn_from_a_generator() -> None:
    before = torch.get_rng_state()
    net = Net(BF16)
    draws = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = Net(BF16)
        optimizer = built(net, LINKS["parq"], latent_dtype=BF16)
        state = torch.get_rng_state()
        x = torch.ones(4, 2, 6, 6, dtype=BF16)
        for _ in range(3):
            net(x).square().mean().backward()
            optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        draws.append(optimizer.state[net.linear.weight]["latent"].clone())
    assert torch.equal(*draws)
    torch.set_rng_state(before)


def by_file(one: QuantOptimizer, net: Net, other: Net, again: QuantOptimizer, at: Path) -> None:
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(net.state_dict())
    again.load_state_dict(torch.load(file, weights_only=True))


def by_checkpoint(
    one: QuantOptimizer, net: Net, other: Net, again: QuantOptimizer, at: Path
) -> None:
    save_checkpoint(at, net, one)
    load_checkpoint(at, other, again)


def by_copy(one: QuantOptimizer, net: Net, other: Net, again: QuantOptimizer, at: Path) -> None:
    mine, its = copy.deepcopy((net, one))
    other.load_state_dict(mine.state_dict())
    again.load_state_dict(its.state_dict())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("way", [by_file, by_checkpoint, by_copy])
def test_it_is_resumed_to_the_bit(way: Callable[..., None], tmp_path: Path) -> None:
    link = LINKS["parq_normal_map"]
    straight, net, other = Net(BF16), Net(BF16), Net(BF16)
    its, optimizer, again = (
        built(n, link, latent_dtype=BF16, average=0.9) for n in (straight, net, other)
    )
    train(straight, its, 9)
    train(net, optimizer, 4)
    with torch.no_grad():
        other.linear.weight.add_(1.0)
    train(other, again, 1)
    way(optimizer, net, other, again, tmp_path / "last")
    train(other, again, 5)
    check_same(straight, its, other, again, way)


def test_a_state_of_latents_in_float32_goes_on_and_back() -> None:
    narrow_net, wide_net = Net(BF16), Net(BF16)
    wide = built(wide_net, LINKS["parq"])
    narrow = built(narrow_net, LINKS["parq"], latent_dtype=BF16)
    train(wide_net, wide, 4)
    narrow_net.load_state_dict(wide_net.state_dict())
    narrow.load_state_dict(wide.state_dict())
    p, q = narrow_net.linear.weight, wide_net.linear.weight
    assert torch.equal(narrow.state[p]["latent"], wide.state[q]["latent"].to(BF16))
    train(narrow_net, narrow, 1)
    wide.load_state_dict(narrow.state_dict())
    assert "rounding" not in wide.state[q]
    assert torch.equal(wide.state[q]["latent"], narrow.state[p]["latent"].float())


def test_training_in_full_precision_is_the_start_of_narrow_latents_too() -> None:
    net, other = Net(BF16), Net(BF16)
    plain = torch.optim.AdamW(net.parameters(), lr=0.05)
    train(net, plain, 3)
    groups = [{"params": other.parameters(), "quant_bits": 2}]
    optimizer = QuantOptimizer(torch.optim.AdamW(groups), LINKS["hard"], latent_dtype=BF16)
    other.load_state_dict(net.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    entries, own = optimizer.state[other.linear.weight], plain.state[net.linear.weight]
    assert torch.equal(entries["latent"], net.linear.weight)
    assert entries["exp_avg"].dtype == torch.float32
    assert torch.equal(entries["exp_avg"], own["exp_avg"].float())
    train(other, optimizer, 1)


def test_a_step_that_the_base_breaks_off_leaves_latents_in_place() -> None:
    net = Net(BF16)
    optimizer = built(net, LINKS["parq"], latent_dtype=BF16)
    train(net, optimizer, 2)
    twin, its = copy.deepcopy((net, optimizer))
    step = optimizer.base.step

    def broken(*_: Any) -> None:
        raise KeyError

    optimizer.base.step = broken  # type: ignore[method-assign]
    with pytest.raises(KeyError):
        optimizer.step()
    optimizer.base.step = step  # type: ignore[method-assign]
    train(net, optimizer, 2)
    train(twin, its, 2)
    check_same(twin, its, net, optimizer, "after it")


# Two ranks


def on_two_ranks(folder: str) -> None:
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
    whole = rounded(x, 3)
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        mine = distribute_tensor(x, mesh, [placement])
        into = distribute_tensor(torch.zeros_like(whole), mesh, [placement])
        round_into(into.to_local(), mine.to_local(), torch.tensor(3), into)
        assert torch.equal(into.full_tensor(), whole), placement

    for name in ("parq_normal_map", "damped"):
        alone, net = Net(BF16), sharded(Net(BF16), (2,))
        one, other = (built(each, LINKS[name], latent_dtype=BF16) for each in (alone, net))
        train(alone, one, 5)
        train(net, other, 5)
        check_same(alone, one, net, other, name)
        save_checkpoint(Path(folder) / name, net, other)
        net = sharded(Net(BF16), (2,))
        other = built(net, LINKS[name], latent_dtype=BF16)
        load_checkpoint(Path(folder) / name, net, other)
        train(alone, one, 4)
        train(net, other, 4)
        check_same(alone, one, net, other, name)


@pytest.mark.slow  # two processes
def test_shards_draw_as_one_process(tmp_path: Path) -> None:
    on_processes(on_two_ranks, 2, tmp_path, str(tmp_path))


# Refusals


@pytest.mark.parametrize(
    ("dtype", "param", "base", "error", "match"),
    [
        (torch.float16, BF16, torch.optim.SGD, ValueError, "must be torch.bfloat16, whose range"),
        ("bfloat16", BF16, torch.optim.SGD, TypeError, "must be torch.bfloat16, or None"),
        (BF16, torch.float32, torch.optim.SGD, ValueError, "'conv.weight' is torch.float32; conv"),
        (BF16, BF16, bases.HasModes, ValueError, "is not for HasModes, whose train"),
    ],
)
def test_what_latents_cannot_be_is_refused(
    dtype: Any, param: torch.dtype, base: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        built(Net(param), LINKS["parq"], base, latent_dtype=dtype)
