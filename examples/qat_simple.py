"""Quantization-aware training from nothing, on scikit-learn's 8x8 scans of handwritten digits.

    python -m examples.qat_simple
    python -m examples.qat_simple --quant-bits 2 --quant-method uniform --quant-proxmap hard

A small residual network is trained in full precision and then once for every bit width, always
from the same start, over the same batches and by the same recipe. Every conv kernel, the first
one too, and the head are quantized. The norms are GroupNorm, which keeps no state: running
statistics would be one more thing to carry through a pure training step.

Prints the test accuracy of each network, the bits of a quantized weight (ternary: 1.6, five to
a byte), the share of quantized weights that are bit-equal to one of their levels, and the bytes
of the whole network, in which levels and all that is not quantized take float32. Writes that
table as JSON, and a figure of the weights before, during and after annealing. A seed gives the
same table again on the same machine and number of threads (one, unless --threads says more).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import parq_fn as pq
from parq_fn import export

Params = dict[str, Tensor]

# The data: 1,797 scans, a quarter of them held out.


class Data(NamedTuple):
    images: Tensor  # [n, 1, 8, 8], in [0, 1]
    labels: Tensor  # [n]


def load_data(seed: int) -> tuple[Data, Data]:
    """(train, test): a stratified split of the digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=0.25, random_state=seed, stratify=digits.target
    )
    return Data(images[train], labels[train]), Data(images[test], labels[test])


def batches(data: Data, size: int, generator: torch.Generator) -> Iterator[Data]:
    """One epoch of shuffled batches of one size, each image shifted by at most one pixel."""
    windows = F.pad(data.images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
    order = torch.randperm(len(data.labels), generator=generator)
    for index in order[: len(order) // size * size].split(size):
        down, right = torch.randint(3, (2, size), generator=generator)
        yield Data(windows[index, :, down, right], data.labels[index])


# The network: 77,562 parameters.


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Norm(nn.GroupNorm):
    """GroupNorm written out: of the fused one torch.func and backward() round differently, and
    the two engines are to give one table."""

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), self.num_groups, -1)
        centered = groups - groups.mean(-1, keepdim=True)
        variance = centered.square().mean(-1, keepdim=True)
        normal = (centered * (variance + self.eps).rsqrt()).reshape(x.shape)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


def norm(channels: int) -> Norm:
    return Norm(channels // 8, channels)


class Block(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), norm(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3), norm(outputs)
        self.shortcut = conv(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    """A stem, three residual blocks of 16, 32 and 64 channels, and a head."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.stem, self.norm = conv(1, 16, 3), norm(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


# Quantization.

PROXES = {
    "hard": pq.hard_prox,
    "soft": pq.soft_prox,
    "parq": pq.parq_prox,
    "binaryrelax": pq.binary_relax_prox,
}


def kind(name: str, weight: Tensor) -> str:
    """The label of a quantized weight: blocks are cut from matrices alone."""
    del name
    return "matrix" if weight.dim() == 2 else "kernel"


def granularities(args: argparse.Namespace) -> dict[str, pq.Granularity]:
    """Which weights share levels, by label."""
    if args.quant_block_size is not None:
        return {"kernel": pq.per_channel(), "matrix": pq.per_block(args.quant_block_size)}
    rule = pq.per_channel() if args.quant_per_channel else pq.per_tensor()
    return {"kernel": rule, "matrix": rule}


def quantizer(args: argparse.Namespace, bits: int) -> pq.Quantizer:
    if args.quant_method == "uniform":
        return pq.uniform(bits) if bits else pq.ternary_uniform()
    if args.quant_lsbq_optimal:
        return pq.lsbq(bits, "optimal" if bits <= 2 else "alternating")
    return pq.lsbq(bits)


def quantization(
    args: argparse.Namespace, bits: int | None, steps_per_epoch: int, learning_rate: pq.Schedule
) -> pq.Transformation:
    """What makes quantized weights of latent ones: a prox link for each label."""
    if bits is None:
        return pq.identity()
    options: dict[str, Any] = {
        "period": args.quant_period,
        "warmup": args.quant_warmup_steps,
        "shrink": args.quant_shrink,
        "learning_rate": learning_rate,
    }
    if args.quant_proxmap != "hard":
        options["anneal_start"] = args.anneal_start * steps_per_epoch
        options["anneal_end"] = args.anneal_end * steps_per_epoch
    if args.quant_proxmap == "parq":
        options |= {"steepness": args.anneal_steepness, "center": args.anneal_center}
    prox = PROXES[args.quant_proxmap]
    links = {
        label: prox(quantizer(args, bits), granularity=rule, **options)
        for label, rule in granularities(args).items()
    }
    return pq.partition(links, kind)


def read_levels(state: Any) -> Params:
    """The levels [r, k] of every quantized weight; none in full precision."""
    levels = {}
    for label in ("kernel", "matrix"):
        with contextlib.suppress(KeyError):
            part = pq.read(state, f"{label}.levels")
            levels |= {name: q for name, q in part.items() if isinstance(q, Tensor)}
    return levels


# Measurements.


def share_on_levels(weights: Params, levels: Params, rules: dict[str, pq.Granularity]) -> float:
    """The share of quantized weights that are bit-equal to a level of their row."""
    on = total = 0
    for name, q in levels.items():
        rows = rules[kind(name, weights[name])].rows(weights[name])
        on += int((rows.unsqueeze(-1) == q.unsqueeze(-2)).any(-1).sum())
        total += rows.numel()
    return on / total


def packed_bytes(params: Params, levels: Params, bits: int) -> int:
    """Bytes of the codes, `bits` each (ternary: five to a byte), of the levels in float32, and
    of all other params in float32."""
    total = 0
    for name, param in params.items():
        count = param.numel()
        if name not in levels:
            total += 4 * count
        else:
            total += math.ceil(count * bits / 8) if bits else math.ceil(count / 5)
            total += 4 * levels[name].numel()
    return total


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


def title(bits: int) -> str:
    return {0: "ternary", 1: "1 bit"}.get(bits, f"{bits} bits")


# Training, by pure functions or by a torch optimizer: the same arithmetic.


class Functional:
    """The loop of pure functions."""

    def __init__(self, net: nn.Module, transform: pq.Transformation) -> None:
        apply, self.latent = pq.functional(net)
        self.transform, self.state = transform, transform.init(self.latent)

        def loss(weights: Params, images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(apply(weights, images), labels)

        self.loss_and_grads = pq.value_and_grad(loss, transform)  # at the weights

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        value, grads = self.loss_and_grads(self.latent, self.state, images, labels)
        updates, self.state = self.transform.update(grads, self.state, self.latent)
        self.latent = pq.apply_updates(self.latent, updates)
        return value

    def params(self) -> tuple[Params, Params, Params]:
        """(latent, weights, levels of what is quantized), by name."""
        weights = self.transform.weights(self.state, self.latent)
        return self.latent, weights, read_levels(self.state)

    def packed(self) -> dict[str, Any]:
        return export.pack(self.latent, self.transform, self.state)


class Torch:
    """The usual loop: the module holds its weights, the optimizer the rest."""

    def __init__(self, net: nn.Module, transform: pq.Transformation) -> None:
        self.net = net
        self.optimizer = pq.optim.TransformOptimizer(net.named_parameters(), transform)

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        value = F.cross_entropy(self.net(images), labels)
        value.backward()
        self.optimizer.step()
        return value.detach()

    def params(self) -> tuple[Params, Params, Params]:
        """(latent, weights, levels of what is quantized), by name."""
        weights = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        latent, levels = dict(weights), {}
        for name, p in self.net.named_parameters():
            for key, got in self.optimizer.state[p].items():
                if key == "latent":
                    latent[name] = got.clone()
                elif key.endswith(".levels"):
                    levels[name] = got.clone()
        return latent, weights, levels

    def packed(self) -> dict[str, Any]:
        return export.pack(self.net, self.optimizer)


ENGINES = {"functional": Functional, "torch": Torch}


# One row of the table.


class Snapshot(NamedTuple):
    """What the figure shows of an epoch."""

    epoch: int
    latent: Params
    weights: Params
    levels: Params


def accuracy(net: nn.Module, weights: Params, test: Data) -> float:
    """Of the network with those weights, in percent."""
    with torch.no_grad():
        scores = torch.func.functional_call(net, weights, (test.images,))
    right = scores.argmax(1) == test.labels
    return 100 * right.sum().item() / len(right)


def run(
    args: argparse.Namespace, bits: int | None
) -> tuple[Row, list[Snapshot], Callable[[], dict[str, Any]]]:
    """Trains one network, in full precision where bits is None; gives what packs it, too."""
    generator = torch.Generator().manual_seed(args.seed)  # the same start for every row
    data, test = load_data(args.seed)
    net = ResNet(generator)
    steps_per_epoch = len(data.labels) // args.batch_size
    rate = pq.schedules.cosine(args.lr, 0.0, 0, args.epochs * steps_per_epoch)
    transform = pq.chain(
        pq.sgd(rate, momentum=0.9, nesterov=True, weight_decay=args.weight_decay),
        pq.masked(quantization(args, bits, steps_per_epoch, rate), pq.weight_mask(net)),
    )
    engine = ENGINES[args.engine](net, transform)
    kept: list[Snapshot] = []
    name = "full precision" if bits is None else title(bits)
    disable = args.no_progress or None  # None: where stderr is no terminal
    if not sys.stderr.isatty():
        print(f"training: {name}", file=sys.stderr)
    with tqdm(range(1, args.epochs + 1), name, disable=disable) as progress:
        for epoch in progress:
            for images, labels in batches(data, args.batch_size, generator):
                value = engine.step(images, labels)
            progress.set_postfix(loss=f"{value.item():.3f}")
            if bits is not None and epoch in moments(args):
                kept.append(Snapshot(epoch, *engine.params()))

    params, weights, levels = engine.params()
    row = Row(
        weights=name,
        test_accuracy=accuracy(net, weights, test),
        bits=32 if bits is None else bits or 1.6,
        on_levels=share_on_levels(weights, levels, granularities(args)) if levels else None,
        packed=packed_bytes(params, levels, bits or 0),
        float32=packed_bytes(params, {}, 0),
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
            levels = snapshot.levels[layer].flatten().numpy()
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


def at_least(low: float, cast: type[int] | type[float] = float) -> Callable[[str], float]:
    """A type for argparse: a number from `low` on that torch's own numbers can hold."""
    most = 2**63 - 1 if cast is int else torch.finfo(torch.float32).max

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (got := cast(text)) <= most:
                return got
        what = "whole number" if cast is int else "number"
        raise argparse.ArgumentTypeError(f"expected a {what} from {low} on, got {text!r}")

    return number


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    about = "Trains a small network on 8x8 digits, in full precision and quantized."
    parser = argparse.ArgumentParser("python -m examples.qat_simple", description=about)

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
    flag("--quant-method", "lsbq", text, choices=("uniform", "lsbq"))
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
    total, warmup = args.epochs * (images // args.batch_size), args.quant_warmup_steps
    if warmup >= total:
        parser.error(f"--quant-warmup-steps must be below {total}, got {warmup}")
    try:
        granularities(args)["matrix"].shape(ResNet(torch.Generator()).head.weight)
    except ValueError as error:
        parser.error(f"--quant-block-size: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Trains every row, prints the table, and writes it and the figure."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    if args.evaluate is not None:
        net, test = ResNet(torch.Generator()), load_data(args.seed)[1]
        export.load_into(net, args.evaluate)
        print(f"{args.evaluate}: {accuracy(net, dict(net.named_parameters()), test):.2f} %")
        return []
    widths = dict.fromkeys(args.quant_bits)
    results = {bits: run(args, bits) for bits in (None, *widths)}
    rows = [row for row, _, _ in results.values()]
    print(table(rows))
    if args.save is not None:
        export.save(results[args.quant_bits[0]][2](), args.save)
        print(f"{title(args.quant_bits[0])}: {args.save.stat().st_size:,} bytes in {args.save}")

    args.save_dir.mkdir(parents=True, exist_ok=True)
    row, kept, _ = results[2 if 2 in widths else args.quant_bits[0]]
    draw(args, row.weights, kept).savefig(args.save_dir / "weights.png", dpi=150)
    report = {"arguments": vars(args), "table": [row._asdict() for row in rows]}
    (args.save_dir / "table.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"{time.perf_counter() - start:.0f} s, saved in {args.save_dir}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    main()
