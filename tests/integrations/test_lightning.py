"""Lightning: automatic optimization, where every step is a closure, and resuming; on two ranks with
ModelParallelStrategy, which is FSDP2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs lightning: pip install 'parq_fn[integrations]'")

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from parq_fn.transforms.sharded import local
from tests.integrations.training import (
    ADAPTERS,
    BATCHES,
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

# what Lightning says of itself: its use of torch's pytrees, loader workers, what it does by default
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Module(lightning.LightningModule):
    def __init__(self, adapter: str) -> None:
        super().__init__()
        self.adapter, self.net = adapter, network()
        self.seen: list[int] = []

    def training_step(self, batch: Any, index: int) -> Tensor:
        del index
        self.seen.append(local(self.net[2].weight).unique().numel())
        return loss_of(self.net, *batch)

    def configure_optimizers(self) -> Any:
        optimizer = ADAPTERS[self.adapter](self.net)
        return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]


class Sharded(Module):
    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in (self.net[0], self.net[2], self.net):
            fully_shard(layer, mesh=mesh)


def fit(
    adapter: str,
    folder: Path,
    resume: Path | None = None,
    epochs: int = 1,
    kind: type[Module] = Module,
    batches: Any = None,
    **options: Any,
) -> Module:
    module = kind(adapter)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"devices": 1, **options},
    )
    trainer.fit(module, batches or data(), ckpt_path=resume)
    module.last = trainer.optimizers[0]
    return module


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_r13_closures_run_at_the_weights(adapter: str, tmp_path: Path) -> None:
    module = fit(adapter, tmp_path, gradient_clip_val=0.5, enable_checkpointing=False)
    net, _ = plain_loop(adapter, clip=0.5)
    check_same(net, module.net)
    check_on_levels(module.net, module.last)
    assert module.seen[0] > 4  # in full precision before warmup has passed
    assert module.seen[-1] <= 4


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_accumulated_gradients_are_one_step(adapter: str, tmp_path: Path) -> None:
    module = fit(adapter, tmp_path, accumulate_grad_batches=3, enable_checkpointing=False)
    net, _ = plain_loop(adapter, every=3)
    check_same(net, module.net)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_resumed_it_ends_as_if_left_alone(adapter: str, tmp_path: Path) -> None:
    runs = []
    for resume in (None, tmp_path / "epoch=0.ckpt"):
        keep = ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, filename="{epoch}")
        runs.append(fit(adapter, tmp_path, resume, epochs=2, callbacks=[keep]))
    straight, resumed = runs
    assert len(resumed.seen) == BATCHES
    check_same(straight.net, resumed.net)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_mixed_precision(adapter: str, tmp_path: Path) -> None:
    module = fit(adapter, tmp_path, precision="bf16-mixed", enable_checkpointing=False)
    assert all(p.dtype == torch.float32 for p in module.net.parameters())
    check_on_levels(module.net, module.last)


def _on_two_ranks(folder: Path) -> None:
    as_torchrun_tells()
    os.chdir(folder)
    of_the_page("lightning")
    mine = DataLoader(list(data())[dist.get_rank() :: 2], batch_size=None)
    for adapter in ADAPTERS:
        runs = []
        for resume in (None, folder / adapter / "epoch=0.ckpt"):
            keep = ModelCheckpoint(dirpath=folder / adapter, save_top_k=-1, filename="{epoch}")
            strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            options: dict[str, Any] = {"strategy": strategy, "devices": 2, "callbacks": [keep]}
            options["use_distributed_sampler"] = False  # each has its own already
            run = fit(adapter, folder, resume, 2, Sharded, mine, **options)
            runs.append(run)
        straight, resumed = runs
        assert len(resumed.seen) == BATCHES // 2
        net, _ = plain_loop(adapter, every=2, epochs=2)  # each rank has one of two batches
        check_same(net, straight.net)
        check_same(net, resumed.net)


def test_two_ranks_equal_a_plain_loop_and_resume_to_the_bit(tmp_path: Path) -> None:
    on_processes(_on_two_ranks, 2, tmp_path, tmp_path)
