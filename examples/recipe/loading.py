"""Batches of a data set, in an order that a seed and an epoch decide, read in worker processes.

A step takes the same images on whatever number of processes; each reads its part of them.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from multiprocessing import resource_tracker
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from examples.recipe.datasets import DataSet, Unreadable
from examples.recipe.stopping import STOPPING
from examples.recipe.transforms import Transform, drawing, mixed
from parq_fn.foundation.command import UserError


class Key(NamedTuple):
    """What is read for one place of a batch."""

    index: int  # of the image; below 0 for a place that is left empty
    epoch: int = 0
    copy: int = 0  # which of an image's views in the epoch


class View(NamedTuple):
    """What was read for it."""

    key: Key
    image: Tensor  # [3, h, w]; zeros where there is none
    label: int  # below 0 for what counts nothing
    problem: str  # of an image that could not be read, else empty


class Batch(NamedTuple):
    """What a process gets of a step."""

    images: Tensor  # [n, 3, h, w]
    labels: Tensor  # [n], below 0 for what counts nothing
    shares: Tensor | None  # [n, classes], of mixed images: how much of each class they show
    skipped: int  # images that could not be read, each counted once in an epoch
    problem: str  # of the first of them


class Views(Dataset[View]):
    """Transformed images by key.

    Of an image that cannot be read the next one takes the place in training; in evaluation the
    place stays empty.
    """

    def __init__(self, images: DataSet, transform: Transform, seed: int, training: bool) -> None:
        self.images, self.transform, self.seed, self.training = images, transform, seed, training

    def __getitem__(self, key: Key) -> View:
        problem = ""
        tries = min(100, len(self.images)) if self.training else 1
        for further in range(tries if key.index >= 0 else 0):
            try:
                image, label = self.images.read((key.index + further) % len(self.images))
            except Unreadable as error:
                problem = problem or str(error)
                continue
            with drawing("view", self.seed, *key):
                return View(key, self.transform(image), label, problem)
        size = self.transform.size
        return View(key, torch.zeros(3, size, size), -1, problem)


def gathered(views: Sequence[View], mix_seed: int | None = None, classes: int = 0) -> Batch:
    """One batch of views; with a seed, mixed."""
    images = torch.stack([view.image for view in views])
    labels = torch.tensor([view.label for view in views])
    shares = None
    if mix_seed is not None:
        images, shares = mixed(images, labels, classes, "mix", mix_seed, *views[0].key)
    problems = [view.problem for view in views if view.problem]
    skipped = sum(bool(view.problem) and view.key.copy == 0 for view in views)
    return Batch(images, labels, shares, skipped, problems[0] if problems else "")


def steps_of(count: int, batch_size: int) -> int:
    """Whole batches of so many images."""
    return count // batch_size


def training_keys(
    count: int, batch_size: int, seed: int, epoch: int, repeats: int, rank: int, size: int
) -> list[list[Key]]:
    """The keys of every step of an epoch, for one process of `size`.

    The images are shuffled, and what fills no batch is left out. With repeats > 1 every image
    comes so many times, next to each other and so on different processes, and an epoch, no longer
    than others, has so many times fewer images.

    Source of repeated augmentation: Hoffer et al., arXiv 1901.09335; Touvron et al., 2012.12877.
    """
    with drawing("order", seed, epoch):
        shuffled = torch.randperm(count).tolist()
    whole = steps_of(count, batch_size) * batch_size
    taken = shuffled[: -(-whole // repeats)]
    keys = [Key(i, epoch, copy) for i in taken for copy in range(repeats)]
    return [keys[i : i + batch_size][rank::size] for i in range(0, whole, batch_size)]


def evaluation_keys(count: int, batch_size: int, rank: int, size: int) -> list[list[Key]]:
    """The keys of all images in their order; every process has as many batches, as large."""
    each = max(1, batch_size // size)
    keys = [Key(i) for i in range(count)]
    keys += [Key(-1)] * (-count % (each * size))
    own = keys[rank::size]
    return [own[i : i + each] for i in range(0, len(own), each)]


#: Seconds in which a worker gives a batch. One that is stuck would be waited for without end.
PATIENCE = 900.0

# Workers are forked from a server, which has one thread. One forked from the main process waits
# without end for a lock that another thread had: Python 3.11's own, in one fork of a thousand, as
# gloo's thread let go of a sum.
WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["examples.recipe.training"])  # what they import, once for all


def _undisturbed(loader: DataLoader[View]) -> Iterator[Batch]:
    """The loader's batches. The server begins with the signals that are blocked here, and so do
    its workers; they leave it to the main process when they end."""
    resource_tracker.ensure_running()  # the server starts it else, and it lets signals through
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _ends_with_the_main(worker: int) -> None:
    """Ends a worker when the main process dies, or signals it on shutdown."""
    del worker
    main = multiprocessing.parent_process()
    if main is None or not hasattr(signal, "sigtimedwait"):  # as on macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)  # where a server ran before

    def wait() -> None:
        while main.is_alive():
            told = signal.sigtimedwait(STOPPING, 1.0)
            if told is not None and told.si_pid == main.pid:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _batches_of(loader: DataLoader[View]) -> Iterator[Batch]:
    """All of them. Raises UserError where a worker is gone, or gives none."""
    try:
        yield from _undisturbed(loader)
    except (ConnectionError, EOFError, RuntimeError) as error:
        other = not re.search("exited unexpectedly|timed out after", str(error))
        if isinstance(error, RuntimeError) and other:
            raise  # by a worker, not of one
        raise UserError(
            f"a process that reads images was lost, killed for its memory perhaps ({error}); "
            "--resume resumes from the last checkpoint, with other --workers too",
            here=True,
        ) from None


def batches(
    views: Views,
    keys: list[list[Key]],
    workers: int,
    device: torch.device,
    skip: bool,
    mix_seed: int | None = None,
) -> Iterator[Batch]:
    """The batches of the keys, on the device; with a seed, mixed. Raises UserError for an image
    that cannot be read, unless such images are to be skipped, and for a worker that is lost."""
    loader = DataLoader(
        views,
        batch_sampler=keys,
        num_workers=workers,
        collate_fn=partial(gathered, mix_seed=mix_seed, classes=len(views.images.classes)),
        pin_memory=device.type == "cuda",
        worker_init_fn=_ends_with_the_main,
        multiprocessing_context=WORKERS if workers else None,
        timeout=PATIENCE if workers else 0,
    )
    for batch in _batches_of(loader):
        too_many = views.training and bool((batch.labels < 0).any())  # a hundred in a row
        if batch.problem and (too_many or not skip):
            raise UserError(
                f"{batch.problem}; delete or repair the file, or leave such images out and have "
                "them counted: --skip-corrupt",
                here=True,
            )
        tensors = {name: getattr(batch, name) for name in ("images", "labels", "shares")}
        moved = {k: t.to(device, non_blocking=True) for k, t in tensors.items() if t is not None}
        yield batch._replace(**moved)
