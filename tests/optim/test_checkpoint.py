"""The contract's acceptance matrix: the next steps after loading are those of a run that was
never interrupted, bit for bit, on as many ranks as it was saved on or on others."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import parq_fn as pf
from parq_fn.optim import QuantOptimizer
from tests.optim.processes import on_processes
from tests.optim.test_sharded import Net, optimizer_of, train, whole

PROX = pf.parq_prox(pf.lsbq(2), anneal_start=2, anneal_end=9, period=3, warmup=2, normal_map=5.0)
#: before training, in warmup, mid-anneal, after the last weight froze
STEPS = (0, 1, 5, 11)
CASES = list(itertools.product(("float32", "bfloat16"), (False, True), STEPS))


def begin(dtype: str, sharded: bool) -> tuple[Net, QuantOptimizer]:
    net = Net(getattr(torch, dtype))
    if sharded:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(net.linear, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net, optimizer_of(net, PROX)


def save(folder: str, sharded: bool) -> None:
    for dtype, flat, steps in CASES:
        net, optimizer = begin(dtype, sharded)
        train(net, optimizer, steps)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, state = get_state_dict(net, optimizer, options=options)
        where = Path(folder) / f"{dtype}-{flat}-{steps}"
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=where)


def load(folder: str, sharded: bool) -> None:
    for dtype, flat, steps in CASES:
        net, optimizer = begin(dtype, sharded)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1.0)  # nothing but what is loaded may count
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, state = get_state_dict(net, optimizer, options=options)
        saved = {"model": model, "optimizer": state}
        dcp.load(saved, checkpoint_id=Path(folder) / f"{dtype}-{flat}-{steps}")
        set_state_dict(
            net,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=options,
        )
        straight, other = begin(dtype, sharded=False)
        train(straight, other, steps)
        for ahead in range(4):
            compare(straight, other, net, optimizer, (dtype, flat, steps, ahead))
            train(straight, other, 1)
            train(net, optimizer, 1)


def compare(straight: Net, one: QuantOptimizer, net: Net, other: QuantOptimizer, at: Any) -> None:
    for (name, p), q in zip(straight.named_parameters(), net.parameters(), strict=True):
        assert torch.equal(p, whole(q)), (*at, name)
        mine, theirs = one.state[p], other.state[q]
        assert mine.keys() == theirs.keys(), (*at, name)
        for key, own in mine.items():
            got = whole(theirs[key])
            assert own.dtype == got.dtype, (*at, name, key)
            assert torch.equal(own, got), (*at, name, key)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_on_one_process_without_a_group(tmp_path: Path) -> None:
    save(str(tmp_path), False)
    load(str(tmp_path), False)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_saved_on_2_ranks_loaded_on_others(
    world: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "saved-on-2"
    if not folder.exists():
        folder.mkdir()
        on_processes(save, 2, folder, str(folder), True)
    on_processes(load, world, folder, str(folder), True)
