"""Adapters: the functional core as torch.optim optimizers."""

from parq_fn.optim.quantized import QuantOptimizer

__all__ = ["QuantOptimizer"]
