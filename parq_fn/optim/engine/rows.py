"""Rows of parameters and what maps them, in every form of the prox pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.scalar import is_number, may_be_read, to_device
from parq_fn.optim.engine.chunks import chunks
from parq_fn.proxmaps.even import COUNTED_MAX, Even
from parq_fn.proxmaps.levels import Levels, bounds, prepare
from parq_fn.proxmaps.proxmap import Formula
from parq_fn.quantizers import Quantizer
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_state import ProxState, shrunk

AT_ONCE = 1 << 16  # rows whose levels are made together


class Rows(NamedTuple):
    """Rows that are mapped at once, or m groups of g rows each: [m, g, ...] for [r, ...]."""

    latent: Tensor  # [r, n]
    qparams: Tensor | None  # [r, m]; None where levels are there
    weight: Tensor  # [r, n]
    levels: Tensor | None = None  # [r, k], in the weight's dtype, where they are made already
    bound: Tensor | None = None  # `levels.bounds(levels)`, [r, k - 1]
    inverse: Tensor | None = None  # [r, 1], beside qparams: by which levels are rounded to
    even: Any = None  # those levels as `Even`, where no compiler makes them

    @property
    def table(self) -> Tensor:
        """Qparams or levels."""
        table = self.qparams if self.levels is None else self.levels
        assert table is not None
        return table

    @property
    def kind(self) -> tuple[Any, ...]:
        """What rows that are mapped together have in common."""
        tensors = self.latent, self.table, self.weight
        made = self.levels is not None, self.inverse is not None
        return self.latent.device, *made, self.table.shape[-1], *(t.dtype for t in tensors)


class Spare:
    """Memory for what a map makes on the way, lent to one piece of rows after another."""

    def __init__(self, like: Tensor, size: int):
        self._memory = torch.empty(2, size, dtype=like.dtype, device=like.device)
        self._found: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def of(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Two tensors of this one's shape; None where there is none of its dtype and size."""
        one, other = self._memory
        if x.dtype != one.dtype or x.numel() > len(one):
            return None
        if x.shape not in self._found:
            size = x.numel()
            self._found[x.shape] = one[:size].view(x.shape), other[:size].view(x.shape)
        return self._found[x.shape]


class Map(NamedTuple):
    """What maps the rows of one latent's and weight's dtypes, on one device."""

    quantizer: Quantizer
    formula: Formula
    scalars: tuple[Tensor, ...]  # [] each, what `formula.weight` takes
    divisor: Tensor | None  # []
    dtype: torch.dtype  # that is computed in

    def write(self, rows: Rows, spare: Spare | None = None) -> None:
        """The rows' weights, from their latents and qparams."""
        write(self.quantizer, self.formula, rows, self.scalars, self.divisor, spare)

    def inverse_steps(self, qparams: Tensor, dtype: torch.dtype) -> Tensor | None:
        """By which the formula finds the levels of these qparams, if by rounding."""
        quantizer: Any = self.quantizer  # perhaps no more than alike
        if isinstance(quantizer, Quantizer) and self.formula.rounds(quantizer.num_levels):
            return quantizer.inverse_steps(qparams, dtype)
        return None

    def with_levels(self, parts: Sequence[Rows]) -> list[Rows]:
        """Rows of one kind with their levels, made once, and with bounds where these help."""
        levels = self.quantizer.levels_in(tables(parts), parts[0].weight.dtype)
        own = torch.split(levels, sizes := sizes_of(parts))
        bound: Sequence[Tensor | None] = [None] * len(sizes)
        if self.uses_bounds:
            bound = torch.split(bounds(levels.to(self.dtype)), sizes)
        each = zip(parts, own, bound, strict=True)
        return [part._replace(qparams=None, levels=q, bound=b) for part, q, b in each]

    def even(self, rows: Sequence[Rows]) -> Even | None:
        """The levels of all these rows, of one kind, where a rounding finds each of them."""
        table, dtype = tables(rows), rows[0].weight.dtype
        if (inverse := self.inverse_steps(table, dtype)) is None:
            return None
        even = self.quantizer.even(table, inverse, dtype)
        if self.uses_bounds and even.num_levels <= COUNTED_MAX and is_number(even.first):
            levels = self.quantizer.levels_in(table, dtype)
            even = even._replace(bound=bounds(levels.to(self.dtype)))
        return even

    @property
    def uses_bounds(self) -> bool:
        """Whether the formula looks for the nearest level, if it looks for any."""
        return self.formula.prepared and self.formula.cells_from is None


class Maps:
    """The `Map`s of a link at a state, each made once."""

    def __init__(self, link: Prox, state: ProxState):
        self.link = link
        self._state = state
        self._found: dict[Any, Map] = {}

    def of(self, rows: Rows) -> Map:
        latent = rows.latent
        key = latent.dtype, rows.weight.dtype, latent.device
        if key not in self._found:
            dtype = torch.promote_types(torch.promote_types(*key[:2]), torch.float32)
            coefficient = self._state.slope
            formula = self.link.formula(float(coefficient.to(dtype)))
            if formula.prepared:
                coefficient = to_device(coefficient, latent).to(dtype)
            divisor = self.link.divisor(self._state)
            scalars = formula.scalars(coefficient)
            self._found[key] = Map(self.link.quantizer, formula, scalars, divisor, dtype)
        return self._found[key]


def of_a_kind(wholes: Sequence[Rows]) -> Iterable[list[int]]:
    """Places of those that are mapped alike."""
    found: dict[Any, list[int]] = {}
    for i, whole in enumerate(wholes):
        found.setdefault(whole.kind, []).append(i)
    return found.values()


def tables(parts: Sequence[Rows]) -> Tensor:
    """Their qparams or levels, one after another."""
    return parts[0].table if len(parts) == 1 else torch.cat([part.table for part in parts])


def sizes_of(parts: Sequence[Rows]) -> list[int]:
    """How many rows each has."""
    return [len(part.table) for part in parts]


def with_even(maps: Maps, wholes: Sequence[Rows]) -> list[Rows]:
    """The same, with `Even` levels where roundings find these: asked for many at once, and one by
    one where rows among them are to be searched."""
    wholes = list(wholes)
    for places in of_a_kind(wholes):
        sizes = dict(zip(places, sizes_of([wholes[i] for i in places]), strict=True))
        todo = chunks(sizes, AT_ONCE)
        while todo:
            chunk = todo.pop()
            parts = [wholes[i] for i in chunk]
            even, start = maps.of(parts[0]).even(parts), 0
            if even is None:
                alone = len(chunk) > 1 and may_be_read(parts[0].table)
                todo += [[i] for i in chunk] if alone else []
                continue
            for i in chunk:
                own = even.rows(slice(start, start + sizes[i])) if len(chunk) > 1 else even
                wholes[i], start = wholes[i]._replace(even=own), start + sizes[i]
    return wholes


def write(
    quantizer: Quantizer,
    formula: Formula,
    rows: Rows,
    scalars: tuple[Tensor, ...],
    divisor: Tensor | None,
    spare: Spare | None = None,
) -> None:
    """`Map.write`, of what a compiler is given and of what it is not."""
    u = shrunk(rows.latent, divisor)
    levels: Levels | None = rows.levels if rows.even is None else rows.even
    if rows.inverse is not None:
        levels = quantizer.even(rows.table, rows.inverse, rows.weight.dtype)
    elif levels is None:
        levels = quantizer.levels_in(rows.table, rows.weight.dtype)
    if spare is not None and isinstance(levels, Even) and (own := spare.of(rows.weight)):
        levels = levels._replace(room=(rows.weight, *own))
    if formula.prepared:
        u, levels = prepare(u, levels)
    rows.weight.copy_(formula.weight(u, levels, rows.bound, *scalars))


def some_rows(rows: Rows, s: slice) -> Rows:
    """Some of the rows."""
    return Rows._make(x.rows(s) if isinstance(x, Even) else x if x is None else x[s] for x in rows)


def in_columns(rows: Rows, s: slice) -> Rows:
    """A part of each of the rows."""
    return rows._replace(latent=rows.latent[:, s], weight=rows.weight[:, s])


def of_other_rows(row: Rows, latent: Tensor, weight: Tensor) -> Rows:
    """The weights of one row, cut into rows."""
    of_row = (
        x.expand(len(latent), -1) if isinstance(x, Tensor) else x for x in (row.qparams, *row[3:])
    )
    qparams, *rest = of_row
    return Rows(latent, qparams, weight, *rest)
