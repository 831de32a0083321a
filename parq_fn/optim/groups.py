"""The parameter groups of QuantOptimizer: which are quantized and how, and what their keys may
be."""

from __future__ import annotations

import dataclasses
from typing import Any

from parq_fn.optim.state import Group
from parq_fn.quantizers import ternary_uniform, uniform
from parq_fn.quantizers.granularity import per_block
from parq_fn.transforms.prox_link import Prox


def is_quantized(group: Group) -> bool:
    """Whether the group has fewer than 16 bits."""
    bits = group.get("quant_bits")
    return bits is not None and bits < 16


def check_group(group: Group, index: int) -> None:
    """Raises ValueError for quantization keys that mean nothing."""
    where = f"QuantOptimizer: group {index}"
    known = ("quant_bits", "quant_block_size")
    unknown = sorted(k for k in group if k.startswith("quant_") and k not in known)
    if unknown:
        raise ValueError(
            f"{where} has {', '.join(unknown)}; expected {' and '.join(known)} alone, the rest is "
            "the prox link's, such as granularity=per_channel()"
        )
    bits, block = group.get("quant_bits"), group.get("quant_block_size")
    if bits is not None and (
        isinstance(bits, bool) or not isinstance(bits, int) or not (0 <= bits <= 8 or bits >= 16)
    ):
        raise ValueError(
            f"{where} has quant_bits={bits!r}, expected a whole number in 0..8 (0 is ternary), or "
            "16 and more where it is not quantized"
        )
    if block is not None and (isinstance(block, bool) or not isinstance(block, int) or block < 1):
        raise ValueError(f"{where} has quant_block_size={block!r}, expected 1 or more, or None")
    if group.get("differentiable"):
        raise ValueError(f"{where} is differentiable, which a step in place on latents is not")
    if is_quantized(group) and "lr" not in group:
        raise ValueError(f"{where} has no lr, which the prox link needs")


def link_of(prox: Prox, bits: int, block: int | None) -> Prox:
    """The prox link with a group's bits, 0 for ternary, and its block size where it has one, along
    the dimensions that the link's own blocks run along."""
    quantizer: Any = prox.quantizer
    if bits == 0 and isinstance(quantizer, uniform):
        quantizer = ternary_uniform(center=quantizer.center)
    elif "bits" in {f.name for f in dataclasses.fields(quantizer)}:
        quantizer = dataclasses.replace(quantizer, bits=bits)
    elif not (bits == 0 and isinstance(quantizer, ternary_uniform)):
        raise ValueError(
            f"QuantOptimizer: {quantizer!r} has no bits to be set to quant_bits={bits}"
        )
    granularity = prox.granularity
    if block is not None:
        if isinstance(granularity, per_block):
            granularity = dataclasses.replace(granularity, size=block)
        else:
            granularity = per_block(block)
    return dataclasses.replace(prox, quantizer=quantizer, granularity=granularity)
