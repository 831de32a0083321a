"""Adapters: the functional core as torch.optim optimizers."""

from parq_fn.optim.quantized import QuantOptimizer
from parq_fn.optim.transformed import TransformOptimizer

__all__ = ["QuantOptimizer", "TransformOptimizer"]
