"""torchtitan: a container of optimizers whose groups carry quant_bits, with its schedules and
checkpoints, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "torchtitan", reason="needs torchtitan, of Python 3.11 on: pip install 'parq_fn[integrations]'"
)

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import LRSchedulersContainer, ParamGroupConfig

from parq_fn.optim import QuantOptimizer
from tests.integrations.training import (
    BATCHES,
    FIRST,
    PROX,
    as_torchrun_tells,
    check_on_levels,
    check_same,
    data,
    loss_of,
    network,
    of_the_page,
    quantized,
)
from tests.processes import on_processes

KINDS: dict[str, dict[str, Any]] = {
    r"0\.weight$": {"prox": FIRST},
    "weight$": {"quant_bits": 2},
    ".*": {"weight_decay": 0.0},
}


def container(kind: Any, parts: list[nn.Module]) -> Any:
    """kind: the class of the page on engines."""
    groups = [
        ParamGroupConfig(
            pattern=pattern, optimizer_name="AdamW", optimizer_kwargs={"lr": 0.05, **more}
        )
        for pattern, more in KINDS.items()
    ]
    config = kind.Config(prox=PROX, param_groups=groups, implementation="for-loop")
    return config.build(model_parts=parts)


class Run:
    """A training of torchtitan's parts, as its trainer puts them together."""

    def __init__(self, kind: Any) -> None:
        self.net = network()
        for layer in (self.net[0], self.net[2], self.net):
            fully_shard(layer)
        self.optimizers = container(kind, [self.net])
        schedule = LRSchedulersContainer.Config(warmup_steps=2)
        self.schedules = schedule.build(optimizers=self.optimizers, training_steps=BATCHES)

    def train(self, batches: slice) -> None:
        for inputs, targets in [*data()][dist.get_rank() :: 2][batches] * 2:
            self.optimizers.zero_grad()
            loss_of(self.net, inputs, targets).backward()
            self.optimizers.step()
            self.schedules.step()

    def state(self) -> dict[str, object]:
        model = get_model_state_dict(self.net)
        return {"model": model, "optimizer": self.optimizers, "lr_scheduler": self.schedules}


def plain_loop(like: Run, batches: list[slice]) -> tuple[nn.Module, QuantOptimizer]:
    net = network()
    optimizer = quantized(net)
    (factor,) = like.schedules.schedulers[0].lr_lambdas[:1]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    both = [*zip([*data()][::2], [*data()][1::2], strict=True)]
    for half in batches:
        for pair in both[half] * 2:
            optimizer.zero_grad()
            for inputs, targets in pair:
                (loss_of(net, inputs, targets) / 2).backward()
            optimizer.step()
            schedule.step()
    return net, optimizer


def _on_two_ranks(folder: Path) -> None:
    as_torchrun_tells()
    kind = of_the_page("torchtitan")["QuantizedOptimizers"]
    halves = [slice(0, 3), slice(3, None)]
    straight, stopped, resumed = (Run(kind) for _ in range(3))
    for half in halves:
        straight.train(half)
    net, optimizer = plain_loop(straight, halves)
    check_same(net, straight.net)
    check_on_levels(net, optimizer)
    stopped.train(halves[0])
    dcp.save(stopped.state(), checkpoint_id=folder / "half")
    dcp.load(resumed.state(), checkpoint_id=folder / "half")
    resumed.train(halves[1])
    check_same(net, resumed.net)
    several = container(kind, [network(), network()])  # as a rank has under pipeline parallelism
    assert [type(one) for one in several] == [QuantOptimizer] * 2


def test_two_ranks_equal_a_plain_loop_and_resume_to_the_bit(tmp_path: Path) -> None:
    on_processes(_on_two_ranks, 2, tmp_path, tmp_path)
