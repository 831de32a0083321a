"""Rows of parameters and what maps them, in every form of the prox pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.scalar import to_device
from parq_fn.proxmaps.levels import prepare
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
        made = self.levels is not None
        return self.latent.device, made, self.table.shape[-1], *(t.dtype for t in tensors)


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

    def with_levels(self, rows: Rows) -> Rows:
        """The rows with their levels, made once."""
        return (
            rows
            if rows.qparams is None
            else rows._replace(
                qparams=None, levels=self.quantizer.levels_in(rows.qparams, rows.weight.dtype)
            )
        )


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
    u, levels = shrunk(rows.latent, divisor), rows.levels
    if levels is None:
        levels = quantizer.levels_in(rows.table, rows.weight.dtype)
    if formula.prepared:
        u, levels = prepare(u, levels)
    rows.weight.copy_(formula.weight(u, levels, rows.bound, *scalars))


def some_rows(rows: Rows, s: slice) -> Rows:
    """Some of the rows."""
    return Rows._make(x if x is None else x[s] for x in rows)


def in_columns(rows: Rows, s: slice) -> Rows:
    """A part of each of the rows."""
    return rows._replace(latent=rows.latent[:, s], weight=rows.weight[:, s])
