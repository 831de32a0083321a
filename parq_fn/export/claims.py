"""What the header of a packed model's file claims, checked before it is believed.

A checksum shows that nothing was changed by accident, not who wrote it. Here are the JSON forms of
what `Packed` holds, and the way back, which refuses what no model has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parq_fn.export.codes import highest_code
from parq_fn.export.cuts import cut_from_json
from parq_fn.export.few_numbers import FLOATS, MOST, Table, levels_from
from parq_fn.export.packing import Packed
from parq_fn.foundation.memory import in_order
from parq_fn.quantizers.base import Grid

#: Weights of one level take no bytes, so that a file could claim any number of them.
MOST_OF_ONE_LEVEL = 1 << 24
#: What a file may hold in the place of levels.
PARTS = (["step", "first"], ["scale", "numbers"], ["scale", "numbers", "shift"], ["half"])
#: What reading a header that was made up can end in.
WRONG = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError)


def believed(own: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Packed | Tensor]:
    """The model that a header describes. Raises one of `WRONG` where it describes none."""
    names, packed, orders = own["names"], own["packed"], own.get("orders", {})
    if not isinstance(names, list) or not all(isinstance(n, str) and is_text(n) for n in names):
        raise ValueError(f"its names are {names!r}, expected a list of texts")
    if len(set(names)) < len(names):
        raise ValueError("a name stands twice among its names")
    for what, given in (("packed", packed), ("orders", orders)):
        if not isinstance(given, dict) or not given.keys() <= set(names):
            raise ValueError(f"its {what!r} are not of its names")
    made: dict[str, Packed | Tensor] = {}
    left, constants = set(tensors), 0
    for name in names:
        order = _order(name, orders[name]) if name in orders else None
        if name not in packed:
            made[name] = in_order(tensors[name], order)
            left.remove(name)
            continue
        entry, parts = _packed(name, packed[name], tensors, order)
        for part in ("codes", *parts):
            left.remove(f"{name}.{part}")
        made[name] = entry
        if entry.levels.shape[1] == 1:
            constants += torch.Size(entry.shape).numel()
    if left:
        raise ValueError(f"{sorted(left)[0]!r} is none of its names")
    if constants > MOST_OF_ONE_LEVEL:
        raise ValueError(
            f"{constants} weights of one level, which take no bytes; at most {MOST_OF_ONE_LEVEL} "
            "are read"
        )
    return made


def _packed(
    name: str, about: dict[str, Any], tensors: dict[str, Tensor], order: tuple[int, ...] | None
) -> tuple[Packed, set[str]]:
    """The weight, and which tensors beside its codes it is made of."""
    codes = tensors[f"{name}.codes"]
    shape, texts = about["shape"], (about["quantizer"], about["granularity"])
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{name!r} has the shape {shape!r}, expected a list of whole numbers")
    if not all(isinstance(text, str) and is_text(text) for text in texts):
        raise ValueError(f"{name!r} has {texts!r} for its quantizer and granularity")
    count = torch.Size(shape).numel()
    parts, levels = _levels(name, about, tensors, count)
    if levels.dim() != 2 or not levels.is_floating_point() or not 1 <= levels.shape[1] <= 256:
        raise ValueError(f"{name!r} has levels {tuple(levels.shape)}, {levels.dtype}")
    cut = about.get("cut")
    cut = None if cut is None else cut_from_json(cut)
    grid = table = None
    if "grid" in about:
        if about["grid"] is not True:
            raise ValueError(f"{name!r} has the grid {about['grid']!r}, expected true")
        parts |= {part: tensors[f"{name}.{part}"] for part in ("step", "first")}
        grid = Grid(parts["step"], parts["first"], parts["first"] + (levels.shape[1] - 1))
    if "scale" in parts:
        table = Table(parts["scale"], parts["numbers"], parts.get("shift"))
    entry = Packed(codes, levels, tuple(shape), *texts, cut, order, grid, table)
    highest = highest_code(codes, count, levels.shape[1])
    if highest >= levels.shape[1]:
        raise ValueError(f"{name!r} has the code {highest} of {levels.shape[1]} levels")
    return entry, set(parts)


def _levels(
    name: str, about: dict[str, Any], tensors: dict[str, Tensor], count: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors that levels are made of, by the last part of their names, and the levels."""
    if "from" not in about:
        levels = tensors[f"{name}.levels"]
        return {"levels": levels}, levels
    k, kind, names = (about["from"][what] for what in ("levels", "dtype", "parts"))
    if type(k) is not int or not 1 <= k <= 256 or kind not in FLOATS or names not in PARTS:
        raise ValueError(f"{name!r} has levels from {about['from']!r}")
    parts = {part: tensors[f"{name}.{part}"] for part in names}
    dtype = FLOATS[kind]
    wide, r = torch.promote_types(dtype, torch.float32), len(parts[names[0]])
    if r * k > MOST * count:
        raise ValueError(f"{name!r} has {r} rows of {k} levels for {count} weights")
    columns = {"numbers": k, "half": k - k // 2}
    for part, tensor in parts.items():
        rows = [1] if part == "numbers" else [1, r] if part == "first" else [r]
        held = tensor.dim() == 2 and len(tensor) in rows and tensor.shape[1] == columns.get(part, 1)
        if not held or tensor.dtype != (dtype if part == "half" else wide):
            raise ValueError(f"{name!r} has {part} {tuple(tensor.shape)}, {tensor.dtype}")
    return parts, levels_from(parts, k, dtype)


def _order(name: str, given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or any(type(d) is not int for d in given):
        raise ValueError(f"{name!r} has the order {given!r}, expected a list of whole numbers")
    return tuple(given)


def is_text(name: str) -> bool:
    """Whether it can be written as UTF-8: a surrogate without its other half cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
