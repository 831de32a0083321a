"""What tests of any part need: cases drawn from a product, copies and comparison of tensors."""

from __future__ import annotations

import itertools
import os
import random
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

import parq_fn as pf
from tests.plugin import seed

_T = TypeVar("_T")


# Cases. TEST_SEED draws the same again, TEST_CASES=all takes every one.


def every_case() -> bool:
    """Whether nothing is to be sampled."""
    return os.environ.get("TEST_CASES") == "all"


def sampled(cases: Iterable[_T], count: int) -> list[_T]:
    """So many of the cases, in their order, drawn by the seed of the run.

    For cases that take long and seldom tell: each run takes others, and a failure is repeated by
    the seed that the run prints.
    """
    given = list(cases)
    if every_case() or count >= len(given):
        return given
    drawn = random.Random(f"{seed()} {len(given)}").sample(range(len(given)), count)
    return [given[i] for i in sorted(drawn)]


def spread(first: Sequence[Any], *others: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A case for each value of the first factor, with values of the others in turn.

    Which values meet is drawn by the seed of the run; each comes as often as others of its factor,
    to one. `TEST_CASES=all` gives the whole product.
    """
    if every_case():
        return list(itertools.product(first, *others))
    draw = random.Random(f"{seed()} {len(first)}")
    columns = []
    for values in others:
        column = [values[i % len(values)] for i in range(len(first))]
        start = draw.randrange(len(values))  # which of them comes once more
        column = [values[(values.index(v) + start) % len(values)] for v in column]
        draw.shuffle(column)
        columns.append(column)
    return list(zip(first, *columns, strict=True))


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cases of the product of the factors in which every two values of two factors meet.

    Greedy, over the product in an order drawn by the seed of the run. Most faults need no more
    than two values to meet; the product of 4 x 2 x 2 x 4 values has 64 cases, this 16.
    """
    cases = list(itertools.product(*factors))
    if every_case() or len(factors) < 3:
        return cases
    random.Random(f"{seed()} {len(cases)}").shuffle(cases)

    def met(case: tuple[Any, ...]) -> set[tuple[int, int, int, int]]:
        places = [list(f).index(value) for f, value in zip(factors, case, strict=True)]
        return {(i, places[i], j, places[j]) for i in range(len(places)) for j in range(i)}

    found: list[tuple[Any, ...]] = []
    left = set[Any]().union(*map(met, cases))
    while left:
        best = max(cases, key=lambda case: len(met(case) & left))
        found.append(best)
        left -= met(best)
    return found


# Tensors


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Of their values now."""
    return [t.detach().clone() for t in tensors]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether they are as many, of the same dtypes, shapes and bits."""
    pairs = zip(one, other, strict=True)
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# Documents


def python_blocks(text: str) -> list[str]:
    """The Python code of a Markdown text."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run_blocks(blocks: Iterable[str], names: dict[str, Any] | None = None) -> dict[str, Any]:
    """The names that the blocks define, run one after another."""
    names = {} if names is None else names
    for block in blocks:
        exec(compile(block, "page", "exec"), names)
    return names


# A granularity of one's own.


class every_other(pf.Granularity):
    """Rows that a weight's own order does not have, by methods of its own."""

    def shape(self, weight: Tensor) -> tuple[int, int]:
        return 2, weight.numel() // 2

    def rows(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 2).t()

    def restore(self, rows: Tensor, weight: Tensor) -> Tensor:
        return rows.t().reshape(weight.shape)
