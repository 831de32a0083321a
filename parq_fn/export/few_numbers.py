"""Levels as the few numbers that they follow from, which is what files hold of them.

Of evenly spaced levels a row keeps its step and, where rows differ in it, its first multiple; of
multiples of a table a scale, and what is added to them; of symmetric levels the upper half. None of
it needs the quantizer that made them, and each is taken only where it gives the levels bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.export.grid import told, wider
from parq_fn.quantizers.base import Grid, Quantizer

#: The dtypes of levels, by their names in files.
FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
#: Bytes that are to be won: fewer are not worth a file that older releases do not read.
LEAST = 1024
#: At most so many levels for each weight are made of few numbers, or a file would be a small part
#: of what it is read into.
MOST = 16


class Table(NamedTuple):
    """Levels scale * numbers + shift."""

    scale: Tensor  # [r, 1]
    numbers: Tensor  # [1, k]
    shift: Tensor | None = None  # [r, 1]; None where nothing is added

    def levels(self) -> Tensor:
        """All of them, [r, k]."""
        made = self.scale * self.numbers
        return made if self.shift is None else made + self.shift


def table_of(quantizer: Any, qparams: Tensor, levels: Tensor) -> Table | None:
    """The table of a quantizer's levels [r, k], those of qparams [r, m]; None where they follow
    otherwise. What the numbers are, the levels of a scale of 1 say.

    >>> from parq_fn import centered, codebook
    >>> table_of(codebook((-1, 0, 3)), torch.tensor([[2.0]]), torch.tensor([[-2.0, 0.0, 6.0]]))
    Table(scale=tensor([[2.]]), numbers=tensor([[-1.,  0.,  3.]]), shift=None)
    """
    if not isinstance(quantizer, Quantizer) or qparams.shape[1:] not in ((1,), (2,)):
        return None
    if qparams.shape[1] != quantizer.num_qparams or not len(levels):
        return None
    rounded = quantizer.rounded(qparams.detach()).to(wider(levels))
    scale = rounded[:, :1].contiguous()
    shifts = [None] if rounded.shape[1] == 1 else [None, rounded[:, 1:].contiguous()]
    for shift in shifts:
        one = torch.ones_like(rounded[:1])
        if shift is not None:
            one[:, 1] = 0.0
        numbers = quantizer.levels(one).to(wider(levels))
        if numbers.shape == levels[:1].shape:
            found = Table(scale, numbers, shift)
            if _same_bits(found.levels().to(levels.dtype), levels):
                return found
    return None


def kept_table(quantizer: Any, qparams: Tensor, levels: Tensor, count: int) -> Table | None:
    """`table_of`, as `Packed` keeps it: None where files of so many weights hold something else."""
    if told(levels) is not None:
        return None
    table = table_of(quantizer, qparams, levels)
    return table if table is not None and "scale" in parts_of(levels, None, table, count) else None


def check_table(table: Table, levels: Tensor) -> None:
    """Raises ValueError unless a table is one of levels [r, k]."""
    dtype, (r, k) = wider(levels), levels.shape
    shapes = {"scale": (r, 1), "numbers": (1, k), "shift": (r, 1)}
    for (what, shape), part in zip(shapes.items(), table, strict=True):
        if part is None and what == "shift":
            continue
        if not isinstance(part, Tensor) or part.dtype != dtype or tuple(part.shape) != shape:
            raise ValueError(
                f"the {what} of a table of levels {(r, k)}, {levels.dtype}, is {part!r}, expected "
                f"{list(shape)} in {dtype}"
            )
    if not torch.equal(table.levels().to(levels.dtype), levels):
        raise ValueError("levels are not those of their table, scale * numbers + shift")


def parts_of(
    levels: Tensor, grid: Grid | None, table: Table | None, count: int
) -> dict[str, Tensor]:
    """What a file holds of the levels [r, k] of so many weights, by name: {"levels": ...}, or fewer
    numbers that `levels_from` makes them of.

    grid, table: as `Packed` keeps them, at most one of them.
    """
    whole = {"levels": levels}
    if grid is not None:
        whole |= {"step": grid.step, "first": torch.as_tensor(grid.first)}
    k = levels.shape[1]
    if levels.numel() > MOST * count or levels.nbytes < LEAST:
        return whole
    found = []
    even = told(levels) if grid is None else grid
    if even is not None:
        found.append({"step": even.step, "first": torch.as_tensor(even.first)})
    if table is not None:
        shift = {} if table.shift is None else {"shift": table.shift}
        found.append({"scale": table.scale, "numbers": table.numbers, **shift})
    elif grid is None:
        found.append({"half": levels[:, k // 2 :]})
    for parts in found:
        won = _nbytes(whole.values()) - _nbytes(parts.values())
        if won >= LEAST and _same_bits(levels_from(parts, k, levels.dtype), levels):
            return parts
    return whole


def levels_from(parts: Mapping[str, Tensor], k: int, dtype: torch.dtype) -> Tensor:
    """The levels [r, k] that parts give which are not the levels themselves."""
    if "step" in parts:
        first = parts["first"]
        return Grid(parts["step"], first, first + (k - 1)).levels(k).to(dtype)
    if "scale" in parts:
        return Table(parts["scale"], parts["numbers"], parts.get("shift")).levels().to(dtype)
    half = parts["half"]
    return torch.cat([-half[:, k % 2 :].flip(-1), half], -1)


def _nbytes(parts: Iterable[Tensor]) -> int:
    return sum(part.nbytes for part in parts)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())
