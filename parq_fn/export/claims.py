"""What the header of a packed model's file claims, checked before it is believed.

A checksum shows that nothing was changed by accident, not who wrote it. Here are the JSON forms of
what `Packed` holds, and the way back, which refuses what no model has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from parq_fn.export.codes import highest_code
from parq_fn.export.packing import Packed
from parq_fn.foundation.memory import in_order
from parq_fn.quantizers.base import Grid
from parq_fn.quantizers.granularity import Granularity, per_block, per_channel

#: Weights of one level take no bytes, so that a file could claim any number of them.
MOST_OF_ONE_LEVEL = 1 << 24
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
        made[name] = entry = _packed(name, packed[name], tensors, order)
        for part in ("codes", "levels", *(() if entry.grid is None else ("step", "first"))):
            left.remove(f"{name}.{part}")
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
) -> Packed:
    codes, levels = tensors[f"{name}.codes"], tensors[f"{name}.levels"]
    shape, texts = about["shape"], (about["quantizer"], about["granularity"])
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"{name!r} has the shape {shape!r}, expected a list of whole numbers")
    if not all(isinstance(text, str) and is_text(text) for text in texts):
        raise ValueError(f"{name!r} has {texts!r} for its quantizer and granularity")
    if levels.dim() != 2 or not levels.is_floating_point() or not 1 <= levels.shape[1] <= 256:
        raise ValueError(f"{name!r} has levels {tuple(levels.shape)}, {levels.dtype}")
    cut = about.get("cut")
    cut = None if cut is None else cut_from_json(cut)
    grid = None
    if "grid" in about:
        if about["grid"] is not True:
            raise ValueError(f"{name!r} has the grid {about['grid']!r}, expected true")
        step, first = tensors[f"{name}.step"], tensors[f"{name}.first"]
        grid = Grid(step, first, first + (levels.shape[1] - 1))
    entry = Packed(codes, levels, tuple(shape), *texts, cut, order, grid)
    highest = highest_code(codes, torch.Size(shape).numel(), levels.shape[1])
    if highest >= levels.shape[1]:
        raise ValueError(f"{name!r} has the code {highest} of {levels.shape[1]} levels")
    return entry


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


def cut_as_json(cut: Granularity) -> dict[str, Any]:
    """The fields of a `Packed.cut`, by name, for JSON.

    >>> cut_as_json(per_channel((0, 2))), cut_as_json(per_block(32, along=0))
    ({'axis': [0, 2]}, {'size': 32, 'along': 0})
    """
    return {k: list(got) if isinstance(got, tuple) else int(got) for k, got in vars(cut).items()}


def cut_from_json(fields: dict[str, Any]) -> Granularity:
    """What `cut_as_json` gave, read again.

    Raises ValueError or TypeError for anything else.
    """
    own: dict[str, Any] = {
        k: tuple(got) if isinstance(got, list) else got for k, got in fields.items()
    }
    return per_channel(**own) if own.keys() == {"axis"} else per_block(**own)
