"""The command line of the three recipes, and what of it can be wrong."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from examples.options import METHODS, PROXES, at_least
from examples.recipe.parallel import MODES
from examples.recipe.transforms import Normal
from parq_fn.foundation.command import Parser


class Recipe(NamedTuple):
    """A published recipe: its networks, its data, and the defaults of its flags."""

    program: str  # the script's name
    about: str
    build: Callable[[str, int, int], nn.Module]  # arch, classes, size of an image -> network
    archs: tuple[str, ...]
    blocks: type | tuple[type, ...]  # modules that fsdp2 shards together
    full_precision: tuple[str, ...]  # modules whose weights are not quantized
    undecayed: tuple[str, ...]  # parameters without weight decay, besides biases
    data: str  # cifar10 or imagenet
    image_size: int
    normal: Normal
    optimizer: str  # sgd or adamw
    cuts: tuple[float, ...]  # shares of the epochs at which sgd's rate is divided by ten
    full_precision_cuts: tuple[float, ...]
    annealed: float  # share of the epochs after which annealing ends
    smoothing: float  # of labels
    repeats: int  # views of an image in an epoch
    defaults: dict[str, Any]


@dataclass
class Flags:
    """The flags of a run, with `Recipe`'s defaults; --help explains each."""

    arch: str
    data: str  # cifar10, imagenet or synthetic
    data_dir: Path
    hdf5_data: bool
    image_size: int
    synthetic_images: int
    skip_corrupt: bool
    workers: int
    custom_train_transform: bool
    cutmix_mixup: bool
    no_repeat_aug: bool

    epochs: int
    start_epoch: int | None
    batch_size: int  # over all processes
    lr: float
    lr_min: float
    warmup_epochs: float
    const_lr_epochs: float
    momentum: float
    weight_decay: float
    seed: int
    torch_compile: bool
    amp: bool
    parallel: str | None  # one of parallel.MODES

    full_prec: bool
    quant_bits: int
    quant_method: str
    quant_lsbq_optimal: bool
    quant_per_channel: bool
    quant_period: int
    quant_warmup_steps: int
    quant_shrink: bool
    quant_proxmap: str
    anneal_start: float  # epoch
    anneal_end: float  # epoch
    anneal_steepness: float
    anneal_center: float
    anneal_wd_frac: float
    nm_gamma: float

    save_dir: Path
    save_every: int
    print_freq: int
    resume: str | None  # "" for the last checkpoint of save_dir
    evaluate: bool
    no_progress: bool


def parse(recipe: Recipe, argv: Sequence[str] | None) -> Flags:
    """The flags, checked. What is wrong ends the program with one line."""
    parser = Parser(f"examples.{recipe.program}", recipe.about)
    group: Any = parser

    def flag(name: str, default: Any, text: str, shown: str | None = None, **options: Any) -> None:
        default = recipe.defaults.get(name.removeprefix("--").replace("-", "_"), default)
        if isinstance(default, bool):
            options["action"] = "store_true"
        described = default if shown is None else shown
        if isinstance(described, bool):
            described = "on" if described else "off"
        described = str(described).replace("%", "%%")
        group.add_argument(name, default=default, help=f"{text} (default: {described})", **options)
        if default is True:
            dest, off = name.removeprefix("--").replace("-", "_"), name.replace("--", "--no-")
            group.add_argument(off, dest=dest, action="store_false", help=f"without {name}")

    count, whole = {"type": at_least(1, int)}, {"type": at_least(0, int)}
    number, share = {"type": at_least(0)}, {"type": at_least(0)}

    group = parser.add_argument_group("network and data")
    flag("--arch", recipe.archs[0], "the network", choices=recipe.archs, metavar="ARCH")
    parser.epilog = f"networks: {', '.join(recipe.archs)}"
    text = f"{recipe.data}, or synthetic: shapes drawn on the fly, for a run without data"
    flag("--data", recipe.data, text, choices=(recipe.data, "synthetic"))
    folder = "cifar-10-batches-py (downloaded where it is absent)"
    if recipe.data == "imagenet":
        folder = "train and val, or of train.hdf5 and val.hdf5"
    flag("--data-dir", Path("data"), f"folder of {folder}", type=Path)
    if recipe.data == "imagenet":
        flag("--hdf5-data", False, "read HDF5 files, as examples.create_hdf5 makes them")
    else:
        parser.set_defaults(hdf5_data=False)
        group.add_argument("--hdf5-data", action="store_true", help=argparse.SUPPRESS)
    flag("--image-size", recipe.image_size, "pixels of a side that the network sees", **count)
    text = "drawn images of --data synthetic, a fifth as many more for the test"
    flag("--synthetic-images", 5000, text, **count)
    flag("--skip-corrupt", False, "leave out images that cannot be read, and count them")
    flag("--workers", 2, "processes that read images; 0 reads in this one", **whole)
    text = "RandAugment, and a rectangle erased in one image of four"
    flag("--custom-train-transform", False, text)
    flag("--cutmix-mixup", False, "every batch by cutmix or by mixup, as likely")
    text = "every image once an epoch; otherwise as often as the recipe says "
    flag("--no-repeat-aug", False, f"{text}({recipe.repeats})", shown="off")

    group = parser.add_argument_group("training")
    flag("--epochs", 1, "passes over the training images", **count)
    text = "epoch that a run from nothing begins at, by its rates and its annealing"
    flag("--start-epoch", None, text, "0", **whole)
    flag("--batch-size", 1, "images of a step, over all processes", **count)
    flag("--lr", 0.1, "learning rate", **number)
    if recipe.optimizer == "sgd":
        cuts = ", ".join(f"{share:g}" for share in recipe.cuts)
        full = ", ".join(f"{share:g}" for share in recipe.full_precision_cuts)
        text = f"least rate; above it the rate is divided by ten after {cuts} of the epochs"
        text += f" ({full} in full precision)" if full != cuts else ""
    else:
        text = "rate that a cosine ends at"
    flag("--lr-min", 0.0, text, **number)
    flag("--warmup-epochs", 0, "epochs in which the rate rises from a thousandth", **number)
    flag("--const-lr-epochs", 0, "last epochs, with the rate --lr-min", **number)
    flag("--momentum", 0.9, "momentum; AdamW's first beta", **share)
    flag("--weight-decay", 0.0, "weight decay; biases have none", **number)
    flag("--seed", 0, "of the start, the order and all that is drawn", **whole)
    flag("--torch-compile", False, "compile the network and the quantizing map")
    flag("--amp", False, "compute in bfloat16 where torch's autocast does")
    text = "none, or under torchrun ddp, or fsdp2 for sharded parameters"
    flag("--parallel", None, text, "ddp under torchrun, else none", choices=MODES)

    group = parser.add_argument_group("quantization")
    flag("--full-prec", False, "quantize nothing")
    flag("--quant-bits", 2, "bits of a weight, 0 to 8; 0 is ternary", type=int, choices=range(9))
    text = "evenly spaced levels, or least-squares binary quantization"
    flag("--quant-method", "lsbq", text, choices=METHODS)
    text = "lsbq by least squares, exact to 2 bits and alternating from 3 on; otherwise greedy"
    flag("--quant-lsbq-optimal", False, text)
    flag("--quant-per-channel", False, "levels for each output channel; otherwise each tensor")
    flag("--quant-period", 10, "steps from one fit of the levels to the next", **count)
    flag("--quant-warmup-steps", 0, "steps before the first fit, in full precision", **whole)
    flag("--quant-shrink", False, "map the latent weights over the sum of learning rates")
    text = "from latent weights to the network's; hard is the straight-through estimator"
    flag("--quant-proxmap", "parq", text, choices=PROXES)
    flag("--anneal-start", 0.0, "epoch at which annealing starts", **number)
    text = "epoch at which it ends; from then on every weight is on a level"
    shown = "as published, in proportion to --epochs"
    flag("--anneal-end", None, text, shown, **number)
    flag("--anneal-steepness", 10.0, "of parq's annealing, a sigmoid", type=at_least(0.001))
    flag("--anneal-center", 0.5, "of that sigmoid, as a share of the annealing", **share)
    text = "share of the weight decay that goes with parq's inverse slope, 0 to 1"
    flag("--anneal-wd-frac", 0.0, text, **share)
    text = "gamma of the normal map, which pulls latent weights to the network's; 0 is none"
    flag("--nm-gamma", 0.0, text, **number)

    group = parser.add_argument_group("saving")
    text = "folder for checkpoints, log, TensorBoard's files and the quantized weights"
    flag("--save-dir", Path("runs") / recipe.program, text, type=Path)
    flag("--save-every", 10, "epochs from one checkpoint to the next", **count)
    flag("--print-freq", 50, "steps from one report of the loss to the next", **count)
    text = "resume from a checkpoint, or from the last in --save-dir (from nothing, if it has none)"
    group.add_argument("--resume", nargs="?", const="", type=str, metavar="PATH", help=text)
    text = "test the checkpoint or packed weights that --resume names, or --save-dir's last"
    flag("--evaluate", False, text)
    flag("--no-progress", False, "no progress bars")
    args = parser.parse_args(argv)
    _check(parser, recipe, args)
    return Flags(**vars(args))


def _check(parser: Parser, recipe: Recipe, args: argparse.Namespace) -> None:
    """Fills in what follows from other flags, and refuses what does not go together."""
    if args.hdf5_data and recipe.data != "imagenet":
        parser.error("--hdf5-data is for ImageNet; CIFAR-10 comes as python batches")
    if args.data == "synthetic" and args.hdf5_data:
        parser.error("--hdf5-data reads files and --data synthetic draws images; pass one of them")
    for name in ("momentum", "anneal_center", "anneal_wd_frac"):
        if getattr(args, name) > 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at most 1, got {getattr(args, name):g}"
            )
    if args.momentum == 1:
        parser.error("--momentum must be below 1")
    if args.anneal_wd_frac and args.quant_proxmap != "parq":
        parser.error(
            f"--anneal-wd-frac follows parq's inverse slope; {args.quant_proxmap} has none"
        )
    if args.lr_min > args.lr:
        parser.error(f"--lr-min must be at most --lr, got {args.lr_min:g} and {args.lr:g}")
    still = args.epochs - args.warmup_epochs - args.const_lr_epochs
    if still <= 0:
        parser.error(
            f"--warmup-epochs and --const-lr-epochs leave nothing of {args.epochs} epochs: "
            f"{args.warmup_epochs:g} and {args.const_lr_epochs:g}"
        )
    if args.start_epoch is not None and args.start_epoch >= args.epochs:
        parser.error(f"--start-epoch must be below --epochs, got {args.start_epoch}")
    if args.anneal_end is None:
        args.anneal_end = args.epochs * recipe.annealed
        args.anneal_end = min(args.anneal_end, args.epochs - args.const_lr_epochs)
    annealed = not args.full_prec and args.quant_proxmap != "hard"
    if annealed and not args.anneal_start < args.anneal_end <= args.epochs:
        parser.error(
            "--anneal-start, --anneal-end and --epochs must come in this order, got "
            f"{args.anneal_start:g}, {args.anneal_end:g} and {args.epochs}"
        )
    if args.data == "cifar10" and args.image_size != recipe.image_size:
        parser.error("--image-size is for --data synthetic; CIFAR-10's images have 32 pixels")
    if args.const_lr_epochs and not args.lr_min:
        parser.error("--const-lr-epochs trains at the rate --lr-min, which is 0; pass both")
    cuts = recipe.full_precision_cuts if args.full_prec else recipe.cuts
    if cuts and args.warmup_epochs > cuts[0] * args.epochs:
        parser.error(
            f"--warmup-epochs must end before the rate's first cut, after "
            f"{cuts[0] * args.epochs:g} epochs, got {args.warmup_epochs:g}"
        )
    if args.image_size > 4096:
        parser.error(f"--image-size must be at most 4096, got {args.image_size}")
    if args.image_size % 16 and "deit" in args.arch:
        parser.error(f"--image-size must be a multiple of 16, got {args.image_size}")
