"""Thirty-two runs in one compiled program, against the same runs one after another."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from examples.digits import Data, load_data
from examples.sweep import Sweep, at_once, hold, one_by_one, order_of, parse, settings_of
from tests.benchmarks.measure import CORES, ratio
from tests.benchmarks.report import Found


def both(inputs: Any) -> tuple[Any, Any]:
    return at_once(*inputs), one_by_one(*inputs)


def compared(model: str, batch: int, steps: int, repeats: int, held: float | None) -> Found:
    """Times in float32, results in float64."""
    torch.compiler.reset()  # or it would make what differs from the last case symbolic
    settings = settings_of(parse([]), steps)
    sweep = Sweep(model, 1, round(0.1 * steps))
    times: dict[str, list[float]] = {"once": [], "one": []}
    for dtype in (torch.float64, *[torch.float32] * repeats):
        train, test = (Data(data.images.to(dtype), data.labels) for data in load_data(0))
        orders = order_of(settings.seed, steps, batch, len(train.labels))
        inputs = sweep, settings, orders, train, test, not sys.stderr.isatty()
        (found, alone), CORES.were_slow = CORES.steady(partial(both, inputs))
        if dtype == torch.float64:
            hold(found, alone, dtype)
        else:
            times["once"].append(found.seconds)
            times["one"].append(alone.seconds)
    value, spread = ratio(times["one"], times["once"])
    case = f"{model}, {len(settings.seed)} runs, batches of {batch}"
    return Found("sweep", case, "times the throughput", value, spread, held, False)


def run(size: str, repeats: int) -> Iterator[Found]:
    """The groups of this module."""
    if size == "tiny":
        yield compared("perceptron", 16, 12, 1, None)
        return
    for batch in (32, 16, 64):
        held = 5.0 if batch == 32 else None
        yield compared("perceptron", batch, 400, min(repeats, 5), held)
    yield compared("conv", 32, 100, 1, None)
