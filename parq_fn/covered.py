"""Which of a module's parameters are quantized, how, and what they take."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from torch import Tensor, nn

from parq_fn.export.codes import num_bytes
from parq_fn.foundation.columns import columns
from parq_fn.foundation.value import briefly, show
from parq_fn.modules import check_module
from parq_fn.optim.groups import check_bits, link_of
from parq_fn.quantizers.bits import name_of_bits
from parq_fn.roles import Role, check_dtype, roles
from parq_fn.transforms.prox_link import Prox

_HEADS = ("parameter", "count", "shape", "weights", "how", "bytes")


class Row(NamedTuple):
    """A parameter."""

    name: str
    shape: tuple[int, ...]
    numel: int
    how: str  # the quantizer and the granularity, or what it is that is left alone
    quantized: bool
    nbytes: int | None  # of its codes and the numbers of its rows; None where bits are not known


class Coverage:
    """What `coverage` gives: rows, one for each parameter, and their sums; prints as a table, in
    which rows that differ by numbers in their names alone are one.

    rows: (name, shape, numel, how, quantized, nbytes) of each parameter.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    @property
    def total(self) -> int:
        """How many weights the module has, tied ones once."""
        return sum(row.numel for row in self.rows)

    @property
    def quantized(self) -> int:
        """How many of them are quantized."""
        return sum(row.numel for row in self.rows if row.quantized)

    @property
    def share(self) -> float:
        """The share of all weights that are quantized; 0 of none."""
        return self.quantized / self.total if self.total else 0.0

    @property
    def nbytes(self) -> int | None:
        """Bytes of all: codes and the numbers of rows of what is quantized, the rest as it is; None
        where it is not known with how many bits."""
        known = [row.nbytes for row in self.rows if row.nbytes is not None]
        return sum(known) if len(known) == len(self.rows) else None

    def __str__(self) -> str:
        return columns(self._cells(), (0, 2, 4))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head, *body = (
            "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
            for tag, row in zip(["th"] + ["td"] * len(self._cells()), self._cells(), strict=False)
        )
        rows = "".join(f"<tr>{row}</tr>" for row in body)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def _cells(self) -> list[tuple[str, ...]]:
        alike: dict[Any, list[Row]] = {}
        for row in self.rows:
            name = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name)
            alike.setdefault((name, row.shape, row.how, row.nbytes is None), []).append(row)
        found: list[tuple[str, ...]] = [_HEADS]
        for (_, shape, how, unknown), rows in alike.items():
            count = sum(row.numel for row in rows)
            size = "?" if unknown else f"{sum(row.nbytes or 0 for row in rows):,}"
            name, times = _in_common(rows), str(len(rows)) if len(rows) > 1 else ""
            found.append((name, times, str(list(shape)), f"{count:,}", how, size))
        size = "?" if self.nbytes is None else f"{self.nbytes:,}"
        how = f"{100 * self.share:.1f} % quantized"
        return [*found, ("all", str(len(self.rows)), "", f"{self.total:,}", how, size)]


def coverage(module: nn.Module, by: Any) -> Coverage:
    """Which of a module's parameters are quantized, how, and what they take: a row for each.

    module: a torch.nn.Module.
    by: what says so: a mask {name: bool} such as `weight_mask` gives, groups such as
        `optim.param_groups` gives, a QuantOptimizer or a TransformOptimizer.

    The result prints as a table and has `rows` (name, shape, numel, how, quantized, nbytes),
    `quantized` and `total` (weights, tied ones once), `share` and `nbytes`: of quantized weights
    the bits of their codes and the numbers of their rows in float32, of others their own; None for
    a mask, which says nothing of bits. A packed file keeps the levels of rows in the place of these
    numbers, and takes more: `export.pack(module, optimizer)` has its `num_bytes`.

    Raises TypeError for what is no module, mask, groups or optimizer, for a "prox" that is no prox
    link, and for parameters to quantize that are not floating; ValueError for a mask with names
    that are not the module's, groups or an optimizer without a parameter of it, bits that there
    are none of, and blocks that do not divide a weight.

    >>> from parq_fn import weight_mask
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    >>> print(coverage(net, weight_mask(net)))
    parameter  count  shape   weights  how               bytes
    0.weight          [8, 4]       32  quantized             ?
    0.bias            [8]           8  bias                 32
    1.weight          [8]           8  norm                 32
    1.bias            [8]           8  norm                 32
    2.weight          [2, 8]       16  quantized             ?
    2.bias            [2]           2  bias                  8
    all            6               74  64.9 % quantized      ?
    """
    check_module("coverage", module, "a table")
    found = roles(module)
    if isinstance(by, Mapping):
        _check_names(found, by)
        return Coverage([_by_mask(role, by) for role in found])
    links = _links(by)
    if not any(id(role.parameter) in links for role in found):
        raise ValueError(
            "coverage: the groups or the optimizer have no parameter of the module; give those "
            "that were made of it"
        )
    return Coverage([_by_link(role, links.get(id(role.parameter), _ABSENT)) for role in found])


_ABSENT = object()


def _check_names(found: list[Role], mask: Mapping[str, bool]) -> None:
    names = {name for role in found for name in role.names}
    unknown = sorted(map(str, mask.keys() - names))
    if unknown:
        raise ValueError(
            f"coverage: the mask names {', '.join(unknown[:8])}, which are no parameters of the "
            "module; give weight_mask(module), or what was made of it"
        )


def _by_mask(role: Role, mask: Mapping[str, bool]) -> Row:
    taken = any(mask.get(name) for name in role.names)
    if taken:
        check_dtype("coverage", role)
    how, size = ("quantized", None) if taken else (_left(role), _own_size(role))
    return _row(role, how, taken, size)


def _in_common(rows: Sequence[Row]) -> str:
    """The names of some, with a star for the parts in which they differ."""
    parts = zip(*(row.name.split(".") for row in rows), strict=True)
    return ".".join(part[0] if len({*part}) == 1 else "*" for part in parts)


def _links(by: Any) -> dict[int, Any]:
    """{id of a parameter: its prox link, its bits, how its group shows a link that an optimizer
    took out of it, or None where it is in full precision}."""
    groups = getattr(by, "param_groups", by)
    right = isinstance(groups, Sequence) and all(
        # not an iterator, which can be read but once
        isinstance(group, Mapping) and not isinstance(group.get("params", iter(())), Iterator)
        for group in groups
    )
    if not right or (by is not groups and not hasattr(by, "prox_of")):
        raise TypeError(
            "coverage: expected a mask such as weight_mask(module), groups such as "
            "param_groups(module), with lists of params, a QuantOptimizer or a TransformOptimizer, "
            f"got {briefly(by)}"
        )
    found: dict[int, Any] = {}
    for i, group in enumerate(groups):
        given = group["params"]
        entries = [given] if isinstance(given, Tensor) else given
        params = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        if by is groups:
            own = _of_group(f"coverage: group {i}", {**group, "params": params})
            found |= {id(p): own for p in params}
        else:
            found |= {id(p): by.prox_of(p) for p in params}
    return found


def _of_group(where: str, group: Mapping[str, Any]) -> Any:
    """What a group says of its parameters, as QuantOptimizer reads it."""
    prox, bits = group.get("prox"), group.get("quant_bits")
    if prox is not None and not isinstance(prox, Prox):
        raise TypeError(
            f"{where} has prox={briefly(prox)}, expected a prox link such as hard_prox(lsbq(2))"
        )
    if bits is not None:
        check_bits(where, bits)
        if bits >= 16:
            return None
    return link_of(prox, dict(group)) if prox else group.get("quant_prox", bits)


def _by_link(role: Role, link: Any) -> Row:
    if link is _ABSENT:
        return _row(role, "not in the optimizer", False, _own_size(role))
    if link is None:
        return _row(role, _left(role), False, _own_size(role))
    check_dtype("coverage", role)
    if isinstance(link, int):
        return _row(role, name_of_bits(link), True, None)
    if isinstance(link, str):
        return _row(role, link, True, None)
    try:
        rows = math.prod(link.granularity.row_shape(role.parameter))
    except ValueError as error:
        raise ValueError(f"coverage: parameter {role.name!r}: {error}") from None
    size = num_bytes(role.parameter.numel(), link.quantizer.num_levels)
    how = f"{show(link.quantizer)}, {show(link.granularity)}"
    return _row(role, how, True, size + 4 * rows * link.quantizer.num_qparams)


def _row(role: Role, how: str, quantized: bool, size: int | None) -> Row:
    return Row(role.name, tuple(role.parameter.shape), role.parameter.numel(), how, quantized, size)


def _left(role: Role) -> str:
    return "in full precision" if role.kind in ("weight", "experts") else role.kind


def _own_size(role: Role) -> int:
    return role.parameter.numel() * role.parameter.element_size()
