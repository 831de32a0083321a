"""Lightning: automatic optimization, where every step is a closure, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning", reason="needs lightning: pip install 'parq_fn[integrations]'")

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from tests.integrations.training import (
    ADAPTERS,
    BATCHES,
    check_on_levels,
    check_same,
    data,
    loss_of,
    network,
    plain_loop,
    schedule,
)

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
        self.seen.append(self.net[0].weight.unique().numel())
        return loss_of(self.net, *batch)

    def configure_optimizers(self) -> Any:
        optimizer = ADAPTERS[self.adapter](self.net)
        return [optimizer], [{"scheduler": schedule(optimizer), "interval": "step"}]


def fit(
    adapter: str, folder: Path, resume: Path | None = None, epochs: int = 1, **options: Any
) -> Module:
    module = Module(adapter)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, data(), ckpt_path=resume)
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
