"""Hugging Face accelerate: prepare, gradient accumulation, clipping, saving and resuming; on two
ranks with DDP, and with its code for FSDP2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="needs accelerate: pip install 'parq_fn[integrations]'")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
)
from torch import nn
from torch.distributed.tensor import DTensor

from tests.integrations.training import (
    ADAPTERS,
    as_torchrun_tells,
    check_on_levels,
    check_same,
    data,
    loss_of,
    network,
    of_the_page,
    plain_loop,
    schedule,
)
from tests.processes import on_processes


class Run:
    """A loop as accelerate's documentation writes it."""

    def __init__(self, adapter: str, every: int = 1, **options: Any) -> None:
        plugin = GradientAccumulationPlugin(num_steps=every, sync_with_dataloader=False)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin, **options)
        self.begin(adapter)

    def begin(self, adapter: str) -> None:
        net = network()
        own = ADAPTERS[adapter](net)
        prepared: Any = self.accelerator.prepare(net, own, data(), schedule(own))
        self.net, self.optimizer, self.batches, self.scheduler = prepared

    def train(self, batches: slice = slice(None), clip: float | None = None) -> None:
        for inputs, targets in list(self.batches)[batches]:
            with self.accelerator.accumulate(self.net):
                self.accelerator.backward(loss_of(self.net, inputs, targets))
                if clip is not None and self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.net.parameters(), clip)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_equals_a_plain_loop(adapter: str) -> None:
    run = Run(adapter)
    run.train(clip=0.5)
    net, _ = plain_loop(adapter, clip=0.5)
    check_same(net, run.net)
    check_on_levels(run.net, run.optimizer.optimizer)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_accumulated_gradients_are_one_step(adapter: str) -> None:
    run = Run(adapter, every=3)
    run.train()
    net, _ = plain_loop(adapter, every=3)
    check_same(net, run.net)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_r8_saved_and_resumed_it_ends_as_if_left_alone(adapter: str, tmp_path: Path) -> None:
    straight, stopped, resumed = Run(adapter), Run(adapter), Run(adapter)
    straight.train()
    stopped.train(slice(0, 5))
    stopped.accelerator.save_state(str(tmp_path / "half"))
    resumed.accelerator.load_state(str(tmp_path / "half"))
    resumed.train(slice(5, None))
    check_same(straight.net, resumed.net)


class Sharded(Run):
    """With the plugin for FSDP2, and the schedule stepped once a step whatever the ranks.

    on_cpu: whether accelerate is told that it may use it here; it takes DDP in its place
    otherwise, without a word.
    """

    def __init__(self, adapter: str, on_cpu: bool) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=1
        )
        self.told = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        self.on_cpu = on_cpu
        super().__init__(adapter, fsdp_plugin=plugin, step_scheduler_with_optimizer=False)

    def begin(self, adapter: str) -> None:
        if self.on_cpu:
            AcceleratorState._shared_state.update(self.told)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        super().begin(adapter)


def _on_two_ranks(folder: str, on_cpu: bool) -> None:
    as_torchrun_tells()
    if not on_cpu:
        os.chdir(folder)
        of_the_page("accelerate")
    for adapter in ADAPTERS:
        straight, stopped, resumed = (Sharded(adapter, on_cpu) for _ in range(3))
        straight.train()
        (shard, *_) = straight.net.parameters()
        assert isinstance(shard, DTensor) is on_cpu
        assert isinstance(straight.net, nn.parallel.DistributedDataParallel) is not on_cpu
        net, _ = plain_loop(adapter, every=2)  # each rank has one of two batches
        check_same(net, straight.net)
        stopped.train(slice(0, 3))
        stopped.accelerator.save_state(f"{folder}/{adapter}")
        stopped.accelerator.wait_for_everyone()
        resumed.accelerator.load_state(f"{folder}/{adapter}")
        resumed.train(slice(3, None))
        check_same(net, resumed.net)


@pytest.mark.parametrize("on_cpu", [False, True])
def test_two_ranks_equal_a_plain_loop_and_resume_to_the_bit(on_cpu: bool, tmp_path: Path) -> None:
    on_processes(_on_two_ranks, 2, tmp_path, str(tmp_path), on_cpu)
