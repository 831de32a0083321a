"""Running packed: loading into a float module, and packing the layers of one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from parq_fn.export.file import load
from parq_fn.export.given import check_file, check_packed
from parq_fn.export.packed_layer import (
    Kept,
    PackedLayer,
    is_large_linear,
    keys_of,
    pack_layer,
    packs,
    set_exact,
    unpack_layer,
)
from parq_fn.export.packing import Packed, unpack
from parq_fn.export.product import widened
from parq_fn.foundation.value import briefly, check_flags


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


def owners_of(module: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """The layers that have a parameter, and what they call it, by its first name; each of them
    once, where all of them can hold a packed one."""
    layers = dict(module.named_modules(remove_duplicate=False))
    owners = {}
    for name, aliases in names_of_tied(module).items():
        parts = [alias.rpartition(".") for alias in aliases]
        found = {(id(layers[above]), own): (layers[above], own) for above, _, own in parts}
        if all(packs(*one) for one in found.values()):
            owners[name] = list(found.values())
    return owners


def quantized(
    module: nn.Module,
    file: str | os.PathLike[str] | Mapping[str, Any],
    *,
    exact: bool = False,
) -> nn.Module:
    """The module with packed layers where the file, or the packed model, has packed weights, the
    rest loaded into it.

    The module is changed in place and returned: a layer with a packed weight gets a class that
    decodes it where the layer looks at it, PackedLinear, PackedConv2d and PackedEmbedding for
    torch's own. So do layers of any class, and parameters of any name, such as those of experts.
    Packed weights of torch's recurrent layers, of embeddings with max_norm, in lists of parameters,
    of layers that have attributes called as those of a `PackedLayer`, and of classes that take no
    subclass, are unpacked into them, with a warning that names them. Tied layers share codes and
    levels. Decoding is made of plain tensor operations: torch.compile(module) fuses it.

    module: with the names and shapes of what was packed.
    file: a packed file, or a packed model.
    exact: whether outputs of all layers are those of the dense module, bit for bit. Without it
    linear layers of 65,536 weights and more multiply with their codes on a CPU, by programs that
    torch.compile makes at the first call of a kind; their outputs differ by float32 rounding of the
    sum. So do ternary codes take 2 bits there in place of 1.6, and evenly spaced ones of 3 bits 4,
    of 5 to 7 bits 8. `layer.exact = True` makes one layer exact.

    Raises ValueError, and changes nothing, as `load_into` does.
    """
    check_flags("quantized", exact=exact)
    packed = _given("quantized", module, file)
    check_fit(module, packed)
    own, owners = module.state_dict(keep_vars=True), owners_of(module)
    plain = {k: e for k, e in packed.items() if isinstance(e, Packed) and k not in owners}
    with torch.no_grad():
        for name, entry in packed.items():
            if not isinstance(entry, Packed) or name in plain:
                own[name].copy_(entry.unpack() if isinstance(entry, Packed) else entry)
                continue
            codes, levels = entry.codes.to(own[name].device), entry.levels.to(own[name])
            kept = Kept(tuple(entry.shape), entry.cut, entry.order)
            if not exact and any(is_large_linear(layer, kept) for layer, _ in owners[name]):
                codes, levels = widened(codes, levels, kept.shape)
            for layer, local in owners[name]:
                pack_layer(layer, codes, levels, kept, local)
                set_exact(layer, exact)
    if plain:
        count = sum(own[name].nbytes for name in plain)
        warnings.warn(
            f"quantized: {', '.join(plain)} are unpacked, {count:,} bytes: torch's recurrent "
            "layers and lists of parameters do not look weights up by name, embeddings with "
            "max_norm write to them, and other layers take no subclass or have attributes called "
            "as those of packed ones (codes, levels, kept, decoded, plain)",
            stacklevel=2,
        )
    return module


def dequantized(module: nn.Module) -> nn.Module:
    """The module with plain layers where it has packed ones, their weights the decoded ones.

    The module is changed in place and returned: packed layers get the class again that they had,
    and weights are parameters that can be trained, merged with an adapter's, or written to. Layers
    that share codes and levels share the weight. A module without packed layers is returned as it
    is. Raises TypeError for what is no module.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> dequantized(layer) is layer
    True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"dequantized: expected a torch.nn.Module, got {type(module).__name__}")
    weights: dict[Any, tuple[nn.Parameter, Any]] = {}  # with what keys are of, which keeps it
    for layer in [layer for layer in module.modules() if isinstance(layer, PackedLayer)]:
        own = {}
        for name, kept in layer.kept.items():
            codes, levels = (getattr(layer, key) for key in keys_of(name))
            key = id(codes), id(levels), kept.shape
            if key not in weights:
                weights[key] = nn.Parameter(layer.decoded(name)), (codes, levels)
            own[name], _ = weights[key]
        unpack_layer(layer, own)
    return module
