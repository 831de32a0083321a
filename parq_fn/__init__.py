"""Quantization-aware training as composable, pure gradient transformations for PyTorch."""

import torch

from parq_fn import links, modules, optim, proxmaps, quantizers, schedules, tree, wrappers
from parq_fn.granularity import Granularity, per_block, per_channel, per_tensor
from parq_fn.links import (
    add_decayed_weights,
    clip,
    clip_by_global_norm,
    global_norm,
    scale,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_schedule,
    trace,
)
from parq_fn.modules import functional, weight_mask
from parq_fn.optimizers import adam, adamw, sgd
from parq_fn.prox import (
    Prox,
    ProxState,
    binary_relax_prox,
    custom_prox,
    hard_prox,
    parq_prox,
    proxquant_prox,
    soft_prox,
)
from parq_fn.quantizers import (
    Quantizer,
    asymmetric,
    lloyd_max,
    lsbq,
    max_uniform,
    ternary_uniform,
    uniform,
)
from parq_fn.schedules import Schedule, inverse_slope
from parq_fn.transformation import (
    Composite,
    EmptyState,
    GradientTransformation,
    Link,
    Transformation,
    apply_updates,
    chain,
    freeze,
    identity,
    masked,
    named_chain,
    partition,
    stateless,
    value_and_grad,
)
from parq_fn.tree import read
from parq_fn.wrappers import accumulate, apply_if_finite

__version__ = "0.1.0"

# States are tuples of tensors: torch.load's safe default may read them.
torch.serialization.add_safe_globals(
    [
        EmptyState,
        ProxState,
        wrappers.AccumulateState,
        links.AdamState,
        wrappers.FiniteState,
        links.StepState,
        links.TraceState,
        tree.Masked,
    ]
)

__all__ = [
    "Composite",
    "EmptyState",
    "GradientTransformation",
    "Granularity",
    "Link",
    "Prox",
    "ProxState",
    "Quantizer",
    "Schedule",
    "Transformation",
    "accumulate",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_if_finite",
    "apply_updates",
    "asymmetric",
    "binary_relax_prox",
    "chain",
    "clip",
    "clip_by_global_norm",
    "custom_prox",
    "freeze",
    "functional",
    "global_norm",
    "hard_prox",
    "identity",
    "inverse_slope",
    "lloyd_max",
    "lsbq",
    "masked",
    "max_uniform",
    "modules",
    "named_chain",
    "optim",
    "parq_prox",
    "partition",
    "per_block",
    "per_channel",
    "per_tensor",
    "proxmaps",
    "proxquant_prox",
    "quantizers",
    "read",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_schedule",
    "schedules",
    "sgd",
    "soft_prox",
    "stateless",
    "ternary_uniform",
    "trace",
    "tree",
    "uniform",
    "value_and_grad",
    "weight_mask",
]
