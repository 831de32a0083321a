"""The command line, the table and the figure of `python -m examples.qat_simple`.

The small network is trained in full precision and then once for every bit width, always from the
same start, over the same batches and by the same recipe.

Prints the test accuracy of each network, the bits of a quantized weight (ternary: 1.6, five to
a byte), the share of quantized weights that are bit-equal to one of their levels, and the bytes
of the whole network, in which levels and all that is not quantized take float32. Writes that
table as JSON, and a figure of the weights before, during and after annealing. A seed gives the
same table again on the same machine and number of threads (one, unless --threads says more).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

import parq_fn as pq
from examples.digits import ResNet, load_data
from examples.options import METHODS, PROXES, at_least, name_of_bits
from examples.qat_simple import Functional, Params, Settings, accuracy, granularities, train
from parq_fn import export
from parq_fn.foundation.command import Parser, UserError, output_file, output_folder

Packed = Mapping[str, export.Packed | Tensor]  # by name, as of export.pack


class Torch:
    """The usual loop, with the arithmetic of `Functional`: the module holds its weights, the
    optimizer the rest."""

    def __init__(self, net: nn.Module, transform: pq.Transformation) -> None:
        self.net = net
        self.optimizer = pq.optim.TransformOptimizer(net.named_parameters(), transform)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        value = F.cross_entropy(self.net(images), labels)
        value.backward()
        self.optimizer.step()
        return value.detach()

    def params(self) -> tuple[Params, Params]:
        """(latent weights, weights of the network)."""
        weights = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        entries = {name: self.optimizer.state[p] for name, p in self.net.named_parameters()}
        latent = {name: entries[name].get("latent", w).clone() for name, w in weights.items()}
        return latent, weights

    def packed(self, snap: bool = False) -> dict[str, Any]:
        return export.pack(self.net, self.optimizer, snap=snap)


ENGINES = {"functional": Functional, "torch": Torch}


# Measurements.


def share_on_levels(weights: Params, packed: Packed) -> float:
    """The share of quantized weights that are bit-equal to a level of their row, which is what
    packing with snap=True leaves as it is."""
    quantized = {name: p.unpack() for name, p in packed.items() if isinstance(p, export.Packed)}
    on = sum(int((weights[name] == w).sum()) for name, w in quantized.items())
    return on / sum(w.numel() for w in quantized.values())


def packed_bytes(packed: Packed) -> int:
    """Bytes of codes and levels, and of all that is not quantized."""
    return sum(
        p.num_bytes if isinstance(p, export.Packed) else p.numel() * p.element_size()
        for p in packed.values()
    )


class Row(NamedTuple):
    """A row of the table."""

    weights: str
    test_accuracy: float  # percent
    bits: float  # per quantized weight, levels aside
    on_levels: float | None  # share
    packed: int  # bytes
    float32: int  # bytes


def table(rows: Sequence[Row]) -> str:
    """The rows as text; the size of a network is also given as a share of float32's."""
    lines = ["weights         test acc.   bits   on levels     bytes    of float32"]
    for row in rows:
        on = "-" if row.on_levels is None else f"{row.on_levels:.4f}"
        lines.append(
            f"{row.weights:<16}{row.test_accuracy:>7.2f} %{row.bits:>7g}{on:>12}"
            f"{row.packed:>10,}{row.packed / row.float32:>12.1%}"
        )
    return "\n".join(lines)


# One row of the table.


class Snapshot(NamedTuple):
    """What the figure shows of an epoch."""

    epoch: int
    latent: Params
    weights: Params
    packed: Packed


def run(
    args: argparse.Namespace, bits: int | None
) -> tuple[Row, list[Snapshot], Callable[[], dict[str, Any]]]:
    """Trains one network, in full precision where bits is None; gives what packs it, too."""
    name = "full precision" if bits is None else name_of_bits(bits)
    kept: list[Snapshot] = []
    disable = args.no_progress or None  # None: where stderr is no terminal
    if not sys.stderr.isatty():
        print(f"training: {name}", file=sys.stderr)
    with tqdm(total=args.epochs, desc=name, disable=disable) as progress:

        def watch(epoch: int, loss: float, engine: Any) -> None:
            if not math.isfinite(loss):
                raise UserError(f"{name}: the loss is {loss} after epoch {epoch}; lower --lr")
            progress.update()
            progress.set_postfix(loss=f"{loss:.3f}")
            if bits is not None and epoch in moments(args):
                kept.append(Snapshot(epoch, *engine.params(), engine.packed(snap=True)))

        engine, percent = train(settings_of(args, bits), ENGINES[args.engine], watch)

    weights = engine.params()[1]
    packed = weights if bits is None else engine.packed(snap=True)
    row = Row(
        weights=name,
        test_accuracy=percent,
        bits=32 if bits is None else bits or 1.6,
        on_levels=None if bits is None else share_on_levels(weights, packed),
        packed=packed_bytes(packed),
        float32=packed_bytes(weights),
    )
    return row, kept, engine.packed


# The figure.


def moments(args: argparse.Namespace) -> tuple[int, int, int]:
    """The epochs that the figure shows: before, in the middle of, and after annealing."""
    middle = (args.anneal_start + args.anneal_end) / 2
    return max(1, math.floor(args.anneal_start)), math.ceil(middle), args.epochs


def draw(args: argparse.Namespace, name: str, kept: Sequence[Snapshot]) -> Figure:
    """Histograms of two layers (down) at the epochs kept (across), with the levels."""
    layers = ("blocks.0.conv2.weight", "blocks.2.conv2.weight")
    figure = Figure(figsize=(11, 5.6), layout="constrained")
    axes = figure.subplots(len(layers), len(kept), sharex="row", sharey=True, squeeze=False)
    for line, layer in zip(axes, layers, strict=True):
        end = 1.05 * max(s.latent[layer].abs().max().item() for s in kept)
        for axis, snapshot in zip(line, kept, strict=True):
            filled = {"color": "#56B4E9", "label": "weights of the model"}
            outline = {"color": "black", "label": "latent weights", "histtype": "step"}
            for tree, style in ((snapshot.weights, filled), (snapshot.latent, outline)):
                flat = tree[layer].flatten().numpy()
                share = [100 / len(flat)] * len(flat)
                axis.hist(flat, bins=81, range=(-end, end), weights=share, **style)
            levels = snapshot.packed[layer].levels.flatten().numpy()
            marks = {"color": "#D55E00", "marker": "v", "linestyle": "none", "label": "levels"}
            axis.plot(levels, [0.94] * len(levels), transform=axis.get_xaxis_transform(), **marks)
            phase = (snapshot.epoch > args.anneal_start) + (snapshot.epoch > args.anneal_end)
            when = f"{('before', 'during', 'after')[phase]} annealing, "
            when = "" if args.quant_proxmap == "hard" else when
            axis.set(title=f"{when}epoch {snapshot.epoch}", xlabel="value of a weight")
            axis.set(yscale="log", ylim=(0.05, 150), yticks=[0.1, 1, 10, 100])
            axis.yaxis.set_major_formatter("{x:g}")
        line[0].set_ylabel(f"{layer}\nshare of weights (%)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    setting = f"{name}, {args.quant_method}, {args.quant_proxmap}"
    figure.suptitle(f"Weights of two of the quantized layers: {setting}")
    return figure


# The command line.


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    about = "Trains a small network on 8x8 digits, in full precision and quantized."
    parser = Parser("examples.qat_simple", about)

    def flag(name: str, default: Any, text: str, shown: Any = None, **options: Any) -> None:
        if default is False:
            options, shown = {"action": "store_true"}, "off"
        text = f"{text} (default: {default if shown is None else shown})"
        parser.add_argument(name, default=default, help=text, **options)

    bits = {"type": int, "nargs": "+", "choices": range(9), "metavar": "BITS"}
    count, steps = {"type": at_least(1, int)}, {"type": at_least(0, int)}
    number, positive = {"type": at_least(0)}, {"type": at_least(0.001)}
    flag("--quant-bits", [4, 2, 0, 1], "bits of a weight, 0 to 8; 0 is ternary", "4 2 0 1", **bits)
    text = "evenly spaced levels (ternary: by the largest weight), or least-squares binary"
    flag("--quant-method", "lsbq", text, choices=METHODS)
    text = "lsbq by least squares, exact to 2 bits and alternating from 3 on; otherwise greedy"
    flag("--quant-lsbq-optimal", False, text)
    text = "from latent weights to the model's; hard is the straight-through estimator"
    flag("--quant-proxmap", "parq", text, choices=PROXES)
    flag("--quant-per-channel", False, "levels for each output channel; otherwise each tensor")
    text = "levels for each run of so many weights in the rows of the head, a divisor of 64; "
    text += "conv kernels are no matrices and then have levels for each output channel"
    flag("--quant-block-size", None, text, "no blocks", **count)
    flag("--quant-period", 10, "steps from one fit of the levels to the next", **count)
    flag("--quant-warmup-steps", 0, "steps before the first fit, in full precision", **steps)
    flag("--quant-shrink", False, "map the latent weights over the sum of learning rates")
    flag("--anneal-start", None, "epochs before annealing starts", "0.2 of --epochs", **number)
    text = "epochs before annealing ends; from then on every weight is on a level"
    flag("--anneal-end", None, text, "0.8 of --epochs", **number)
    flag("--anneal-steepness", 10.0, "of parq's annealing, a sigmoid", **positive)
    flag("--anneal-center", 0.5, "of that sigmoid, as a share of the annealing", **number)
    flag("--epochs", 50, "passes over the training images", **count)
    flag("--batch-size", 64, "images in a step", **count)
    flag("--lr", 0.05, "learning rate that a cosine takes to 0", **number)
    flag("--weight-decay", 5e-4, "L2 penalty on the latent weights", **number)
    flag("--seed", 0, "of the split, the start and the batches", **steps)
    flag("--save-dir", Path("runs/qat_simple"), "folder for figure and table", type=Path)
    text = "CPU threads; with one, results do not depend on the machine's number of cores, "
    text += "and so small a network takes as long"
    flag("--threads", 1, text, **count)
    text = "train by pure functions, or by a torch optimizer around the same ones"
    flag("--engine", "functional", text, choices=ENGINES)
    text = "file for the first quantized network of the table, packed"
    flag("--save", None, text, "none", type=Path)
    flag("--evaluate", None, "train nothing, test a file of --save", "none", type=Path)
    flag("--no-progress", False, "no progress bars")
    args = parser.parse_args(argv)

    args.anneal_start = 0.2 * args.epochs if args.anneal_start is None else args.anneal_start
    args.anneal_end = 0.8 * args.epochs if args.anneal_end is None else args.anneal_end
    start, end = args.anneal_start, args.anneal_end
    if not start < end:
        parser.error(f"--anneal-start must be below --anneal-end, got {start:g} and {end:g}")
    if not end < args.epochs:
        parser.error(f"--anneal-end must be below --epochs, got {end:g} and {args.epochs}")
    images = len(load_data(args.seed)[0].labels)
    if args.batch_size > images:
        parser.error(f"--batch-size must be at most {images}, got {args.batch_size}")
    last = args.epochs if args.quant_proxmap == "hard" else end
    steps, warmup = last * (images // args.batch_size), args.quant_warmup_steps
    if warmup >= steps:
        what = "the run" if args.quant_proxmap == "hard" else "the annealing"
        parser.error(
            f"--quant-warmup-steps must be below {steps:g}, the end of {what}, got {warmup}"
        )
    try:
        granularities(settings_of(args, None))["matrix"].shape(
            ResNet(torch.Generator()).head.weight
        )
    except ValueError as error:
        parser.error(f"--quant-block-size: {error}")
    return args


def settings_of(args: argparse.Namespace, bits: int | None) -> Settings:
    """What the flags choose for one training."""
    return Settings(
        bits=bits,
        anneal_start=args.anneal_start,
        anneal_end=args.anneal_end,
        method=args.quant_method,
        lsbq_optimal=args.quant_lsbq_optimal,
        proxmap=args.quant_proxmap,
        steepness=args.anneal_steepness,
        center=args.anneal_center,
        per_channel=args.quant_per_channel,
        block_size=args.quant_block_size,
        period=args.quant_period,
        warmup=args.quant_warmup_steps,
        shrink=args.quant_shrink,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        weight_decay=args.weight_decay,
        seed=args.seed,
    )


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Trains every row, prints the table, and writes it and the figure."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    if args.evaluate is not None:
        net, test = ResNet(torch.Generator()), load_data(args.seed)[1]
        try:
            export.load_into(net, args.evaluate)
        except ValueError as error:
            raise UserError(str(error)) from None
        print(f"{args.evaluate}: {accuracy(net, dict(net.named_parameters()), test):.2f} %")
        return []
    output_folder(args.save_dir)
    if args.save is not None:
        output_file(args.save)
    widths = dict.fromkeys(args.quant_bits)
    results = {bits: run(args, bits) for bits in (None, *widths)}
    rows = [row for row, _, _ in results.values()]
    print(table(rows))
    if args.save is not None:
        export.save(results[args.quant_bits[0]][2](), args.save)
        print(
            f"{name_of_bits(args.quant_bits[0])}: {args.save.stat().st_size:,} bytes in {args.save}"
        )

    row, kept, _ = results[2 if 2 in widths else args.quant_bits[0]]
    draw(args, row.weights, kept).savefig(args.save_dir / "weights.png", dpi=150)
    report = {"arguments": vars(args), "table": [row._asdict() for row in rows]}
    (args.save_dir / "table.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"{time.perf_counter() - start:.0f} s, saved in {args.save_dir}", file=sys.stderr)
    return rows
