"""Compiled programs of the prox pass, each one loop that reads latents and writes weights.

A program is made for a map, a quantizer and dtypes, and serves rows of any number and length, but
for very large parameters on a GPU, where it serves one length; steps, learning rates and
coefficients are tensors to it. It makes the levels of short rows from their qparams, in the loop.

On a CPU a loop maps two parameters of one shape, or both halves of a very large one, for what is
read from memory in two places is waited for less long. On a GPU a program maps up to four of one
shape, for it takes longer to call than most parameters to map; and the compiler is told the length
of rows, and by how much their number can be divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.torch_private import compiled, compiler_options, mark_constant
from parq_fn.optim.engine.rows import (
    Map,
    Maps,
    Rows,
    in_columns,
    of_a_kind,
    sizes_of,
    some_rows,
    tables,
    write,
)
from parq_fn.proxmaps.levels import BOUNDS_MIN, bounds
from parq_fn.proxmaps.proxmap import Formula
from parq_fn.quantizers import Quantizer

_LONG = 1 << 10  # of a row from which on its levels are made once, not for every weight
_LARGE = 1 << 20  # of a latent from which on a program is told more of its shape
_GROUP = 1 << 12  # of whose multiples a loop on a GPU needs no mask
_REST = 1 << 17  # elements left over that are mapped without a program
_AT_ONCE = 4  # parameters that a program on a GPU maps


class Programs:
    """What writes the weights of rows; programs are kept from call to call."""

    def __init__(self) -> None:
        self._found: dict[Any, Callable[..., None]] = {}

    def __call__(self, maps: Maps, wholes: list[Rows]) -> None:
        calls, left = _calls(_with_levels(maps, wholes), cut=maps.link.elementwise)
        # All are prepared before the first is run: alternating would evict code from the
        # instruction cache, which doubles the time.
        hows = [maps.of(parts[0]) for parts in calls]
        programs = [self._program(how, parts) for how, parts in zip(hows, calls, strict=True)]
        for program, parts, how in zip(programs, calls, hows, strict=True):
            program(parts, how.scalars, how.divisor)
        for part in left:
            maps.of(part).write(part)

    def _program(self, how: Map, parts: list[Rows]) -> Callable[..., None]:
        formula, k = how.formula, how.quantizer.num_levels
        (latent, _, weight, levels, bound, inverse, _), table = parts[0], parts[0].table
        device, columns = latent.device.type, table.shape[-1]
        dtypes = latent.dtype, table.dtype, weight.dtype
        grouped = latent.dim() > 2
        shape = (
            latent.shape[1:] if grouped else tuple(size in (1, columns) for size in latent.shape)
        )
        # the program keeps the quantizer alive whose number stands for it
        own = id(how.quantizer) if levels is None else None
        made = bound is None, inverse is None
        kind = len(parts), shape, columns, dtypes, device, *made, how.divisor is None
        key = _identity(formula.weight), own, k, kind
        if key not in self._found:
            cells_from = formula.cells_from
            if cells_from is None and bound is None:
                cells_from = BOUNDS_MIN  # then a cell is searched for the nearest level, too
            narrow = inverse is None and cells_from is not None and k >= cells_from
            options = compiler_options(device, two=len(parts) > 1, narrow=narrow)
            self._found[key] = _compiled(how.quantizer, formula, options)
        return self._found[key]


def _with_levels(maps: Maps, wholes: list[Rows]) -> list[Rows]:
    """The same, but with the inverse of steps where a rounding finds levels; else long rows with
    levels, and with bounds where a program would compute them for every weight. Those of all
    together, for one at a time they cost as much as a call of a program.
    """
    wholes = list(wholes)
    for places in of_a_kind(wholes):
        parts = [wholes[i] for i in places]
        inverse = maps.of(parts[0]).inverse_steps(tables(parts), parts[0].weight.dtype)
        if inverse is not None:
            for i, own in zip(places, _apart(inverse, sizes_of(parts)), strict=True):
                wholes[i] = wholes[i]._replace(inverse=own)
    for places in of_a_kind(wholes):
        places = [i for i in places if wholes[i].latent.shape[1] >= _LONG]
        parts = [wholes[i] for i in places]
        if not parts or parts[0].inverse is not None:
            continue
        one, how, sizes = parts[0], maps.of(parts[0]), sizes_of(parts)
        levels = how.quantizer.levels_in(tables(parts), one.weight.dtype)
        bound: Sequence[Tensor | None] = [None] * len(sizes)
        if how.uses_bounds and _on_cpu(one):
            bound = _apart(bounds(levels.to(how.dtype)), sizes)  # a GPU has time for them
        for i, own, ends in zip(places, _apart(levels, sizes), bound, strict=True):
            wholes[i] = wholes[i]._replace(qparams=None, levels=own, bound=ends)
    return wholes


def _apart(table: Tensor, sizes: list[int]) -> list[Tensor]:
    """Parts of a table, each at the start of its own memory: a compiler tells a tensor that begins
    there from one that begins further on, and would make a program for either."""
    return [part.clone() if part.storage_offset() else part for part in torch.split(table, sizes)]


def _calls(wholes: list[Rows], *, cut: bool) -> tuple[list[list[Rows]], list[Rows]]:
    """What programs are called with, parts of one shape each, and what is too small for a program.

    cut: whether a row may be.
    """
    calls, left = [], []
    todo = _alike(wholes)
    while todo:
        parts, rests = todo.pop(), list[Rows]()
        if cut and parts[0].latent.numel() >= _LARGE:
            parts, rests = _split(parts)
        calls.append([_by_itself(part) for part in parts])
        if rests:
            small = rests[0].latent.numel() <= _REST  # a row or an element
            left.extend(rests) if small else todo.append(rests)
    return calls, left


def _on_cpu(rows: Rows) -> bool:
    return rows.latent.device.type == "cpu"


def _alike(wholes: list[Rows]) -> list[list[Rows]]:
    """Those of one shape in twos, on a GPU in fours too, as far as there are; the others
    alone."""
    found: dict[Any, list[int]] = {}
    for i, whole in enumerate(wholes):
        found.setdefault((whole.kind, whole.latent.shape), []).append(i)
    runs = []
    for places in found.values():
        most = 2 if _on_cpu(wholes[places[0]]) else _AT_ONCE
        while places:
            size = min(most, 1 << (len(places).bit_length() - 1))  # a program for each size
            runs.append(places[:size])
            places = places[size:]
    return [[wholes[i] for i in run] for run in sorted(runs)]


def _split(parts: list[Rows]) -> tuple[list[Rows], list[Rows]]:
    """Parts of large ones of which a compiler makes a faster loop, and what they leave."""
    if _on_cpu(parts[0]):
        if len(parts) > 1:
            return parts, []
        splits = [_halved(*parts)]
    else:
        splits = [_grouped(part) for part in parts]
    own = [part for found, _ in splits for part in found]
    return own, [rest for _, rest in splits if rest is not None]


def _halved(whole: Rows) -> tuple[list[Rows], Rows | None]:
    """Two parts of one shape, of half of the rows or half of the only row each, and the row or
    element that is left over, if any. Of two elements or more."""
    r, n = whole.latent.shape
    rest = None
    if r == 1:
        half = n // 2
        if n % 2:
            rest = in_columns(whole, slice(n - 1, n))
            whole = in_columns(whole, slice(0, n - 1))
        # levels of their own memory, as those of two rows are: else a program of its own
        of_row = (x if x is None else x.repeat(2, 1) for x in (whole.qparams, *whole[3:]))
        whole = _of_other_rows(whole, of_row, 2, half)
    elif r % 2:
        whole, rest = some_rows(whole, slice(0, r - 1)), some_rows(whole, slice(r - 1, r))
    halves = zip(*([x, x] if x is None else x.chunk(2) for x in whole), strict=True)
    return [Rows._make(half) for half in halves], rest


def _of_other_rows(whole: Rows, of_row: Iterable[Tensor | None], r: int, n: int) -> Rows:
    """The weights as r rows of n, with the qparams, levels and bounds of these."""
    qparams, *rest = of_row
    return Rows(whole.latent.view(r, n), qparams, whole.weight.view(r, n), *rest)


def _grouped(whole: Rows) -> tuple[list[Rows], Rows | None]:
    """Groups [m, g, n] of rows, of a multiple of _GROUP elements each, and what is left over, if
    anything; the whole, where there is no group.

    A compiler is to know g and n. An element's row is then its place over a number, and what
    neighbours have in common, levels and whether they lie in the tensor, is read once for them.
    """
    r, n = whole.latent.shape
    g = 1 if r == 1 else _GROUP // math.gcd(n, _GROUP)
    if r < g or r * n < _GROUP:
        return [whole], None
    rest = None
    if r == 1:
        r, n = n // _GROUP, _GROUP
        if whole.latent.numel() % _GROUP:
            rest = in_columns(whole, slice(r * n, None))
            whole = in_columns(whole, slice(0, r * n))
        of_row = (x if x is None else x.expand(r, -1) for x in (whole.qparams, *whole[3:]))
        whole = _of_other_rows(whole, of_row, r, n)
    elif r % g:
        used = r // g * g
        whole, rest = some_rows(whole, slice(0, used)), some_rows(whole, slice(used, r))
    groups = (x if x is None else x.view(r // g, g, x.shape[1]) for x in whole)
    return [Rows._make(groups)], rest


def _by_itself(part: Rows) -> Rows:
    """The part as a compiler is given it: views detached, for torch.compile specialises on each
    kind of view and stops after eight; sizes of groups constant."""
    found = Rows._make(x if x is None else x.detach() for x in part)
    for x in found:
        if x is not None and x.dim() > 2:
            mark_constant(x, [1, 2])
    return found


def _flat(groups: Tensor) -> Tensor:
    """[m, g, n] as [m g, n], a view."""
    m, g, n = groups.shape
    return groups.view(m * g, n)


def _compiled(
    quantizer: Quantizer, formula: Formula, options: dict[str, Any]
) -> Callable[..., None]:
    """A program that writes the weights of one part, or of some of one shape."""

    def run(parts: list[Rows], scalars: tuple[Tensor, ...], divisor: Tensor | None) -> None:
        for part in parts:
            assert part.latent.shape == parts[0].latent.shape  # known to a compiler: one loop
            if part.latent.dim() > 2:
                part = Rows._make(x if x is None else _flat(x) for x in part)
            write(quantizer, formula, part, scalars, divisor)

    return compiled(run, options)


def _identity(weight: Any) -> Any:
    """A key for a map, which its program keeps alive; of a link's method, for that link."""
    owner = getattr(weight, "__self__", None)
    return id(weight) if owner is None else (id(weight.__func__), id(owner))
