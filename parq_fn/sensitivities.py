"""What each number of bits costs in each weight of a model: errors of rounding, and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from parq_fn.export.codes import num_bytes
from parq_fn.foundation.checks import check_kind
from parq_fn.foundation.columns import columns
from parq_fn.foundation.value import briefly
from parq_fn.modules import check_module
from parq_fn.quantizers.bits import name_of_bits, with_bits
from parq_fn.quantizers.granularity import Granularity, per_block, per_channel
from parq_fn.roles import QUANTIZABLE, Role, roles
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
    exclude: Sequence[str] = (),
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
    squares: {name: mean of the squared gradients}; the change is sum squares (w - Q(w))^2 / 2,
        the second order of the loss at its minimum, with the squares for its second derivatives
        (the diagonal of the empirical Fisher matrix).
    exclude: parameters that are left out, by name.
    progress: called with (how many are done, of how many) after each matrix.

    The result is a dict {name: [Cost(bits, size, error, change), ...]} for `allocate`, and prints
    as a table of the changes, or of errors where none was asked for.

    Raises TypeError for what is no module or prox link; ValueError for bits that the quantizer
    cannot have, for loss and squares together, for squares that lack a parameter or are not of its
    shape, for names to exclude that are none, and where nothing is left to ask.

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
    found = [role for role in roles(module) if role.kind in QUANTIZABLE]
    unknown = sorted({*exclude} - {name for role in found for name in role.names})
    if unknown:
        raise ValueError(
            f"sensitivity: exclude names {', '.join(unknown)}, none of which could be quantized; "
            f"there are {', '.join(role.name for role in found)}"
        )
    found = [role for role in found if not {*exclude} & {*role.names}]
    if not found:
        raise ValueError("sensitivity: the module has no matrix, kernel or embedding to ask for")
    quantizers = {b: None if b >= 16 else _of_bits(prox, b) for b in _checked(bits)}
    if squares is not None:
        _check_squares(found, squares)
    weights = {name: gathered(p.detach()) for name, p in module.named_parameters()}
    with torch.no_grad():
        before = None if loss is None else float(loss(weights))
        costs: dict[str, list[Cost]] = {}
        for i, role in enumerate(found):
            cut = _cut(prox.granularity, role)
            w = weights[role.name]
            costs[role.name] = []
            for b, quantizer in quantizers.items():
                rounded = w if quantizer is None else _rounded(w, quantizer, cut, role.name)
                change: float | None = None
                if loss is not None and before is not None:
                    change = float(loss({**weights, role.name: rounded})) - before
                elif squares is not None:
                    off = (w.double() - rounded.double()).square()
                    change = float((squares[role.name].double() * off).sum() / 2)
                size = _size(w, quantizer, cut)
                costs[role.name].append(Cost(b, size, _error(w, rounded), change))
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


def _check_squares(found: Sequence[Role], squares: Mapping[str, Tensor]) -> None:
    for role in found:
        got = squares.get(role.name)
        if got is None or got.shape != role.parameter.shape:
            what = "none" if got is None else f"a tensor of shape {tuple(got.shape)}"
            raise ValueError(
                f"sensitivity: expected squares[{role.name!r}] of shape "
                f"{tuple(role.parameter.shape)}, got {what}"
            )


def _cut(granularity: Granularity, role: Role) -> Granularity:
    """The link's granularity by the outputs of this layer, as a group's quant_axis makes it."""
    if role.axis == (0,):
        return granularity
    if isinstance(granularity, per_block):
        along = tuple(d for d in range(role.parameter.dim()) if d not in role.axis)
        return per_block(granularity.size, along=along[0] if len(along) == 1 else along)
    return per_channel(role.axis[0] if len(role.axis) == 1 else role.axis)


def _rounded(w: Tensor, quantizer: Any, cut: Granularity, name: str) -> Tensor:
    try:
        rows = cut.rows(w)
    except ValueError as error:
        raise ValueError(f"sensitivity: parameter {name!r}: {error}") from None
    levels = quantizer.levels_in(quantizer.fit(rows), w.dtype)
    return cut.restore(quantizer.nearest(rows, levels), w)


def _error(w: Tensor, rounded: Tensor) -> float:
    whole = float(w.double().square().sum())
    off = float((w.double() - rounded.double()).square().sum())
    return off / whole if whole else (0.0 if off == 0 else math.inf)


def _size(w: Tensor, quantizer: Any, cut: Granularity) -> int:
    if quantizer is None:
        return 8 * w.numel() * w.element_size()
    rows = math.prod(cut.row_shape(w))
    numbers = rows * int(quantizer.num_qparams)
    return 8 * num_bytes(w.numel(), quantizer.num_levels) + 32 * numbers
