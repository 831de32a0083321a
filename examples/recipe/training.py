"""The training of a recipe, from its flags to the quantized weights in a file.

Whatever is drawn in a step depends on the seed, the epoch, the step and the process alone, so a
checkpoint needs no generator's state, and a run that was stopped in the middle of an epoch resumes
bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from examples.recipe import checkpoints
from examples.recipe.checkpoints import BEST, LAST
from examples.recipe.evaluation import Score, evaluate, score
from examples.recipe.flags import Flags, Recipe, parse
from examples.recipe.loading import Batch, batches, training_keys
from examples.recipe.log import Log, latents_and_weights, levels_of
from examples.recipe.parallel import World, agree_on_buffers, spread, status_of
from examples.recipe.plan import WEIGHTS, Plan, fixed_flags, plan_of
from examples.recipe.setup import network_of, optimizer_of
from examples.recipe.stopping import STATUS_STOPPED, Stopped, stop_on_signals
from examples.recipe.transforms import seed_of
from parq_fn import export
from parq_fn.foundation.command import UserError
from parq_fn.optim import QuantOptimizer, share_on_levels

STOPPED_FILE = "stopped"  # a file that says that the run was told to stop
_Norm = nn.modules.batchnorm._BatchNorm


class Run:
    """Everything that a training holds, and its steps."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.progress, self.stopping = plan, plan.progress, False
        recipe, args, world = plan.recipe, plan.args, plan.world
        self.net = network_of(recipe, args, plan.classes)
        if args.batch_size == world.size and any(isinstance(m, _Norm) for m in self.net.modules()):
            raise UserError("--batch-size must give every process two images, for batch norm")
        self.model: Any = spread(self.net, recipe.blocks, world)
        self.optimizer = optimizer_of(recipe, args, self.net, plan.steps, self.progress.begun)
        if plan.source is not None:
            checkpoints.load(plan.source, self.net, self.optimizer)
        if args.torch_compile:
            self.model = torch.compile(self.model)

    @property
    def quantized(self) -> QuantOptimizer | None:
        """The optimizer, if it quantizes."""
        return self.optimizer if isinstance(self.optimizer, QuantOptimizer) else None

    def train(self) -> None:
        """All epochs that are left. Raises Stopped, with a checkpoint saved, where the run was
        told to stop before."""
        at, args = self.progress, self.plan.args
        done = at.epoch * self.plan.steps + at.step
        self.log = Log(args.save_dir, self.plan.world, at.epoch, done)
        self.log.say(self.plan.about(sum(p.numel() for p in self.net.parameters())))
        self.sums, self.start = self._sums(), time.perf_counter()
        try:
            for epoch in range(at.epoch, args.epochs):
                self._epoch(epoch)
            self._finish()
        except Stopped:
            where = f"step {at.step} of epoch {at.epoch}"
            if at.step == self.plan.steps:
                where = f"the test after epoch {at.epoch}"
            elif at.epoch == args.epochs:
                where = "the test of the quantized weights"
            begun = self.plan.source is not None or at.epoch > at.begun or at.step > 0
            if begun:  # torch would fill in the state of an optimizer without a step
                loss, *_ = self.plan.world.total(*self.sums.tolist())
                self._check_finite(loss, at.epoch, here=False)
                self._save(LAST)
            self.log.say(f"stopped before {where}; --resume {'resumes' if begun else 'begins'}")
            raise
        finally:
            self.log.close()

    def _sums(self) -> Tensor:
        """[4] float64: loss, right answers, images and skipped images of this process in the epoch
        so far."""
        sums = torch.zeros(4, dtype=torch.float64)
        if self.progress.sums:
            each = torch.tensor(self.progress.sums, dtype=torch.float64)
            if len(each) == self.plan.world.size:
                sums = each[self.plan.world.rank]
            elif self.plan.world.first:  # there were more processes, or fewer
                sums = each.sum(0)
        return sums.to(self.plan.world.device)

    def _epoch(self, epoch: int) -> None:
        """The steps that are left of it, a test, a line of the log, checkpoints."""
        args, world, at = self.plan.args, self.plan.world, self.progress
        self.start = time.perf_counter() - at.seconds
        count, seed = len(self.plan.views.images), args.seed
        keys = training_keys(
            count, args.batch_size, seed, epoch, self.plan.repeats, world.rank, world.size
        )
        read = batches(
            self.plan.views,
            keys[at.step :],
            args.workers,
            world.device,
            args.skip_corrupt,
            seed if args.cutmix_mixup else None,
        )
        self.model.train()
        with self.log.bar(self.plan.steps, at.step, f"epoch {epoch}", args.no_progress) as bar:
            for batch in read:
                self._raise_if_stopping()
                self.sums += self._step(epoch, at.step, batch)
                at.step += 1
                bar.update()
                if at.step % args.print_freq == 0:
                    self._report(epoch, bar)
        self._end_epoch(epoch)

    def _raise_if_stopping(self) -> None:
        """Raises Stopped if any process was told to stop."""
        if self.plan.world.any(self.stopping):
            raise Stopped

    def _step(self, epoch: int, step: int, batch: Batch) -> Tensor:
        """One step; [4]: its sums."""
        args, world = self.plan.args, self.plan.world
        rate = float(self.plan.rate(epoch * self.plan.steps + step))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed_of("step", args.seed, epoch, step, world.rank))
        self.optimizer.zero_grad()
        with torch.autocast(world.device.type, torch.bfloat16, enabled=args.amp):
            scores = self.model(batch.images)
        scores = scores.float()
        target = batch.labels if batch.shares is None else batch.shares
        loss = F.cross_entropy(scores, target, label_smoothing=self.plan.recipe.smoothing)
        loss.backward()
        self.optimizer.step()
        right = (scores.detach().argmax(1) == batch.labels).sum()
        n = len(batch.labels)
        fixed = torch.tensor([n, batch.skipped], dtype=torch.float64, device=loss.device)
        return torch.cat([torch.stack([n * loss.detach().double(), right.double()]), fixed])

    def _report(self, epoch: int, bar: Any) -> None:
        """What the epoch has come to so far, on this process."""
        loss, right, images, _ = self.sums.tolist()
        loss, accuracy, step = loss / images, 100 * right / images, self.progress.step
        self._check_finite(loss, epoch)
        bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.2f}")
        if bar.disable:
            head = f"epoch {epoch}, step {step} of {self.plan.steps}"
            self.log.say(f"{head}: loss {loss:.4f}, accuracy {accuracy:.2f} %")
        values = {"step/loss": loss, "step/accuracy": accuracy, "step/rate": self._rate}
        self.log.scalars(epoch * self.plan.steps + step, {**values, **self._slope})

    def _check_finite(self, loss: float, epoch: int, here: bool = True) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} in epoch {epoch}, by step {self.progress.step}; a lower --lr "
                "or some --warmup-epochs may keep it finite",
                here,
            )

    @property
    def _rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def _slope(self) -> dict[str, float]:
        group = self.optimizer.param_groups[0]
        if "inverse_slope" not in group:
            return {}
        names = {"soft": "temperature", "binaryrelax": "theta"}
        value = group["inverse_slope"]  # the coefficient of any map
        return {names.get(self.plan.args.quant_proxmap, "inverse_slope"): value}

    def _end_epoch(self, epoch: int) -> None:
        args, at, done = self.plan.args, self.progress, (epoch + 1) * self.plan.steps
        loss, right, images, skipped = self.plan.world.total(*self.sums.tolist())
        self._check_finite(loss, epoch, here=False)
        test = score(
            self.net,
            self.model,
            self.plan.test_views,
            args,
            self.plan.world,
            self._raise_if_stopping,
        )
        record: dict[str, Any] = {
            "epoch": epoch,
            "train_loss": loss / images,
            "train_accuracy": 100 * right / images,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "learning_rate": self._rate,
            **self._slope,
        }
        if self.quantized is not None:
            record["on_levels"] = share_on_levels(self.quantized)
        seconds = time.perf_counter() - self.start
        record |= {"skipped": round(skipped) + test.skipped, "seconds": seconds}
        self.log.record(done, record)
        due = epoch + 1 == args.epochs or (epoch + 1) % args.save_every == 0
        if self.quantized is not None and due:
            self.log.scalars(done, levels_of(self.net, self.quantized))
            self.log.figure(done, "weights", latents_and_weights(self.net, self.quantized))
        better, at.best = test.accuracy > at.best, max(at.best, test.accuracy)
        at.epoch, at.step, self.sums = epoch + 1, 0, torch.zeros_like(self.sums)
        self.start = time.perf_counter()
        if better:  # before the last, which says that it was saved
            self._save(BEST)
        if due:
            self._save(LAST)

    def _save(self, name: str) -> None:
        """A checkpoint of what is."""
        sums = self.sums.cpu()
        each = [torch.zeros_like(sums) for _ in range(self.plan.world.size)]
        if self.plan.world.size > 1:
            dist.all_gather(each, sums)
        else:
            each = [sums]
        self.progress.sums = [own.tolist() for own in each]
        self.progress.seconds = time.perf_counter() - self.start
        agree_on_buffers(self.net, self.plan.world)
        folder, fixed = self.plan.args.save_dir / name, fixed_flags(self.plan.args)
        checkpoints.save(folder, self.net, self.optimizer, self.progress, self.plan.args, fixed)

    def _finish(self) -> None:
        """The quantized weights, hard, in a file of their own, and what they come to."""
        if self.quantized is None:
            return
        plan, world = self.plan, self.plan.world
        file = plan.args.save_dir / WEIGHTS
        packed = export.pack(self.net, self.quantized, snap=True)
        if world.first:
            export.save(packed, file)
        world.any(False)  # it is there
        hard = network_of(plan.recipe, plan.args, plan.classes).to(world.device)
        export.load_into(hard, file)
        found = self._test(hard, hard)
        size = file.stat().st_size
        self.log.say(f"{file}: {size:,} bytes, test accuracy {found.accuracy:.2f} %")

    def _test(self, net: nn.Module, model: nn.Module) -> Score:
        """On the test images; raises Stopped as `_raise_if_stopping` does."""
        plan = self.plan
        return score(net, model, plan.test_views, plan.args, plan.world, self._raise_if_stopping)


def execute(recipe: Recipe, args: Flags, world: World) -> int:
    """What the flags ask for; the program's status."""
    if args.evaluate:
        evaluate(recipe, args, world)
        return 0
    run, mark = Run(plan_of(recipe, args, world)), args.save_dir / STOPPED_FILE
    if world.first:
        mark.unlink(missing_ok=True)
    with stop_on_signals(run):
        try:
            run.train()
        except Stopped:
            if world.first:
                mark.touch()
            return STATUS_STOPPED
    return 0


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """Trains or tests; the status that the program ends with: 0, 2 for what the user can put
    right, 143 for a run that was told to stop."""
    args = parse(recipe, argv)
    return status_of(args.parallel, recipe.program, lambda world: execute(recipe, args, world))
