"""From the flags of a recipe to what is trained, on what, and by which rates and maps."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import nn

import parq_fn as pq
from examples.options import PROXES, quantizer_of
from examples.recipe.datasets import Cifar10, DataSet, Hdf5, ImageFolder, Shapes
from examples.recipe.flags import Flags, Recipe
from examples.recipe.loading import Views
from examples.recipe.transforms import Evaluation, Training, Transform, seed_of
from parq_fn.foundation.command import UserError
from parq_fn.optim import QuantOptimizer


def network_of(recipe: Recipe, args: Flags, classes: int) -> nn.Module:
    """The network at its start, which the seed decides."""
    torch.manual_seed(seed_of("start", args.seed))
    return recipe.build(args.arch, classes, args.image_size)


def images_of(recipe: Recipe, args: Flags, train: bool) -> DataSet:
    """The training or test images that the flags name."""
    if args.data == "synthetic":
        count = args.synthetic_images if train else max(10, args.synthetic_images // 5)
        return Shapes(count, args.image_size, train)
    if recipe.data == "cifar10":
        return Cifar10(args.data_dir, train)
    return Hdf5(args.data_dir, train) if args.hdf5_data else ImageFolder(args.data_dir, train)


def views_of(recipe: Recipe, args: Flags, images: DataSet, train: bool) -> Views:
    """The images as the network sees them."""
    size, custom, small = args.image_size, args.custom_train_transform, recipe.data == "cifar10"
    bicubic, bilinear = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR
    if train:
        resize = bicubic if custom else bilinear
        transform: Transform = Training(size, resize, recipe.normal, small, custom)
    else:
        transform = Evaluation(size, bicubic, recipe.normal, small)
    return Views(images, transform, args.seed, train)


def rate_of(recipe: Recipe, args: Flags, steps: int) -> pq.schedules.Schedule:
    """The learning rate by step, of `steps` in an epoch: a rise, a cosine or cuts, a constant."""
    total = args.epochs * steps
    rise, still = (round(e * steps) for e in (args.warmup_epochs, args.const_lr_epochs))
    if rise + still >= total:
        raise UserError(
            f"--warmup-epochs and --const-lr-epochs leave none of the run's {total} steps: "
            f"{rise} and {still}"
        )
    if recipe.optimizer == "sgd":
        cuts = recipe.full_precision_cuts if args.full_prec else recipe.cuts
        places = [max(1, round(cut * total) - rise) for cut in cuts]
        distinct = sorted(set(places))  # in runs of few steps, two cuts may be at one
        made = [sum(place <= at for place in places) for at in (0, *distinct)]
        rates = [max(args.lr_min, args.lr / 10**cut) for cut in made]
        body: Any = pq.schedules.piecewise(rates, distinct)
    else:
        body = pq.schedules.cosine(args.lr, args.lr_min, 0, total - still - rise)
    parts, bounds = [body], []
    if rise:
        parts, bounds = [pq.schedules.linear(args.lr / 1000, args.lr, 0, rise), body], [rise]
    if still:
        parts, bounds = [*parts, pq.schedules.constant(args.lr_min)], [*bounds, total - still]
    return pq.schedules.join(parts, bounds)


def annealing_of(args: Flags, steps: int) -> tuple[int, int]:
    """The steps at which it starts and ends, the end before the run's last step, so that this is
    a hard one."""
    start, end = (round(e * steps) for e in (args.anneal_start, args.anneal_end))
    end = max(0, min(max(end, start + 1), args.epochs * steps - 1))
    return min(start, end - 1), end


def optimizer_of(
    recipe: Recipe, args: Flags, net: nn.Module, steps: int, begun: int
) -> torch.optim.Optimizer:
    """SGD or AdamW, around them the quantization; its steps count from the epoch `begun` on."""
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
    before = begun * steps
    options = {
        "granularity": pq.per_channel() if args.quant_per_channel else pq.per_tensor(),
        "period": args.quant_period,
        "warmup": max(0, args.quant_warmup_steps - before),
        "shrink": args.quant_shrink,
        "normal_map": args.nm_gamma or None,
    }
    if args.quant_proxmap != "hard":
        start, end = annealing_of(args, steps)
        options |= {"anneal_start": start - before, "anneal_end": end - before}
    if args.quant_proxmap == "parq":
        options |= {"steepness": args.anneal_steepness, "center": args.anneal_center}
    quantizer = quantizer_of(args.quant_method, args.quant_bits, args.quant_lsbq_optimal)
    prox = PROXES[args.quant_proxmap](quantizer, **options)
    frac = args.anneal_wd_frac
    return QuantOptimizer(base, prox, anneal_weight_decay=frac, compile=args.torch_compile)
