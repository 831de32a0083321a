"""Adapters: the functional core as torch.optim optimizers."""

from typing import TYPE_CHECKING, Any

from parq_fn.optim.as_link import as_link
from parq_fn.optim.flip_counter import FlipCounter
from parq_fn.optim.on_levels import share_on_levels
from parq_fn.optim.param_groups import param_groups
from parq_fn.optim.prox_partition import prox_partition
from parq_fn.optim.quantized import QuantOptimizer
from parq_fn.optim.transformed import TransformOptimizer

if TYPE_CHECKING:
    from parq_fn.optim.checkpoint import load_checkpoint, save_checkpoint
else:

    def __getattr__(name: str) -> Any:
        if name in ("load_checkpoint", "save_checkpoint"):  # which import distributed tensors
            from parq_fn.optim import checkpoint

            return getattr(checkpoint, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "FlipCounter",
    "QuantOptimizer",
    "TransformOptimizer",
    "as_link",
    "load_checkpoint",
    "param_groups",
    "prox_partition",
    "save_checkpoint",
    "share_on_levels",
]
