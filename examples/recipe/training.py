"""The training of a recipe, from its flags to the quantized weights in a file.

Whatever is drawn in a step hangs on the seed, the epoch, the step and the process alone, so a
checkpoint needs no generator's state, and a run that was stopped in the middle of an epoch goes on
bit for bit.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from examples.recipe import checkpoints
from examples.recipe.checkpoints import BEST, LAST, Progress
from examples.recipe.evaluation import evaluate, score
from examples.recipe.flags import Recipe, parse
from examples.recipe.loading import STOPPING, Batch, batches, steps_of, training_keys
from examples.recipe.log import LOG, Log, latents_and_weights, levels_of
from examples.recipe.parallel import World, agree_on_buffers, leave, quiet, spread, world_of
from examples.recipe.problem import Problem, tell
from examples.recipe.setup import images_of, network_of, optimizer_of, rate_of, views_of
from examples.recipe.transforms import seed_of
from parq_fn import export
from parq_fn.optim import QuantOptimizer, share_on_levels

WEIGHTS = "quantized.safetensors"
MARK = "stopped"  # a file that says that the run was told to stop
STATUS_STOPPED = 128 + signal.SIGTERM


class Stopped(Exception):
    """The run was told to stop."""


_Norm = nn.modules.batchnorm._BatchNorm


class Run:
    """Everything that a training holds, and its steps."""

    def __init__(self, recipe: Recipe, args: argparse.Namespace, world: World) -> None:
        self.recipe, self.args, self.world, self.stopping = recipe, args, world, False
        if args.batch_size % world.size:
            raise Problem(
                f"--batch-size must be a multiple of the {world.size} processes, got "
                f"{args.batch_size}"
            )
        self.source, self.progress = _begin(args)
        world.in_turn(partial(_folder_of, args, self.source))
        test = world.in_turn(partial(images_of, recipe, args, False))
        train = world.in_turn(partial(images_of, recipe, args, True))
        if train.classes != test.classes:
            apart = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:5])
            raise Problem(
                "training and test images have other classes; "
                + (f"not in both: {apart}" if apart else "they are in another order")
            )
        self.test_views = views_of(recipe, args, test, False)
        self.views = views_of(recipe, args, train, True)
        self.repeats = 1 if args.no_repeat_aug else recipe.repeats
        self.steps = steps_of(len(train), args.batch_size)
        if not self.steps:
            raise Problem(f"--batch-size {args.batch_size} is more than the {len(train)} images")
        if self.progress.steps not in (0, self.steps):
            raise Problem(
                f"{self.source} was trained in {self.progress.steps} steps an epoch, and these "
                f"{len(train):,} images are {self.steps}; give it the images that it had"
            )
        self.progress.steps = self.steps
        total, warmup = args.epochs * self.steps, args.quant_warmup_steps
        if warmup >= total and not args.full_prec:
            raise Problem(
                f"--quant-warmup-steps must be below the {total} steps of the run, got {warmup}"
            )
        self.rate = rate_of(recipe, args, self.steps)
        self.classes = len(train.classes)
        self.net = network_of(recipe, args, self.classes)
        if args.batch_size == world.size and any(isinstance(m, _Norm) for m in self.net.modules()):
            raise Problem("--batch-size must give every process two images, for batch norm")
        self.model: Any = spread(self.net, recipe.blocks, world)
        self.optimizer = optimizer_of(recipe, args, self.net, self.steps, self.progress.begun)
        if self.source is not None:
            checkpoints.load(self.source, self.net, self.optimizer)
        if args.torch_compile:
            self.model = torch.compile(self.model)

    @property
    def quantized(self) -> QuantOptimizer | None:
        """The optimizer, if it quantizes."""
        return self.optimizer if isinstance(self.optimizer, QuantOptimizer) else None

    def train(self) -> None:
        """All epochs that are left. Raises Stopped, with a checkpoint saved, where the run was
        told to stop before."""
        at, args = self.progress, self.args
        self.log = Log(args.save_dir, self.world, at.epoch, at.epoch * self.steps + at.step)
        self.log.say(self._about())
        self.sums, self.start = self._sums(), time.perf_counter()
        try:
            for epoch in range(at.epoch, args.epochs):
                self._epoch(epoch)
            self._finish()
        except Stopped:
            where = f"step {at.step} of epoch {at.epoch}"
            if at.step == self.steps:
                where = f"the test after epoch {at.epoch}"
            elif at.epoch == args.epochs:
                where = "the test of the quantized weights"
            begun = self.source is not None or at.epoch > at.begun or at.step > 0
            if begun:  # torch would fill in the state of an optimizer without a step
                self._check_finite(self.world.total(*self.sums.tolist())[0], at.epoch, here=False)
                self._save(LAST)
            self.log.say(f"stopped before {where}; --resume {'goes on' if begun else 'begins'}")
            raise
        finally:
            self.log.close()

    def _about(self) -> str:
        count = sum(p.numel() for p in self.net.parameters())
        where = f"{self.world.size} x {self.world.device.type}, {self.world.mode}"
        at = self.progress
        on = f"; goes on from {self.source}" if self.source is not None else ""
        if self.source is None and self.args.resume is not None:
            on = f"; there is no checkpoint {checkpoints.source_of(self.args)} to go on from"
        return (
            f"{self.args.arch}, {count:,} parameters, {len(self.views.images):,} images of "
            f"{self.classes} classes, {self.steps} steps an epoch, {where}, from epoch {at.epoch}, "
            f"step {at.step}{on}"
        )

    def _sums(self) -> Tensor:
        """[4] float64: loss, right answers, images and skipped images of this process in the epoch
        so far."""
        sums = torch.zeros(4, dtype=torch.float64)
        if self.progress.sums:
            each = torch.tensor(self.progress.sums, dtype=torch.float64)
            if len(each) == self.world.size:
                sums = each[self.world.rank]
            elif self.world.first:  # there were more processes, or fewer
                sums = each.sum(0)
        return sums.to(self.world.device)

    def _epoch(self, epoch: int) -> None:
        """The steps that are left of it, a test, a line of the log, checkpoints."""
        args, world, at = self.args, self.world, self.progress
        self.start = time.perf_counter() - at.seconds
        count, seed = len(self.views.images), args.seed
        keys = training_keys(
            count, args.batch_size, seed, epoch, self.repeats, world.rank, world.size
        )
        read = batches(
            self.views,
            keys[at.step :],
            args.workers,
            world.device,
            args.skip_corrupt,
            seed if args.cutmix_mixup else None,
        )
        self.model.train()
        with self.log.bar(self.steps, at.step, f"epoch {epoch}", args.no_progress) as bar:
            for batch in read:
                self._heed()
                self.sums += self._step(epoch, at.step, batch)
                at.step += 1
                bar.update()
                if at.step % args.print_freq == 0:
                    self._report(epoch, bar)
        self._end_epoch(epoch)

    def _heed(self) -> None:
        """Raises Stopped if any process was told to stop."""
        if self.world.any(self.stopping):
            raise Stopped

    def _step(self, epoch: int, step: int, batch: Batch) -> Tensor:
        """One step; [4]: its sums."""
        args, world = self.args, self.world
        rate = float(self.rate(epoch * self.steps + step))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(seed_of("step", args.seed, epoch, step, world.rank))
        self.optimizer.zero_grad()
        with torch.autocast(world.device.type, torch.bfloat16, enabled=args.amp):
            scores = self.model(batch.images)
        scores = scores.float()
        target = batch.labels if batch.shares is None else batch.shares
        loss = F.cross_entropy(scores, target, label_smoothing=self.recipe.smoothing)
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
            head = f"epoch {epoch}, step {step} of {self.steps}"
            self.log.say(f"{head}: loss {loss:.4f}, accuracy {accuracy:.2f} %")
        values = {"step/loss": loss, "step/accuracy": accuracy, "step/rate": self._rate}
        self.log.scalars(epoch * self.steps + step, {**values, **self._slope})

    def _check_finite(self, loss: float, epoch: int, here: bool = True) -> None:
        if not math.isfinite(loss):
            raise Problem(
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
        return {names.get(self.args.quant_proxmap, "inverse_slope"): value}

    def _end_epoch(self, epoch: int) -> None:
        args, at, done = self.args, self.progress, (epoch + 1) * self.steps
        loss, right, images, skipped = self.world.total(*self.sums.tolist())
        self._check_finite(loss, epoch, here=False)
        test = score(self.net, self.model, self.test_views, args, self.world, self._heed)
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
        self.log.epoch(done, record)
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
        each = [torch.zeros_like(sums) for _ in range(self.world.size)]
        if self.world.size > 1:
            dist.all_gather(each, sums)
        else:
            each = [sums]
        self.progress.sums = [own.tolist() for own in each]
        self.progress.seconds = time.perf_counter() - self.start
        agree_on_buffers(self.net, self.world)
        folder, fixed = self.args.save_dir / name, _fixed(self.args)
        checkpoints.save(folder, self.net, self.optimizer, self.progress, self.args, fixed)

    def _finish(self) -> None:
        """The quantized weights, hard, in a file of their own, and what they come to."""
        if self.quantized is None:
            return
        file = self.args.save_dir / WEIGHTS
        packed = export.pack(self.net, self.quantized, snap=True)
        if self.world.first:
            export.save(packed, file)
        self.world.any(False)  # it is there
        hard = network_of(self.recipe, self.args, self.classes).to(self.world.device)
        export.load_into(hard, file)
        found = score(hard, hard, self.test_views, self.args, self.world, self._heed)
        size = file.stat().st_size
        self.log.say(f"{file}: {size:,} bytes, test accuracy {found.accuracy:.2f} %")


# Flags that a run may go on with other values of; what is trained hangs on all the others.
FREE = {
    "data_dir", "hdf5_data", "workers", "skip_corrupt", "parallel", "torch_compile", "resume",
    "evaluate", "start_epoch", "save_dir", "save_every", "print_freq", "no_progress",
}  # fmt: skip


def _fixed(args: argparse.Namespace) -> list[str]:
    # the epochs first, for others follow from them
    return sorted(vars(args).keys() - FREE, key=lambda name: (name != "epochs", name))


def _folder_of(args: argparse.Namespace, source: Path | None) -> Path:
    """--save-dir, made. Raises Problem where it cannot be, or has another run's."""
    folder: Path = args.save_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"--save-dir {folder} cannot be made: {error}") from None
    if not os.access(folder, os.W_OK):
        raise Problem(f"--save-dir {folder} cannot be written to")
    used = [name for name in (LAST, BEST, LOG, WEIGHTS) if (folder / name).exists()]
    own = source is not None and source.resolve().parent == folder.resolve()
    if used and not own and args.resume != "":
        raise Problem(
            f"{folder} holds a run ({', '.join(used)}); go on with it by --resume, give another "
            "--save-dir, or delete it"
        )
    return folder


def _begin(args: argparse.Namespace) -> tuple[Path | None, Progress]:
    """The checkpoint that the run goes on from, None without one, and how far it is."""
    begun = args.start_epoch or 0
    fresh = Progress(epoch=begun, begun=begun)
    if args.resume is None:
        return None, fresh
    source = checkpoints.source_of(args)
    progress = checkpoints.progress_at(source, args, _fixed(args))
    if progress is None:
        if args.resume:
            raise Problem(f"no checkpoint of these scripts at {source}")
        return None, fresh
    if args.start_epoch not in (None, progress.begun):
        raise Problem(
            f"{source} is of a run that began at --start-epoch {progress.begun}, not {begun}"
        )
    if progress.epoch > args.epochs:
        raise Problem(f"{source} is at epoch {progress.epoch}, beyond --epochs {args.epochs}")
    return source, progress


@contextmanager
def told_to_stop(run: Run) -> Iterator[None]:
    """SIGTERM and SIGUSR1, by which schedulers preempt, and Ctrl-C stop the run before its next
    step; a second Ctrl-C stops it at once."""

    def stop(number: int, frame: Any) -> None:
        del frame
        if run.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stopping = True

    before = {s: signal.signal(s, stop) for s in STOPPING}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def carried_out(recipe: Recipe, args: argparse.Namespace, world: World) -> int:
    """What the flags ask for; the program's status."""
    if args.evaluate:
        evaluate(recipe, args, world)
        return 0
    run, mark = Run(recipe, args, world), args.save_dir / MARK
    if world.first:
        mark.unlink(missing_ok=True)
    with told_to_stop(run):
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
    try:
        with world_of(args.parallel, recipe.program) as world, quiet():
            ended = leave if world.size > 1 else int
            try:
                status = carried_out(recipe, args, world)
                world.any(False)  # all are done, and nothing of them is gone
                return ended(status)
            except Problem as problem:
                tell(problem, problem.here)
                return ended(2)
            except OSError as error:  # it names the file
                tell(Problem(f"{type(error).__name__}: {error}"), True)
                return ended(2)
    except Problem as problem:
        tell(problem, problem.here)
        return 2
