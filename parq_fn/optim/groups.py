"""The parameter groups of QuantOptimizer: which are quantized and how, and what their keys may
be."""

from __future__ import annotations

import dataclasses
import re
import warnings
from typing import Any

from torch import Tensor

from parq_fn.optim.state import Group
from parq_fn.quantizers import Quantizer
from parq_fn.quantizers.bits import bits_of, with_bits
from parq_fn.quantizers.granularity import Granularity, per_block, per_channel
from parq_fn.transforms.prox_link import Prox

#: What a group's levels follow, besides its prox link.
KEYS = ("quant_bits", "quant_block_size", "quant_axis")
#: Keys of this look are ours, or a mistake, but for those that the base optimizer knows.
_OURS = re.compile("quant|prox|granularity$")


def is_quantized(group: Group) -> bool:
    """Whether the group has fewer than 16 bits, or a prox link of its own and no bits."""
    bits = group.get("quant_bits")
    return "quant_prox" in group if bits is None else bits < 16


def is_ours(key: str) -> bool:
    """Whether a group's key looks like one of those that say how parameters are quantized."""
    return _OURS.match(key) is not None


def check_group(
    group: Group, index: int, prox: Prox | None, base: Group, who: str = "QuantOptimizer"
) -> None:
    """Raises TypeError or ValueError for a group that is new and holds what means nothing.

    prox: the optimizer's link; base: the defaults of the base optimizer, whose own keys may be any.
    who: for messages.
    """
    where = f"{who}: group {index}"
    if "quant_prox" in group and "prox" not in group:
        raise ValueError(
            f"{where} has quant_prox, which shows what an optimizer took out of the group; give "
            'the prox link itself, under "prox"'
        )
    known = {*KEYS, "prox", "quant_prox", *base}
    unknown = sorted(k for k in group if is_ours(k) and k not in known)
    if unknown:
        raise ValueError(
            f"{where} has {', '.join(unknown)}; expected {', '.join(KEYS)} and prox alone, the "
            "rest is the prox link's, such as granularity=per_channel()"
        )
    own = group.get("prox")
    if own is not None and not isinstance(own, Prox):
        raise TypeError(
            f"{where} has prox={own!r}, expected a prox link such as parq_prox(lsbq(2), ...)"
        )
    bits, block, axis = map(group.get, KEYS)
    if bits is not None:
        check_bits(where, bits)
    if block is not None and (not _is_whole(block) or block < 1):
        raise ValueError(f"{where} has quant_block_size={block!r}, expected 1 or more, or None")
    dims = axis if isinstance(axis, tuple) else (axis,)
    if axis is not None and not (dims and all(map(_is_whole, dims))):
        raise ValueError(
            f"{where} has quant_axis={axis!r}, expected a dimension or a tuple of them, or None"
        )
    if group.get("differentiable"):
        raise ValueError(f"{where} is differentiable, which a step in place on latents is not")
    if bits is None and own is None:
        return
    if bits is not None and bits < 16 and own is None and prox is None:
        raise ValueError(
            f"{where} has quant_bits={bits} and no prox link; give {who} one, or the group its "
            'own under "prox"'
        )
    if (bits is None or bits < 16) and "lr" not in group:
        raise ValueError(f"{where} has no lr, which the prox link needs")


def check_some(groups: list[Group], prox: Prox | None, *, none: bool) -> None:
    """Raises ValueError where no group of a new optimizer uses its link; warns where each of them
    says prox=None, so that nothing is quantized.

    prox: the optimizer's link; none: whether all groups had a "prox" before links were taken out.
    """
    if any(group.get(key) is not None for group in groups for key in ("quant_bits", "quant_prox")):
        return
    if prox is not None:
        raise ValueError(
            "QuantOptimizer: no group has quant_bits below 16; give one such as "
            '{"params": ..., "quant_bits": 2}'
        )
    if none:
        warnings.warn(
            'QuantOptimizer: every group has "prox": None and there is no other link, so nothing '
            "is quantized; give a group a prox link, or leave the key out for full precision",
            stacklevel=4,
        )


def check_bits(where: str, bits: Any) -> None:
    """Raises ValueError for what is no number of bits."""
    if not _is_whole(bits) or not (0 <= bits <= 8 or bits >= 16):
        raise ValueError(
            f"{where} has quant_bits={bits!r}, expected a whole number in 0..8 (0 is ternary), or "
            "16 and more where it is not quantized"
        )


def _is_whole(got: Any) -> bool:
    return isinstance(got, int) and not isinstance(got, bool)


def link_of(prox: Prox, group: Group, who: str = "QuantOptimizer") -> Prox:
    """The prox link with what a group gives of bits, 0 for ternary, block size and axis."""
    bits, block, axis = map(group.get, KEYS)
    quantizer = prox.quantizer if bits is None else _with_bits(who, prox.quantizer, bits)
    granularity: Granularity = prox.granularity
    if block is not None and isinstance(granularity, per_block):
        granularity = dataclasses.replace(granularity, size=block)
    elif block is not None:
        granularity = per_block(block)
    if axis is not None and isinstance(granularity, per_block):
        granularity = dataclasses.replace(granularity, along=_others(who, axis, group["params"]))
    elif axis is not None:
        granularity = per_channel(axis)
    return dataclasses.replace(prox, quantizer=quantizer, granularity=granularity)


def cut_of(prox: Prox, p: Tensor, axis: tuple[int, ...]) -> Granularity:
    """The link's granularity by the outputs of a parameter, which are those dimensions of it;
    ValueError where the parameter cannot be cut so."""
    dims = None if axis == (0,) else axis[0] if len(axis) == 1 else axis
    cut = link_of(prox, {"quant_axis": dims, "params": [p]}).granularity
    cut.row_shape(p)
    return cut


def _with_bits(who: str, quantizer: Any, bits: int) -> Any:
    found = with_bits(quantizer, bits)
    if found is None:
        inner = quantizer
        while isinstance(getattr(inner, "quantizer", None), Quantizer):
            inner = inner.quantizer
        raise ValueError(
            f"{who}: {inner!r} has no field bits to be set to quant_bits={bits}, and "
            f"{inner.num_levels} levels; write quant_bits={bits_of(inner)}, or give the group a "
            '"prox" of its own'
        )
    return found


def _others(who: str, axis: int | tuple[int, ...], params: list[Tensor]) -> int | tuple[int, ...]:
    """The dimensions that are not of the axis, which blocks are cut from."""
    ranks = {p.dim() for p in params} or {2}
    if len(ranks) > 1:
        raise ValueError(
            f"{who}: a group with quant_axis={axis} and blocks has parameters of "
            f"{sorted(ranks)} dimensions, expected as many in each; give them groups of their own"
        )
    (rank,) = ranks
    dims = {d % rank for d in (axis if isinstance(axis, tuple) else (axis,)) if rank}
    along = tuple(d for d in range(rank) if d not in dims)
    if not along:
        raise ValueError(
            f"{who}: quant_axis={axis} leaves no dimension of {rank} to cut blocks from"
        )
    return along[0] if len(along) == 1 else along
