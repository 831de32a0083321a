"""Adapters: the functional core as torch.optim optimizers."""

from parq_fn.optim.checkpoint import load_checkpoint, save_checkpoint
from parq_fn.optim.quantized import QuantOptimizer
from parq_fn.optim.share import share_on_levels
from parq_fn.optim.transformed import TransformOptimizer

__all__ = [
    "QuantOptimizer",
    "TransformOptimizer",
    "load_checkpoint",
    "save_checkpoint",
    "share_on_levels",
]
