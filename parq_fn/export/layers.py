"""Running packed: loading into a float module, and layers that keep codes and decode on the fly."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, MutableMapping
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakIdKeyDictionary

from parq_fn.export.codes import decode, fill_bytes
from parq_fn.export.file import load
from parq_fn.export.given import check_file, check_packed
from parq_fn.export.packing import Packed, decoded, unpack
from parq_fn.export.read_only import ReadOnly
from parq_fn.foundation.memory import in_order, order_of
from parq_fn.foundation.torch_private import in_tracer, sizes
from parq_fn.foundation.value import briefly
from parq_fn.quantizers.granularity import Granularity


def load_into(module: nn.Module, file: str | os.PathLike[str] | Mapping[str, Any]) -> None:
    """Unpacks a file, or a packed model, into a plain module with the same names, in its dtypes.

    Raises ValueError, and changes nothing, for names that are missing or unknown, other shapes,
    a module on the meta device, and as `load` does.
    """
    packed = _given("load_into", module, file)
    check_fit(module, packed)
    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, weight in unpack(packed).items():
            own[name].copy_(weight)


def _given(who: str, module: Any, file: Any) -> dict[str, Packed | Tensor]:
    """The packed model that a file is, or holds. Raises TypeError for what is neither, or no
    module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{who} takes (module, file), got {briefly(module)} for the module")
    if not isinstance(file, Mapping):
        check_file(who, file)
        return load(file)
    check_packed(who, file)
    return dict(file)


def names_of_tied(module: nn.Module) -> dict[str, list[str]]:
    """The names of each parameter and kept buffer, by the first of them; tied ones have more."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, entry in module.state_dict(keep_vars=True).items():
        if isinstance(entry, Tensor):
            names.setdefault(first.setdefault(id(entry), name), []).append(name)
    return names


def check_fit(module: nn.Module, packed: Mapping[str, Packed | Tensor]) -> None:
    """Raises ValueError unless a packed model has the module's names and shapes."""
    if any(isinstance(layer, PackedLayer) for layer in module.modules()):
        raise ValueError(
            "the module has packed layers already; give parq_fn.export.dequantized(module), or one "
            "that was made anew"
        )
    own, names = module.state_dict(keep_vars=True), names_of_tied(module)
    missing, unknown = sorted(names.keys() - packed.keys()), sorted(packed.keys() - names.keys())
    if missing or unknown:
        raise ValueError(
            f"the packed model lacks {', '.join(missing) or 'nothing'} of the module, and has "
            f"{', '.join(unknown) or 'nothing'} that the module has not; names are those of the "
            "module that was packed, of tied weights the first; buffers of a functional loop are "
            "packed by pack(params, transformation, state) | buffers"
        )
    absent = [name for name in packed if own[name].is_meta]
    if absent:
        raise ValueError(
            f"{absent[0]} is on the meta device, which holds nothing; make the module on a device"
        )
    wrong = [name for name, entry in packed.items() if own[name].shape != torch.Size(entry.shape)]
    if wrong:
        raise ValueError(
            f"shapes of {', '.join(wrong)} in the packed model differ from the module's: "
            f"{tuple(packed[wrong[0]].shape)}, expected {tuple(own[wrong[0]].shape)}"
        )


_LOST = (
    "the weight of a packed layer is decoded at each use, so that what is written to it would be "
    "lost; parq_fn.export.dequantized(module) gives layers with plain weights, weight.clone() a "
    "plain tensor"
)


#: What codes and levels that several layers share were converted to, while one of them waits.
_CONVERTED: MutableMapping[Tensor, ref[Tensor]] = WeakIdKeyDictionary()


class _Decoded(ReadOnly):
    why = _LOST


class PackedLayer(nn.Module):
    """A layer whose weight is codes and levels, decoded when it is used.

    Its outputs are those of the layer with the unpacked weight, bit for bit. `weight` is the
    decoded weight, which cannot be written to: a write raises RuntimeError, an assignment
    AttributeError. `dequantized` gives the plain layer back. Conversions keep layers tied that
    share codes, and dimensions in their order in memory.

    What raises nothing and changes nothing are writes to the decoded memory itself, by
    `untyped_storage()`, `data_ptr()`, `torch.utils.dlpack.to_dlpack` or `swap_tensors`; to what
    torch.func hands on, as in vmap(lambda row: row.add_(1))(layer.weight); where torch.export or
    make_fx traces; and, within compiled functions, to views of it, of which `weight.data` is one.
    """

    codes: Tensor  # [bytes], uint8
    levels: Tensor  # [r, k]
    packed_shape: tuple[int, ...]
    packed_cut: Granularity | None = None  # as `Packed.cut`
    packed_order: tuple[int, ...] | None = None  # as `Packed.order`

    def decoded(self) -> Tensor:
        """The weight, in memory of its own."""
        weight = decoded(self.codes, self.levels, self.packed_shape, self.packed_cut)
        return weight if self.packed_order is None else in_order(weight, self.packed_order)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What converts the module converts the weight: codes stay codes, tied layers tied."""
        before = self.codes, self.levels
        probe = self.levels.new_empty((2,) * len(self.packed_shape))
        self.packed_order = order_of(fn(in_order(probe, self.packed_order)))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch's
        self.codes = self.codes.to(torch.uint8)
        for name, old in zip(("codes", "levels"), before, strict=True):
            made = getattr(self, name)
            if made is not old:
                known = _CONVERTED[old]() if old in _CONVERTED else None
                if known is None or (known.dtype, known.device) != (made.dtype, made.device):
                    _CONVERTED[old] = ref(made)
                else:
                    setattr(self, name, known)
        return self

    @property
    def weight(self) -> Tensor:
        """The decoded weight, read-only (see `ReadOnly`); a plain tensor where torch.export or
        make_fx traces."""
        weight = self.decoded()
        if not torch.compiler.is_dynamo_compiling() and in_tracer():
            return weight
        return _Decoded.of(weight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(f"weight: {_LOST}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        r, k = self.levels.shape
        rows = f"{r} {'row' if r == 1 else 'rows'}"
        cut = "" if self.packed_cut is None else f" of {self.packed_cut}"
        return f"{super().extra_repr()}, {k} levels in {rows}{cut}"


class PackedLinear(PackedLayer, nn.Linear):  # type: ignore[override] # weight is decoded
    """nn.Linear with a packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.decoded(), self.bias)


class PackedConv2d(PackedLayer, nn.Conv2d):  # type: ignore[override] # weight is decoded
    """nn.Conv2d with a packed weight."""

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(input, self.decoded(), self.bias)
        return out


class PackedEmbedding(PackedLayer, nn.Embedding):  # type: ignore[override] # weight is decoded
    """nn.Embedding with a packed weight, of which the rows that are looked up are decoded; all of
    it where rows of levels run across them. Indexes are those that nn.Embedding takes."""

    def forward(self, input: Tensor) -> Tensor:
        (count, size), (r, k) = self.packed_shape, sizes(self.levels)
        whole = self.packed_cut is None and (r == 1 or r % count == 0)
        if not (fill_bytes(size, k) and whole):
            return functional.embedding(input, self.decoded())
        # looked up by torch's own embedding, which refuses what is no index of a row
        codes = functional.embedding(input, self.codes.reshape(count, -1))
        codes = decode(codes, size, k).to(torch.int64)
        if r == 1:
            return self.levels[0][codes]
        table = functional.embedding(input, self.levels.reshape(count, -1))
        blocks = r // count  # of a row
        table = table.reshape(*input.shape, blocks, k)
        return table.gather(-1, codes.reshape(*input.shape, blocks, size // blocks)).flatten(-2)


_PACKED: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    nn.Embedding: PackedEmbedding,
}


_PLAIN = {packed: plain for plain, packed in _PACKED.items()}


def packs(layer: nn.Module) -> bool:
    """Whether the layer can hold a packed weight: one of exactly torch's own class."""
    plain = not (isinstance(layer, nn.Embedding) and layer.max_norm is not None)  # which writes
    return type(layer) in _PACKED and plain


def holders_of(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The layers that a parameter is the weight of, by its first name, each of them once, where
    all of them can hold a packed one."""
    layers = dict(module.named_modules(remove_duplicate=False))
    holders = {}
    for name, aliases in names_of_tied(module).items():
        parts = [alias.rpartition(".") for alias in aliases]
        found = {id(layers[above]): layers[above] for above, _, _ in parts}
        if all(last == "weight" for _, _, last in parts) and all(map(packs, found.values())):
            holders[name] = list(found.values())
    return holders


def pack_layer(
    layer: nn.Module,
    codes: Tensor,
    levels: Tensor,
    shape: tuple[int, ...],
    cut: Granularity | None = None,
    order: tuple[int, ...] | None = None,
) -> None:
    """Takes codes and levels for the layer's weight, in place; rows are cut as in `Packed`. Without
    an order its dimensions have that of the layer's weight before."""
    order = order_of(cast(Tensor, layer.weight)) if order is None else order
    del layer.weight
    layer.__class__ = _PACKED[type(layer)]
    layer.register_buffer("codes", codes)
    layer.register_buffer("levels", levels)
    layer.packed_shape = shape  # type: ignore[assignment] # of a PackedLayer
    layer.packed_cut = cut  # type: ignore[assignment] # of a PackedLayer
    layer.packed_order = order  # type: ignore[assignment] # of a PackedLayer


def quantized(module: nn.Module, file: str | os.PathLike[str] | Mapping[str, Any]) -> nn.Module:
    """The module with packed layers where the file, or the packed model, has packed weights, the
    rest loaded into it.

    The module is changed in place and returned: nn.Linear, nn.Conv2d and nn.Embedding, of exactly
    those classes, become PackedLinear, PackedConv2d and PackedEmbedding; packed weights of other
    layers are unpacked into them, with a warning that names them. Tied layers share codes and
    levels. Decoding is made of plain tensor operations: torch.compile(module) fuses it.

    Raises ValueError, and changes nothing, as `load_into` does.
    """
    packed = _given("quantized", module, file)
    check_fit(module, packed)
    own, holders = module.state_dict(keep_vars=True), holders_of(module)
    with torch.no_grad():
        for name, entry in packed.items():
            if isinstance(entry, Packed) and name in holders:
                device = own[name].device
                codes, levels = entry.codes.to(device), entry.levels.to(own[name])
                for layer in holders[name]:
                    pack_layer(layer, codes, levels, tuple(entry.shape), entry.cut, entry.order)
            else:
                own[name].copy_(entry.unpack() if isinstance(entry, Packed) else entry)
    plain = {k: e for k, e in packed.items() if isinstance(e, Packed) and k not in holders}
    if plain:
        count = sum(torch.Size(entry.shape).numel() for entry in plain.values())
        warnings.warn(
            f"quantized: {', '.join(plain)} are unpacked, {count:,} weights, for packed layers are "
            "torch's own Linear, Conv2d and Embedding (without max_norm), and no class of these",
            stacklevel=2,
        )
    return module


def dequantized(module: nn.Module) -> nn.Module:
    """The module with plain layers where it has packed ones, their weights the decoded ones.

    The module is changed in place and returned: PackedLinear, PackedConv2d and PackedEmbedding
    become nn.Linear, nn.Conv2d and nn.Embedding again, whose weights are parameters that can be
    trained, merged with an adapter's, or written to. Layers that share codes and levels share the
    weight. A module without packed layers is returned as it is. Raises TypeError for what is no
    module.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> dequantized(layer) is layer
    True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"dequantized: expected a torch.nn.Module, got {type(module).__name__}")
    weights: dict[Any, nn.Parameter] = {}
    for layer in module.modules():
        if isinstance(layer, PackedLayer):
            key = id(layer.codes), id(layer.levels), layer.packed_shape
            if key not in weights:
                weights[key] = nn.Parameter(layer.decoded())
            del layer.codes, layer.levels, layer.packed_shape, layer.packed_cut, layer.packed_order
            plain: nn.Module = layer
            plain.__class__ = _PLAIN[type(layer)]
            plain.weight = weights[key]
    return module
