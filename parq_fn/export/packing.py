"""Packing: quantized weights as codes and levels, and back, bit for bit.

After annealing a weight is one of its row's levels, so nothing is quantized again: a code says
which. Rows are runs of a weight's logical order for every granularity, so a shape and the number
of rows are all that the way back needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parq_fn.export.codes import decode, encode, num_bytes, width
from parq_fn.foundation.tree import PyTree, names_of, tree_leaves
from parq_fn.foundation.value import Value, value
from parq_fn.optim.quantized import QuantOptimizer
from parq_fn.optim.transformed import TransformOptimizer
from parq_fn.proxmaps.levels import nearest
from parq_fn.transforms.prox_link import Prox, ProxState
from parq_fn.transforms.sharded import gathered
from parq_fn.transforms.transformation import Transformation, children_of


@value
class Packed(Value):
    """A quantized weight: codes and the levels that they stand for.

    codes: [bytes], uint8, as of `codes.encode`, in the weight's logical order.
    levels: [r, k], in the weight's dtype.
    shape: of the weight, of r rows one after another.
    quantizer, granularity: as they print, for the reader.
    """

    codes: Tensor
    levels: Tensor
    shape: tuple[int, ...]
    quantizer: str = ""
    granularity: str = ""

    def __post_init__(self) -> None:
        count, (r, k) = torch.Size(self.shape).numel(), self.levels.shape
        if self.codes.dtype != torch.uint8 or self.codes.shape != (num_bytes(count, k),):
            raise ValueError(
                f"expected {num_bytes(count, k)} bytes of codes for shape {self.shape} and {k} "
                f"levels, got {tuple(self.codes.shape)}, {self.codes.dtype}"
            )
        if r == 0 or count % r:
            raise ValueError(f"shape {self.shape} is not {r} rows of one length")

    @property
    def bits(self) -> float:
        """Bits a code takes: 1.6 for three levels, of which five go into a byte."""
        k = self.levels.shape[1]
        return 1.6 if k == 3 else float(width(k))

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and levels together."""
        return len(self.codes) + self.levels.numel() * self.levels.element_size()

    def unpack(self) -> Tensor:
        """The weight, of its shape, contiguous: bit-equal to what was packed."""
        return decoded(self.codes, self.levels, self.shape)

    def indices(self) -> Tensor:
        """Which level of its row each element is: [r, n], int64."""
        return indices(self.codes, self.levels, self.shape)


def indices(codes: Tensor, levels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What codes [bytes] stand for, [r, n], int64, for levels [r, k] of a weight's shape."""
    (r, k), count = levels.shape, torch.Size(shape).numel()
    return decode(codes, count, k).reshape(r, -1).to(torch.int64)


def decoded(codes: Tensor, levels: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The weight that codes [bytes] and levels [r, k] stand for."""
    return levels.gather(1, indices(codes, levels, shape)).reshape(shape)


def pack_weight(
    weight: Tensor,
    levels: Tensor,
    *,
    name: str = "weight",
    snap: bool = False,
    quantizer: str = "",
    granularity: str = "",
) -> Packed:
    """A weight of r rows one after another, each of whose elements is a level of its row [r, k].

    snap: round what is on no level to the nearest; without it that is an error. What unpacks is
    equal; a zero has the sign of its level.
    Raises ValueError, with the name, for weights off their levels, with the share of them; for
    levels that are not rows of 1 to 256 sorted ones; and for a shape that is not their rows.

    >>> packed = pack_weight(torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[-1.0, 1.0]]))
    >>> packed.codes, packed.unpack()
    (tensor([5], dtype=torch.uint8), tensor([[ 1., -1.,  1.]]))
    """
    levels = levels.detach().to(weight.dtype).contiguous()
    _check_levels(name, weight, levels)
    rows = weight.detach().reshape(len(levels), -1)
    if snap:
        rows = nearest(rows, levels)
    codes = torch.searchsorted(levels, rows.contiguous()).clamp(max=levels.shape[1] - 1)
    off = int((levels.gather(1, codes) != rows).sum())
    if off:
        raise ValueError(
            f"parameter {name!r}: {100 * off / rows.numel():.3g} % of its weights are on none of "
            "their levels; train to the end of annealing, or round them with snap=True"
        )
    packed = encode(codes.flatten(), levels.shape[1])
    return Packed(packed, levels.clone(), tuple(weight.shape), quantizer, granularity)


def _check_levels(name: str, weight: Tensor, levels: Tensor) -> None:
    shape = tuple(levels.shape)
    if levels.dim() != 2 or not (shape[0] >= 1 and 1 <= shape[1] <= 256):
        raise ValueError(f"parameter {name!r}: expected levels [r, 1 to 256], got {shape}")
    if weight.numel() % shape[0]:
        raise ValueError(
            f"parameter {name!r}: shape {tuple(weight.shape)} is not {shape[0]} rows of one length"
        )
    if bool((levels.diff() < 0).any()):
        raise ValueError(f"parameter {name!r}: its levels are not sorted")
    if bool(weight.isnan().any()):
        raise ValueError(f"parameter {name!r}: some of its weights are not numbers")


def pack(
    params: PyTree | nn.Module,
    transformation: Transformation | QuantOptimizer | TransformOptimizer,
    state: Any = None,
    *,
    snap: bool = False,
) -> dict[str, Packed | Tensor]:
    """Everything of a model by name: quantized weights packed, the rest as it is.

    pack(params, transformation, state): latent params of a functional loop.
    pack(module, optimizer): a module trained by one of the adapters, with its buffers; sharded
    parameters are gathered, one at a time, on every rank. Tied parameters come once, under their
    first name; extra state that is no tensor is not kept.

    Raises ValueError for a weight that is on none of its levels, with its name, unless `snap`, and
    for a module that has none of the optimizer's quantized parameters, such as a copy.

    >>> from parq_fn import chain, hard_prox, lsbq, sgd
    >>> params, transform = {"w": torch.tensor([[1.0, -3.0]])}, chain(sgd(0.1), hard_prox(lsbq(1)))
    >>> updates, state = transform.update({"w": torch.zeros(1, 2)}, transform.init(params), params)
    >>> packed = pack(params, transform, state)
    >>> packed["w"].levels, unpack(packed)
    (tensor([[-2., 2.]]), {'w': tensor([[ 2., -2.]])})
    """
    return {entry.name: entry.make() for entry in stream(params, transformation, state, snap=snap)}


@dataclass(frozen=True)
class Entry:
    """A tensor of a model that is still to be packed, or to be kept as it is."""

    name: str
    source: Tensor  # which may be sharded
    link: Prox | None = None
    levels: Tensor | None = None  # [r, k]; None where it is kept
    snap: bool = False

    def make(self) -> Packed | Tensor:
        """The packed weight or the tensor, whole; a sharded one is gathered, so every rank calls
        it.

        Raises ValueError as `pack` does.
        """
        whole = gathered(self.source.detach())
        if self.levels is None:
            return whole.clone()
        return pack_weight(
            whole,
            self.levels,
            name=self.name,
            snap=self.snap,
            quantizer=self.quantizer,
            granularity=self.granularity,
        )

    @property
    def quantizer(self) -> str:
        return repr(self.link.quantizer) if self.link else ""

    @property
    def granularity(self) -> str:
        return repr(self.link.granularity) if self.link else ""


def stream(
    params: PyTree | nn.Module, transformation: Any, state: Any = None, *, snap: bool = False
) -> list[Entry]:
    """What `pack` gives, still to be made: `save` makes one at a time, so that no more than one
    parameter of a sharded module is held in full.

    Raises TypeError as `pack` does.
    """
    if isinstance(params, nn.Module):
        if not isinstance(transformation, QuantOptimizer | TransformOptimizer):
            raise TypeError(
                "pack(module, optimizer) takes a QuantOptimizer or TransformOptimizer, got "
                f"{type(transformation).__name__}"
            )
        entries, found = _of_module(params), _of_optimizer(params, transformation)
        if not found.keys() & dict(params.named_parameters()).keys():
            raise ValueError(
                "pack: the module has none of the parameters that the optimizer quantizes; a copy "
                "of the module has parameters of its own"
            )
    else:
        weights = transformation.weights(state, params)
        entries = zip(names_of(params), tree_leaves(weights), strict=True)
        found = _of_transformation(transformation, state)
    made = []
    for name, entry in entries:
        link, levels = found.get(name, (None, None))
        made.append(Entry(name, entry, link, levels, snap))
    return made


def unpack(packed: dict[str, Packed | Tensor]) -> dict[str, Tensor]:
    """The weights by name, as they were before `pack`, bit for bit."""
    return {k: p.unpack() if isinstance(p, Packed) else p.clone() for k, p in packed.items()}


def _of_module(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and kept buffers by name, tied ones once."""
    kept, seen = module.state_dict(keep_vars=True), set()
    for name, entry in kept.items():
        if isinstance(entry, Tensor) and id(entry) not in seen:
            seen.add(id(entry))
            yield name, entry


def _of_optimizer(
    module: nn.Module, optimizer: QuantOptimizer | TransformOptimizer
) -> dict[str, tuple[Prox, Tensor]]:
    """(link, levels) of the quantized parameters, by their names in the module."""
    names = {id(p): name for name, p in module.named_parameters()}
    if isinstance(optimizer, QuantOptimizer):
        own = [(p, group) for group in optimizer.param_groups for p in group["params"]]
        return {
            names[id(p)]: (optimizer.link(group), optimizer.state[p]["levels"])
            for p, group in own
            if "levels" in optimizer.state[p] and id(p) in names
        }
    inner = {given: names.get(id(p), given) for given, p, _ in optimizer._named()}
    state = optimizer.transformation_state
    found = _of_transformation(optimizer.transformation, state)
    return {inner[given]: pair for given, pair in found.items()}


def _of_transformation(transformation: Any, state: Any) -> dict[str, tuple[Prox, Tensor]]:
    found = {}
    for link, own in prox_states(transformation, state):
        for name, levels in zip(names_of(own.levels), tree_leaves(own.levels), strict=True):
            found[name] = link, levels
    return found


def prox_states(link: Any, state: Any) -> Iterator[tuple[Prox, ProxState]]:
    """The prox links inside a transformation, each with its state."""
    if isinstance(link, Prox):
        yield link, state
    elif inside := children_of(link):
        states = link.child_states(state)
        for name, inner in inside.items():
            yield from prox_states(inner, states[name])
