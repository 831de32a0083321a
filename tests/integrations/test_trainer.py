"""Hugging Face Trainer: a run, and one resumed from its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'parq_fn[integrations]'"
)

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

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


class Model(nn.Module):
    """The network with the loss that Trainer asks a model for."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.net, inputs, targets)}


def rows() -> list[dict[str, Tensor]]:
    dataset: Any = data().dataset
    return [{"inputs": x, "targets": y} for x, y in dataset]


class InOrder(Trainer):
    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer(adapter: str, folder: Path, steps: int) -> Trainer:
    model = Model()
    optimizer = ADAPTERS[adapter](model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        max_grad_norm=0.5,
        save_steps=4,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        label_names=["targets"],
    )
    return InOrder(
        model, arguments, train_dataset=rows(), optimizers=(optimizer, schedule(optimizer))
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_equals_a_plain_loop_and_resumes_to_the_bit(adapter: str, tmp_path: Path) -> None:
    straight = trainer(adapter, tmp_path / "straight", BATCHES)
    straight.train()
    net, _ = plain_loop(adapter, clip=0.5)
    check_same(net, straight.model)
    own = straight.optimizer
    check_on_levels(straight.model, getattr(own, "optimizer", own))

    resumed = trainer(adapter, tmp_path / "resumed", BATCHES)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    check_same(straight.model, resumed.model)
