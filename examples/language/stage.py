"""The training of one model of a run: its steps, its checkpoints, and what it tells.

Sequences follow from the seed and the step alone, and whatever else is drawn from the seed, the
step and the process, so that a stage that was stopped goes on bit for bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parq_fn as pq
from examples.language.models import blocks_of
from examples.language.quantization import optimizer_of
from examples.language.scores import Score, logits_of, loss_of, score
from examples.language.text import Text, batch
from examples.recipe.log import Log
from examples.recipe.parallel import World, spread
from examples.recipe.stopping import Stopped
from parq_fn.foundation.command import UserError
from parq_fn.optim import QuantOptimizer, load_checkpoint, save_checkpoint, share_on_levels

LAST = "last"


class Stage:
    """A model that is trained for so many steps with weights of so many bits.

    name: what the log calls it. folder: of its checkpoint and its log. stopping: whether the run
    was told to stop. rate: the highest learning rate, which falls to 0. teacher: whose predictions
    are learned by the share `args.distill`; None without.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        model: Any,
        bits: int,
        text: Text,
        args: Any,
        world: World,
        *,
        stopping: Callable[[], bool],
        rate: float,
        steps: int,
        teacher: Any = None,
    ) -> None:
        self.name, self.folder, self.text, self.args, self.world = name, folder, text, args, world
        self.net, self.steps, self.seconds = model, steps, 0.0
        self.step = self.told = self.saved = 0  # steps taken, of the last record, of the checkpoint
        self.sums = torch.zeros(2, dtype=torch.float64)  # losses since then, here, and their number
        self.stopping = stopping
        if args.gradient_checkpointing:
            older = model.gradient_checkpointing_enable  # before transformers 5.15
            getattr(model, "activation_checkpointing_enable", older)()
        self.model: Any = spread(model, blocks_of(model), world)
        self.teacher = None
        if teacher is not None:
            self.teacher = spread(teacher.eval().requires_grad_(False), blocks_of(teacher), world)
        self.optimizer = optimizer_of(model, bits, args, rate)
        if args.torch_compile:
            self.model = torch.compile(self.model)
        rise = round(args.warmup * steps)
        falling = pq.schedules.cosine(rate, 0.0, 0, max(1, steps - rise))
        self.rate: Any = falling
        if rise:
            self.rate = pq.schedules.join(
                [pq.schedules.linear(rate / rise, rate, 0, rise), falling], [rise]
            )

    @property
    def quantized(self) -> QuantOptimizer | None:
        """The optimizer, if it quantizes."""
        return self.optimizer if isinstance(self.optimizer, QuantOptimizer) else None

    def train(self) -> Score:
        """All steps that are left; the score after them. Raises Stopped, with a checkpoint saved,
        where the run was told to stop before."""
        resumed = self._resume()
        self.log = Log(self.folder, self.world, self.told + 1, self.step, "step")
        self.log.say(f"{self.name}: {self.steps} steps, from step {self.step}{resumed}")
        try:
            return self._train()
        except Stopped:
            if self.step > self.saved:
                self._save()
            self.log.say(f"{self.name}: stopped after step {self.step} of {self.steps}")
            raise
        finally:
            self.log.close()

    def _train(self) -> Score:
        args, found = self.args, None
        self.model.train()
        self.begun = time.perf_counter()
        with self.log.bar(self.steps, self.step, self.name, args.no_progress) as bar:
            while True:
                at_end = self.step == self.steps
                if self.step > self.told and (at_end or self.step % args.eval_every == 0):
                    found = self._tell()
                if self.step > self.saved and (at_end or self.step % args.save_every == 0):
                    self._save()
                if at_end:
                    return found or self._score()  # where the end was told before
                self._raise_if_stopping()
                self.sums += self._step()
                self.step += 1
                bar.update()

    def _step(self) -> Tensor:
        """One step; [2]: its loss, and 1."""
        args, world = self.args, self.world
        rate = float(self.rate(torch.tensor(self.step)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed((args.seed * 1_000_003 + self.step) * 4096 + world.rank)  # of dropout
        tokens = batch(
            self.text.train,
            args.context,
            args.batch_size,
            self.step,
            args.seed,
            world.rank,
            world.size,
        ).to(world.device)
        self.optimizer.zero_grad()
        with torch.autocast(world.device.type, torch.bfloat16, enabled=args.amp):
            logits = logits_of(self.model, tokens[:, :-1])
            loss = loss_of(logits, tokens)
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = logits_of(self.teacher, tokens[:, :-1])
                loss = (1 - args.distill) * loss + args.distill * _distance(logits, wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), args.clip)
        self.optimizer.step()
        return torch.tensor([float(loss.detach()), 1.0], dtype=torch.float64)

    def _raise_if_stopping(self) -> None:
        """Raises Stopped if any process was told to stop."""
        if self.world.any(self.stopping()):
            raise Stopped

    def _score(self) -> Score:
        return score(self.model, self.text, self.args, self.world, self._raise_if_stopping)

    def _tell(self) -> Score:
        """A line of the log on the steps since the last one."""
        loss, steps = self.world.total(*self.sums.tolist())
        if not math.isfinite(loss):
            raise UserError(
                f"{self.name}: the loss is {loss} by step {self.step}; a lower --lr may keep it "
                "finite"
            )
        found = self._score()
        record: dict[str, Any] = {
            "step": self.step,
            "train_loss": loss / steps,
            "test_loss": found.nats,
            "bits_per_byte": found.bits_per_byte,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
        }
        if self.quantized is not None:
            slopes = (g.get("inverse_slope") for g in self.optimizer.param_groups)
            record["inverse_slope"] = next((s for s in slopes if s is not None), None)
            record["on_levels"] = share_on_levels(self.quantized)
        self._count_seconds()
        self.log.record(self.step, {**record, "seconds": self.seconds})
        self.told = self.step
        self.sums.zero_()
        return found

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.seconds, self.begun = self.seconds + now - self.begun, now

    # Checkpoints.

    def _save(self) -> None:
        self._count_seconds()
        place, every = 2 * self.world.rank, [0.0] * 2 * self.world.size
        every[place : place + 2] = self.sums.tolist()
        told = {"step": self.step, "told": self.told, "seconds": self.seconds}
        told["sums"] = self.world.total(*every)  # of each process
        progress = {"json": json.dumps(told)}
        save_checkpoint(self.folder / LAST, self.net, self.optimizer, progress=progress)
        self.saved = self.step

    def _resume(self) -> str:
        """Takes up the stage's checkpoint, if there is one; what to say of it."""
        if not (self.folder / LAST).is_dir():
            return ""
        about: dict[str, Any] = {}
        try:
            load_checkpoint(self.folder / LAST, self.net, self.optimizer, progress=about)
            told = json.loads(about["json"])
            self.step, self.told, self.seconds = told["step"], told["told"], told["seconds"]
            self.saved, each = (
                self.step,
                torch.tensor(told["sums"], dtype=torch.float64).view(-1, 2),
            )
            if len(each) == self.world.size:
                self.sums = each[self.world.rank]
            elif self.world.first:  # there were more processes, or fewer
                self.sums = each.sum(0)
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
            line = " ".join(str(error).split())[:300]
            raise UserError(f"{self.folder / LAST} cannot be loaded: {line}") from None
        return f"; resumes from {self.folder / LAST}"


def _distance(logits: Tensor, wanted: Tensor) -> Tensor:
    """The mean of KL(teacher || model) over tokens, in nats."""
    own, other = (x.flatten(0, 1).log_softmax(-1) for x in (logits, wanted))
    return F.kl_div(own, other, log_target=True, reduction="batchmean")
