"""The training of a recipe, from its flags to the quantized weights in a file.

Whatever is drawn in a step hangs on the seed, the epoch, the step and the process alone, so a
checkpoint needs no generator's state, and a run that was stopped in the middle of an epoch goes on
bit for bit.
"""

from __future__ import annotations

import argparse
import json
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
from PIL import Image
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

import parq_fn as pq
from examples.recipe.datasets import Cifar10, DataSet, Hdf5, ImageFolder, Shapes
from examples.recipe.flags import Recipe, parse, quantizer_of
from examples.recipe.loading import (
    Batch,
    Views,
    batches,
    evaluation_keys,
    steps_of,
    training_keys,
)
from examples.recipe.log import Log, drawn, levels_of, on_levels
from examples.recipe.parallel import (
    World,
    agree_on_buffers,
    leave,
    quiet,
    reshard,
    spread,
    world_of,
)
from examples.recipe.problem import Problem, tell
from examples.recipe.transforms import Evaluation, Training, loss_of, mixed, seed_of
from parq_fn import export
from parq_fn.optim import QuantOptimizer, load_checkpoint, save_checkpoint

STOPPED = 128 + signal.SIGTERM  # the status of a run that was told to stop

PROXES = {
    "hard": pq.hard_prox,
    "soft": pq.soft_prox,
    "parq": pq.parq_prox,
    "binaryrelax": pq.binary_relax_prox,
}


# What is trained, and on what.


def images_of(recipe: Recipe, args: argparse.Namespace, train: bool) -> DataSet:
    """The training or test images that the flags name."""
    if args.data == "synthetic":
        count = args.synthetic_images if train else max(10, args.synthetic_images // 5)
        return Shapes(count, args.image_size, train)
    if recipe.data == "cifar10":
        return Cifar10(args.data_dir, train)
    return Hdf5(args.data_dir, train) if args.hdf5_data else ImageFolder(args.data_dir, train)


def views_of(recipe: Recipe, args: argparse.Namespace, images: DataSet, train: bool) -> Views:
    """The images as the network sees them."""
    size, bicubic = args.image_size, Image.Resampling.BICUBIC
    transform: Training | Evaluation = Evaluation(size, bicubic, recipe.normal)
    if train:
        resize = bicubic if args.custom_train_transform else Image.Resampling.BILINEAR
        small, custom = recipe.data == "cifar10", args.custom_train_transform
        transform = Training(size, resize, recipe.normal, small, custom)
    return Views(images, transform, args.seed, train)


def rate_of(recipe: Recipe, args: argparse.Namespace, steps: int) -> pq.schedules.Schedule:
    """The learning rate by step, of `steps` in an epoch: a rise, a cosine or cuts, a constant."""
    rise, still = (round(e * steps) for e in (args.warmup_epochs, args.const_lr_epochs))
    end = args.epochs * steps - still
    if recipe.optimizer == "sgd":
        cuts = recipe.full_precision_cuts if args.full_prec else recipe.cuts
        places = sorted({max(1, round(cut * args.epochs * steps) - rise) for cut in cuts})
        rates = [max(args.lr_min, args.lr / 10**i) for i in range(len(places) + 1)]
        body: Any = pq.schedules.piecewise(rates, places)
    else:
        body = pq.schedules.cosine(args.lr, args.lr_min, 0, max(1, end - rise))
    parts, places = [body], []
    if rise:
        parts, places = [pq.schedules.linear(args.lr / 1000, args.lr, 0, rise), body], [rise]
    if still:
        parts, places = [*parts, pq.schedules.constant(args.lr_min)], [*places, end]
    return pq.schedules.join(parts, places)


def optimizer_of(
    recipe: Recipe, args: argparse.Namespace, net: nn.Module, steps: int
) -> torch.optim.Optimizer:
    """SGD or AdamW, around them the quantization; annealing counts from --start-epoch on."""
    mask = pq.weight_mask(net, exclude=recipe.full_precision)
    quantized, undecayed, others = [], [], []
    for name, p in net.named_parameters():
        if mask[name] and not args.full_prec:
            quantized.append((name, p))
        elif name.endswith("bias") or name in recipe.undecayed:
            undecayed.append((name, p))
        else:
            others.append((name, p))
    groups: list[dict[str, Any]] = [
        {"params": quantized, "quant_bits": args.quant_bits},
        {"params": undecayed, "weight_decay": 0.0},
        {"params": others},
    ]
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {"lr": args.lr, "weight_decay": args.weight_decay}
    if recipe.optimizer == "sgd":
        base: torch.optim.Optimizer = torch.optim.SGD(groups, momentum=args.momentum, **options)
    else:
        base = torch.optim.AdamW(groups, betas=(args.momentum, 0.99), **options)
    if args.full_prec:
        return base
    begun = args.begun * steps
    options = {
        "granularity": pq.per_channel() if args.quant_per_channel else pq.per_tensor(),
        "period": args.quant_period,
        "warmup": max(0, args.quant_warmup_steps - begun),
        "shrink": args.quant_shrink,
        "normal_map": args.nm_gamma or None,
    }
    if args.quant_proxmap != "hard":
        start, end = (round(e * steps) for e in (args.anneal_start, args.anneal_end))
        end = max(start + 1, min(end, args.epochs * steps - 1))  # the last step is a hard one
        options |= {"anneal_start": start - begun, "anneal_end": end - begun}
    if args.quant_proxmap == "parq":
        options |= {"steepness": args.anneal_steepness, "center": args.anneal_center}
    prox = PROXES[args.quant_proxmap](quantizer_of(args), **options)
    frac = args.anneal_wd_frac
    return QuantOptimizer(base, prox, anneal_weight_decay=frac, compile=args.torch_compile)


# A run.


class Run:
    """Everything that a training holds, and its steps."""

    def __init__(self, recipe: Recipe, args: argparse.Namespace, world: World) -> None:
        self.recipe, self.args, self.world = recipe, args, world
        if args.batch_size % world.size:
            raise Problem(
                f"--batch-size must be a multiple of the {world.size} processes, got "
                f"{args.batch_size}"
            )
        test = self._in_turn(partial(images_of, recipe, args, False))
        self.test_views = views_of(recipe, args, test, False)
        train = images_of(recipe, args, True)
        if train.classes != test.classes:
            raise Problem(
                f"training and test images have other classes: {train.classes[:3]}..., "
                f"{test.classes[:3]}..."
            )
        self.views = views_of(recipe, args, train, True)
        self.repeats = 1 if args.no_repeat_aug else recipe.repeats
        self.steps = steps_of(len(train), args.batch_size)
        if not self.steps:
            raise Problem(f"--batch-size {args.batch_size} is more than the {len(train)} images")
        total, warmup = args.epochs * self.steps, args.quant_warmup_steps
        if warmup >= total and not args.full_prec:
            raise Problem(
                f"--quant-warmup-steps must be below the {total} steps of the run, got {warmup}"
            )
        self.classes = len(train.classes)
        self.progress = self._found()
        args.begun = self.progress["begun"]
        self.net = self._network()
        self.model: Any = spread(self.net, recipe.blocks, world)
        self.optimizer = optimizer_of(recipe, args, self.net, self.steps)
        if args.torch_compile:
            self.model = torch.compile(self.model)
        self.rate = rate_of(recipe, args, self.steps)
        self.stopping = False

    def _in_turn(self, make: Any) -> Any:
        """Made by the first process, which may download, and then by the others."""
        if not self.world.first:
            self.world.any(False)
            return make()
        made = make()
        self.world.any(False)
        return made

    def _network(self) -> nn.Module:
        torch.manual_seed(self.args.seed)
        return self.recipe.build(self.args.arch, self.classes, self.args.image_size)

    @property
    def quantized(self) -> QuantOptimizer | None:
        """The optimizer, if it quantizes."""
        return self.optimizer if isinstance(self.optimizer, QuantOptimizer) else None

    # Checkpoints.

    def _path(self, name: str) -> Path:
        return self.args.save_dir / name

    def _found(self) -> dict[str, Any]:
        """How far the checkpoint is that the run goes on from; a run's beginning, without one."""
        args, begun = self.args, self.args.start_epoch or 0
        fresh = {"epoch": begun, "step": 0, "begun": begun, "best": -1.0, "sums": []}
        if args.resume is None:
            return fresh
        self.source = Path(args.resume) if args.resume else self._path("last")
        if not args.resume and not self.source.is_dir() and not args.evaluate:
            args.resume = None
            return fresh
        if args.start_epoch is not None:
            raise Problem("--start-epoch is for runs from nothing; --resume has the checkpoint's")
        about: dict[str, Any] = {"progress": {"json": ""}}
        missing = f"no checkpoint of these scripts at {self.source}"
        try:
            with quiet():
                load(about, checkpoint_id=self.source, no_dist=True)
            found: dict[str, Any] = json.loads(about["progress"]["json"])
        except (
            CheckpointException,
            OSError,
            ValueError,
            KeyError,
            EOFError,
            RuntimeError,
        ) as error:
            text = str(error).splitlines()[0][:200]
            raise Problem(f"{missing} ({type(error).__name__}: {text})") from None
        for name, got in found["flags"].items():
            if got != getattr(args, name):
                flag = f"--{name.replace('_', '-')}"
                raise Problem(
                    f"{self.source} was trained with {flag} {got}, not {getattr(args, name)}; "
                    f"pass {flag} {got}, or another --resume or --save-dir"
                )
        return found

    def load(self) -> None:
        """The state of the checkpoint, where there is one."""
        if self.args.resume is None:
            return
        try:
            load_checkpoint(self.source, self.net, self.optimizer)
        except (ValueError, OSError) as error:
            text = str(error).splitlines()[0][:300]
            raise Problem(f"{self.source} cannot be loaded: {text}") from None

    def save(self, name: str, epoch: int, step: int, sums: Tensor) -> None:
        """A checkpoint of the state before a step of an epoch."""
        sums = sums.cpu()
        each = [torch.zeros_like(sums) for _ in range(self.world.size)]
        if self.world.size > 1:
            dist.all_gather(each, sums)
        else:
            each = [sums]
        flags = {key: getattr(self.args, key) for key in self._fixed}
        told = {"sums": [s.tolist() for s in each], "flags": flags, "epoch": epoch, "step": step}
        progress = {**self.progress, **told}
        agree_on_buffers(self.net, self.world)
        save_checkpoint(
            self._path(name), self.net, self.optimizer, progress={"json": json.dumps(progress)}
        )

    @property
    def _fixed(self) -> list[str]:
        """Flags that a checkpoint fits no other values of."""
        names = ["arch", "image_size", "full_prec", "seed", "batch_size"]
        if not self.args.full_prec:
            names += ["quant_bits", "quant_method", "quant_per_channel"]
        return names

    # Training.

    def train(self) -> bool:
        """All epochs that are left; False if the run was told to stop before."""
        progress, world = self.progress, self.world
        begin = progress["epoch"] * self.steps + progress["step"]
        self.log = Log(self.args.save_dir, world, progress["epoch"], begin)
        self.log.say(self._about())
        try:
            for epoch in range(progress["epoch"], self.args.epochs):
                if not self._epoch(epoch):
                    return False
            self._finish()
        finally:
            self.log.close()
        return True

    def _about(self) -> str:
        count = sum(p.numel() for p in self.net.parameters())
        where = f"{self.world.size} x {self.world.device.type}, {self.world.mode}"
        begin = self.progress["epoch"], self.progress["step"]
        on = f"; goes on from {self.source}" if self.args.resume is not None else ""
        return (
            f"{self.args.arch}, {count:,} parameters, {len(self.views.images):,} images of "
            f"{self.classes} classes, {self.steps} steps an epoch, {where}, from epoch {begin[0]}, "
            f"step {begin[1]}{on}"
        )

    def _epoch(self, epoch: int) -> bool:
        """Steps, a test, a line of the log, checkpoints; False where it was told to stop."""
        args, world, start = self.args, self.world, time.perf_counter()
        resumed = epoch == self.progress["epoch"]
        first = self.progress["step"] if resumed else 0
        sums = torch.zeros(4, dtype=torch.float64)  # loss, right, images, skipped
        if resumed and self.progress["sums"]:
            sums = self._own(self.progress["sums"])
        sums = sums.to(world.device)
        count, seed = len(self.views.images), args.seed
        keys = training_keys(
            count, args.batch_size, seed, epoch, self.repeats, world.rank, world.size
        )
        read = batches(self.views, keys[first:], args.workers, world.device, args.skip_corrupt)
        self.model.train()
        with self.log.bar(self.steps, first, f"epoch {epoch}", args.no_progress) as bar:
            for step, batch in enumerate(read, first):
                if world.any(self.stopping):
                    self.save("last", epoch, step, sums)
                    self.log.say(f"stopped before step {step} of epoch {epoch}; --resume goes on")
                    return False
                sums += self._step(epoch, step, batch)
                bar.update()
                if (step + 1) % args.print_freq == 0:
                    self._report(epoch, step, sums, bar)
        self._end_epoch(epoch, sums, time.perf_counter() - start)
        return True

    def _own(self, sums: list[list[float]]) -> Tensor:
        """This process's part of what was summed before, on as many processes or on others."""
        each = torch.tensor(sums, dtype=torch.float64)
        if len(each) == self.world.size:
            return each[self.world.rank]
        return each.sum(0) if self.world.first else torch.zeros_like(each[0])

    def _step(self, epoch: int, step: int, batch: Batch) -> Tensor:
        """One step; [4]: its sums."""
        args, world = self.args, self.world
        rate = float(self.rate(epoch * self.steps + step))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seed = seed_of(args.seed, epoch, step, world.rank)
        torch.manual_seed(seed)
        images, mix = batch.images, None
        if args.cutmix_mixup:
            mix = mixed(images, batch.labels, seed)
            images = mix.images
        self.optimizer.zero_grad()
        with torch.autocast(world.device.type, torch.bfloat16, enabled=args.amp):
            scores = self.model(images)
        scores = scores.float()
        loss = loss_of(scores, batch.labels, mix, self.recipe.smoothing)
        loss.backward()
        self.optimizer.step()
        right = (scores.detach().argmax(1) == batch.labels).sum()
        n = len(batch.labels)
        fixed = torch.tensor([n, batch.skipped], dtype=torch.float64, device=loss.device)
        return torch.cat([torch.stack([n * loss.detach().double(), right.double()]), fixed])

    def _report(self, epoch: int, step: int, sums: Tensor, bar: Any) -> None:
        """What the epoch has come to so far, on this process."""
        loss, right, images, _ = sums.tolist()
        loss, accuracy = loss / images, 100 * right / images
        bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.2f}")
        if bar.disable and not self.args.no_progress:
            head = f"epoch {epoch}, step {step + 1} of {self.steps}"
            self.log.say(f"{head}: loss {loss:.4f}, accuracy {accuracy:.2f} %")
        done = epoch * self.steps + step + 1
        values = {"step/loss": loss, "step/accuracy": accuracy, "step/rate": self._rate}
        self.log.scalars(done, {**values, **self._slope})

    @property
    def _rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def _slope(self) -> dict[str, float]:
        group = self.optimizer.param_groups[0]
        return {"inverse_slope": group["inverse_slope"]} if "inverse_slope" in group else {}

    def _end_epoch(self, epoch: int, sums: Tensor, seconds: float) -> None:
        args, done = self.args, (epoch + 1) * self.steps
        loss, right, images, skipped = self.world.total(*sums.tolist())
        record: dict[str, Any] = {
            "epoch": epoch,
            "train_loss": loss / images,
            "train_accuracy": 100 * right / images,
        }
        record["test_loss"], record["test_accuracy"], unread = self.test(self.model)
        record |= {"learning_rate": self._rate, **self._slope}
        if self.quantized is not None:
            record["on_levels"] = on_levels(self.quantized)
        record |= {"skipped": round(skipped) + unread, "seconds": seconds}
        self.log.epoch(done, record)
        last = epoch + 1 == args.epochs
        if self.quantized is not None and (last or (epoch + 1) % args.save_every == 0):
            self.log.scalars(done, levels_of(self.net, self.quantized))
            self.log.figure(done, "weights", drawn(self.net, self.quantized))
        none = torch.zeros(4, dtype=torch.float64)
        better = record["test_accuracy"] > self.progress["best"]
        self.progress["best"] = max(self.progress["best"], record["test_accuracy"])
        if better:  # before "last", which says that it was saved
            self.save("best", epoch + 1, 0, none)
        if last or (epoch + 1) % args.save_every == 0:
            self.save("last", epoch + 1, 0, none)

    # What it has come to.

    @torch.no_grad()
    def test(self, model: nn.Module) -> tuple[float, float, int]:
        """(loss in nats, accuracy in percent, images that could not be read) on the test images."""
        args, world = self.args, self.world
        agree_on_buffers(self.net, world)
        model.eval()
        keys = evaluation_keys(len(self.test_views.images), args.batch_size, world.rank, world.size)
        sums = torch.zeros(4, dtype=torch.float64)
        for batch in batches(self.test_views, keys, args.workers, world.device, args.skip_corrupt):
            with torch.autocast(world.device.type, torch.bfloat16, enabled=args.amp):
                scores = model(batch.images).float()
            there = batch.labels >= 0
            labels = batch.labels.clamp(min=0)
            losses = F.cross_entropy(scores, labels, reduction="none").double()
            right = (scores.argmax(1) == labels) & there
            parts = [losses.where(there, 0.0).sum().item(), right.sum().item(), there.sum().item()]
            sums += torch.tensor([*parts, batch.skipped], dtype=torch.float64)
        reshard(self.net)
        loss, hits, images, skipped = world.total(*sums.tolist())
        if not images:
            raise Problem("no test image could be read")
        return loss / images, 100 * hits / images, round(skipped)

    def _finish(self) -> None:
        """The quantized weights, hard, in a file of their own, and what they come to."""
        if self.quantized is None:
            return
        file = self._path("quantized.safetensors")
        export.save(export.pack(self.net, self.quantized, snap=True), file)
        hard = self._network().to(self.world.device)
        export.load_into(hard, file)
        self.world.any(False)  # all have read it
        _, accuracy, _ = self.test(hard)
        self.log.say(f"{file}: {file.stat().st_size:,} bytes, test accuracy {accuracy:.2f} %")


@contextmanager
def told_to_stop(run: Run) -> Iterator[None]:
    """SIGTERM and SIGUSR1, by which schedulers preempt, stop the run at its next step."""

    def stop(number: int, frame: Any) -> None:
        del number, frame
        run.stopping = True

    signals = (signal.SIGTERM, signal.SIGUSR1)
    before = {s: signal.signal(s, stop) for s in signals}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def carried_out(run: Run) -> int:
    """What the flags ask for; the program's status."""
    run.load()
    args, world = run.args, run.world
    if args.evaluate:
        loss, accuracy, skipped = run.test(run.model)
        if world.first:
            unread = f", {skipped} images skipped" if skipped else ""
            print(f"{run.source}: test accuracy {accuracy:.4f} %, loss {loss:.6f}{unread}")
        return 0
    if world.first:
        args.save_dir.mkdir(parents=True, exist_ok=True)
    with told_to_stop(run):
        return 0 if run.train() else STOPPED


def main(recipe: Recipe, argv: Sequence[str] | None = None) -> int:
    """Trains or tests; the status that the program ends with: 0, 2 for what the user can put
    right, 143 for a run that was told to stop."""
    args = parse(recipe, argv)
    try:
        with world_of(args.parallel, recipe.program) as world, quiet():
            ended = leave if world.size > 1 else int
            try:
                run = Run(recipe, args, world)
                status = carried_out(run)
                world.any(False)  # all are done, and nothing of them is gone
                return ended(status)
            except Problem as problem:
                tell(problem, problem.here)
                return ended(2)
    except Problem as problem:
        tell(problem)
        return 2
