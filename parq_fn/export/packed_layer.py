"""Layers whose weights are codes and levels, decoded when they are used.

Every module can have them, whatever it computes: its class is replaced by one in which a packed
parameter is a property that decodes. Of torch's own Linear, Conv2d and Embedding there are classes
that decode less, or without a wrapper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, cast
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils.weak import WeakIdKeyDictionary

from parq_fn.export.codes import decode, fill_bytes
from parq_fn.export.packing import decoded
from parq_fn.export.product import LEAST, multiplied, takes
from parq_fn.export.read_only import ReadOnly
from parq_fn.foundation.memory import in_order, order_of
from parq_fn.foundation.torch_private import in_tracer, sizes
from parq_fn.quantizers.granularity import Granularity

_LOST = (
    "the weight of a packed layer is decoded at each use, so that what is written to it would be "
    "lost; parq_fn.export.dequantized(module) gives layers with plain weights, weight.clone() a "
    "plain tensor"
)
WEIGHT = "weight"

#: What codes and levels that several layers share were converted to, while one of them waits.
_CONVERTED: MutableMapping[Tensor, ref[Tensor]] = WeakIdKeyDictionary()


class Kept(NamedTuple):
    """How codes and levels make a parameter."""

    shape: tuple[int, ...]
    cut: Granularity | None = None  # as `Packed.cut`
    order: tuple[int, ...] | None = None  # as `Packed.order`


def keys_of(name: str) -> tuple[str, str]:
    """The names of the buffers that a parameter's codes and levels are.

    >>> keys_of("weight"), keys_of("gate_up_proj")
    (('codes', 'levels'), ('codes_of_gate_up_proj', 'levels_of_gate_up_proj'))
    """
    return ("codes", "levels") if name == WEIGHT else (f"codes_of_{name}", f"levels_of_{name}")


class _Decoded(ReadOnly):
    why = _LOST
    _is_hf_initialized = True  # what transformers asks before it begins a weight at random


class PackedLayer(nn.Module):
    """A layer whose weight, or other parameters, are codes and levels, decoded when they are used.

    Its outputs are those of the layer with the unpacked weight, bit for bit, but that torch's fused
    pass of a TransformerEncoderLayer, which rounds otherwise, is not taken. `weight` is the
    decoded weight, which cannot be written to: a write raises RuntimeError, an assignment
    AttributeError; so are other packed parameters, such as those of experts, which are decoded once
    for each call of the layer. `dequantized` gives the plain layer back. Conversions keep layers
    tied that share codes, and dimensions in their order in memory.

    What raises nothing and changes nothing are writes to the decoded memory itself, by
    `untyped_storage()`, `data_ptr()`, `torch.utils.dlpack.to_dlpack` or `swap_tensors`; to what
    torch.func hands on, as in vmap(lambda row: row.add_(1))(layer.weight); where torch.export or
    make_fx traces; and, within compiled functions, to views of it, of which `weight.data` is one.
    """

    codes: Tensor  # [bytes], uint8; see `keys_of`
    levels: Tensor  # [r, k]
    kept: dict[str, Kept]  # by the parameters' names

    def decoded(self, name: str = WEIGHT) -> Tensor:
        """A packed parameter, in memory of its own."""
        codes, levels = (getattr(self, key) for key in keys_of(name))
        shape, cut, order = self.kept[name]
        weight = decoded(codes, levels, shape, cut)
        return weight if order is None else in_order(weight, order)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """What converts the module converts the weight: codes stay codes, tied layers tied."""
        before = {key: getattr(self, key) for name in self.kept for key in keys_of(name)}
        orders = {}
        for name, (shape, _, order) in self.kept.items():
            probe = before[keys_of(name)[1]].new_empty((2,) * len(shape))
            orders[name] = order_of(fn(in_order(probe, order)))
        self.kept = {name: kept._replace(order=orders[name]) for name, kept in self.kept.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch's
        for name in self.kept:
            codes, _ = keys_of(name)
            setattr(self, codes, getattr(self, codes).to(torch.uint8))
        for key, old in before.items():
            made = getattr(self, key)
            if made is not old:
                known = _CONVERTED[old]() if old in _CONVERTED else None
                if known is None or (known.dtype, known.device) != (made.dtype, made.device):
                    _CONVERTED[old] = ref(made)
                else:
                    setattr(self, key, known)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("kept", ()):
            raise AttributeError(f"{name}: {_LOST}")
        super().__setattr__(name, value)

    def extra_repr(self) -> str:
        return ", ".join([*filter(None, [super().extra_repr()]), *map(self._about, self.kept)])

    def _about(self, name: str) -> str:
        r, k = getattr(self, keys_of(name)[1]).shape
        rows, kept = f"{r} {'row' if r == 1 else 'rows'}", self.kept[name]
        cut = "" if kept.cut is None else f" of {kept.cut}"
        return f"{'' if name == WEIGHT else f'{name}: '}{k} levels in {rows}{cut}"


def _property(name: str) -> property:
    """The decoded parameter, read-only (see `ReadOnly`); a plain tensor where torch.export or
    make_fx traces."""

    def get(layer: PackedLayer) -> Tensor:
        now: dict[str, Tensor] = layer.__dict__.get("_now", {})
        weight = now[name] if name in now else layer.decoded(name)
        if not torch.compiler.is_dynamo_compiling() and in_tracer():
            return weight
        return _Decoded.of(weight)

    return property(get, doc=f"The decoded {name}, read-only.")


class PackedLinear(PackedLayer, nn.Linear):
    """nn.Linear with a packed weight.

    Where `exact` is False and the layer has 65,536 weights and more, a processor multiplies with
    the codes, and no weight is decoded to memory. It is faster, and errs by a few units in the last
    place of float32 of sum |x_i| times the row's largest level: see `parq_fn.export.product`. What
    is written to levels through `levels.data` goes unnoticed there.
    """

    exact: bool = True  # as packed; `quantized` sets it

    weight = _property(WEIGHT)  # decoded

    def forward(self, input: Tensor) -> Tensor:
        shape, cut, _ = self.kept[WEIGHT]
        if self.exact or cut is not None or not takes(input, self.levels, shape):
            return functional.linear(input, self.decoded(), self.bias)
        out = multiplied(input, self.codes, self.levels, shape[0])
        bias: Tensor | None = self.bias
        return out if bias is None else out + bias


class PackedConv2d(PackedLayer, nn.Conv2d):
    """nn.Conv2d with a packed weight."""

    weight = _property(WEIGHT)  # decoded

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = self._conv_forward(input, self.decoded(), self.bias)
        return out


class PackedEmbedding(PackedLayer, nn.Embedding):
    """nn.Embedding with a packed weight, of which the rows that are looked up are decoded; all of
    it where rows of levels run across them. Indexes are those that nn.Embedding takes."""

    weight = _property(WEIGHT)  # decoded

    def forward(self, input: Tensor) -> Tensor:
        ((count, size), cut, _), (r, k) = self.kept[WEIGHT], sizes(self.levels)
        whole = cut is None and (r == 1 or r % count == 0)
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


_OWN: dict[type[nn.Module], type[PackedLayer]] = {
    nn.Linear: PackedLinear,
    nn.Conv2d: PackedConv2d,
    nn.Embedding: PackedEmbedding,
}
#: Layers that look at their parameters otherwise than by name: torch's own recurrent ones keep a
#: list of them, and containers and parametrizations are looked into by others.
_OTHERS = (
    nn.RNNBase, nn.ParameterList, nn.ParameterDict, ParametrizationList, torch.jit.ScriptModule,
)  # fmt: skip


#: What a packed layer has of its own, which no attribute of the layer before may be called.
_OWN_NAMES = {"_now", "plain", *PackedLayer.__annotations__, *vars(PackedLayer)} - {*dir(nn.Module)}


def packs(layer: nn.Module, name: str = WEIGHT) -> bool:
    """Whether the layer can hold its parameter of that name packed."""
    own = (key for key, _ in layer.named_parameters(recurse=False, remove_duplicate=False))
    writes = getattr(layer, "max_norm", None) is not None  # as embeddings do then
    if name not in own or writes or isinstance(layer, _OTHERS):
        return False
    taken = {*keys_of(name)} | (set() if isinstance(layer, PackedLayer) else _OWN_NAMES)
    if any(hasattr(layer, key) for key in taken):
        return False
    with suppress(TypeError):  # of classes that take no subclass
        return bool(_class_of(plain_class(layer), (name,)))
    return False


def is_large_linear(layer: nn.Module, kept: Kept) -> bool:
    """Whether it can multiply with the codes of its weight."""
    size = torch.Size(kept.shape).numel()
    return plain_class(layer) is nn.Linear and kept.cut is None and size >= LEAST


def set_exact(layer: nn.Module, exact: bool) -> None:
    """Says whether a packed layer's outputs are to be the dense one's, bit for bit."""
    if isinstance(layer, PackedLinear):
        layer.exact = exact


_MADE: dict[tuple[Any, tuple[str, ...]], type[PackedLayer]] = {}


def _class_of(kind: Any, names: tuple[str, ...]) -> type[PackedLayer]:
    """The class of a layer of that class with these parameters packed."""
    if names == (WEIGHT,) and kind in _OWN:
        return _OWN[kind]
    if (kind, names) not in _MADE:
        _MADE[kind, names] = _made(kind, names)
    return _MADE[kind, names]


def _made(kind: Any, names: tuple[str, ...]) -> type[PackedLayer]:
    body: dict[str, Any] = {name: _property(name) for name in names}
    body |= {"__doc__": f"{kind.__name__} with packed {', '.join(names)}.", "plain": kind}
    body |= {"__module__": kind.__module__, "__reduce_ex__": _reduced}
    if names != (WEIGHT,):
        body["forward"] = _decoding_once(kind.forward)
    return cast(type[PackedLayer], type(f"Packed{kind.__name__}", (PackedLayer, kind), body))


def _reduced(layer: Any, protocol: Any) -> Any:
    """How copies and pickles make a layer of a class that was made here, with the state that its
    own class keeps."""
    del protocol
    made: Any = object.__reduce_ex__(layer, 2)
    return _bare, (type(layer).plain, tuple(layer.kept)), *made[2:]


def _bare(kind: type[nn.Module], names: tuple[str, ...]) -> PackedLayer:
    made = _class_of(kind, names)
    return made.__new__(made)


def _decoding_once(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass that finds each packed parameter decoded, however often it looks at it."""

    @functools.wraps(forward)
    def run(layer: PackedLayer, *args: Any, **kwargs: Any) -> Any:
        with _decoded_now(layer):
            return forward(layer, *args, **kwargs)

    return run


@contextmanager
def _decoded_now(layer: PackedLayer) -> Iterator[None]:
    before = layer.__dict__.get("_now")
    layer.__dict__["_now"] = {name: layer.decoded(name) for name in layer.kept}
    try:
        yield
    finally:
        if before is None:
            layer.__dict__.pop("_now", None)
        else:
            layer.__dict__["_now"] = before


def pack_layer(
    layer: nn.Module, codes: Tensor, levels: Tensor, kept: Kept, name: str = WEIGHT
) -> None:
    """Takes codes and levels for the layer's parameter of that name, in place. Without an order its
    dimensions have that of the parameter before."""
    own: dict[str, Kept] = {} if not isinstance(layer, PackedLayer) else layer.kept
    if kept.order is None:
        kept = kept._replace(order=order_of(cast(Tensor, getattr(layer, name))))
    kind, names = plain_class(layer), (*own, name)
    layer.__class__ = _class_of(kind, names)
    layer.register_parameter(name, None)  # which keeps its place among them
    packed = cast(PackedLayer, layer)
    for key, buffer in zip(keys_of(name), (codes, levels), strict=True):
        packed.register_buffer(key, buffer)
    packed.kept = {**own, name: kept}


def plain_class(layer: nn.Module) -> type[nn.Module]:
    """The class that a layer has without packed parameters."""
    kind = type(layer)
    if not issubclass(kind, PackedLayer):
        return kind
    known: dict[Any, type[nn.Module]] = {packed: plain for plain, packed in _OWN.items()}
    return known.get(kind) or cast(type[nn.Module], cast(Any, kind).plain)


def unpack_layer(layer: PackedLayer, parameters: dict[str, nn.Parameter]) -> None:
    """Gives the layer its own class again, with these parameters for the packed ones."""
    for name in parameters:
        for key in keys_of(name):
            delattr(layer, key)
    kind = plain_class(layer)
    del layer.kept
    layer.__dict__.pop("exact", None)
    plain: nn.Module = layer
    plain.__class__ = kind
    for name, parameter in parameters.items():
        setattr(plain, name, parameter)
