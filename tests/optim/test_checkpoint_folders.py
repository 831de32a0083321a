"""Checkpoint folders: what they replace, what they hold beside tensors, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from parq_fn.optim import QuantOptimizer, load_checkpoint, save_checkpoint
from tests.optim.adapters import SOON, saved_with_a_frozen_layer


def test_nothing_but_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    net, optimizer = saved_with_a_frozen_layer("QuantOptimizer")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.csv").write_text("a month of work")
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for name in ("out", "file", "link"):
        with pytest.raises(ValueError, match="is no checkpoint and not empty"):
            save_checkpoint(tmp_path / name, net, optimizer)
    assert (tmp_path / "out" / "results.csv").read_text() == "a month of work"
    (tmp_path / "empty").mkdir()
    left_over = tmp_path / ".empty.parq_fn-unfinished"
    left_over.mkdir()
    (left_over / "__0_0.distcp").write_text("")
    save_checkpoint(tmp_path / "empty", net, optimizer)
    save_checkpoint(tmp_path / "empty", net, optimizer)
    load_checkpoint(tmp_path / "empty", net, optimizer)
    assert {p.name for p in tmp_path.iterdir()} == {"empty", "file", "link", "out"}
    left_over.mkdir()
    (left_over / "notes").write_text("another's")
    with pytest.raises(ValueError, match="is in the way, and holds what no checkpoint does"):
        save_checkpoint(tmp_path / "empty", net, optimizer)
    assert (left_over / "notes").exists()
    for place in (Path.cwd().parent, Path("/")):
        with pytest.raises(ValueError, match="is no checkpoint and not empty"):
            save_checkpoint(place, net, optimizer)


def test_extra_entries_that_do_not_fit_a_checkpoint_raise(tmp_path: Path) -> None:
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


def test_a_checkpoint_quantized_otherwise_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    def build(bits: int, seed: int) -> tuple[nn.Linear, QuantOptimizer]:
        torch.manual_seed(seed)
        net = nn.Linear(8, 4)
        groups = [
            {"params": [net.weight], "quant_bits": 2},
            {"params": [net.bias], "quant_bits": bits},
        ]
        return net, QuantOptimizer(torch.optim.SGD(groups, lr=0.1, momentum=0.9), SOON)

    save_checkpoint(tmp_path / "last", *build(1, 0))
    net, optimizer = build(2, 1)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="has quant_bits=1 in group 1, the optimizer 2"):
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
