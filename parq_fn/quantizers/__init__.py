"""Quantizers: rows [r, n] -> levels [r, k], sorted, each row's own."""

from parq_fn.quantizers.base import Quantizer
from parq_fn.quantizers.error import relative_error
from parq_fn.quantizers.lloyd_max import lloyd_max
from parq_fn.quantizers.lsbq import lsbq
from parq_fn.quantizers.uniform import asymmetric, max_uniform, ternary_uniform, uniform

__all__ = [
    "Quantizer",
    "asymmetric",
    "lloyd_max",
    "lsbq",
    "max_uniform",
    "relative_error",
    "ternary_uniform",
    "uniform",
]
