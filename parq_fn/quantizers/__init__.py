"""Quantizers: rows [r, n] -> qparams [r, m] -> levels [r, k], sorted, each row's own."""

from parq_fn.quantizers.affine import affine
from parq_fn.quantizers.base import Grid, Quantizer
from parq_fn.quantizers.centered import centered
from parq_fn.quantizers.codebook import codebook
from parq_fn.quantizers.error import relative_error
from parq_fn.quantizers.gaussian import gaussian
from parq_fn.quantizers.integer import integer
from parq_fn.quantizers.lloyd_max import lloyd_max
from parq_fn.quantizers.lsbq import lsbq
from parq_fn.quantizers.mxfp4 import mxfp4
from parq_fn.quantizers.nvfp4 import nvfp4
from parq_fn.quantizers.stored import stored
from parq_fn.quantizers.uniform import asymmetric, max_uniform, ternary_uniform, uniform

__all__ = [
    "Grid",
    "Quantizer",
    "affine",
    "asymmetric",
    "centered",
    "codebook",
    "gaussian",
    "integer",
    "lloyd_max",
    "lsbq",
    "max_uniform",
    "mxfp4",
    "nvfp4",
    "relative_error",
    "stored",
    "ternary_uniform",
    "uniform",
]
