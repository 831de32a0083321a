"""Packed weights as torchao's integer tensors, bit for bit.

IntxUnpackedToInt8Tensor holds a weight as (code - zero point) * scale, a scale and a zero point
for each output channel or group of its inputs, which is what evenly spaced levels are.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parq_fn.export.given import check_packed
from parq_fn.export.grid import Multiples, as_multiples, even_grid, halved, off_grid, shifted
from parq_fn.export.layers import check_fit, owners_of
from parq_fn.export.packing import Packed
from parq_fn.foundation.value import check_flags

_FORWARDS = (nn.Linear.forward, nn.Conv2d.forward, nn.Embedding.forward)


def to_torchao(
    module: nn.Module,
    packed: Mapping[str, Packed | Tensor],
    *,
    int8_activations: bool = False,
    rounded: bool = False,
) -> nn.Module:
    """A copy of the module whose packed weights are torchao's IntxUnpackedToInt8Tensor.

    Scale and zero point are those of the quantizer, bit for bit (the zero point less 2^(b-1), for
    codes are signed). Levels that are odd multiples of one number, such as those of `uniform`, get
    the zero point -1/2 and as many bits as they have. A scale of the whole weight is given to every
    channel. These are of nn.Linear, nn.Conv2d and nn.Embedding, and of subclasses that leave
    `forward` alone; other packed weights are unpacked, with a warning that names them, what is not
    packed is loaded as it is, and tied weights stay tied. A model of transformers gets its config
    for torchao: save_pretrained writes a folder that from_pretrained reads where torchao is
    installed, in programs that do not know this library. torchao's FakeQuantizedLinear becomes
    nn.Linear: trained with activations that are quantized per token to 8 bits, asymmetrically, it
    computes what its plain layer computes afterwards with int8_activations.

    module: of which packed weights are parameters; it is not changed.
    packed: what `pack` gives, or a file's content from `load`.
    int8_activations: inputs of linear layers are quantized to 8 bits as they come, asymmetrically
    and per token.
    rounded: round levels that are not evenly spaced to multiples of max|level| / 127, and warn of
    the error; without it they are refused.

    Raises ImportError without torchao; ValueError, with the parameter's name, for levels that are
    not evenly spaced, zero points beyond 8 bits, rows that cross output channels or run along
    another dimension than the inputs, and float64; with the layer's name, for a FakeQuantizedLinear
    whose activations or weights are quantized otherwise than the result's.
    """
    check_flags("to_torchao", int8_activations=int8_activations, rounded=rounded)
    check_packed("to_torchao", packed)
    tensor_class, activation = _torchao()
    made = _without_fakes(copy.deepcopy(module), int8_activations)
    check_fit(made, packed)
    own, holders, left = made.state_dict(keep_vars=True), _holders(made), list[str]()
    with torch.no_grad():
        for name, entry in packed.items():
            if not (isinstance(entry, Packed) and name in holders and own[name].numel()):
                own[name].copy_(entry.unpack() if isinstance(entry, Packed) else entry)
                left += [name] * (isinstance(entry, Packed) and own[name].numel() > 0)
                continue
            codes, scale, zero, bits = _affine(name, entry, rounded)
            block = [n // m for n, m in zip(entry.shape, scale.shape, strict=True)]
            linear = all(isinstance(layer, nn.Linear) for layer in holders[name])
            quantize = activation.INT8_ASYM_PER_TOKEN.value if int8_activations and linear else None
            device, target = own[name].device, getattr(torch, f"int{bits}")
            weight = tensor_class(
                *(part.to(device) for part in (codes, scale, zero)),
                target, tuple(block), entry.levels.dtype, quantize,
            )  # fmt: skip
            parameter = nn.Parameter(weight, requires_grad=False)
            for layer in holders[name]:
                layer.weight = parameter
    if left:
        warnings.warn(
            f"to_torchao: {', '.join(left)} are unpacked, {sum(own[n].nbytes for n in left):,} "
            "bytes, for torchao's tensors are of the weights of nn.Linear, nn.Conv2d and "
            "nn.Embedding, and of subclasses that leave forward alone",
            stacklevel=2,
        )
    if hasattr(made, "save_pretrained"):
        from parq_fn.export.torchao_config import attach  # needs transformers

        attach(made)
    return made


def _holders(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The layers that a parameter is the weight of, by its first name, where all of them compute
    what torch's own do, and are not the projection of attention, whose weight that one takes."""

    def computes(layer: nn.Module, local: str) -> bool:
        own = local == "weight" and type(layer).forward in _FORWARDS
        return own and not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)

    return {
        name: [layer for layer, _ in found]
        for name, found in owners_of(module).items()
        if all(computes(*one) for one in found)
    }


def _without_fakes(module: nn.Module, int8_activations: bool) -> nn.Module:
    """The module with nn.Linear for torchao's FakeQuantizedLinear; weights stay the same."""
    from torchao.quantization.qat import IntxFakeQuantizeConfig
    from torchao.quantization.qat.linear import FakeQuantizedLinear

    plain: dict[int, nn.Module] = {}
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        if not isinstance(layer, FakeQuantizedLinear):
            continue
        where = f"to_torchao: layer {name!r} is a FakeQuantizedLinear"
        if layer.weight_fake_quantizer is not None:
            raise ValueError(
                f"{where} whose weights are quantized a second time; make it with "
                "weight_config=None, for the optimizer quantizes them"
            )
        quantizer = layer.activation_fake_quantizer
        given = getattr(quantizer, "config", None)
        wanted = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
        if quantizer is not None and not (int8_activations and given == wanted):
            raise ValueError(
                f"{where} with activations of {given}; to_torchao(..., int8_activations=True) "
                f"quantizes them by {wanted}, and without it not at all"
            )
        if id(layer) not in plain:
            plain[id(layer)] = layer.to_linear().train(layer.training)
        if not name:
            return plain[id(layer)]
        module.set_submodule(name, plain[id(layer)])
    return module


def _torchao() -> tuple[Any, Any]:
    try:
        from torchao.quantization import IntxUnpackedToInt8Tensor
        from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
            IntxUnpackedToInt8TensorActivationQuantization as Activation,
        )
    except ImportError:
        raise ImportError("to_torchao needs torchao: pip install 'parq_fn[torchao]'") from None
    return IntxUnpackedToInt8Tensor, Activation


def _affine(name: str, entry: Packed, rounded: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    """(codes of the weight's shape, int8; scale and zero point of its blocks; bits)."""
    if entry.levels.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"parameter {name!r} is {entry.levels.dtype}, expected 32 bits or less; convert the "
            "module before it is packed"
        )
    blocks = blocks_of(name, entry, "torchao's integer tensors")
    found = _multiples(name, entry, rounded)
    codes, whole, bits = shifted(found)
    if bits > 8 or not bool(found.unit.isfinite().all()):
        off_grid(name, entry.levels, torch.full_like(found.error, torch.inf), "", rounded)
    zero = whole.float() - 0.5 if found.half else whole.to(torch.int8)
    rows = entry.indices()
    chosen = codes.gather(1, rows).to(torch.int8).reshape(entry.shape)
    return chosen, spread(found.unit, blocks), spread(zero, blocks), bits


def _multiples(name: str, entry: Packed, rounded: bool) -> Multiples:
    """The levels as multiples of the quantizer's step; of those that do not follow from a step and
    a zero point in 8 bits, found or rounded."""
    levels, grid = entry.levels, entry.even
    if grid is not None:
        found = as_multiples(levels, grid, levels.dtype, halves=True)
        if bool(found.is_exact.all()) and shifted(found)[2] <= 8:
            return found
    found = halved(even_grid(levels))
    if not found.half and int((found.multiples.amax(-1) - found.multiples.amin(-1)).max()) > 255:
        found = even_grid(levels, -127, 127)
    if not bool(found.is_exact.all()):
        reason = "multiples of one number, as torchao's integer tensors hold them in 8 bits"
        off_grid(name, levels, found.error, reason, rounded, grid)
    return found


def blocks_of(name: str, entry: Packed, reader: str) -> tuple[int, ...]:
    """How many scales there are along each dimension of the weight."""
    if entry.cut is not None:
        raise ValueError(
            f"parameter {name!r}: {reader} have scales for output channels or groups of their "
            f"inputs, which rows of {entry.cut!r} are not; unpack it, or train it with rows of "
            "those"
        )
    r, (first, *rest) = len(entry.levels), entry.shape
    ones = (1,) * (len(rest) - 1)
    if r == 1 or r == first:
        return (first, 1, *ones) if rest else (r,)
    if len(rest) == 1 and r % first == 0 and rest[0] % (r // first) == 0:
        return first, r // first
    raise ValueError(
        f"parameter {name!r}: {reader} have scales for output channels or groups of their inputs; "
        f"its shape is {tuple(entry.shape)} and it has {r} rows of levels"
    )


def spread(values: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Values [r, 1] of rows for the blocks; one of the whole weight for every channel."""
    if len(values) == 1:
        return values.reshape([1] * len(blocks)).expand(blocks).contiguous()
    return values.reshape(blocks).contiguous()
