"""Quantization-aware training as composable, pure gradient transformations for PyTorch."""

from parq_fn.foundation import command as _command  # noqa: F401 # first: see its last lines

# isort: split
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from parq_fn import modules, moved, proxmaps, quantizers, schedules
from parq_fn.foundation import tree
from parq_fn.foundation.tree import read, write
from parq_fn.foundation.value import shown_by
from parq_fn.modules import functional, weight_mask
from parq_fn.quantizers import (
    Quantizer,
    affine,
    asymmetric,
    centered,
    codebook,
    gaussian,
    integer,
    lloyd_max,
    lsbq,
    max_uniform,
    mxfp4,
    nvfp4,
    stored,
    ternary_uniform,
    uniform,
)
from parq_fn.quantizers.granularity import Granularity, per_block, per_channel, per_tensor
from parq_fn.schedules import Schedule, inverse_slope
from parq_fn.transforms import estimators, links, wrappers
from parq_fn.transforms.averaged import averaged, weights_of_average
from parq_fn.transforms.chain import Composite, chain, named_chain
from parq_fn.transforms.clipping import clip, clip_by_global_norm, global_norm
from parq_fn.transforms.conditionally import conditionally
from parq_fn.transforms.flips import monitor_flips
from parq_fn.transforms.learn import learn
from parq_fn.transforms.levels_of import levels_of
from parq_fn.transforms.links import (
    add_decayed_weights,
    scale,
    scale_by_adam,
    scale_by_learning_rate,
    scale_by_schedule,
    trace,
)
from parq_fn.transforms.lion import lion, scale_by_lion
from parq_fn.transforms.lookahead import lookahead
from parq_fn.transforms.masked import masked
from parq_fn.transforms.muon import muon
from parq_fn.transforms.noise import add_noise
from parq_fn.transforms.optimizers import adam, adamw, sgd
from parq_fn.transforms.oscillation import oscillation
from parq_fn.transforms.partition import partition
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_links import (
    binary_relax_prox,
    custom_prox,
    hard_prox,
    parq_prox,
    proxquant_prox,
    soft_prox,
)
from parq_fn.transforms.prox_state import ProxState
from parq_fn.transforms.schedule_free import schedule_free
from parq_fn.transforms.train import apply_updates, value_and_grad
from parq_fn.transforms.transformation import (
    EmptyState,
    GradientTransformation,
    Link,
    Transformation,
    freeze,
    identity,
    stateless,
)
from parq_fn.transforms.wrappers import accumulate, apply_if_finite

if TYPE_CHECKING:
    from parq_fn import convergence as convergence
    from parq_fn import export as export
    from parq_fn import optim as optim
    from parq_fn import show as show
    from parq_fn import testing as testing
    from parq_fn.allocation import allocate as allocate
    from parq_fn.covered import coverage as coverage
    from parq_fn.optim import as_link as as_link
    from parq_fn.sensitivities import sensitivity as sensitivity
    from parq_fn.show import display as display
    from parq_fn.show import plot as plot

__version__ = "0.1.0"

#: What is imported when it is first asked for.
_LATER = ("convergence", "display", "export", "optim", "plot", "show")
#: And names of these modules.
_FROM = {
    "allocate": "parq_fn.allocation",
    "as_link": "parq_fn.optim",
    "coverage": "parq_fn.covered",
    "sensitivity": "parq_fn.sensitivities",
}

if not TYPE_CHECKING:  # a checker would take every name for one of the package

    def __getattr__(name: str) -> Any:
        if name in _FROM:
            return getattr(import_module(_FROM[name]), name)
        if name in (*_LATER, "testing", *moved.MOVED):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:  # what is completed, without what modules import for themselves
        dunders = {name for name in globals() if name.startswith("__")}
        testing = {"testing"} if find_spec("hypothesis") else set()  # which needs it
        return sorted({*dunders, *__all__, *_LATER, *testing})


@shown_by
def _html(shown: Any) -> str:
    """Until something is shown; from then on it is what is imported here that shows it."""
    from parq_fn.show import display

    return display.html(shown)


# States are tuples of tensors, which torch.load's safe default may read: `state_class` says so of
# them, and this of what they were called before.
for _state in (
    EmptyState,
    ProxState,
    wrappers.AccumulateState,
    links.AdamState,
    wrappers.FiniteState,
    links.StepState,
    links.TraceState,
    tree.Masked,
):
    torch.serialization.add_safe_globals(
        [_state, *((_state, name) for name in moved.former_names(_state))]
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
    "add_noise",
    "affine",
    "allocate",
    "apply_if_finite",
    "apply_updates",
    "as_link",
    "asymmetric",
    "averaged",
    "binary_relax_prox",
    "centered",
    "chain",
    "clip",
    "clip_by_global_norm",
    "codebook",
    "conditionally",
    "coverage",
    "custom_prox",
    "estimators",
    "freeze",
    "functional",
    "gaussian",
    "global_norm",
    "hard_prox",
    "identity",
    "integer",
    "inverse_slope",
    "learn",
    "levels_of",
    "lion",
    "lloyd_max",
    "lookahead",
    "lsbq",
    "masked",
    "max_uniform",
    "modules",
    "monitor_flips",
    "muon",
    "mxfp4",
    "named_chain",
    "nvfp4",
    "optim",
    "oscillation",
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
    "scale_by_lion",
    "scale_by_schedule",
    "schedule_free",
    "schedules",
    "sensitivity",
    "sgd",
    "soft_prox",
    "stateless",
    "stored",
    "ternary_uniform",
    "trace",
    "tree",
    "uniform",
    "value_and_grad",
    "weight_mask",
    "weights_of_average",
    "write",
]
