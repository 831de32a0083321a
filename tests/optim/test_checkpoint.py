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

import parq_fn as pf
from tests.optim.processes import on_processes
from tests.optim.test_sharded import ADAPTERS, Net, check_same, sharded, train

PROX = pf.parq_prox(pf.lsbq(2), anneal_start=2, anneal_end=9, period=3, warmup=2, normal_map=5.0)
#: before training, in warmup, mid-anneal, after the last weight froze
STEPS = (0, 1, 5, 11)
CASES = list(itertools.product(ADAPTERS, ("float32", "bfloat16"), (False, True), STEPS))


def begin(adapter: str, dtype: str, split: bool) -> tuple[Net, Any]:
    net = Net(getattr(torch, dtype))
    if split:
        sharded(net, (dist.get_world_size(),))
    return net, ADAPTERS[adapter](net, PROX)


def save(folder: str, split: bool) -> None:
    for adapter, dtype, flat, steps in CASES:
        net, optimizer = begin(adapter, dtype, split)
        train(net, optimizer, steps)
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, state = get_state_dict(net, optimizer, options=options)
        where = Path(folder) / f"{adapter}-{dtype}-{flat}-{steps}"
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=where)


def load(folder: str, split: bool) -> None:
    for adapter, dtype, flat, steps in CASES:
        net, optimizer = begin(adapter, dtype, split)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(1.0)  # nothing but what is loaded may count
        options = StateDictOptions(flatten_optimizer_state_dict=flat)
        model, state = get_state_dict(net, optimizer, options=options)
        saved = {"model": model, "optimizer": state}
        dcp.load(saved, checkpoint_id=Path(folder) / f"{adapter}-{dtype}-{flat}-{steps}")
        set_state_dict(
            net,
            optimizer,
            model_state_dict=saved["model"],
            optim_state_dict=saved["optimizer"],
            options=options,
        )
        straight, other = begin(adapter, dtype, split=False)
        train(straight, other, steps)
        for ahead in range(4):
            check_same(straight, other, net, optimizer, (adapter, dtype, flat, steps, ahead))
            train(straight, other, 1)
            train(net, optimizer, 1)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_on_one_process_without_a_group(tmp_path: Path) -> None:
    save(str(tmp_path), False)
    load(str(tmp_path), False)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_r18_saved_on_2_ranks_loaded_on_others(
    world: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "saved-on-2"
    if not folder.exists():
        folder.mkdir()
        on_processes(save, 2, folder, str(folder), True)
    on_processes(load, world, folder, str(folder), True)
