"""What a run is to do, checked before it begins: its data, its steps, where it resumes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from examples.recipe import checkpoints
from examples.recipe.checkpoints import BEST, LAST, Progress
from examples.recipe.datasets import DataSet
from examples.recipe.flags import Flags, Recipe
from examples.recipe.loading import Views, steps_of
from examples.recipe.log import LOG
from examples.recipe.parallel import World
from examples.recipe.setup import annealing_of, images_of, rate_of, views_of
from parq_fn.foundation.command import UserError
from parq_fn.schedules import Schedule

WEIGHTS = "quantized.safetensors"


@dataclass(frozen=True)
class Plan:
    """A run that can begin."""

    recipe: Recipe
    args: Flags
    world: World
    source: Path | None  # the checkpoint that it resumes from
    progress: Progress  # where it begins
    views: Views  # of the training images
    test_views: Views
    rate: Schedule  # the learning rate by step
    steps: int  # of an epoch

    @property
    def classes(self) -> int:
        return len(self.views.images.classes)

    @property
    def repeats(self) -> int:
        """Views of an image in an epoch."""
        return 1 if self.args.no_repeat_aug else self.recipe.repeats

    def about(self, parameters: int) -> str:
        """A line on the run, of a network of so many parameters."""
        world, at, on = self.world, self.progress, ""
        if self.source is not None:
            on = f"; resumes from {self.source}"
        elif self.args.resume is not None:
            on = f"; there is no checkpoint {checkpoints.source_of(self.args)} to resume from"
        return (
            f"{self.args.arch}, {parameters:,} parameters, {len(self.views.images):,} images of "
            f"{self.classes} classes, {self.steps} steps an epoch, {world.size} x "
            f"{world.device.type}, {world.mode}, from epoch {at.epoch}, step {at.step}{on}"
        )


def plan_of(recipe: Recipe, args: Flags, world: World) -> Plan:
    """Reads what the flags name. Raises UserError for what does not go together."""
    if args.batch_size % world.size:
        raise UserError(
            f"--batch-size must be a multiple of the {world.size} processes, got {args.batch_size}"
        )
    source, progress = _resume_point(args)
    world.in_turn(partial(_folder_of, args, source))
    test = world.in_turn(partial(images_of, recipe, args, False))
    train = world.in_turn(partial(images_of, recipe, args, True))
    _check_classes(train, test)
    steps = steps_of(len(train), args.batch_size)
    _check_steps(args, source, progress, steps, len(train))
    progress.steps = steps
    views, test_views = views_of(recipe, args, train, True), views_of(recipe, args, test, False)
    rate = rate_of(recipe, args, steps)
    return Plan(recipe, args, world, source, progress, views, test_views, rate, steps)


def _check_classes(train: DataSet, test: DataSet) -> None:
    if train.classes != test.classes:
        apart = ", ".join(sorted(set(train.classes) ^ set(test.classes))[:5])
        raise UserError(
            "training and test images have other classes; "
            + (f"not in both: {apart}" if apart else "they are in another order")
        )


def _check_steps(
    args: Flags, source: Path | None, progress: Progress, steps: int, images: int
) -> None:
    if not steps:
        raise UserError(f"--batch-size {args.batch_size} is more than the {images} images")
    if progress.steps not in (0, steps):
        raise UserError(
            f"{source} was trained in {progress.steps} steps an epoch, and these {images:,} images "
            f"are {steps}; give it the images that it had"
        )
    annealed = args.quant_proxmap != "hard"
    last = annealing_of(args, steps)[1] if annealed else args.epochs * steps
    if args.quant_warmup_steps >= last and not args.full_prec:
        what = "until the annealing ends" if annealed else "of the run"
        raise UserError(
            f"--quant-warmup-steps must be below the {last} steps {what}, got "
            f"{args.quant_warmup_steps}"
        )


#: Flags that a run may resume with other values of; what is trained depends on all the others.
RESUMABLE_FLAGS = {
    "data_dir", "hdf5_data", "workers", "skip_corrupt", "parallel", "torch_compile", "resume",
    "evaluate", "start_epoch", "save_dir", "save_every", "print_freq", "no_progress",
}  # fmt: skip


def fixed_flags(args: Flags) -> list[str]:
    """The names of the others, the epochs first, for others follow from them."""
    return sorted(vars(args).keys() - RESUMABLE_FLAGS, key=lambda name: (name != "epochs", name))


def _folder_of(args: Flags, source: Path | None) -> Path:
    """--save-dir, made. Raises UserError where it cannot be, or has another run's."""
    folder: Path = args.save_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save-dir {folder} cannot be made: {error}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--save-dir {folder} cannot be written to")
    used = [name for name in (LAST, BEST, LOG, WEIGHTS) if (folder / name).exists()]
    own = source is not None and source.resolve().parent == folder.resolve()
    if used and not own and args.resume != "":
        raise UserError(
            f"{folder} holds a run ({', '.join(used)}); resume it by --resume, give another "
            "--save-dir, or delete it"
        )
    return folder


def _resume_point(args: Flags) -> tuple[Path | None, Progress]:
    """The checkpoint that the run resumes from, None without one, and how far it is."""
    begun = args.start_epoch or 0
    fresh = Progress(epoch=begun, begun=begun)
    if args.resume is None:
        return None, fresh
    source = checkpoints.source_of(args)
    progress = checkpoints.progress_at(source, args, fixed_flags(args))
    if progress is None:
        if args.resume:
            raise UserError(f"no checkpoint of these scripts at {source}")
        return None, fresh
    if args.start_epoch not in (None, progress.begun):
        raise UserError(
            f"{source} is of a run that began at --start-epoch {progress.begun}, not {begun}"
        )
    if progress.epoch > args.epochs:
        raise UserError(f"{source} is at epoch {progress.epoch}, beyond --epochs {args.epochs}")
    return source, progress
