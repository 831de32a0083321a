"""What a checkpoint holds of groups, by the names of parameters; starting from full precision."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer, load_checkpoint, save_checkpoint
from tests.helpers import copies
from tests.optim.helpers import BITS, SAVED, Net, check_same, quantized, sharded, state_of, train
from tests.processes import on_processes

QUIET = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or unini")


# Starting from full precision


def full_precision(dtype: str, split: bool, base: Any = torch.optim.AdamW) -> tuple[Net, Any]:
    net = Net(getattr(torch, dtype))
    if split:
        sharded(net, (dist.get_world_size(),))
    return net, base(net.parameters(), lr=0.02)


def saves(folder: str, split: bool, dtype: str) -> None:
    net, plain = full_precision(dtype, split)
    train(net, plain, 3)
    save_checkpoint(Path(folder) / "ours", net, plain)
    model, state = get_state_dict(net, plain)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=Path(folder) / "torchs")
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model, state = get_state_dict(net, plain, options=flat)
    dcp.save({"model": model, "optimizer": state}, checkpoint_id=Path(folder) / "flat")
    for group in plain.param_groups:
        group["quant_bits"] = 16
    save_checkpoint(Path(folder) / "wrapped", net, QuantOptimizer(plain, SAVED))


def starts(folder: str, split: bool, dtype: str) -> None:
    """As where the base that has learned is wrapped in the process that trained it."""
    straight = Net(getattr(torch, dtype))
    base = torch.optim.AdamW(_groups(straight), lr=0.02)
    train(straight, base, 3)
    again = QuantOptimizer(base, SAVED)
    for name in ("ours", "torchs", "flat", "wrapped"):
        net = Net(getattr(torch, dtype))
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1.0)
        optimizer = quantized(sharded(net, (dist.get_world_size(),)) if split else net, SAVED)
        load_checkpoint(Path(folder) / name, net, optimizer)
        assert {group["lr"] for group in optimizer.param_groups} == {0.02}
        assert [g["quant_bits"] for g in optimizer.param_groups] == [2, 32, 1]
        whole, its = copy.deepcopy((straight, again))
        for ahead in range(3):
            check_same(whole, its, net, optimizer, (name, ahead))
            train(whole, its, 1)
            train(net, optimizer, 1)


def _groups(net: Net) -> list[dict[str, Any]]:
    """Those of `quantized`."""
    by_bits: dict[int, list[Any]] = {}
    for name, p in net.named_parameters():
        by_bits.setdefault(BITS.get(name, 32), []).append((name, p))
    return [{"params": params, "quant_bits": bits} for bits, params in by_bits.items()]


@pytest.mark.slow
@QUIET
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_in_full_precision_is_the_start_of_quantized(dtype: str, tmp_path: Path) -> None:
    saves(str(tmp_path), False, dtype)
    starts(str(tmp_path), False, dtype)


@QUIET
@pytest.mark.rare
@pytest.mark.parametrize("sharded_first", [True, False])
def test_full_precision_to_quantized_on_2_ranks(sharded_first: bool, tmp_path: Path) -> None:
    if sharded_first:
        on_processes(saves, 2, tmp_path, str(tmp_path), True, "float32")
    else:
        saves(str(tmp_path), False, "float32")
    on_processes(starts, 2, tmp_path, str(tmp_path), True, "float32")


@QUIET
def test_parameters_that_full_precision_did_not_train_begin_anew(tmp_path: Path) -> None:
    """Those that it left out or froze, and all of an optimizer without moments."""
    net, _ = full_precision("float32", split=False)
    plain = torch.optim.AdamW([p for n, p in net.named_parameters() if not n.startswith("conv")])
    train(net, plain, 3)
    save_checkpoint(tmp_path / "some", net, plain)
    sgd = torch.optim.SGD(net.parameters(), lr=0.02)
    save_checkpoint(tmp_path / "none", net, sgd)
    other = Net(torch.float32)
    optimizer = quantized(other, SAVED)
    load_checkpoint(tmp_path / "some", other, optimizer)
    for name, p in other.named_parameters():
        entries = optimizer.state[p]
        assert int(entries["updates"]) == (0 if name.startswith("conv") else 1)
        assert torch.equal(entries.get("latent", p), net.get_parameter(name))
    again = QuantOptimizer(
        torch.optim.SGD([{"params": other.parameters(), "quant_bits": 2}], lr=1.0), SAVED
    )
    load_checkpoint(tmp_path / "none", other, again)
    assert again.param_groups[0]["lr"] == 0.02
    with pytest.raises(ValueError, match=r"none does not fit: Missing key .*step"):
        load_checkpoint(tmp_path / "none", other, optimizer)


@QUIET
@pytest.mark.parametrize("base", [torch.optim.AdamW, torch.optim.SGD])
def test_transform_optimizer_says_that_full_precision_has_nothing_for_it(
    base: Any, tmp_path: Path
) -> None:
    net, plain = full_precision("float32", split=False, base=base)
    train(net, plain, 2)
    save_checkpoint(tmp_path / "plain", net, plain)
    other = Net(torch.float32)
    transform = pf.chain(pf.adamw(0.05), pf.masked(pf.hard_prox(pf.lsbq(2)), "*.weight"))
    optimizer = TransformOptimizer(other.named_parameters(), transform)
    with torch.no_grad():
        other.linear.weight.add_(1.0)
    optimizer.sync()
    before = copies(state_of(other, optimizer))
    with pytest.raises(ValueError, match=r"plain does not fit: .*load the model alone"):
        load_checkpoint(tmp_path / "plain", other, optimizer)
    assert all(map(torch.equal, state_of(other, optimizer), before))
    load_checkpoint(tmp_path / "plain", other)
    optimizer.sync()
    for name, p in net.named_parameters():
        assert torch.equal(optimizer.state[other.get_parameter(name)].get("latent", p), p)


# Stages of a pipeline


def stage(rank: int, adapter: str, rate: float, bits: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(rank)
    net = nn.ModuleDict({f"stage{rank}": nn.Linear(4, 4)})
    link = pf.parq_prox(pf.lsbq(bits), anneal_start=0, anneal_end=9)
    if adapter == "QuantOptimizer":
        groups = [{"params": list(net.named_parameters()), "quant_bits": bits}]
        return net, QuantOptimizer(torch.optim.AdamW(groups, lr=rate), link)
    return net, TransformOptimizer(net.named_parameters(), pf.chain(pf.adamw(rate), link))


def step(net: nn.Module, optimizer: Any) -> None:
    for p in net.parameters():
        p.grad = torch.full_like(p, 0.5)
    optimizer.step()


def stages(folder: str, adapter: str) -> None:
    rank = dist.get_rank()
    net, optimizer = stage(rank, adapter, 0.1 * (rank + 1), rank + 1)
    step(net, optimizer)
    save_checkpoint(Path(folder) / "last", net, optimizer)
    other, again = stage(rank, adapter, 0.7, rank + 1)
    load_checkpoint(Path(folder) / "last", other, again)
    assert again.param_groups[0]["lr"] == 0.1 * (rank + 1)
    for _ in range(2):
        check_same(net, optimizer, other, again, rank)
        step(net, optimizer)
        step(other, again)
    if adapter == "QuantOptimizer":  # of one stage alone, and raised on both
        other, again = stage(rank, adapter, 0.7, 3 if rank else 1)
        with pytest.raises(ValueError, match="has quant_bits=2 in group 0, the optimizer 3"):
            load_checkpoint(Path(folder) / "last", other, again)


@pytest.mark.rare
@pytest.mark.parametrize("adapter", ["QuantOptimizer", "TransformOptimizer"])
def test_stages_of_a_pipeline_keep_their_groups_apart(adapter: str, tmp_path: Path) -> None:
    on_processes(stages, 2, tmp_path, str(tmp_path), adapter)


@QUIET
def test_groups_that_are_cut_otherwise(tmp_path: Path) -> None:
    """Each parameter has what its group had; in one group they are to agree."""
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def build(rates: list[float]) -> Any:
        parts: Any = net if len(rates) == 2 else [net]
        groups = [
            {"params": list(part.parameters()), "lr": r}
            for part, r in zip(parts, rates, strict=True)
        ]
        return torch.optim.SGD(groups, momentum=0.9)

    save_checkpoint(tmp_path / "two", net, build([0.1, 0.1]))
    save_checkpoint(tmp_path / "apart", net, build([0.1, 0.2]))
    save_checkpoint(tmp_path / "one", net, build([0.3]))
    optimizer = build([0.7])
    load_checkpoint(tmp_path / "two", net, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(ValueError, match=r"'0\.weight', which was saved with lr=0\.1, and '1"):
        load_checkpoint(tmp_path / "apart", net, optimizer)
    optimizer = build([0.7, 0.7])
    load_checkpoint(tmp_path / "one", net, optimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]


@QUIET
def test_what_groups_hold_comes_back_as_it_was(tmp_path: Path) -> None:
    """Numbers, tuples, None, tensors, lists and dicts."""
    p = nn.ParameterDict({"0": nn.Parameter(torch.ones(2, 2))})  # a name like an index
    extra = {"note": {"of": ["a", 1]}, "list": [torch.ones(1), 2.0], "none": None}
    group = {"params": [p["0"]], "quant_bits": 2, **extra}
    base = torch.optim.AdamW([group], lr=torch.tensor(0.25))
    optimizer = QuantOptimizer(base, SAVED)
    save_checkpoint(tmp_path / "last", p, optimizer)
    its = optimizer.param_groups[0]
    its.update(lr=torch.tensor(0.5), betas=(0.1, 0.2), none=1, list=[torch.zeros(1), 0.0])
    its["note"] = {"of": []}
    load_checkpoint(tmp_path / "last", p, optimizer)
    its = optimizer.param_groups[0]
    assert (float(its["lr"]), its["betas"], its["none"]) == (0.25, (0.9, 0.999), None)
    assert its["note"] == extra["note"]
    assert torch.equal(its["list"][0], torch.ones(1))
