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

from parq_fn.integrations.trainer import QuantCallback
from parq_fn.optim import share_on_levels
from tests.helpers import sampled
from tests.integrations.training import (
    ADAPTERS,
    BATCHES,
    PROX,
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


def trainer(adapter: str, folder: Path, steps: int, **more: Any) -> Trainer:
    model = Model()
    optimizer = ADAPTERS[adapter](model)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.5,
        "save_steps": 4,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "label_names": ["targets"],
        **more,
    }
    return InOrder(
        model,
        TrainingArguments(**arguments),
        train_dataset=rows(),
        eval_dataset={"few": rows()[:8], "more": rows()[8:]},
        optimizers=(optimizer, schedule(optimizer)),
    )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_equals_a_plain_loop_and_resumes_to_the_bit(adapter: str, tmp_path: Path) -> None:
    straight = trainer(adapter, tmp_path / "straight", BATCHES, logging_steps=1)
    straight.add_callback(QuantCallback(straight, flips=True))
    straight.train()
    net, _ = plain_loop(adapter, clip=0.5)
    check_same(net, straight.model)
    own = straight.optimizer
    check_on_levels(straight.model, getattr(own, "optimizer", own))

    resumed = trainer(adapter, tmp_path / "resumed", BATCHES, eval_strategy="steps", eval_steps=3)
    resumed.add_callback(QuantCallback(resumed, rounded=True))
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    check_same(straight.model, resumed.model)


# What QuantCallback writes and refuses


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_logs_say_how_far_the_annealing_is(adapter: str, tmp_path: Path) -> None:
    run = trainer(adapter, tmp_path, BATCHES, logging_steps=1, save_strategy="no")
    run.add_callback(QuantCallback(run, flips=True))
    run.train()
    found = [row for row in run.state.log_history if "share_on_levels" in row]
    assert [row["step"] for row in found] == [*range(1, BATCHES + 1)]
    slopes = PROX.coefficient(torch.arange(BATCHES)).tolist()
    assert [row["inverse_slope"] for row in found] == slopes
    _, optimizer = plain_loop(adapter, clip=0.5)
    assert found[-1]["share_on_levels"] == share_on_levels(optimizer) == 1.0
    assert found[0]["share_on_levels"] == 0.0  # in the warmup
    flips = [row["flips"] for row in found]
    assert max(flips[:2]) == 0.0 < max(flips) <= 1.0


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_evaluations_at_rounded_weights_are_those_of_the_weights_then(
    adapter: str, tmp_path: Path
) -> None:
    run = trainer(adapter, tmp_path, BATCHES, eval_strategy="steps", eval_steps=4, eval_delay=4)
    run.add_callback(QuantCallback(run, rounded=True))
    run.train()
    found: dict[tuple[int, str], float] = {}
    for row in run.state.log_history:
        losses = {key: got for key, got in row.items() if key.endswith("_loss")}
        found |= {(row["step"], key): got for key, got in losses.items() if key != "train_loss"}
    assert {key for _, key in found} == {
        f"eval_{how}{name}_loss" for how in ("", "rounded_") for name in ("few", "more")
    }
    for name in ("few", "more"):
        assert found[4, f"eval_rounded_{name}_loss"] != found[4, f"eval_{name}_loss"]
        assert found[12, f"eval_rounded_{name}_loss"] == found[12, f"eval_{name}_loss"]
    half = trainer(adapter, tmp_path / "half", 4, save_strategy="no")
    half.train()
    own = half.optimizer
    with getattr(own, "optimizer", own).rounded():
        found_then = half.evaluate()
    assert found_then["eval_few_loss"] == found[4, "eval_rounded_few_loss"]


BEST: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "few_loss"}

LARGER: dict[str, Any] = {"per_device_train_batch_size": 8}  # two epochs


@pytest.mark.parametrize(
    ("arguments", "step"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2, **BEST}, 2),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 7, **BEST}, 8),
        ({"eval_strategy": "epoch", "save_strategy": "epoch", **LARGER, **BEST}, 6),
        ({"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "best", **BEST}, 3),
    ],
    ids=["steps", "delay", "epoch", "best"],
)
def test_a_best_model_of_before_the_annealing_s_end_is_refused(
    arguments: dict[str, Any], step: int, tmp_path: Path
) -> None:
    run = trainer("QuantOptimizer", tmp_path, BATCHES, **arguments)
    run.add_callback(QuantCallback(run))
    match = rf"evaluation at step {step} would .* 'net.0.weight' has .* from step 11 on"
    with pytest.raises(ValueError, match=match):
        run.train()
    begun = 0 if arguments["eval_strategy"] == "steps" else step  # else it is said at once
    assert run.state.global_step == begun


def test_a_best_model_of_after_it_is_on_levels(tmp_path: Path) -> None:
    own: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 11}
    own["save_steps"] = 2
    run = trainer("QuantOptimizer", tmp_path, BATCHES + 2, **own, **BEST)
    run.add_callback(QuantCallback(run))
    run.train()
    assert run.state.best_global_step in (12, 14)
    assert run.model.net[2].weight.unique().numel() <= 4
    again = trainer("QuantOptimizer", tmp_path / "again", BATCHES + 2, **own, **BEST)
    again.add_callback(QuantCallback(again))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    check_same(run.model, again.model)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_the_page_s_program_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = of_the_page("transformers")["trainer"].state.log_history
    assert [row["share_on_levels"] for row in found if "flips" in row][-1] == 1.0
    assert sum("eval_rounded_loss" in row for row in found) == 4


def _on_two_ranks(folder: Path, adapter: str) -> None:
    """What is logged, evaluated and refused is the same on both ranks, and that of one process."""
    as_torchrun_tells()
    steps, two = BATCHES // 2, {"ddp_backend": "gloo", "logging_steps": 1, "save_steps": 2}
    own: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 6, **two}
    run = trainer(adapter, folder / adapter, steps, **own)
    run.add_callback(QuantCallback(run, rounded=True, flips=True))
    run.train()
    net, optimizer = plain_loop(adapter, clip=0.5, every=2)  # each rank has one of two batches
    check_same(net, run.model)
    found = [row for row in run.state.log_history if "share_on_levels" in row]
    assert [row["step"] for row in found] == [*range(1, steps + 1)]
    slopes = PROX.coefficient(torch.arange(steps)).tolist()
    assert [row["inverse_slope"] for row in found] == slopes
    assert found[-1]["share_on_levels"] == share_on_levels(optimizer)
    rounded = [row for row in run.state.log_history if "eval_rounded_few_loss" in row]
    assert [row["step"] for row in rounded] == [6]
    every: list[Any] = [None, None]
    torch.distributed.all_gather_object(every, (found, rounded[0]["eval_rounded_few_loss"]))
    assert every[0] == every[1]
    again = trainer(adapter, folder / f"{adapter} again", steps, **own)
    again.add_callback(QuantCallback(again, rounded=True, flips=True))
    again.train(resume_from_checkpoint=str(folder / adapter / "checkpoint-2"))
    check_same(net, again.model)
    best = trainer(adapter, folder / "best", steps, **{**own, "eval_steps": 2}, **BEST)
    best.add_callback(QuantCallback(best))
    with pytest.raises(ValueError, match="evaluation at step 2 would choose a best model"):
        best.train()


@pytest.mark.slow  # two processes import transformers
@pytest.mark.parametrize("adapter", sampled([*ADAPTERS], 1))
def test_two_ranks_log_evaluate_and_refuse_as_one_process(adapter: str, tmp_path: Path) -> None:
    on_processes(_on_two_ranks, 2, tmp_path, tmp_path, adapter)


def test_what_the_callback_cannot_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="QuantCallback: expected a Trainer of transformers, got"):
        QuantCallback(Model())  # type: ignore[arg-type] # what is refused
    run = trainer("QuantOptimizer", tmp_path, 2)
    run.optimizer = torch.optim.SGD(run.model.parameters())
    run.callback_handler.optimizer = run.optimizer
    run.add_callback(QuantCallback(run))
    with pytest.raises(TypeError, match="QuantCallback: expected a QuantOptimizer or a Transf"):
        run.train()
