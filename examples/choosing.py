"""Trains two small networks by bits, quantizer, map and granularity: the tables of the page on
what to choose.

    python -m examples.choosing
    python -m examples.choosing --tasks digits --seeds 1

`digits` is a perceptron on scikit-learn's 8x8 scans of handwritten digits, scored by the share of
test images that it names right. `bytes` predicts the next byte of the sources of Python's standard
library from the 16 before it, scored by its test loss in bits a byte. A line differs from the first
of its table in what it names and in nothing else, and nothing was tuned for any of them. All seeds
of a line are trained at once, by `torch.vmap`; a seed gives every line the same start and batches.

Every result is added to results.jsonl in --save-dir, and what is there is not trained again.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import parq_fn as pq
from examples.digits import load_data
from examples.options import at_least, name_of_bits
from examples.qat_fsdp2 import batch, load_text
from parq_fn.foundation.command import Parser, UserError, command, output_folder
from parq_fn.foundation.tree import tree_map

# What is trained.

CONTEXT = 16  # bytes before the one that is predicted
digits, text = cache(load_data), cache(load_text)  # every seed's stream has them


class Task(NamedTuple):
    """A network with its data, and how it is scored."""

    name: str
    net: Callable[[], nn.Module]
    #: Seed -> batches of (inputs, labels), without end.
    batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]
    #: (inputs, labels) of the test.
    test: Callable[[], tuple[Tensor, Tensor]]
    #: (outputs, labels) -> a number.
    score: Callable[[Tensor, Tensor], Tensor]
    of: str
    rate: float
    #: Patterns for weights that are left in full precision.
    exclude: tuple[str, ...] = ()
    steps: int = 400
    seeds: int = 5


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def _digits(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    data, _ = digits(0)
    generator = torch.Generator().manual_seed(seed)
    while True:
        drawn = torch.randint(len(data.labels), (64,), generator=generator)
        yield data.images[drawn], data.labels[drawn]


def _share_right(outputs: Tensor, labels: Tensor) -> Tensor:
    return 100 * (outputs.argmax(-1) == labels).double().mean(-1)


def _next_byte() -> nn.Module:
    return nn.Sequential(
        *(nn.Embedding(256, 16), nn.Flatten(), nn.Linear(16 * CONTEXT, 128), nn.ReLU()),
        *(nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 256)),
    )


def _bytes(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = batch(text()[0], 64, CONTEXT, generator)
        yield tokens[:, :-1], tokens[:, -1]


def _bytes_of_test() -> tuple[Tensor, Tensor]:
    tokens = batch(text()[1], 20_000, CONTEXT, torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, -1]


def _bits_a_byte(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels) / math.log(2)


TASKS = {
    "digits": Task(
        *("digits", _perceptron, _digits, lambda: digits(0)[1], _share_right),
        *("test accuracy in percent, higher is better", 3e-3),
    ),
    "bytes": Task(
        *("bytes", _next_byte, _bytes, _bytes_of_test, _bits_a_byte),
        *("test loss in bits a byte, lower is better", 3e-3, ("6",)),  # not the head
        seeds=3,
    ),
}


# What is compared: a prox link for a task, or None for full precision.

Link = Callable[[Task], pq.Prox | None]


def annealed(
    map_of: Callable[..., pq.Prox],
    quantizer: pq.Quantizer,
    granularity: pq.Granularity | None = None,
    **options: float,
) -> Link:
    """The annealing is from a fifth of the steps to four fifths."""

    def link(task: Task) -> pq.Prox:
        steps = {"anneal_start": task.steps // 5, "anneal_end": task.steps * 4 // 5}
        rows = granularity or pq.per_channel()
        if map_of is pq.hard_prox:
            return pq.hard_prox(quantizer, granularity=rows)
        return map_of(quantizer, granularity=rows, **steps, **options)

    return link


def quantizers(bits: int) -> dict[str, pq.Quantizer]:
    """Those that have so many bits; of 1 bit all have the same levels."""
    if bits == 1:
        return {"lsbq(bits)": pq.lsbq(1)}
    best = "optimal" if bits <= 2 else "alternating"
    return {
        "lsbq(bits)": pq.lsbq(bits),
        'lsbq(bits, "optimal") to 2 bits, "alternating" above': pq.lsbq(bits, best),
        "uniform(bits), ternary_uniform()": pq.uniform(bits) if bits else pq.ternary_uniform(),
    }


MAPS: dict[str, tuple[Callable[..., pq.Prox], dict[str, float]]] = {
    "parq_prox": (pq.parq_prox, {}),
    "hard_prox": (pq.hard_prox, {}),
    "soft_prox": (pq.soft_prox, {}),
    "binary_relax_prox": (pq.binary_relax_prox, {}),
    "proxquant_prox, strength 0.05": (pq.proxquant_prox, {"strength": 0.05}),
}

GRANULARITIES: dict[str, pq.Granularity] = {
    "per_channel()": pq.per_channel(),
    "per_tensor()": pq.per_tensor(),
}


def compared() -> dict[str, dict[tuple[str, str], Link]]:
    """{table: {(row, column): link}}."""
    tables: dict[str, dict[tuple[str, str], Link]] = {"Quantizers": {("full precision", ""): _none}}
    for bits in (4, 3, 2, 0, 1):
        for name, quantizer in quantizers(bits).items():
            tables["Quantizers"][name, name_of_bits(bits)] = annealed(pq.parq_prox, quantizer)
    tables["Maps"] = {
        (name, name_of_bits(bits)): annealed(map_of, pq.lsbq(bits), **options)
        for name, (map_of, options) in MAPS.items()
        for bits in (2, 0, 1)
    }
    tables["Granularity"] = {
        (name, name_of_bits(bits)): annealed(pq.parq_prox, pq.lsbq(bits), rows)
        for name, rows in GRANULARITIES.items()
        for bits in (2, 0, 1)
    }
    return tables


def _none(task: Task) -> None:
    del task


# Training.


def train(task: Task, link: Link, seeds: Sequence[int]) -> list[float]:
    """The scores of networks that are trained at once, one from each seed."""
    starts = []
    for seed in seeds:
        torch.manual_seed(seed)
        net = task.net()
        starts.append(pq.functional(net)[1])
    apply, _ = pq.functional(net)
    prox = link(task)
    rate = pq.schedules.cosine(task.rate, 0.0, 0, task.steps)
    last = () if prox is None else (pq.masked(prox, pq.weight_mask(net, exclude=task.exclude)),)
    transform = pq.chain(pq.clip_by_global_norm(1.0), pq.adamw(rate), *last)

    def loss(weights: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(apply(weights, inputs), labels)

    def step(params: Any, state: Any, inputs: Tensor, labels: Tensor) -> Any:
        _, grads = pq.value_and_grad(loss, transform)(params, state, inputs, labels)
        updates, state = transform.update(grads, state, params)
        return pq.apply_updates(params, updates), state

    params = {name: torch.stack([start[name] for start in starts]) for name in starts[0]}
    # counts are of all seeds alike: read as numbers, they spare what is not due in a step
    alike = tree_map(lambda leaf: 0 if leaf.ndim else None, transform.init(starts[0]))
    state = torch.vmap(transform.init, out_dims=alike)(params)
    together = torch.vmap(step, (0, alike, 0, 0), (0, alike))
    streams = [task.batches(seed) for seed in seeds]
    for _ in range(task.steps):
        inputs, labels = (torch.stack(parts) for parts in zip(*map(next, streams), strict=True))
        params, state = together(params, state, inputs, labels)

    weights = torch.vmap(transform.weights, (alike, 0))(state, params)
    inputs, labels = task.test()
    with torch.no_grad():
        scores = torch.vmap(lambda w: task.score(apply(w, inputs), labels))(weights)
    return scores.tolist()


def kept_results(task: Task, file: Path) -> dict[str, list[float]]:
    """{link: scores} of a file.

    Raises UserError for a line of the file that is no result, as of a run that was cut off.
    """
    found: dict[str, list[float]] = {}
    if file.exists():
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            try:
                name, steps, link, scores = json.loads(line)
                count = len(scores)
            except (TypeError, ValueError):
                raise UserError(f"{file}, line {number} is no result; delete that line") from None
            if (name, steps, count) == (task.name, task.steps, task.seeds):
                found[link] = scores
    return found


def results(task: Task, file: Path, compared: Iterable[Link]) -> dict[str, list[float]]:
    """{link: scores}: those of the file, and those of links it lacks, which are added to it.

    Raises UserError as `kept_results`.
    """
    found = kept_results(task, file)
    links = {str(link(task)): link for link in compared}
    left = [link for name, link in links.items() if name not in found]
    for link in tqdm(left, task.name, disable=None):
        name = str(link(task))
        found[name] = train(task, link, range(task.seeds))
        with file.open("a") as lines:
            lines.write(json.dumps([task.name, task.steps, name, found[name]]) + "\n")
    return found


def tables(task: Task, found: dict[str, list[float]]) -> str:
    """All of a task, as Markdown: means over seeds, with the standard deviation."""
    parts = []
    for title, cells in compared().items():
        columns = list(dict.fromkeys(column for _, column in cells if column))
        parts += [f"{title}, {task.name}: {task.of}, {task.seeds} seeds", ""]
        parts += [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in dict.fromkeys(row for row, _ in cells):
            links = [cells.get((row, column), cells.get((row, ""))) for column in columns]
            texts = ["" if link is None else _cell(found[str(link(task))]) for link in links]
            parts.append(f"| {row} | {' | '.join(texts)} |")
        parts.append("")
    return "\n".join(parts)


def _cell(scores: list[float]) -> str:
    spread = f" ± {statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.2f}{spread}"


# The command line.


def main(argv: Sequence[str] | None = None) -> str:
    """Trains what is not there yet, and prints the tables."""
    parser = Parser("examples.choosing", __doc__)
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="which"
    )
    parser.add_argument("--seeds", type=at_least(1, int), default=None, help="of each line")
    parser.add_argument("--steps", type=at_least(5, int), default=None, help="of a run, for a try")
    parser.add_argument(
        "--save-dir", type=Path, default=Path("runs/choosing"), help="for results.jsonl"
    )
    args = parser.parse_args(argv)
    file = output_folder(args.save_dir) / "results.jsonl"
    print(f"results are kept in {file}", file=sys.stderr)
    parts = []
    links = [link for cells in compared().values() for link in cells.values()]
    given = {"steps": args.steps, "seeds": args.seeds}
    for name in args.tasks:
        task = TASKS[name]._replace(**{k: v for k, v in given.items() if v is not None})
        parts.append(tables(task, results(task, file, links)))
    text = "\n".join(parts)
    print(text)
    return text


if __name__ == "__main__":
    command(main)
