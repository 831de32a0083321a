"""What is asked of a quantizer that is not of this package, where it is fitted: maps search levels
that are sorted and finite, and there is a count of them that states and files rely on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.checks import check_whole
from parq_fn.foundation.scalar import concrete

_PACKAGE = __name__.partition(".")[0] + "."


def is_own(quantizer: Any) -> bool:
    """Whether the class of a quantizer, or of one that it is around, is defined elsewhere."""
    inner = getattr(quantizer, "quantizer", None)
    return not type(quantizer).__module__.startswith(_PACKAGE) or (
        inner is not None and is_own(inner)
    )


def check_counts(quantizer: Any) -> None:
    """Raises TypeError or ValueError unless num_levels and num_qparams are whole and positive."""
    names = ("num_levels", "num_qparams")
    counts = {name: getattr(quantizer, name) for name in names}
    # a repr is made for an error alone: compilers do not trace it
    if not all(type(got) is int and got > 0 for got in counts.values()):
        check_whole(repr(quantizer), 1, **counts)


def check_tensor(quantizer: Any, what: str, got: Any, shape: tuple[Any, ...], of: Tensor) -> None:
    """Raises TypeError unless that is a tensor of a floating dtype at least as wide as what it is
    computed from, ValueError unless it has that shape; the last entry of that with its name."""
    if not isinstance(got, Tensor):
        kind = "None" if got is None else f"a {type(got).__name__}"
        raise TypeError(f"{quantizer!r}: {what} is {kind}, expected a tensor; return one")
    *rows, (count, name) = shape
    if got.shape != (*rows, count):
        raise ValueError(
            f"{quantizer!r}: {what} has shape {tuple(got.shape)}, expected {(*rows, count)}: "
            f"[r, {name}]"
        )
    if not got.is_floating_point() or torch.promote_types(got.dtype, of.dtype) != got.dtype:
        raise TypeError(
            f"{quantizer!r}: {what} has dtype {got.dtype}, expected {of.dtype}, in which it is "
            "given its argument; a narrower dtype rounds"
        )


def check_finite(quantizer: Any, qparams: Tensor, usable: Tensor) -> None:
    """Raises ValueError where qparams(x) are not finite in a row that is usable, [r, 1]."""
    wrong = ~qparams.isfinite() & usable
    bad = concrete(wrong.any(-1).sum())
    if bad:
        row = qparams[int(wrong.any(-1).long().argmax())].tolist()
        raise ValueError(
            f"{quantizer!r}: qparams(x) are not finite in {bad} row(s) of finite x, such as {row}; "
            "a row of zeros, or of equal weights, may have been divided by 0"
        )


def check_grid(quantizer: Any, grid: Any) -> None:
    """Raises ValueError unless a grid, if there is any, has num_levels multiples."""
    if grid is None:
        return
    count = torch.as_tensor(grid.last - grid.first) + 1
    if concrete((count != quantizer.num_levels).any()):
        raise ValueError(
            f"{quantizer!r}: grid(qparams) has {float(count.flatten()[0]):g} levels, from first to "
            f"last, expected num_levels, {quantizer.num_levels}"
        )


def check_levels(quantizer: Any, qparams: Tensor, levels: Any) -> None:
    """Raises unless levels(qparams) are a table [r, k], sorted and, of finite qparams, finite."""
    shape = (len(qparams), (quantizer.num_levels, "num_levels"))
    check_tensor(quantizer, "levels(qparams)", levels, shape, qparams)
    _check_rows(quantizer, levels, levels.diff() < 0, "not sorted", "in ascending order")
    wrong = ~levels.isfinite() & qparams.isfinite().all(-1, keepdim=True)
    _check_rows(quantizer, levels, wrong, "not finite", "as numbers")


def _check_rows(quantizer: Any, levels: Tensor, wrong: Tensor, what: str, how: str) -> None:
    bad = concrete(wrong.any(-1).sum())
    if bad:
        row = int(wrong.any(-1).long().argmax())
        raise ValueError(
            f"{quantizer!r}: levels(qparams) are {what} in {bad} row(s), such as row {row}: "
            f"{levels[row].tolist()}; return them {how}"
        )
