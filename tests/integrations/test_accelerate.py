"""Hugging Face accelerate: prepare, gradient accumulation, clipping, saving and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate", reason="needs accelerate: pip install 'parq_fn[integrations]'")

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from tests.integrations.training import (
    ADAPTERS,
    check_on_levels,
    check_same,
    data,
    loss_of,
    network,
    plain_loop,
    schedule,
)


class Run:
    """A loop as accelerate's documentation writes it."""

    def __init__(self, adapter: str, every: int = 1) -> None:
        plugin = GradientAccumulationPlugin(num_steps=every, sync_with_dataloader=False)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
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
