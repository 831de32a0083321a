"""Rows of parameters and what maps them, in every form of the prox pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.scalar import is_number, to_device
from parq_fn.proxmaps.even import COUNTED_MAX, Even
from parq_fn.proxmaps.levels import Levels, bounds, prepare
from parq_fn.proxmaps.proxmap import Formula
from parq_fn.quantizers import Quantizer
from parq_fn.transforms.prox_link import Prox, ProxState, shrunk


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


class Map(NamedTuple):
    """What maps the rows of one latent's and weight's dtypes, on one device."""

    quantizer: Quantizer
    formula: Formula
    scalars: tuple[Tensor, ...]  # [] each, what `formula.weight` takes
    divisor: Tensor | None  # []
    dtype: torch.dtype  # that is computed in

    def write(self, rows: Rows) -> None:
        """The rows' weights, from their latents and qparams."""
        write(self.quantizer, self.formula, rows, self.scalars, self.divisor)

    def inverse_steps(self, qparams: Tensor, dtype: torch.dtype) -> Tensor | None:
        """By which the formula finds the levels of these qparams, if by rounding."""
        quantizer: Any = self.quantizer  # perhaps no more than alike
        if isinstance(quantizer, Quantizer) and self.formula.rounds(quantizer.num_levels):
            return quantizer.inverse_steps(qparams, dtype)
        return None

    def with_levels(self, rows: Rows) -> Rows:
        """The rows with their levels, made once, and with bounds where these help."""
        levels = self.quantizer.levels_in(rows.table, rows.weight.dtype)
        bound = bounds(levels.to(self.dtype)) if self.uses_bounds else None
        return rows._replace(qparams=None, levels=levels, bound=bound)

    def with_even(self, rows: Rows) -> Rows:
        """The rows with `Even` levels, where a rounding finds these."""
        inverse = self.inverse_steps(rows.table, rows.weight.dtype)
        if inverse is None:
            return rows
        even = self.quantizer.even(rows.table, inverse, rows.weight.dtype)
        if self.uses_bounds and even.num_levels <= COUNTED_MAX and is_number(even.first):
            levels = self.quantizer.levels_in(rows.table, rows.weight.dtype)
            even = even._replace(bound=bounds(levels.to(self.dtype)))
        return rows._replace(even=even)

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


def write(
    quantizer: Quantizer,
    formula: Formula,
    rows: Rows,
    scalars: tuple[Tensor, ...],
    divisor: Tensor | None,
) -> None:
    """`Map.write`, of what a compiler is given and of what it is not."""
    u = shrunk(rows.latent, divisor)
    levels: Levels | None = rows.levels if rows.even is None else rows.even
    if rows.inverse is not None:
        levels = quantizer.even(rows.table, rows.inverse, rows.weight.dtype)
    elif levels is None:
        levels = quantizer.levels_in(rows.table, rows.weight.dtype)
    if isinstance(levels, Even):
        levels = levels._replace(room=rows.weight)
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
