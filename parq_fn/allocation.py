"""Bits where they matter: the cheapest choice of bits for each weight under a size.

Each matrix i takes one of its numbers of bits b, of a size s_i(b) in bits and a cost c_i(b):

    minimize sum_i c_i(b_i)   subject to   sum_i s_i(b_i) <= budget

which is a knapsack with one choice of each kind. It is solved exactly, matrix by matrix: kept are
sums (size, cost) to which none is both smaller and cheaper, and which may still be best. For any
price p >= 0 of a bit

    cost so far + p (size so far - budget) + sum over the others of min_b c(b) + p s(b)

bounds from below what a beginning can come to; a beginning goes where that exceeds what some
choice within the budget costs. The price is that of the best such bound (the Lagrangian dual).

Where too many beginnings are left, as of tens of matrices of different sizes whose costs are all in
proportion to them, some are dropped; the least bound of those says how far off the choice may be.

Source: Kellerer, Pferschy and Pisinger, Knapsack Problems, Springer 2004, chapter 11.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np

from parq_fn.foundation.checks import POSITIVE, check_numbers
from parq_fn.foundation.value import briefly
from parq_fn.quantizers.bits import name_of_bits
from parq_fn.sensitivities import Sensitivity, cost_of

#: By how much of the sums' size bounds may be off, by rounding.
_ROUNDING = 1e-12
#: Beginnings that are kept.
_MOST = 1 << 16


class Allocation(dict[str, int | None]):
    """{parameter: bits, or None for full precision}: rules for `param_groups`; prints as a table.

    size: bits of all; cost: the sum of the costs; numel: how many weights they are; gap: by how
    much the cost may be above the least, 0 where the choice is exact.
    """

    def __init__(
        self, bits: Mapping[str, int], size: int, cost: float, numel: int, gap: float = 0.0
    ) -> None:
        super().__init__({name: b if b < 16 else None for name, b in bits.items()})
        self.size, self.cost, self.numel, self.gap = size, cost, numel, gap

    @property
    def bits_per_weight(self) -> float:
        """The size over the number of weights; 0 of none."""
        return self.size / self.numel if self.numel else 0.0

    def __str__(self) -> str:
        width = max(map(len, self))
        shown = (name_of_bits(16 if bits is None else bits) for bits in self.values())
        rows = (f"{name.ljust(width)}  {how}" for name, how in zip(self, shown, strict=True))
        total = f"{self.bits_per_weight:.3f} bits a weight, cost {self.cost:.4g}"
        total += f", at most {self.gap:.2g} above the least" if self.gap else ""
        return "\n".join([*rows, f"{'all'.ljust(width)}  {total}"])

    __repr__ = __str__


def allocate(
    table: Sensitivity,
    bits_per_weight: float = 2.5,
    *,
    cost: Mapping[str, Mapping[int, float]] | None = None,
) -> Allocation:
    """The bits of each weight matrix whose costs have the least sum, among all choices whose sizes,
    the numbers of rows included, come to at most bits_per_weight for each weight.

    table: what `sensitivity` gives, with the sizes.
    bits_per_weight: of the matrices in the table together.
    cost: {name: {bits: cost}} in the place of the table's: the change of the loss where it was
        asked for, else the relative error times the number of weights.

    The choice is exact, up to the rounding of sums in float64; of equal ones it is one that is
    smallest. Where far too many choices are all but equal, as of tens of matrices of different
    sizes with costs in proportion to them, it is one whose cost is at most `gap` above the least.
    The result is a dict of rules for `param_groups`, with `size` (bits), `cost`, `bits_per_weight`
    and `gap`, which is 0 where the choice is exact.

    Raises TypeError for what is no table; ValueError for a budget under the smallest choice, for
    costs that lack a parameter or a number of bits, or are not finite, and for costs of parameters
    that are not in the table.

    >>> from torch import nn
    >>> from parq_fn import hard_prox, lsbq, per_channel
    >>> from parq_fn.sensitivities import sensitivity
    >>> net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32))
    >>> table = sensitivity(net, hard_prox(lsbq(2), granularity=per_channel()), bits=(1, 2, 4))
    >>> cost = {"0.weight": {1: 9, 2: 4, 4: 1}, "1.weight": {1: 2, 2: 1, 4: 0}}
    >>> rules = allocate(table, 3.5, cost=cost)
    >>> rules["0.weight"], rules["1.weight"], rules.size <= 3.5 * rules.numel
    (2, 2, True)
    """
    check_table("allocate", table)
    costs = _costs(table, cost)
    sizes = {
        name: np.array([one.size for one in own], dtype=np.int64) for name, own in table.items()
    }
    numel = sum(table.numel[name] for name in table)
    check_numbers("allocate", POSITIVE, bits_per_weight=bits_per_weight)
    most = sum(int(own.max()) for own in sizes.values())
    budget = min(_bits(float(bits_per_weight), numel), most)
    least = sum(int(own.min()) for own in sizes.values())
    if not least <= budget:
        needed = math.ceil(1e4 * least / max(numel, 1)) / 1e4
        raise ValueError(
            f"allocate: bits_per_weight={bits_per_weight:g} is less than the smallest choice, "
            f"which takes {needed:.4f} with the numbers of rows; give more, or a table of fewer "
            "bits or of fewer rows, such as larger blocks"
        )
    chosen, gap = _best([sizes[name] for name in table], [costs[name] for name in table], budget)
    bits = {name: table[name][k].bits for name, k in zip(table, chosen, strict=True)}
    size = sum(int(sizes[name][k]) for name, k in zip(table, chosen, strict=True))
    total = sum(float(costs[name][k]) for name, k in zip(table, chosen, strict=True))
    return Allocation(bits, size, total, numel, gap)


def check_table(who: str, table: Any) -> None:
    """Raises TypeError for what is no table, or has nothing in it."""
    if not isinstance(table, Sensitivity) or not table or not all(table.values()):
        raise TypeError(
            f"{who}: expected what sensitivity(module, prox) gives, got {briefly(table)}"
        )


def _bits(bits_per_weight: float, numel: int) -> int:
    """The most bits that come to no more for each weight, as a division says it."""
    bits = math.floor(Fraction(bits_per_weight) * numel)
    return bits + (numel > 0 and (bits + 1) / numel <= bits_per_weight)


def _costs(
    table: Sensitivity, given: Mapping[str, Mapping[int, float]] | None
) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    if given is not None and not isinstance(given, Mapping):
        raise TypeError(
            f"allocate: expected cost as {{name: {{bits: cost}}}}, got {briefly(given)}"
        )
    unknown = [] if given is None else sorted(map(str, given.keys() - table.keys()))
    if unknown:
        raise ValueError(
            f"allocate: cost names {', '.join(unknown[:8])}, which the table has not; it has "
            f"{', '.join(table)}"
        )
    for name, own in table.items():
        if given is not None:
            mine = given.get(name, {})
            missing = [one.bits for one in own if one.bits not in mine]
            if missing:
                raise ValueError(
                    f"allocate: cost[{name!r}] lacks {', '.join(map(name_of_bits, missing))}; give "
                    "a cost for each number of bits of the table"
                )
            costs = [float(mine[one.bits]) for one in own]
        else:
            costs = [cost_of(name, one, table) for one in own]
        found[name] = np.array(costs, dtype=np.float64)
        if not np.isfinite(found[name]).all():
            raise ValueError(
                f"allocate: the costs of {name!r} are {costs}, expected finite numbers"
            )
    return found


def _best(sizes: list[Any], costs: list[Any], budget: int) -> tuple[list[int], float]:
    """The places of the choices, and by how much their sum may be above the least."""
    costs, exponent = _scaled(costs)
    price, fill = _price(sizes, costs, budget)
    # largest first: what is decided early leaves little open
    order = sorted(range(len(sizes)), key=lambda i: -int(sizes[i].max() - sizes[i].min()))
    after_size, after_bound, fill_size, fill_cost = [0], [0.0], [0], [0.0]
    for i in reversed(order):
        after_size.append(after_size[-1] + int(sizes[i].min()))
        after_bound.append(after_bound[-1] + float((costs[i] + price * sizes[i]).min()))
        fill_size.append(fill_size[-1] + int(sizes[i][fill[i]]))
        fill_cost.append(fill_cost[-1] + float(costs[i][fill[i]]))
    upper, lost = fill_cost[-1], math.inf
    slack = _ROUNDING * (sum(float(c.max()) for c in costs) + price * budget)
    size, cost = np.zeros(1, np.int64), np.zeros(1)
    steps = []
    for k, i in enumerate(order):
        rest = len(order) - 1 - k
        all_sizes = (size[:, None] + sizes[i]).ravel()
        all_costs = (cost[:, None] + costs[i]).ravel()
        bound = all_costs + price * (all_sizes - budget) + after_bound[rest]
        # the cost with the others as they are at that price, where that is within the budget
        within = all_sizes + fill_size[rest] <= budget
        filled = np.where(within, all_costs + fill_cost[rest], np.inf)
        upper = min(upper, float(filled.min()))
        alive = np.flatnonzero((all_sizes + after_size[rest] <= budget) & (bound <= upper + slack))
        by_size = alive[np.lexsort((all_costs[alive], all_sizes[alive]))]
        lowest = np.minimum.accumulate(all_costs[by_size])
        keep = np.ones(len(by_size), bool)
        keep[1:] = all_costs[by_size][1:] < lowest[:-1]
        kept = by_size[keep]
        if len(kept) > _MOST:
            chosen = _spread(all_sizes[kept], bound[kept], filled[kept])
            lost = min(lost, float(np.delete(bound[kept], chosen).min()))
            kept = kept[chosen]
        steps.append((i, kept.astype(np.int32), len(sizes[i])))
        size, cost = all_sizes[kept], all_costs[kept]
    place, found = int(cost.argmin()), [0] * len(sizes)
    gap = max(0.0, float(cost[place]) - lost)
    for i, before, count in reversed(steps):
        place, found[i] = divmod(int(before[place]), count)
    return found, math.ldexp(gap, exponent)


def _scaled(costs: list[Any]) -> tuple[list[Any], int]:
    """(costs above the least of each matrix, times a power of two that brings them under 1; its
    exponent): what all choices share does not round what differs, and sums are finite."""
    exponent = 0
    for _ in range(2):  # so that differences are finite, then the differences
        _, power = math.frexp(max(float(np.abs(c).max()) for c in costs))
        costs = [np.ldexp(c, -power - 1) for c in costs]
        costs = [c - c.min() for c in costs]
        exponent += power + 1
    return costs, exponent


def _spread(sizes: Any, bound: Any, filled: Any) -> Any:
    """Places of some, by size: the one of the least bound in each of many equal intervals of
    sizes, and the one that is best with the others as they are."""
    span = int(sizes[-1] - sizes[0]) + 1
    interval = (sizes - sizes[0]) * (_MOST / span) // 1
    order = np.lexsort((bound, interval))
    first = np.ones(len(order), bool)
    first[1:] = np.diff(interval[order]) > 0
    return np.union1d(order[first], filled.argmin())


def _price(sizes: list[Any], costs: list[Any], budget: int) -> tuple[float, list[int]]:
    """(the price of a bit at which the bound is best, the places of the choices at that price,
    whose size is within the budget)."""

    def at(price: float) -> tuple[int, list[int]]:
        places = [int(np.lexsort((s, c + price * s))[0]) for s, c in zip(sizes, costs, strict=True)]
        return sum(int(s[k]) for s, k in zip(sizes, places, strict=True)), places

    size, places = at(0.0)
    if size <= budget:
        return 0.0, places
    low, high = 0.0, 2.0  # where a bit costs more than any choice, the smallest are chosen
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[0] > budget else (low, middle)
    return high, at(high)[1]
