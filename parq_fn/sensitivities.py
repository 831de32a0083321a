"""What each number of bits costs in each weight of a model: errors of rounding, and the loss."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parq_fn.export.codes import num_bytes
from parq_fn.foundation.checks import check_kind
from parq_fn.foundation.columns import columns
from parq_fn.foundation.scalar import is_number
from parq_fn.foundation.value import briefly
from parq_fn.modules import check_module, excluded
from parq_fn.optim.groups import cut_of
from parq_fn.quantizers.bits import name_of_bits, with_bits
from parq_fn.quantizers.error import error_of
from parq_fn.quantizers.granularity import Granularity
from parq_fn.roles import QUANTIZABLE, Role, check_outputs, roles
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.sharded import gathered


class Cost(NamedTuple):
    """What a number of bits costs in one weight matrix."""

    bits: int  # 0 is ternary; 16 and more are full precision
    size: int  # bits of codes and of the numbers of rows in float32
    error: float  # |w - Q(w)|^2 / |w|^2
    change: float | None  # of the loss, where it was asked for


class Sensitivity(dict[str, list[Cost]]):
    """{parameter: its costs, by bits}; prints as a table.

    numel: {parameter: how many weights it has}.
    """

    def __init__(self, costs: Mapping[str, list[Cost]], numel: Mapping[str, int]) -> None:
        super().__init__(costs)
        self.numel = dict(numel)

    def __str__(self) -> str:
        bits = [cost.bits for cost in next(iter(self.values()), [])]
        rows = [("parameter", "weights", *map(name_of_bits, bits))]
        for name, costs in self.items():
            rows.append((name, f"{self.numel[name]:,}", *map(_shown, costs)))
        return columns(rows, {0})

    __repr__ = __str__


def cost_of(name: str, cost: Cost, table: Sensitivity) -> float:
    """The change of the loss where it was asked for, else the relative error times the weights."""
    return cost.error * table.numel[name] if cost.change is None else cost.change


def _shown(cost: Cost) -> str:
    return f"{cost.error:.3g}" if cost.change is None else f"{cost.change:+.3g}"


def sensitivity(
    module: nn.Module,
    prox: Prox,
    *,
    bits: Sequence[int] = (0, 1, 2, 3, 4, 8),
    loss: Callable[[dict[str, Tensor]], Tensor | float] | None = None,
    squares: Mapping[str, Tensor] | None = None,
    exclude: str | re.Pattern[str] | Sequence[str | re.Pattern[str]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Sensitivity:
    """What rounding each weight matrix of a module to its levels costs, one at a time, for each
    number of bits: the relative error |w - Q(w)|^2 / |w|^2, and the change of the loss.

    module: a torch.nn.Module; asked are its matrices, kernels, experts and embeddings, as
        `param_groups` takes them, by their outputs.
    prox: a prox link, whose quantizer and granularity are used.
    bits: 0 for ternary, 16 for full precision, which costs nothing but its size.
    loss: a function of {name: weight}, such as that of `functional(module)`; the change is by
        trial: loss with this matrix rounded less loss as it is. No tensor of the module is changed.
        It gets the parameters that are not frozen, and the matrix that is rounded. It is to give
        the same number for the same weights: call eval() on a module with dropout.
    squares: {name: mean of the squared gradients}; the change is sum squares (w - Q(w))^2 / 2,
        the second order of the loss at its minimum, with the squares for its second derivatives
        (the diagonal of the empirical Fisher matrix).
    exclude: what is left out: patterns as in `weight_mask`.
    progress: called with (how many are done, of how many) after each matrix.

    The result is a dict {name: [Cost(bits, size, error, change), ...]} for `allocate`, and prints
    as a table of the changes, or of errors where none was asked for.

    Warns where loss gives two numbers for the same weights.

    Raises TypeError for what is no module or prox link, and for a loss that gives no number;
    ValueError for bits that the quantizer cannot have, for loss and squares together, for squares
    that lack a parameter, are not of its shape or below 0, for patterns that match nothing, for
    weights on the meta device, and where nothing is left to ask.

    >>> from parq_fn import hard_prox, lsbq, per_channel
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> found = sensitivity(net, hard_prox(lsbq(2), granularity=per_channel()), bits=(1, 4))
    >>> list(found), [cost.size for cost in found["1.weight"]]
    (['0.weight', '1.weight'], [72, 280])
    """
    check_module("sensitivity", module, "a table")
    check_kind("sensitivity", prox, "a prox link such as hard_prox(lsbq(2))", "quantizer", "refit")
    if loss is not None and squares is not None:
        raise ValueError("sensitivity: expected loss or squares, got both; give one of them")
    every = roles(module)
    left = excluded("sensitivity", exclude, every)
    found = [role for role in every if role.kind in QUANTIZABLE and role.name not in left]
    if not found:
        raise ValueError("sensitivity: the module has no matrix, kernel or embedding to ask for")
    quantizers = {b: None if b >= 16 else _of_bits(prox, b) for b in _checked(bits)}
    if squares is not None:
        _check_squares(found, squares)
    for role in found:
        check_outputs("sensitivity", role)
    empty = [role.name for role in found if role.parameter.is_meta]
    if empty:
        raise ValueError(
            f"sensitivity: parameter {empty[0]!r} is on the meta device, which holds no values; "
            "load the module's weights first"
        )
    weights = {}
    if loss is not None:
        trained = (role for role in every if role.parameter.requires_grad)
        weights = {role.name: gathered(role.parameter.detach()) for role in trained}
    with torch.no_grad():
        before = None if loss is None else _at_rest(loss, weights)
        costs: dict[str, list[Cost]] = {}
        for i, role in enumerate(found):
            cut, w = _cut(prox, role), gathered(role.parameter.detach())
            square = None if squares is None else gathered(squares[role.name]).to(w.device)
            costs[role.name] = []
            for b, quantizer in quantizers.items():
                rounded = w if quantizer is None else _rounded(w, quantizer, cut)
                change: float | None = None
                if loss is not None and before is not None:
                    change = _changed(loss, weights, role, rounded) - before
                elif square is not None:
                    off = (w.double() - rounded.double()).square()
                    change = float((square.double() * off).sum() / 2)
                size = _size(w, quantizer, cut)
                costs[role.name].append(Cost(b, size, error_of(rounded, w), change))
            if progress is not None:
                progress(i + 1, len(found))
    return Sensitivity(costs, {role.name: role.parameter.numel() for role in found})


def _checked(bits: Any) -> list[int]:
    given = list(bits) if isinstance(bits, Sequence) and not isinstance(bits, str) else []
    whole = all(isinstance(b, int) and not isinstance(b, bool) and b >= 0 for b in given)
    if not given or not whole or len({*given}) < len(given):
        raise ValueError(
            f"sensitivity: expected bits as different whole numbers such as (0, 1, 2, 4), got "
            f"{briefly(bits)}"
        )
    return given


def _of_bits(prox: Prox, bits: int) -> Any:
    try:
        found = with_bits(prox.quantizer, bits)
    except ValueError as error:
        raise ValueError(f"sensitivity: bits={bits}: {error}") from None
    if found is None:
        raise ValueError(
            f"sensitivity: {prox.quantizer!r} cannot have {bits} bits; give a link with another "
            "quantizer, or other bits"
        )
    return found


def _check_squares(found: Sequence[Role], squares: Any) -> None:
    if not isinstance(squares, Mapping):
        raise TypeError(
            f"sensitivity: expected squares as {{name: tensor}}, got {briefly(squares)}"
        )
    for role in found:
        got = squares.get(role.name)
        if not isinstance(got, Tensor) or got.shape != role.parameter.shape:
            what = f"shape {tuple(got.shape)}" if isinstance(got, Tensor) else briefly(got)
            raise ValueError(
                f"sensitivity: expected squares[{role.name!r}] of shape "
                f"{tuple(role.parameter.shape)}, got {what}"
            )
        if not bool((gathered(got) >= 0).all()):
            raise ValueError(
                f"sensitivity: squares[{role.name!r}] has numbers below 0 or NaN, expected means "
                "of squared gradients"
            )


def _of_loss(loss: Callable[[dict[str, Tensor]], Any], weights: dict[str, Tensor]) -> float:
    got = loss(weights)
    if not (is_number(got) or (isinstance(got, Tensor) and got.numel() == 1)):
        raise TypeError(f"sensitivity: loss gave {briefly(got)}, expected one number")
    return float(got)


def _at_rest(loss: Callable[[dict[str, Tensor]], Any], weights: dict[str, Tensor]) -> float:
    """The loss of the weights as they are; warns where it is another one the second time."""
    before, again = _of_loss(loss, weights), _of_loss(loss, weights)
    if before != again and not (math.isnan(before) and math.isnan(again)):
        warnings.warn(
            f"sensitivity: loss gave {before:g} and then {again:g} for the same weights, so that "
            "changes of this size are chance; call eval() on a module with dropout, and take the "
            "same batch in each call",
            stacklevel=3,
        )
    return before


def _changed(
    loss: Callable[[dict[str, Tensor]], Any], weights: dict[str, Tensor], role: Role, to: Tensor
) -> float:
    """The loss with one weight exchanged."""
    try:
        return _of_loss(loss, {**weights, role.name: to})
    except Exception as error:
        if role.parameter.requires_grad:
            raise
        raise ValueError(
            f"sensitivity: loss fails where it is given {role.name!r}, which is frozen: {error}; "
            "exclude it, or thaw it before functional(module)"
        ) from error


def _cut(prox: Prox, role: Role) -> Granularity:
    try:
        return cut_of(prox, role.parameter, role.axis)
    except ValueError as error:
        raise ValueError(f"sensitivity: parameter {role.name!r}: {error}") from None


def _rounded(w: Tensor, quantizer: Any, cut: Granularity) -> Tensor:
    rows = cut.rows(w)
    levels = quantizer.levels_in(quantizer.fit(rows), w.dtype)
    return cut.restore(quantizer.nearest(rows, levels), w)


def _size(w: Tensor, quantizer: Any, cut: Granularity) -> int:
    if quantizer is None:
        return 8 * w.numel() * w.element_size()
    rows = math.prod(cut.row_shape(w))
    numbers = rows * int(quantizer.num_qparams)
    return 8 * num_bytes(w.numel(), quantizer.num_levels) + 32 * numbers
