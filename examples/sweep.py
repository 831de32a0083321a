"""Thirty-two trainings as one program: learning rates, steepnesses, ends of annealing and seeds.

    python -m examples.sweep
    python -m examples.sweep --one-by-one --threads 2
    python -m examples.sweep --seeds 64 --ray

A perceptron of 64, 128 and 10 units (or a small convolutional network) is trained on
scikit-learn's 8x8 scans of handwritten digits with weights of one or more bits, once for every
setting. Hyperparameters are tensors to a transformation, so that one training step, written for
one setting, is batched over all of them by `torch.vmap` and compiled by `torch.compile`.

Prints the test accuracy of every setting (mean and standard deviation over its seeds), writes that
table as JSON, and draws it. The perceptron gains most, for its steps alone are mostly overhead;
the convolutional network computes as much either way, and gains little on a CPU.
With --one-by-one the same step, compiled too, also trains the settings one after another, and
the times are compared. Their results are held to those of the sweep with --dtype float64; in
float32 roundings of the two grow apart where weights are about to jump to a level. The same call
gives the same table again on the same machine and number of threads.

A sweep that outgrows one program is cut by --chunk into programs of so many runs, one after
another. One that outgrows the machine is trained by Ray Tune's workers with --ray, a chunk and its
compiled program on each, with the table and figure that the same --chunk gives without it. They
are on the cluster that RAY_ADDRESS names, whose machines all have this code and see --save-dir, or
else on this machine, where Ray listens on 127.0.0.1 alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import parq_fn as pq
from examples.digits import Data, load_data
from examples.options import at_least, name_of_bits
from parq_fn.foundation.command import Parser, UserError, command, output_folder
from parq_fn.foundation.tree import tree_map

Params = dict[str, Tensor]


class Setting(NamedTuple):
    """What a run is given, each [] or, of a sweep, [runs]."""

    learning_rate: Tensor  # float64
    steepness: Tensor  # float64
    anneal_end: Tensor  # float64, in steps
    seed: Tensor  # int64


# Two networks, as functions of their weights.


def perceptron(weights: Params, images: Tensor) -> Tensor:
    hidden = F.relu(images.flatten(1) @ weights["hidden"].T + weights["hidden_bias"])
    return hidden @ weights["out"].T + weights["out_bias"]


def convolutional(weights: Params, images: Tensor) -> Tensor:
    x = F.relu(F.conv2d(images, weights["conv1"], weights["conv1_bias"], padding=1))
    x = F.relu(F.conv2d(x, weights["conv2"], weights["conv2_bias"], stride=2, padding=1))
    return x.mean((2, 3)) @ weights["out"].T + weights["out_bias"]


MODELS: dict[str, tuple[Callable[[Params, Tensor], Tensor], dict[str, tuple[int, ...]]]] = {
    "perceptron": (
        perceptron,
        {"hidden": (128, 64), "hidden_bias": (128,), "out": (10, 128), "out_bias": (10,)},
    ),
    "conv": (
        convolutional,
        {
            "conv1": (16, 1, 3, 3),
            "conv1_bias": (16,),
            "conv2": (32, 16, 3, 3),
            "conv2_bias": (32,),
            "out": (10, 32),
            "out_bias": (10,),
        },
    ),
}


def start(model: str, seed: int, dtype: torch.dtype) -> Params:
    """Kaiming's normal start; biases are zero."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in MODELS[model][1].items():
        made[name] = torch.zeros(shape)
        if len(shape) > 1:
            spread = math.sqrt(2 / math.prod(shape[1:]))
            made[name] = spread * torch.randn(shape, generator=generator)
    return {name: p.to(dtype) for name, p in made.items()}


# One step, and one test, of one setting.


class Sweep(NamedTuple):
    """What all runs share."""

    model: str
    bits: int
    anneal_start: int

    def transform(self, setting: Setting) -> pq.Transformation:
        prox = pq.parq_prox(
            pq.lsbq(self.bits),
            anneal_start=self.anneal_start,
            anneal_end=setting.anneal_end,
            steepness=setting.steepness,
            granularity=pq.per_channel(),
        )
        matrices = [name for name, shape in MODELS[self.model][1].items() if len(shape) > 1]
        return pq.chain(pq.adamw(setting.learning_rate), pq.masked(prox, matrices))

    def begin(self, setting: Setting, params: Params) -> Any:
        return self.transform(setting).init(params)

    def step(
        self, setting: Setting, params: Params, state: Any, images: Tensor, labels: Tensor
    ) -> tuple[Params, Any]:
        transform, network = self.transform(setting), MODELS[self.model][0]

        def loss(weights: Params) -> Tensor:
            return F.cross_entropy(network(weights, images), labels)

        _, grads = pq.value_and_grad(loss, transform)(params, state)
        updates, state = transform.update(grads, state, params)
        return pq.apply_updates(params, updates), state

    def test(self, test: Data, setting: Setting, params: Params, state: Any) -> Tensor:
        """The test accuracy in percent."""
        weights = self.transform(setting).weights(state, params)
        right = MODELS[self.model][0](weights, test.images).argmax(1) == test.labels
        return 100 * right.float().mean()


def stacked(trees: Sequence[Params]) -> Params:
    """One tree of all of them, stacked."""
    return {name: torch.stack([tree[name] for tree in trees]) for name in trees[0]}


def order_of(seeds: Tensor, steps: int, size: int, images: int) -> Tensor:
    """[steps, runs, size]: the images of every batch; runs of one seed share theirs."""
    own = {}
    for seed in seeds.unique().tolist():
        generator = torch.Generator().manual_seed(seed)
        epochs = math.ceil(steps * size / images) + 1
        shuffled = [torch.randperm(images, generator=generator) for _ in range(epochs)]
        own[seed] = torch.cat(shuffled)[: steps * size].view(steps, size)
    return torch.stack([own[seed] for seed in seeds.tolist()], 1)


class Found(NamedTuple):
    """What came of the runs."""

    params: Params  # [runs, ...], latent
    accuracy: Tensor  # [runs], percent
    seconds: float  # of the steps after the first
    compiling: float  # seconds of the first step


def chunks(settings: Setting, orders: Tensor, size: int | None) -> list[tuple[Setting, Tensor]]:
    """So many runs at a time; None: all of them."""
    size = size or orders.shape[1]
    fields = zip(*(field.split(size) for field in settings), strict=True)
    return [*zip(map(Setting._make, fields), orders.split(size, 1), strict=True)]


def joined(found: Sequence[Found]) -> Found:
    """What came of the chunks, in their order."""
    params = {name: torch.cat([one.params[name] for one in found]) for name in found[0].params}
    accuracy = torch.cat([one.accuracy for one in found])
    seconds, compiling = (sum(one[i] for one in found) for i in (2, 3))
    return Found(params, accuracy, seconds, compiling)


def at_once(
    sweep: Sweep,
    settings: Setting,
    orders: Tensor,
    train: Data,
    test: Data,
    disable: bool | None,
    chunk: int | None = None,
) -> Found:
    """All settings in every step; or so many at a time, by the same compiled step."""
    step = torch.compile(torch.vmap(sweep.step), fullgraph=True, dynamic=False)
    found = []
    for own, order in chunks(settings, orders, chunk):
        seeds = own.seed.tolist()
        params = stacked([start(sweep.model, seed, train.images.dtype) for seed in seeds])
        state = torch.vmap(sweep.begin)(own, params)
        # what was the same for all is laid out for each, as the step gives it back
        state = tree_map(lambda t: t.clone(memory_format=torch.contiguous_format), state)
        seconds = compiling = 0.0
        for i, index in enumerate(tqdm(order, f"{len(seeds)} runs at once", disable=disable)):
            began = time.perf_counter()
            images, labels = train.images[index], train.labels[index]
            params, state = step(own, params, state, images, labels)
            if i:
                seconds += time.perf_counter() - began
            else:
                compiling = time.perf_counter() - began
        accuracy = torch.vmap(partial(sweep.test, test))(own, params, state)
        found.append(Found(params, accuracy, seconds, compiling))
    return joined(found)


def one_by_one(
    sweep: Sweep, settings: Setting, orders: Tensor, train: Data, test: Data, disable: bool | None
) -> Found:
    """One setting after the other, by the same compiled step."""
    step = torch.compile(sweep.step, fullgraph=True, dynamic=False)
    seconds = compiling = 0.0
    ended, scores = [], []
    for i in tqdm(range(len(settings.seed)), "one after another", disable=disable):
        setting = Setting(*(field[i] for field in settings))
        params = start(sweep.model, int(setting.seed), train.images.dtype)
        state = sweep.begin(setting, params)
        for j, index in enumerate(orders[:, i]):
            began = time.perf_counter()
            images, labels = train.images[index], train.labels[index]
            params, state = step(setting, params, state, images, labels)
            took = time.perf_counter() - began
            if j:
                seconds += took
            elif not i:
                compiling = took
        ended.append(params)
        scores.append(sweep.test(test, setting, params, state))
    return Found(stacked(ended), torch.stack(scores), seconds, compiling)


# What the flags ask for, here or on workers.


def inputs_of(
    args: argparse.Namespace,
) -> tuple[Sweep, Setting, Tensor, Data, Data, bool | None]:
    """What `at_once` and `one_by_one` take."""
    dtype = getattr(torch, args.dtype)
    train, test = (Data(data.images.to(dtype), data.labels) for data in load_data(0))
    if args.batch_size > (most := len(train.labels)):
        raise UserError(f"--batch-size: expected at most {most} images, got {args.batch_size}")
    settings = settings_of(args, args.steps)
    orders = order_of(settings.seed, args.steps, args.batch_size, len(train.labels))
    sweep = Sweep(args.model, args.quant_bits, round(0.1 * args.steps))
    return sweep, settings, orders, train, test, args.no_progress or None


#: What Ray reads when it is imported, to listen on 127.0.0.1 alone, whatever the system.
LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


@contextlib.contextmanager
def cluster(**options: Any) -> Iterator[None]:
    """Ray's, by RAY_ADDRESS, or one on this machine alone; its makers are told nothing.

    options: of ray.init.
    """
    told = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AIR_NEW_OUTPUT": "0"}  # but for warnings silent
    told["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # of Ctrl-C `command` tells
    if "RAY_ADDRESS" not in os.environ:
        told |= LOOPBACK
        options |= {"address": "local", "include_dashboard": False}
    for name, text in told.items():
        os.environ.setdefault(name, text)
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(log_to_driver=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


def on_workers(args: argparse.Namespace) -> Found:
    """As `at_once`, a chunk for each trial of Ray Tune, on a worker of --threads CPUs."""

    def trial(config: dict[str, int]) -> None:
        torch.set_num_threads(args.threads)
        sweep, settings, orders, *data, _ = inputs_of(args)
        own = chunks(settings, orders, args.chunk)[config["chunk"]]
        found = at_once(sweep, *own, *data, disable=True)
        with tempfile.TemporaryDirectory() as folder:
            torch.save(found._asdict(), Path(folder, "found"))
            mean = {"accuracy": float(found.accuracy.mean())}
            tune.report(mean, checkpoint=tune.Checkpoint.from_directory(folder))

    with cluster():
        from ray import tune

        count = math.ceil(len(settings_of(args, args.steps).seed) / args.chunk)
        storage = str((args.save_dir / "ray").resolve())
        results = tune.Tuner(
            tune.with_resources(trial, {"cpu": args.threads}),
            param_space={"chunk": tune.grid_search(list(range(count)))},
            run_config=tune.RunConfig(storage_path=storage, verbose=0),
        ).fit()
        for one in results:
            if one.error is not None:
                raise one.error
        found = {}
        for one in results:
            with one.checkpoint.as_directory() as folder:
                found[one.config["chunk"]] = Found(**torch.load(Path(folder, "found")))
    return joined([found[i] for i in range(count)])


def hold(found: Found, alone: Found, dtype: torch.dtype) -> None:
    """Raises AssertionError where the sweep's results are not those of the runs alone."""
    apart = (found.accuracy - alone.accuracy).abs().max().item()
    print(f"accuracies of runs at once and alone differ by up to {apart:.2f}", file=sys.stderr)
    if dtype == torch.float64:
        for name, p in alone.params.items():
            assert torch.allclose(found.params[name], p, rtol=1e-5, atol=1e-8), name


# What is printed and drawn.


def settings_of(args: argparse.Namespace, steps: int) -> Setting:
    """The grid, seeds last."""
    ends = [round(share * steps) for share in args.anneal_end]
    grid = list(itertools.product(args.lr, args.steepness, ends, range(args.seeds)))
    *real, seeds = zip(*grid, strict=True)
    return Setting(*(torch.tensor(c, dtype=torch.float64) for c in real), torch.tensor(seeds))


def table(settings: Setting, accuracy: Tensor, seeds: int) -> list[dict[str, Any]]:
    """A row for each setting: mean and standard deviation over its seeds, None for one seed."""
    rows = []
    for first in range(0, len(accuracy), seeds):
        own = accuracy[first : first + seeds]
        rows.append(
            {
                "learning_rate": float(settings.learning_rate[first]),
                "steepness": float(settings.steepness[first]),
                "anneal_end": float(settings.anneal_end[first]),
                "mean": float(own.mean()),
                "deviation": float(own.std()) if seeds > 1 else None,
            }
        )
    return rows


def draw(settings: Setting, accuracy: Tensor, seeds: int, title: str) -> Figure:
    """Every run's accuracy against its learning rate, a panel for each end of annealing."""
    ends, steeps = settings.anneal_end.unique().tolist(), settings.steepness.unique().tolist()
    rates = settings.learning_rate.unique().tolist()
    wide = max(4.0, 0.16 * len(steeps) * len(rates))  # inches of a panel
    figure = Figure(figsize=(max(8.5, 1.5 + wide * len(ends)), 4.4), layout="constrained")
    panels = figure.subplots(1, len(ends), sharey=True, squeeze=False)[0]
    colors, markers = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"], "osD^vPX"
    for panel, end in zip(panels, ends, strict=True):
        apart = min(0.16, 0.8 / len(steeps))  # those of a rate stay beside each other
        for k, steepness in enumerate(steeps):
            here = (settings.anneal_end == end) & (settings.steepness == steepness)
            aside = apart * (k - (len(steeps) - 1) / 2)
            at = [rates.index(rate) + aside for rate in settings.learning_rate[here].tolist()]
            own = accuracy[here]
            marker = markers[k % 4 + k // 4]
            style = {"color": colors[k % 4], "marker": marker, "linestyle": "none"}
            means = own.view(-1, seeds).mean(1)
            hollow = {"markerfacecolor": "none", "markeredgewidth": 1.8, "markersize": 11}
            panel.plot(at[::seeds], means, **style, **hollow, label=f"steepness {steepness:g}")
            if seeds > 1:
                panel.plot(at, own, **style, alpha=0.7, markersize=4)
        panel.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        panel.set(xlabel="learning rate (not to scale)", xlim=(-0.5, len(rates) - 0.5))
        panel.set_title(f"annealed until step {end:g}")
        panel.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("test accuracy (%)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(4, len(steeps)), frameon=False
    )
    marks = "small marks are runs, hollow ones the mean over seeds" if seeds > 1 else "one seed"
    figure.suptitle(f"{title}\n{marks}")
    return figure


def positive(text: str) -> float:
    """A type for argparse: a finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (got := float(text)) < math.inf:
            return got
    raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    about = "Trains many settings of a small network on 8x8 digits in one compiled program."
    parser = Parser("examples.sweep", about)

    def flag(name: str, default: Any, text: str, **options: Any) -> None:
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text = f"{text} (default: {'off' if default is False else shown})"
        parser.add_argument(name, default=default, help=text, **options)

    several = {"type": positive, "nargs": "+"}
    flag("--model", "perceptron", "what is trained", choices=tuple(MODELS))
    flag("--quant-bits", 1, "bits of a weight, 0 to 8; 0 is ternary", type=int, choices=range(9))
    flag("--lr", [0.003, 0.01], "learning rates", **several)
    flag("--steepness", [5.0, 50.0], "steepnesses of the annealing", **several)
    text = "ends of the annealing, as shares of all steps; it starts after a tenth of them"
    flag("--anneal-end", [0.5, 0.9], text, **several)
    flag("--seeds", 4, "seeds of the start and the batches, 0 and on", type=at_least(1, int))
    flag("--steps", 400, "steps of a run", type=at_least(10, int))
    flag("--batch-size", 32, "images in a step", type=at_least(1, int))
    text = "runs in one program (default: all of them, 32 with --ray)"
    parser.add_argument("--chunk", type=at_least(1, int), help=text)
    text = "train chunks on Ray Tune's workers; needs pip install -e '.[ray]'"
    flag("--ray", False, text, action="store_true")
    flag("--one-by-one", False, "also train them one after another", action="store_true")
    text = "of weights and states"
    flag("--dtype", "float32", text, choices=("float32", "float64"))
    flag("--threads", 1, "CPU threads", type=at_least(1, int))
    flag("--save-dir", Path("runs/sweep"), "folder for figure and table", type=Path)
    flag("--no-progress", False, "no progress bars", action="store_true")
    args = parser.parse_args(argv)
    for name in ("lr", "steepness", "anneal_end"):
        given = getattr(args, name)
        if len(set(given)) < len(given):
            parser.error(f"--{name.replace('_', '-')}: expected each value once, got {given}")
    begin = round(0.1 * args.steps)
    bad = [x for x in args.anneal_end if x > 1 or round(x * args.steps) <= begin]
    if bad:
        parser.error(f"--anneal-end: expected shares above 0.1 (step {begin}), up to 1, got {bad}")
    if len(args.steepness) > 16:
        parser.error(f"--steepness: expected at most 16 of them, got {len(args.steepness)}")
    if args.ray and find_spec("ray") is None:
        parser.error("--ray: Ray is not installed; pip install -e '.[ray]'")
    if args.ray and args.chunk is None:
        args.chunk = 32
    try:
        output_folder(args.save_dir)
    except OSError as error:
        parser.error(f"--save-dir: {error}")
    return args


def main(argv: Sequence[str] | None = None) -> list[dict[str, float]]:
    """Trains the grid, prints the table, writes it and the figure."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    inputs = sweep, settings, *_ = inputs_of(args)
    print("compiling, in the first step", file=sys.stderr)
    found = on_workers(args) if args.ray else at_once(*inputs, args.chunk)
    rows = table(settings, found.accuracy, args.seeds)
    print(f"annealed from step {sweep.anneal_start}")
    print("learning rate  steepness  until step  test accuracy (%), mean +- deviation over seeds")
    for row in rows:
        spread = "" if row["deviation"] is None else f" +- {row['deviation']:.2f}"
        print(
            f"{row['learning_rate']:>13g}{row['steepness']:>11g}{row['anneal_end']:>12g}"
            f"{row['mean']:>14.2f}{spread}"
        )
    report: dict[str, Any] = {"arguments": vars(args), "table": rows}
    report |= {"seconds": found.seconds, "seconds_compiling": found.compiling}
    runs = f"{len(settings.seed)} runs of {args.steps} steps"
    first = f"after {found.compiling:.1f} s of compiling"
    how = f"{args.chunk} at a time" if args.chunk else "at once"
    print(f"{runs} {how}: {found.seconds:.1f} s, {first}", file=sys.stderr)
    if args.one_by_one:
        alone = one_by_one(*inputs)
        hold(found, alone, getattr(torch, args.dtype))
        report["seconds_one_by_one"] = alone.seconds
        report["seconds_compiling_one_by_one"] = alone.compiling
        ratio = alone.seconds / found.seconds
        text = f"{alone.seconds:.1f} s, {ratio:.1f} times as long"
        first = f"after {alone.compiling:.1f} s of compiling"
        print(f"one after another: {text}, {first}", file=sys.stderr)
    title = f"{runs}, {args.model}, {name_of_bits(args.quant_bits)}"
    figure = draw(settings, found.accuracy, args.seeds, title)
    figure.savefig(args.save_dir / "sweep.png", dpi=150)
    (args.save_dir / "sweep.json").write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"saved in {args.save_dir}", file=sys.stderr)
    return rows


if __name__ == "__main__":
    command(main)
