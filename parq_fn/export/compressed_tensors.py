"""Packed weights in checkpoints of compressed-tensors, "pack-quantized", which transformers and
vLLM read without this library.

A weight is (code - zero point) * scale in 4 or 8 bits, with a scale for each output channel or
group of its inputs in the weight's dtype, which is what evenly spaced levels are.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from parq_fn.export.given import check_packed
from parq_fn.export.grid import Multiples, as_multiples, even_grid, off_grid, shifted
from parq_fn.export.layers import check_fit, owners_of
from parq_fn.export.packing import Packed
from parq_fn.export.torchao import blocks_of, spread
from parq_fn.foundation.tree import matches
from parq_fn.foundation.value import briefly, check_flags

_READER = "compressed-tensors"
_KERNELS = nn.Conv1d, nn.Conv2d, nn.Conv3d


def to_compressed_tensors(
    model: nn.Module,
    packed: Mapping[str, Packed | Tensor],
    folder: str | os.PathLike[str],
    *,
    in_full: str | Iterable[str] = (),
    rounded: bool = False,
) -> dict[str, str]:
    """Writes a folder that from_pretrained of transformers reads where compressed-tensors is
    installed, and vLLM; returns what each packed weight is, such as "int4, group 32".

    Weights of nn.Linear are codes of 4 or 8 bits, the fewest that hold all levels, with zero points
    where they are needed. Levels that are odd multiples of one number, such as those of `uniform`,
    take a bit more than they have. Packed weights of other layers (embeddings, and the heads that
    are tied to them, Conv1D) are written in full precision, with a warning that names
    them. vLLM's kernels take groups of 32, 64 and 128.

    model: a transformers model, of which packed weights are parameters; it is not changed.
    packed: what `pack` gives, or a file's content from `load`.
    folder: to write to.
    in_full: patterns of names that are written in full precision as well, such as "lm_head.*".
    rounded: round scales to the weight's dtype, and levels that are not evenly spaced to multiples
    of max|level| / 127, and warn of the error; without it they are refused.

    Raises TypeError for what is no transformers model; ValueError, with the parameter's name, for
    levels that are no multiples of one number in the weight's dtype, which those of
    stored(quantizer, dtype) are, for rows that cross output channels, and for experts.
    """
    check_flags("to_compressed_tensors", rounded=rounded)
    check_packed("to_compressed_tensors", packed)
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"to_compressed_tensors: expected a transformers model, got {briefly(model)}"
        )
    check_fit(model, packed)
    linear = {
        name
        for name, owners in owners_of(model).items()
        if all(isinstance(layer, nn.Linear) and local == "weight" for layer, local in owners)
    }
    for name, owners in owners_of(model).items():
        shape = packed[name].shape
        if len(shape) > 2 and not all(isinstance(layer, _KERNELS) for layer, _ in owners):
            raise ValueError(
                f"to_compressed_tensors: parameter {name!r}, shape {tuple(shape)}, is of experts, "
                "which transformers reads of these checkpoints only where each is packed alone; "
                "quantize_pretrained and to_torchao hold them"
            )
    patterns = [in_full] if isinstance(in_full, str) else list(in_full)
    state, kinds, left = dict[str, Tensor](), dict[str, str](), list[str]()
    groups: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for name, entry in packed.items():
        full = any(matches(pattern, name) for pattern in patterns)
        if not isinstance(entry, Packed) or full or name not in linear or 0 in entry.shape:
            state[name] = entry.unpack() if isinstance(entry, Packed) else entry
            left += [name] * (isinstance(entry, Packed) and not full)
            continue
        parts, about = _parts(name, entry, rounded)
        state |= {f"{name}_{part}": tensor for part, tensor in parts.items()}
        group = f"group {about['group_size']}" if "group_size" in about else "channel"
        kind = f"int{about['num_bits']}, {group}"
        kinds[name] = kind if about["symmetric"] else f"{kind}, zero points"
        groups.setdefault(kinds[name], (about, []))[1].append(name.removesuffix(".weight"))
    size = sum(state[name].nbytes for name in left)
    made: Any = copy.copy(model)
    made.config = copy.deepcopy(model.config)
    if groups:
        made.config.quantization_config = _config(model, groups)
    made.save_pretrained(folder, state_dict=state)
    if left:
        warnings.warn(
            f"to_compressed_tensors: {', '.join(left)} are in full precision, "
            f"{size:,} bytes, for only weights of nn.Linear are packed that no other layer shares",
            stacklevel=2,
        )
    return kinds


def _config(
    model: nn.Module, groups: dict[str, tuple[dict[str, Any], list[str]]]
) -> dict[str, Any]:
    """What config.json says; of one kind of weights that they are all linear layers' but some."""
    held = {name for _, names in groups.values() for name in names}
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": [name for name in layers if name not in held],
        "config_groups": {
            f"group_{i}": {"targets": names if len(groups) > 1 else ["Linear"], "weights": about}
            for i, (about, names) in enumerate(groups.values())
        },
    }


def _parts(name: str, entry: Packed, rounded: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a weight, by the ends of their names, and what the config says of them."""
    blocks = blocks_of(name, entry, f"weights of {_READER}")
    found = _multiples(name, entry, rounded)
    bits = next(
        (b for b in (4, 8) if bool(found.within(-(2 ** (b - 1)), 2 ** (b - 1) - 1).all())), 0
    )
    codes, zero = found.multiples, torch.zeros_like(found.multiples[:, :1])
    if not bits:
        codes, zero, least = shifted(found)
        bits = 4 if least <= 4 else 8
    rows, (n, m) = entry.indices(), entry.shape
    zeros = spread(zero, blocks)
    symmetric = not bool(zeros.any())
    parts = {
        "packed": _words(codes.gather(1, rows).reshape(n, m), bits),
        "scale": spread(found.unit, blocks).to(entry.levels.dtype),
        "shape": torch.tensor([n, m]),
    }
    if not symmetric:
        parts["zero_point"] = _words(zeros.T, bits).T.contiguous()
    about = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False}
    if blocks[1] == 1:
        return parts, {**about, "strategy": "channel"}
    return parts, {**about, "strategy": "group", "group_size": m // blocks[1]}


def _multiples(name: str, entry: Packed, rounded: bool) -> Multiples:
    """The levels as multiples in 8 bits of a unit of their dtype, in which readers multiply."""
    levels, grid = entry.levels, entry.even
    found = even_grid(levels) if grid is None else as_multiples(levels, grid, levels.dtype)
    found = _in_their_dtype(levels, found)
    if not bool(found.is_exact.all()) or shifted(found)[2] > 8:
        other = _in_their_dtype(levels, even_grid(levels, -127, 127))
        if shifted(found)[2] > 8 or bool(other.is_exact.all()):
            found = other
    if not bool(found.is_exact.all()):
        reason = f"multiples of one {levels.dtype} in 8 bits, as {_READER} holds them"
        off_grid(name, levels, found.error, reason, rounded, grid)
    return found


def _in_their_dtype(levels: Tensor, found: Multiples) -> Multiples:
    """With the unit rounded to the levels' dtype, up or down where only that is exact, by row."""
    unit = found.unit.to(levels.dtype)
    above = torch.full_like(unit, torch.inf)
    units = torch.stack([unit, unit.nextafter(above), unit.nextafter(-above)])
    products = found.multiples.to(levels.dtype) * units
    errors = (products.double() - levels.double()).abs().amax(-1)  # [3, r]
    error, best = errors.min(0)
    best = torch.where(error == 0, best, 0)
    return Multiples(
        found.multiples,
        units.gather(0, best.view(1, -1, 1)).squeeze(0),
        errors.gather(0, best.unsqueeze(0)).squeeze(0),
    )


def _words(values: Tensor, bits: int) -> Tensor:
    """Integers [r, c] of 4 or 8 bits, less their least, in int32 words, the first lowest."""
    raised = (values + 2 ** (bits - 1)).to(torch.uint8)
    bytes_ = pad(raised, (0, -values.shape[1] % (32 // bits)))
    if bits == 4:
        bytes_ = bytes_[:, ::2] | bytes_[:, 1::2] << 4
    return bytes_.contiguous().view(torch.int32)
