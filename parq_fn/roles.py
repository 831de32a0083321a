"""What each parameter of a torch module is to it: a layer's weight, experts, an embedding ..."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from parq_fn.foundation.torch_private import BATCH_NORM

_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (BATCH_NORM, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
#: In the names of matrices that are no weights of a layer.
_TABLES = re.compile("bias|embed|token|pos")
#: In the names of tables that are looked up by position.
_POSITIONS = re.compile("(?<![a-z])(posit|pos_emb)|^wpe$")  # not "composite"
#: In the names of biases, also of two dimensions.
_BIASES = re.compile("(?<![a-z])bias")  # not "unbiased"
#: In the names of classes whose matrices choose experts.
_ROUTERS = re.compile("Router|TopKGate|TopkGate")
#: The names of layers that do so where experts stand beside them.
_GATES = re.compile("(router|gate|gating|wg|.*_gate)$")

WEIGHT, EXPERTS, EMBEDDING = "weight", "experts", "embedding"
NORM, BIAS, VECTOR, ROUTER, ADAPTER = "norm", "bias", "vector", "router", "adapter"
MADE, TABLE, OTHER, NOT_FLOATING = "made into a weight", "table", "other", "no float of 16 bits"

#: What rules with patterns choose among.
QUANTIZABLE = (WEIGHT, EXPERTS, EMBEDDING)

#: {kind: what it is}.
KINDS = {
    WEIGHT: "the matrix or kernel of a layer",
    EXPERTS: "the matrices of a mixture's experts in one parameter",
    EMBEDDING: "a table whose rows are looked up, also where a layer has it for its weight",
    NORM: "of a norm",
    BIAS: "of one number for each output",
    VECTOR: "of one dimension",
    ROUTER: "what chooses among experts",
    ADAPTER: "what an adapter such as LoRA adds to a frozen layer",
    MADE: "what a parametrization, such as weight_norm, makes a layer's weight of",
    TABLE: "a table of another kind, such as position embeddings and class tokens",
    OTHER: "a matrix whose name does not say that it is a layer's weight",
    NOT_FLOATING: "of whole numbers, bools, complex numbers or floats of 8 bits",
}


class Role(NamedTuple):
    """A parameter, and what it is to its module."""

    name: str  # its first
    names: tuple[str, ...]  # all of them, of a tied one
    parameter: Tensor
    kind: str  # one of `KINDS`
    # the dimensions whose index is the output, as of (expert, output); () where none are
    axis: tuple[int, ...]

    @property
    def is_matrix(self) -> bool:
        """Whether more than one of its dimensions is longer than 1."""
        return sum(size > 1 for size in self.parameter.shape) > 1


def roles(module: nn.Module) -> list[Role]:
    """The role of each parameter, in the module's order; a tied one once, under its first name."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    tables = {id(p) for m in module.modules() if isinstance(m, _LOOKUPS) for p in m.parameters()}
    found = []
    for name, parameter in module.named_parameters():
        steps = list(_steps(module, name))
        kind = _kind(steps, parameter, id(parameter) in tables)
        axis = _axis(steps[-1][0], parameter, kind)
        found.append(Role(name, tuple(names[id(parameter)]), parameter, kind, axis))
    return found


def check_outputs(who: str, role: Role) -> None:
    """Raises ValueError for a weight that no dimensions cut by its outputs."""
    if not role.axis:
        raise ValueError(
            f"{who}: parameter {role.name!r} is of a transposed convolution with groups, whose "
            f"outputs are no dimensions of its shape {tuple(role.parameter.shape)}, so that there "
            "are no levels by output; leave it in full precision, or give it a group by hand"
        )


def check_dtype(who: str, role: Role) -> None:
    """Raises TypeError for a parameter that no prox link takes for its dtype."""
    if role.kind == NOT_FLOATING:
        raise TypeError(
            f"{who}: parameter {role.name!r} has dtype {role.parameter.dtype}, expected a floating "
            "one of 16 bits or more; leave it in full precision"
        )


def made_by_hooks(part: nn.Module) -> list[str]:
    """The attributes that hooks of torch.nn.utils make of parameters at each call: "weight" of
    "weight_g" and "weight_v" or of "weight_orig"."""
    parameters = (name.rpartition("_") for name, _ in part.named_parameters(recurse=False))
    return [name for name, _, end in parameters if end in ("v", "orig") and name in vars(part)]


#: A module, and the name of the next one, or of the parameter, in it.
Step = tuple[nn.Module, str]


def _steps(module: nn.Module, name: str) -> Iterator[Step]:
    """From a module down to the one that has the parameter."""
    for part in name.split("."):
        yield module, part
        module = getattr(module, part)


def _kind(steps: Sequence[Step], p: Tensor, looked_up: bool) -> str:
    parent, local = steps[-1]
    if not p.is_floating_point() or p.dtype.itemsize < 2:
        return NOT_FLOATING
    if any(_is_adapter(*step) for step in steps):
        return ADAPTER
    if isinstance(parent, ParametrizationList) or local.rpartition("_")[0] in {
        *made_by_hooks(parent)
    }:
        return MADE
    if looked_up:
        return TABLE if any(_POSITIONS.search(name) for _, name in steps) else EMBEDDING
    if isinstance(parent, _NORMS):
        return NORM
    if _BIASES.search(local):
        return BIAS
    if p.dim() < 2:
        return NORM if _is_called("Norm", parent) else VECTOR
    if any(_is_router(*step) for step in steps):
        return ROUTER
    if _is_called("Expert", parent) or (p.dim() == 3 and _has_experts(steps)):
        return EXPERTS
    if "weight" in local:
        return WEIGHT
    return TABLE if _TABLES.search(local) else OTHER


def _is_called(what: str, module: nn.Module) -> bool:
    """Whether its class, or one that this is made from, has the word in its name."""
    return any(re.search(what, kind.__name__) for kind in type(module).__mro__)


def _is_adapter(module: nn.Module, name: str) -> bool:
    """Whether that part of a module is an adapter's: peft's layers name theirs."""
    own = getattr(module, "adapter_layer_names", ())
    return name.startswith("lora_") or (isinstance(own, tuple | list) and name in own)


def _is_router(module: nn.Module, name: str) -> bool:
    beside = any("expert" in other for other, _ in module.named_children() if other != name)
    return _is_called(_ROUTERS.pattern, module) or (beside and bool(_GATES.match(name)))


def _has_experts(steps: Sequence[Step]) -> bool:
    parent, _ = steps[-1]
    if _is_convolution(parent) or isinstance(parent, nn.Bilinear):
        return False
    return hasattr(parent, "num_experts") or any("expert" in name for _, name in steps[:-1])


def _is_convolution(module: nn.Module) -> bool:
    return hasattr(module, "kernel_size")


def _axis(parent: nn.Module, p: Tensor, kind: str) -> tuple[int, ...]:
    if p.dim() < 2:
        return (0,)
    if kind == EXPERTS and p.dim() == 3:
        return (0, 2) if _is_transposed(parent) else (0, 1)
    if isinstance(parent, _TRANSPOSED) and parent.groups > 1:  # [input, output of the group]
        return (0, 1) if p.shape[0] == parent.groups else ()
    is_conv1d = _is_called("^Conv1D$", parent) and hasattr(parent, "nf")  # of transformers
    return (1,) if is_conv1d or isinstance(parent, _TRANSPOSED) else (0,)


def _is_transposed(parent: nn.Module) -> bool:
    """Whether experts are [expert, input, output]: what transformers says of them, else where a
    matrix [input, 2 * inner] stands before one [inner, input]: other shapes leave it open."""
    told = getattr(parent, "is_transposed", None)
    if isinstance(told, bool):
        return told
    experts = [(n, p) for n, p in parent.named_parameters(recurse=False) if p.dim() == 3]
    first = [p.shape[1:] for n, p in experts if re.search("up|gate|w1|w3|in", n)]
    last = [p.shape[1:] for n, p in experts if re.search("down|w2|out", n)]
    return any(a == (b[1], 2 * b[0]) for a in first for b in last)
