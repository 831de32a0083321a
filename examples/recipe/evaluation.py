"""The accuracy of a network on the test images, and of what a run has saved."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from examples.recipe import checkpoints
from examples.recipe.flags import Flags, Recipe
from examples.recipe.loading import Views, batches, evaluation_keys
from examples.recipe.parallel import World, agree_on_buffers, reshard, spread
from examples.recipe.setup import images_of, network_of, views_of
from parq_fn import export
from parq_fn.foundation.command import UserError


class Score(NamedTuple):
    """What a test found."""

    loss: float  # mean cross entropy, in nats
    accuracy: float  # in percent
    skipped: int  # images that could not be read


@torch.no_grad()
def score(
    net: nn.Module,
    model: nn.Module,
    views: Views,
    args: Flags,
    world: World,
    between: Callable[[], None] = lambda: None,
) -> Score:
    """The network, called as `model`, on all test images; `between` is called before each batch,
    and may raise."""
    agree_on_buffers(net, world)
    model.eval()
    keys = evaluation_keys(len(views.images), args.batch_size, world.rank, world.size)
    sums = torch.zeros(4, dtype=torch.float64)
    try:
        for batch in batches(views, keys, args.workers, world.device, args.skip_corrupt):
            between()
            with torch.autocast(world.device.type, torch.bfloat16, enabled=args.amp):
                scores = model(batch.images).float()
            there = batch.labels >= 0
            labels = batch.labels.clamp(min=0)
            losses = F.cross_entropy(scores, labels, reduction="none").double()
            right = (scores.argmax(1) == labels) & there
            parts = [losses.where(there, 0.0).sum().item(), right.sum().item(), there.sum().item()]
            sums += torch.tensor([*parts, batch.skipped], dtype=torch.float64)
    finally:
        reshard(net)
    loss, hits, images, skipped = world.total(*sums.tolist())
    if not images:
        raise UserError("no test image could be read")
    return Score(loss / images, 100 * hits / images, round(skipped))


def evaluate(recipe: Recipe, args: Flags, world: World) -> None:
    """Tests a checkpoint, or a file of packed weights, and prints what was found."""
    source = checkpoints.source_of(args)
    packed = source.is_file()
    fixed = ["arch", "image_size", "data"]
    if not packed and checkpoints.progress_at(source, args, fixed) is None:
        raise UserError(f"no checkpoint of these scripts at {source}")
    test = world.in_turn(partial(images_of, recipe, args, False))
    net = network_of(recipe, args, len(test.classes))
    if packed:
        try:
            export.load_into(net, source)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source} does not fit {args.arch}: {str(error)[:300]}") from None
    model = spread(net, recipe.blocks, world)
    if not packed:
        checkpoints.load(source, net)
    found = score(net, model, views_of(recipe, args, test, False), args, world)
    if world.first:
        unread = f", {found.skipped} images skipped" if found.skipped else ""
        print(f"{source}: test accuracy {found.accuracy:.4f} %, loss {found.loss:.6f}{unread}")
