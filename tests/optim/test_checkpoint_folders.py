"""Checkpoint folders: what they replace, what they hold beside tensors, what is refused."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer, load_checkpoint, save_checkpoint
from tests.helpers import copies
from tests.optim.adapters import SOON, saved_with_a_frozen_layer
from tests.optim.helpers import state_of


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


def build(adapter: str, prox: pf.Prox = SOON) -> tuple[nn.Module, Any]:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if adapter == "QuantOptimizer":
        groups = [{"params": list(net.named_parameters()), "quant_bits": 1}]
        return net, QuantOptimizer(torch.optim.SGD(groups, lr=0.1), prox)
    return net, TransformOptimizer(net.named_parameters(), pf.chain(pf.sgd(0.1), prox))


@pytest.mark.parametrize("adapter", ["QuantOptimizer", "TransformOptimizer"])
def test_a_checkpoint_of_another_prox_link_changes_nothing(adapter: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "last", *build(adapter))
    net, optimizer = build(adapter, dataclasses.replace(SOON, anneal_end=99))
    before = copies(state_of(net, optimizer))
    with pytest.raises(ValueError, match=r"'0\.weight' was trained with another .* has, parq"):
        load_checkpoint(tmp_path / "last", net, optimizer)
    assert all(map(torch.equal, state_of(net, optimizer), before))


def test_a_transform_optimizers_checkpoint_is_none_of_a_base_alone(tmp_path: Path) -> None:
    """Its latents were left out, and its quantized weights trained."""
    save_checkpoint(tmp_path / "last", *build("TransformOptimizer"))
    net, optimizer = build("QuantOptimizer")
    before = copies(state_of(net, optimizer))
    with pytest.raises(ValueError, match="it is of a TransformOptimizer; load the model alone"):
        load_checkpoint(tmp_path / "last", net, optimizer)
    assert all(map(torch.equal, state_of(net, optimizer), before))


def test_what_a_smaller_model_leaves_out_is_named(tmp_path: Path) -> None:
    net, optimizer = build("QuantOptimizer")
    save_checkpoint(tmp_path / "last", net, optimizer)
    small = net[:1]
    groups = [{"params": small.parameters(), "quant_bits": 1}]
    with pytest.warns(UserWarning, match=r"holds 1\.bias, 1\.weight of another .* 2 entries more"):
        load_checkpoint(
            tmp_path / "last", small, QuantOptimizer(torch.optim.SGD(groups, lr=0.1), SOON)
        )
    load_checkpoint(tmp_path / "last", net)  # without a warning


def test_gradients_that_are_there_keep_no_moments_from_being_loaded(tmp_path: Path) -> None:
    """torch makes no state of an optimizer then, and loads into what there is."""
    net = nn.Linear(3, 2)
    plain = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(torch.ones(1, 3)).sum().backward()
    plain.step()
    save_checkpoint(tmp_path / "last", net, plain)
    other = nn.Linear(3, 2)
    again = torch.optim.AdamW(other.parameters(), lr=0.2)
    other(torch.ones(1, 3)).sum().backward()
    grad = other.weight.grad
    load_checkpoint(tmp_path / "last", other, again)
    assert torch.equal(again.state[other.weight]["exp_avg"], plain.state[net.weight]["exp_avg"])
    assert other.weight.grad is grad


def test_a_model_on_the_meta_device_is_refused(tmp_path: Path) -> None:
    net, optimizer = build("QuantOptimizer")
    save_checkpoint(tmp_path / "last", net, optimizer)
    with pytest.raises(ValueError, match=r"'0\.weight' of the model is on the meta .*to_empty"):
        load_checkpoint(tmp_path / "last", net.to("meta"))


def test_entries_that_a_checkpoint_does_not_give_back_are_refused(tmp_path: Path) -> None:
    net, optimizer = build("QuantOptimizer")
    with pytest.raises(TypeError, match=r"progress\['loss'\] has the key 1, expected strings"):
        save_checkpoint(tmp_path / "last", net, optimizer, progress={"loss": {1: 0.5}})
    with pytest.raises(ValueError, match="last cannot be written: Can't pickle"):
        save_checkpoint(tmp_path / "last", net, optimizer, progress={"of": lambda: 1})
    assert not [*tmp_path.iterdir()]


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
