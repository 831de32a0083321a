"""A quantizer with another number of bits."""

from __future__ import annotations

import dataclasses
from typing import Any

from parq_fn.quantizers.base import Quantizer
from parq_fn.quantizers.uniform import ternary_uniform, uniform


def with_bits(quantizer: Any, bits: int) -> Any:
    """The quantizer, or the one that it is around, with so many bits, 0 for ternary; of a table as
    it is, where a level's code has so many; None where it has others.

    >>> with_bits(uniform(4), 2), with_bits(uniform(4), 0)
    (uniform(2), ternary_uniform())
    """
    inner = getattr(quantizer, "quantizer", None)
    if isinstance(inner, Quantizer):
        found = with_bits(inner, bits)
        return None if found is None else dataclasses.replace(quantizer, quantizer=found)
    if bits == 0 and isinstance(quantizer, uniform):
        return ternary_uniform(center=quantizer.center)
    if "bits" in {f.name for f in dataclasses.fields(quantizer)}:
        return dataclasses.replace(quantizer, bits=bits)
    return quantizer if bits == bits_of(quantizer) else None


def name_of_bits(bits: int) -> str:
    """In words.

    >>> [name_of_bits(b) for b in (0, 1, 2, 16)]
    ['ternary', '1 bit', '2 bits', 'full precision']
    """
    if bits >= 16:
        return "full precision"
    return {0: "ternary", 1: "1 bit"}.get(bits, f"{bits} bits")


def bits_of(quantizer: Any) -> int:
    """The bits of a level's code; 0 of three levels."""
    k = quantizer.num_levels
    return 0 if k == 3 else (k - 1).bit_length()
