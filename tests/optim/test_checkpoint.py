"""The contract's acceptance matrix: the next steps after loading are those of a run that was
never interrupted, bit for bit, on as many ranks as it was saved on or on others."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from parq_fn.optim import load_checkpoint, save_checkpoint
from tests.helpers import copies, every_case, pairwise, sampled
from tests.optim.helpers import ADAPTERS, begin, check_same, scheduled, state_of, train
from tests.plugin import seed
from tests.processes import on_processes

#: before training, in warmup, mid-anneal, after the last weight froze
STEPS = (0, 1, 5, 11)
CASES = sampled(pairwise(list(ADAPTERS), ("float32", "bfloat16"), (False, True), STEPS), 5)


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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_on_one_process_without_a_group(tmp_path: Path) -> None:
    save(str(tmp_path), False)
    load(str(tmp_path), False)


@pytest.mark.rare
@pytest.mark.parametrize("world", sampled([1, 2, 4], 1))
def test_r18_saved_on_2_ranks_loaded_on_others(
    world: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "saved-on-2"
    if not folder.exists():
        folder.mkdir()
        on_processes(save, 2, folder, str(folder), True)
    on_processes(load, world, folder, str(folder), True)


# Files


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_save_and_load_with_a_scheduler(adapter: str, tmp_path: Path) -> None:
    net, optimizer, scheduler = scheduled(adapter, 5)
    for _ in range(2):  # the second takes the place of the first
        save_checkpoint(tmp_path / "new" / "last", net, optimizer, scheduler=scheduler)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["last"]
    other, again, its = scheduled(adapter, 0)
    load_checkpoint(tmp_path / "new" / "last", other, again, scheduler=its)
    for one, two, three in ((net, optimizer, scheduler), (other, again, its)):
        for _ in range(4):
            train(one, two, 1)
            three.step()
    check_same(net, optimizer, other, again, adapter)
    assert again.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] != 0.05


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_part_of_what_was_saved(adapter: str, tmp_path: Path) -> None:
    net, optimizer = begin(adapter, "float32", split=False)
    train(net, optimizer, 5)
    save_checkpoint(tmp_path / "last", net, optimizer, progress={"epoch": 3})
    progress: dict[str, Any] = {}
    load_checkpoint(tmp_path / "last", progress=progress)
    assert progress == {"epoch": 3}
    alone, _ = begin(adapter, "float32", split=False)
    load_checkpoint(tmp_path / "last", alone)
    assert all(map(torch.equal, alone.parameters(), net.parameters()))
    with pytest.raises(TypeError, match="an optimizer without its model"):
        load_checkpoint(tmp_path / "last", None, optimizer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_a_checkpoint_that_was_cut_off_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    net, optimizer, _ = scheduled("QuantOptimizer", 5)
    save_checkpoint(tmp_path / "whole", net, optimizer)
    other, again, _ = scheduled("QuantOptimizer", 2)
    before = copies(state_of(other, again))
    names = [path.name for path in (tmp_path / "whole").iterdir()]
    assert ".metadata" in names
    for name in names:
        full = (tmp_path / "whole" / name).read_bytes()
        for share in (0.0, 0.3, 0.99, None):
            shutil.rmtree(tmp_path / "cut", ignore_errors=True)
            shutil.copytree(tmp_path / "whole", tmp_path / "cut")
            file = tmp_path / "cut" / name
            if share is None:
                file.unlink()
            else:
                file.write_bytes(full[: int(share * len(full))])
            with pytest.raises(ValueError, match="cut off"):
                load_checkpoint(tmp_path / "cut", other, again)
            assert all(map(torch.equal, state_of(other, again), before))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*nowhere"):
        load_checkpoint(tmp_path / "nowhere", other, again)
    load_checkpoint(tmp_path / "whole", other, again)
    check_same(net, optimizer, other, again, "whole")


@pytest.mark.rare
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_killed_at_any_moment_it_resumes_and_ends_as_if_left_alone(
    adapter: str, tmp_path: Path
) -> None:
    """Moments are the steps, and every thing that saving does to a file; a run takes one of each
    eight of them, or all."""
    every = 1 if every_case() else 8
    first = 1 + seed() % every
    command = [sys.executable, "-m", "tests.optim.killed", str(tmp_path), adapter]
    command += [str(first), str(every)]
    root = Path(__file__).parent.parent.parent
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found["last"] >= 20  # of those that are taken
    assert found["wrong"] == [], ended.stderr


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_plain_files_and_safetensors(adapter: str, tmp_path: Path) -> None:
    """torch.save(weights_only=True) of state_dict(), and safetensors of the flattened state."""
    net, optimizer, _ = scheduled(adapter, 5)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model, flat = get_state_dict(net, optimizer, options=options)
    tensors = {key: got for key, got in flat.items() if isinstance(got, Tensor)}
    rest = {key: got for key, got in flat.items() if key not in tensors}
    save_file(tensors, tmp_path / "state.safetensors", metadata={"rest": json.dumps(rest)})

    for way in ("plain", "safetensors"):
        other, again, _ = scheduled(adapter, 0)
        if way == "plain":
            other.load_state_dict(net.state_dict())
            again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        else:
            with safe_open(tmp_path / "state.safetensors", "pt") as file:
                read = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 # no dict
                read |= json.loads(file.metadata()["rest"])
            set_state_dict(
                other, again, model_state_dict=model, optim_state_dict=read, options=options
            )
        check_same(net, optimizer, other, again, way)
        train(other, again, 3)
        straight, its, _ = scheduled(adapter, 5)
        train(straight, its, 3)
        check_same(straight, its, other, again, way)

    for name, read_file in (("state.pt", torch.load), ("state.safetensors", load_file)):
        full = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(full[: len(full) // 2])
        with pytest.raises((OSError, RuntimeError, SafetensorError)):  # before there is a state
            read_file(tmp_path / name)
