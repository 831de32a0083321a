"""Packing: quantized weights as codes and levels, and back, bit for bit.

After annealing a weight is one of its row's levels, so nothing is quantized again: a code says
which. Where rows are runs of a weight's logical order, its shape and the number of rows are all
that the way back needs; rows along other dimensions are kept as the granularity that cuts them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from parq_fn.export.codes import decode, encode, num_bytes, width
from parq_fn.export.cuts import cut_of, empty_of, restored_of, rows_of
from parq_fn.export.few_numbers import FLOATS, Table, check_table, kept_table, parts_of
from parq_fn.export.given import check_packed
from parq_fn.export.grid import check_grid, grid_of, kept_grid, told
from parq_fn.export.sources import check_some, of_module, of_optimizer, of_transformation
from parq_fn.foundation.memory import in_order, order_of
from parq_fn.foundation.torch_private import is_optimizer, sizes
from parq_fn.foundation.tree import PyTree, names_of, tree_leaves
from parq_fn.foundation.value import Value, check_flags, value
from parq_fn.optim.quantized import QuantOptimizer
from parq_fn.optim.transformed import TransformOptimizer
from parq_fn.proxmaps.levels import nearest
from parq_fn.quantizers.base import Grid
from parq_fn.quantizers.granularity import Granularity
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_state import in_rows
from parq_fn.transforms.sharded import gathered
from parq_fn.transforms.transformation import Transformation, check_transformation


@value
class Packed(Value):
    """A quantized weight: codes and the levels that they stand for.

    codes: [bytes], uint8, as of `codes.encode`, in the weight's logical order.
    levels: [r, k], in the weight's dtype.
    shape: of the weight.
    quantizer, granularity: as they print, for the reader.
    cut: how the weight is cut into its r rows, a per_channel or per_block; None where they are
        runs of its logical order, one after another.
    order: that its dimensions have in memory, as of `foundation.memory.order_of`; None where they
        stand as they are.
    grid: the step [r, 1] and the first multiple [r, 1], or [1, 1] where rows agree, of evenly
        spaced levels, which are their products, rounded; in float32, of float64 levels in float64.
        None where levels are not evenly spaced, or say it themselves: see `even`.
    table: what other levels are multiples of, where files hold that in their place; else None.
    """

    codes: Tensor
    levels: Tensor
    shape: tuple[int, ...]
    quantizer: str = ""
    granularity: str = ""
    cut: Granularity | None = None
    order: tuple[int, ...] | None = None
    grid: Grid | None = None
    table: Table | None = None

    def __post_init__(self) -> None:
        count, (r, k) = torch.Size(self.shape).numel(), self.levels.shape
        if self.codes.dtype != torch.uint8 or self.codes.shape != (num_bytes(count, k),):
            raise ValueError(
                f"expected {num_bytes(count, k)} bytes of codes for shape {self.shape} and {k} "
                f"levels, got {tuple(self.codes.shape)}, {self.codes.dtype}"
            )
        if count % r if r else count:
            raise ValueError(f"shape {self.shape} is not {r} rows of one length")
        if self.cut is not None and self.cut.shape(empty_of(self.shape))[0] != r:
            raise ValueError(f"shape {self.shape} has other rows of {self.cut!r} than {r}")
        if self.order is not None and sorted(self.order) != list(range(len(self.shape))):
            raise ValueError(f"{self.order} is no order of the dimensions of shape {self.shape}")
        if self.grid is not None:
            check_grid(self.grid, self.levels)
        if self.table is not None:
            check_table(self.table, self.levels)

    @property
    def bits(self) -> float:
        """Bits a code takes: 1.6 for three levels, of which five go into a byte."""
        k = self.levels.shape[1]
        return 1.6 if k == 3 else float(width(k))

    @property
    def num_bytes(self) -> int:
        """Bytes of codes and of what a file holds of levels."""
        count = torch.Size(self.shape).numel()
        kept = parts_of(self.levels, self.grid, self.table, count)
        return self.codes.nbytes + sum(part.nbytes for part in kept.values())

    @property
    def even(self) -> Grid | None:
        """The step and first multiple of evenly spaced levels: those that the quantizer had; None
        of others, and of levels packed without a grid that do not say one."""
        return told(self.levels) if self.grid is None else self.grid

    def unpack(self) -> Tensor:
        """The weight, of its shape, dense in its order: bit-equal to what was packed."""
        return in_order(decoded(self.codes, self.levels, self.shape, self.cut), self.order)

    def indices(self) -> Tensor:
        """Which level of its row each element is: [r, n], int64."""
        whole = decode(self.codes, torch.Size(self.shape).numel(), self.levels.shape[1])
        return rows_of(whole.reshape(self.shape), len(self.levels), self.cut).to(torch.int64)

    def restored(self, rows: Tensor) -> Tensor:
        """Rows [r, n] in the weight's shape, contiguous."""
        return restored_of(rows, empty_of(self.shape), self.cut)


def decoded(
    codes: Tensor, levels: Tensor, shape: tuple[int, ...], cut: Granularity | None = None
) -> Tensor:
    """The weight that codes [bytes] and levels [r, k] stand for; rows are cut as in `Packed`."""
    r, k = sizes(levels)
    whole = decode(codes, torch.Size(shape).numel(), k).reshape(shape)
    rows = rows_of(whole, r, cut)
    return restored_of(levels.gather(1, rows.to(torch.int64)), whole, cut)


def pack_weight(
    weight: Tensor,
    levels: Tensor,
    *,
    name: str = "weight",
    snap: bool = False,
    quantizer: str = "",
    granularity: str | Granularity = "",
    grid: Grid | None = None,
    table: Table | None = None,
) -> Packed:
    """A weight of r rows, each of whose elements is a level of its row [r, k].

    weight: of any shape.
    levels: [r, k], sorted.
    name: of the weight, for errors.
    quantizer: its name, which the file tells.
    snap: round what is on no level to the nearest; without it that is an error. What unpacks is
    equal; a zero has the sign of its level.
    granularity: how the weight is cut into rows; without one, or with its name alone, rows stand
    one after another.
    grid: `quantizer.grid(qparams)` of evenly spaced levels, which exporters take their scales from.
    table: as `Packed` keeps it.
    Raises ValueError, with the name, for weights off their levels, with the share of them, and for
    levels that are all 0, with `snap` too, where weights are not; for levels that are not rows of 1
    to 256 sorted ones; for a shape that is not their rows; for a granularity that makes rows in a
    way of its own; and for a grid of other levels. Raises TypeError for what is no dense tensor of
    float64, float32, float16 or bfloat16.

    >>> packed = pack_weight(torch.tensor([[1.0, -1.0, 1.0]]), torch.tensor([[-1.0, 1.0]]))
    >>> packed.codes, packed.unpack()
    (tensor([5], dtype=torch.uint8), tensor([[ 1., -1.,  1.]]))
    """
    _check_weight(name, weight, levels)
    check_flags("pack_weight", snap=snap)
    levels = levels.detach().to(weight.dtype).contiguous()
    cut = None if isinstance(granularity, str) else _named(name, granularity, weight)
    _check_levels(name, weight, levels, cut)
    rows = rows_of(weight.detach(), len(levels), cut)
    if bool(rows.any()) and not bool(levels.any()):
        raise ValueError(
            f"parameter {name!r}: its levels are all 0, as they are until a step past warmup fits "
            "them; one that is frozen is never fitted: train it, or leave it "
            "out of what is quantized"
        )
    if snap:
        rows = nearest(rows, levels)
    codes = torch.searchsorted(levels, rows.contiguous()).clamp(max=levels.shape[1] - 1)
    off = int((levels.gather(1, codes) != rows).sum())
    if off:
        raise ValueError(
            f"parameter {name!r}: {100 * off / rows.numel():.3g} % of its weights are on none of "
            "their levels; train to the end of annealing (a parameter that is frozen, or gets no "
            "gradient, stays as it is), or round them with snap=True"
        )
    packed = encode(restored_of(codes, weight, cut).flatten(), levels.shape[1])
    text = granularity if isinstance(granularity, str) else repr(granularity)
    shape, order = tuple(weight.shape), order_of(weight)
    try:
        grid = kept_grid(grid, levels)
        return Packed(packed, levels.clone(), shape, quantizer, text, cut, order, grid, table)
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from None


def _named(name: str, granularity: Any, weight: Tensor) -> Granularity | None:
    try:
        return cut_of(granularity, weight)
    except ValueError as error:
        raise ValueError(f"parameter {name!r}: {error}") from None


def _check_weight(name: str, weight: Any, levels: Any) -> None:
    for what, given in (("it", weight), ("its levels", levels)):
        kind = f"{type(given).__name__}"
        if isinstance(given, Tensor):
            kind = f"{given.dtype}, {given.layout}, on {given.device}"
            if given.is_meta:
                raise ValueError(f"parameter {name!r}: {what} holds nothing, on the meta device")
            if given.dtype in FLOATS.values() and given.layout == torch.strided:
                continue
        raise TypeError(
            f"parameter {name!r}: expected dense tensors of a floating dtype of 16 bits or more, "
            f"got {kind} for {what}"
        )


def _check_levels(name: str, weight: Tensor, levels: Tensor, cut: Granularity | None) -> None:
    shape = tuple(levels.shape)
    some = weight.numel() > 0
    if levels.dim() != 2 or shape[0] < some or not 1 <= shape[1] <= 256:
        raise ValueError(f"parameter {name!r}: expected levels [r, 1 to 256], got {shape}")
    odd = some and weight.numel() % shape[0]
    if odd or (cut is not None and cut.shape(weight)[0] != shape[0]):
        raise ValueError(
            f"parameter {name!r}: shape {tuple(weight.shape)} is not {shape[0]} rows of one length"
        )
    if bool((levels.diff() < 0).any()) or bool(levels.isnan().any()):
        what = "not numbers" if bool(levels.isnan().any()) else "not sorted"
        raise ValueError(f"parameter {name!r}: its levels are {what}")
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

    pack(params, transformation, state): latent params of a functional loop. Buffers of a module are
    added by `pack(...) | buffers`.
    pack(module, optimizer): a module trained by one of the adapters, with its buffers; sharded
    parameters are gathered, one at a time, on every rank. Tied parameters come once, under their
    first name; extra state that is no tensor is not kept.

    Raises ValueError for a weight that is on none of its levels, with its name, unless `snap`; for
    one whose levels were never fitted; for a transformation that quantizes nothing; for a module
    that has none of the optimizer's quantized parameters, such as a copy; and for a granularity
    that makes rows in a way of its own.

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

    name: str  # of the parameter or buffer
    source: Tensor  # which may be sharded
    link: Prox | None = None  # that made the weight
    levels: Tensor | None = None  # [r, k]; None where it is kept
    snap: bool = False  # as of `pack_weight`
    grid: Grid | None = None  # as of `Packed`
    table: Table | None = None  # as of `Packed`

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
            granularity=self.link.granularity if self.link else "",
            grid=self.grid,
            table=self.table,
        )

    @property
    def quantizer(self) -> str:
        return repr(self.link.quantizer) if self.link else ""

    @property
    def granularity(self) -> str:
        return repr(self.link.granularity) if self.link else ""

    @property
    def cut(self) -> Granularity | None:
        """As of `Packed`. Raises ValueError as `pack` does."""
        link = self.link
        return _named(self.name, link.granularity, self.source) if link is not None else None


def stream(
    params: PyTree | nn.Module, transformation: Any, state: Any = None, *, snap: bool = False
) -> list[Entry]:
    """What `pack` gives, still to be made: `save` makes one at a time, so that no more than one
    parameter of a sharded module is held in full.

    Raises TypeError as `pack` does.
    """
    check_flags("pack", snap=snap)
    adapters = QuantOptimizer | TransformOptimizer
    if isinstance(params, nn.Module):
        if not isinstance(transformation, adapters) or state is not None:
            raise TypeError(
                "pack(module, optimizer) takes a QuantOptimizer or TransformOptimizer, got "
                f"{type(transformation).__name__}{'' if state is None else ', and a state'}; of a "
                "functional loop give pack(params, transformation, state)"
            )
        entries, found = list(of_module(params)), of_optimizer(params, transformation)
    else:
        if isinstance(transformation, adapters) or is_optimizer(params):
            raise TypeError(
                f"pack: expected (module, optimizer), got a {type(params).__name__} and a "
                f"{type(transformation).__name__}; with an optimizer give the module itself, first"
            )
        check_transformation(transformation, "pack(params, transformation, state): the second")
        found = of_transformation(transformation, state)
        check_some(found, transformation)
        weights = transformation.weights(state, params)
        entries = list(zip(names_of(params), tree_leaves(weights), strict=True))
    made = []
    lost = found.keys() - {name for name, _ in entries}
    if lost:
        raise ValueError(
            f"pack: the state dict of the module lacks {sorted(lost)[0]!r}, which is quantized"
        )
    for name, entry in entries:
        link = levels = grid = table = None
        if name in found:
            link, qparams = found[name]
            qparams = in_rows(gathered(qparams))
            levels = link.quantizer.levels_in(qparams, entry.dtype)
            grid = grid_of(link.quantizer, qparams, levels)
            if grid is None:
                table = kept_table(link.quantizer, qparams, levels, entry.numel())
        made.append(Entry(name, entry, link, levels, snap, grid, table))
    return made


def unpack(packed: dict[str, Packed | Tensor]) -> dict[str, Tensor]:
    """The weights by name, as they were before `pack`, bit for bit. Raises TypeError for what is no
    packed model."""
    check_packed("unpack", packed)
    return {k: p.unpack() if isinstance(p, Packed) else p.clone() for k, p in packed.items()}
