"""What the command lines of several examples share: numbers, maps and quantizers by name."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable

import torch

import parq_fn as pq

#: --quant-proxmap
PROXES: dict[str, Callable[..., pq.Transformation]] = {
    "hard": pq.hard_prox,
    "soft": pq.soft_prox,
    "parq": pq.parq_prox,
    "binaryrelax": pq.binary_relax_prox,
}

#: --quant-method
METHODS = ("uniform", "lsbq")


def quantizer_of(method: str, bits: int, optimal: bool = False) -> pq.Quantizer:
    """The quantizer that --quant-method, --quant-bits (0 is ternary) and --quant-lsbq-optimal name.

    >>> quantizer_of("uniform", 0), quantizer_of("lsbq", 3, optimal=True)
    (ternary_uniform(), lsbq(3, method='alternating'))
    """
    if method == "uniform":
        return pq.uniform(bits) if bits else pq.ternary_uniform()
    if optimal:
        return pq.lsbq(bits, "optimal" if bits <= 2 else "alternating")
    return pq.lsbq(bits)


def name_of_bits(bits: int) -> str:
    """What tables call a bit width.

    >>> name_of_bits(0), name_of_bits(1), name_of_bits(4)
    ('ternary', '1 bit', '4 bits')
    """
    return {0: "ternary", 1: "1 bit"}.get(bits, f"{bits} bits")


def at_least(low: float, cast: type[int] | type[float] = float) -> Callable[[str], float]:
    """A type for argparse: a number from `low` on that torch's own numbers can hold."""
    most = 2**63 - 1 if cast is int else torch.finfo(torch.float32).max

    def number(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (got := cast(text)) <= most:
                return got
        what = "whole number" if cast is int else "number"
        raise argparse.ArgumentTypeError(f"expected a {what} from {low} on, got {text!r}")

    return number
