"""Trains two small networks by the methods of the field, at few bits: which is worth what.

    python -m examples.methods
    python -m examples.methods --tasks digits --bits 1 2 --seeds 4
    python -m examples.methods --tiny

Every method is one prox link, see `methods`. `digits` is the perceptron of `examples.choosing`,
scored by the share of test images that it names right. `bytes` is a transformer of 0.24 million
parameters that predicts the next byte of the sources of Python's standard library, scored by its
test loss in bits a byte. All have the same steps, rates, starts and batches, levels are of output
channels, and nothing was tuned for any of them. The seeds of a method are trained at once, by
`torch.vmap`, the numbers of bits by `--workers` processes.

Prints means with their standard errors, and differences from straight-through of the same seeds;
writes both as methods.json and draws methods.png in --save-dir. Every result is added to
results.jsonl there, and what is there is not trained again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import parq_fn as pq
from examples import choosing
from examples.choosing import Link, Task, kept_results, results, text
from examples.options import at_least, name_of_bits
from examples.qat_fsdp2 import Transformer, batch
from parq_fn import estimators
from parq_fn.foundation.command import Parser, UserError, command, output_folder
from parq_fn.foundation.value import value

FULL, BASE = "full precision", "straight-through"

# The methods.


@value
class two_scales(pq.Quantizer):
    """Levels -n, 0, p, the magnitudes n and p each a number of its own; both start at the
    least-squares optimum of one magnitude."""

    num_levels, num_qparams = 3, 2
    positive = (True, True)

    def qparams(self, x: Tensor) -> Tensor:
        return pq.lsbq(0, "optimal").qparams(x).expand(-1, 2)

    def levels(self, qparams: Tensor) -> Tensor:
        n, p = qparams.unbind(-1)
        return torch.stack([-n, torch.zeros_like(n), p], -1)


@value
class free(pq.Quantizer):
    """As many levels as another quantizer, each a number of its own; they start at its levels."""

    start: pq.Quantizer

    @property
    def num_levels(self) -> int:
        return self.start.num_levels

    def qparams(self, x: Tensor) -> Tensor:
        return self.start.levels(self.start.qparams(x))


def methods(bits: int, steps: int, rate: float) -> dict[str, pq.Prox]:
    """{name: the prox link of a method}, of those that have so many bits; 0 is ternary.

    steps: of the training; rate: its first learning rate, which falls to 0 by a cosine. Learned
    levels have Adam at the same rate. Annealing is from a fifth of the steps to four fifths.
    """
    levels = pq.uniform(bits) if bits else pq.lsbq(0)
    start, end = steps // 5, steps * 4 // 5
    falling = pq.schedules.cosine(rate, 0.0, 0, steps)
    hard = partial(pq.hard_prox, granularity=pq.per_channel())
    parq = partial(pq.parq_prox, granularity=pq.per_channel(), anneal_start=start, anneal_end=end)
    learned, lsq = (pq.learn(pq.adam(falling), kind) for kind in ("code", "lsq"))
    damped = estimators.damped(pq.schedules.cosine(0.0, 0.1, 0, steps))
    inside = estimators.inside()
    ramp = pq.schedules.linear(0.0, 10.0, end, steps)

    found = {
        BASE: hard(levels),
        "saturated": hard(levels, gradient=inside),
        "dampening": hard(levels, gradient=damped),
        "CAGE": hard(levels, period=1, pull=ramp, learning_rate=falling),
        "QuEST": hard(pq.gaussian(bits), period=1, gradient=estimators.trust(1.0)),
    }
    if bits == 1:
        found["LSQ"] = hard(levels, gradient=inside, learn=learned)
    else:
        grid = pq.integer(bits, "mean") if bits else levels
        found["LSQ"] = hard(grid, gradient=inside, learn=lsq)
    if bits in (0, 2):
        stretched = levels if bits else pq.ternary_uniform()
        found["SEQ"] = hard(stretched, gradient=inside, learn=lsq)
    if bits == 0:
        found["TTQ"] = hard(two_scales(), gradient=estimators.by_level(), learn=learned)
    found["LQ-Nets"] = hard(pq.lsbq(bits), learn=learned)
    found["free levels"] = hard(free(levels), learn=learned)
    found["PARQ"] = parq(levels)
    found["PARQ, clipped start"] = parq(levels, clipped_start=True)
    late = pq.schedules.cosine(rate, 0.0, -start, steps - start)  # learning begins at `start`
    found["PARQ, learned levels"] = parq(levels, learn=pq.adam(late))
    return found


def compared(
    bits: Sequence[int], names: Sequence[str] | None = None
) -> dict[tuple[str, int], Link]:
    """{(method, bits): its link for a task}, in the order of `methods`; full precision has None.

    names: of the methods, beside full precision and straight-through; without them all.
    """

    def link(name: str, bits: int, task: Task) -> pq.Prox:
        return methods(bits, task.steps, task.rate)[name]

    own = {b: methods(b, 10, 1.0) for b in bits}
    links: dict[tuple[str, int], Link] = {(FULL, b): lambda _: None for b in bits}
    for name in dict.fromkeys(name for b in (0, *bits) for name in methods(b, 10, 1.0)):
        if names is None or name in (*names, BASE):
            links |= {(name, b): partial(link, name, b) for b in bits if name in own[b]}
    return links


# The language model.

CONTEXT = 64


def _transformer() -> nn.Module:
    return Transformer(layers=4, width=64, heads=4, context=CONTEXT)


def _bytes(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = batch(text()[0], 8, CONTEXT, generator)
        yield tokens[:, :-1], tokens[:, 1:].flatten()


def _bytes_of_test() -> tuple[Tensor, Tensor]:
    tokens = batch(text()[1], 128, CONTEXT, torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:].flatten()


TASKS = {
    "digits": choosing.TASKS["digits"]._replace(steps=300, seeds=16),
    "bytes": choosing.TASKS["bytes"]._replace(
        net=_transformer, batches=_bytes, test=_bytes_of_test, exclude=("head",), steps=150
    ),
}


# What is printed and drawn.

Scores = dict[tuple[str, int], list[float]]


def mean_and_error(scores: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error; NaN of one score.

    >>> mean_and_error([1.0, 3.0])
    (2.0, 1.0)
    """
    error = math.nan
    if len(scores) > 1:
        error = statistics.stdev(scores) / math.sqrt(len(scores))
    return statistics.mean(scores), error


def differences(scores: Scores) -> Scores:
    """From straight-through, of the same seeds."""
    return {
        (name, bits): [a - b for a, b in zip(own, scores[BASE, bits], strict=True)]
        for (name, bits), own in scores.items()
        if name not in (FULL, BASE)
    }


def table(title: str, scores: Scores, sign: str = "") -> str:
    """As Markdown: a line a method, a column a number of bits, means ± standard errors."""
    columns = list(dict.fromkeys(bits for _, bits in scores))
    lines = [title, "", f"| | {' | '.join(map(name_of_bits, columns))} |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name in dict.fromkeys(name for name, _ in scores):
        cells = []
        for bits in columns:
            mean, error = mean_and_error(scores.get((name, bits), [math.nan]))
            spread = "" if math.isnan(error) else f" ± {error:.2f}"
            cells.append("" if math.isnan(mean) else f"{mean:{sign}.2f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def draw(found: dict[str, Scores]) -> Figure:
    """A panel for each task: scores by bits, with standard errors."""
    figure = Figure(figsize=(11, 1 + 4 * len(found)), layout="constrained")
    panels = figure.subplots(len(found), 1, squeeze=False)[:, 0]
    names = list(dict.fromkeys(name for scores in found.values() for name, _ in scores))
    for panel, (task, scores) in zip(panels, found.items(), strict=True):
        columns = list(dict.fromkeys(bits for _, bits in scores))
        for i, name in enumerate(names):
            here = [b for b in columns if (name, b) in scores]
            ends = [mean_and_error(scores[name, b]) for b in here]
            if name == FULL:
                if here:
                    panel.axhline(ends[0][0], color="gray", linestyle="--", label=name)
                continue
            aside = 0.055 * (i - len(names) / 2)
            panel.errorbar(
                [columns.index(b) + aside for b in here],
                [mean for mean, _ in ends],
                [0.0 if math.isnan(error) else error for _, error in ends],
                fmt="osD^vPX"[i % 7],
                color=f"C{i % 10}",
                markersize=5,
                label=name,
            )
        panel.set_xticks(range(len(columns)), map(name_of_bits, columns))
        panel.set(title=task, ylabel=TASKS[task].of.partition(",")[0])
        panel.set_xlim(-0.5, len(columns) - 0.5)
        panel.grid(axis="y", alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False)
    return figure


# The command line.


def in_processes(parts: Sequence[Sequence[int]], args: argparse.Namespace) -> None:
    """Trains the bits of each part in a process of its own, which adds to the same file. What is
    there is left out, and a part alone is left to the caller.

    Raises UserError where a process fails.
    """
    parts = [part for part in parts if part]
    if len(parts) < 2:
        return
    flags = ["--threads", str(args.threads), "--workers", "1", "--save-dir", str(args.save_dir)]
    flags += ["--tiny"] * args.tiny + ["--tasks", *args.tasks]
    for name in ("seeds", "steps"):
        given = getattr(args, name)
        flags += [] if given is None else [f"--{name}", str(given)]
    flags += ["--methods", *args.methods] if args.methods else []
    command = [sys.executable, "-m", "examples.methods", *flags, "--bits"]
    running = [
        subprocess.Popen([*command, *map(str, part)], stdout=subprocess.DEVNULL) for part in parts
    ]
    try:
        if any(process.wait() for process in running):
            raise UserError("a process of --workers has failed; its error stands above")
    finally:
        for process in running:
            process.kill()
            process.wait()


def main(argv: Sequence[str] | None = None) -> dict[str, Scores]:
    """Trains what is not there yet, prints the tables, writes them and the figure."""
    parser = Parser("examples.methods", __doc__)
    every = list(compared((1, 0, 2, 3)))
    names = list(dict.fromkeys(name for name, _ in every))
    several: dict[str, Any] = {"nargs": "+"}
    parser.add_argument(
        "--tasks", **several, choices=list(TASKS), default=list(TASKS), help="which"
    )
    text = "beside straight-through: " + ", ".join(names)
    parser.add_argument("--methods", **several, choices=names, metavar="METHOD", help=text)
    about = "0 is ternary; all of 1 0 2 3, with --tiny 0 2"
    parser.add_argument("--bits", **several, type=int, choices=range(5), help=about)
    parser.add_argument("--seeds", type=at_least(1, int), default=None, help="of each method")
    parser.add_argument("--steps", type=at_least(10, int), default=None, help="of a training")
    parser.add_argument("--tiny", action="store_true", help="10 steps and 2 seeds, for a try")
    about = "of a CPU, for each process"
    parser.add_argument("--threads", type=at_least(1, int), default=1, help=about)
    about = "processes, each of which trains some of the bits (default: one for each core)"
    parser.add_argument("--workers", type=at_least(1, int), default=os.cpu_count(), help=about)
    parser.add_argument(
        "--save-dir", type=Path, default=Path("runs/methods"), help="for all that is written"
    )
    args = parser.parse_args(argv)
    folder = output_folder(args.save_dir)
    torch.set_num_threads(args.threads)
    given = {"steps": args.steps or (10 if args.tiny else None)}
    given["seeds"] = args.seeds or (2 if args.tiny else None)
    print(f"results are kept in {folder / 'results.jsonl'}", file=sys.stderr)
    bits = args.bits or ([0, 2] if args.tiny else [1, 0, 2, 3])
    links = compared(bits, args.methods)
    given = {key: number for key, number in given.items() if number is not None}
    tasks, file = [TASKS[name]._replace(**given) for name in args.tasks], folder / "results.jsonl"
    there = {task.name: kept_results(task, file) for task in tasks}
    todo = [
        b
        for b in bits
        if any(
            str(link(task)) not in there[task.name]
            for task in tasks
            for (_, own), link in links.items()
            if own == b
        )
    ]
    in_processes([todo[i :: args.workers] for i in range(args.workers)], args)
    found: dict[str, Scores] = {}
    for task in tasks:
        with sdpa_kernel(SDPBackend.MATH):  # others have no rule for vmap
            kept = results(task, file, links.values())
        scores = found[task.name] = {key: kept[str(link(task))] for key, link in links.items()}
        runs = f"{task.seeds} seeds of {task.steps} steps"
        print(table(f"{task.name}: {task.of}, {runs}, mean ± standard error", scores))
        title = f"{task.name}: differences from {BASE}, of the same seeds"
        print(table(title, differences(scores), "+"))
    draw(found).savefig(folder / "methods.png", dpi=120)
    report = {
        task: [
            {"method": name, "bits": bits, "scores": own} for (name, bits), own in scores.items()
        ]
        for task, scores in found.items()
    }
    whole = {"arguments": vars(args), "results": report}
    (folder / "methods.json").write_text(json.dumps(whole, indent=1, default=str) + "\n")
    return found


if __name__ == "__main__":
    command(main)
