"""Running packed: loading into a float module, and layers that keep codes and decode on the fly."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parq_fn.export.codes import decode
from parq_fn.export.file import load
from parq_fn.export.packing import Packed, unpack


def load_into(module: nn.Module, file: str | os.PathLike[str]) -> None:
    """Unpacks a file into a plain module with the same names.

    Raises ValueError, and changes nothing, for names that are missing or unknown and for other
    shapes, and as `load` does.
    """
    weights = unpack(load(file))
    _check_names(module, weights)
    own = module.state_dict(keep_vars=True)
    wrong = [name for name, w in weights.items() if own[name].shape != w.shape]
    if wrong:
        raise ValueError(
            f"shapes of {', '.join(wrong)} in the file differ from the module's: "
            f"{tuple(weights[wrong[0]].shape)}, expected {tuple(own[wrong[0]].shape)}"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)


def _check_names(module: nn.Module, given: dict[str, Any]) -> None:
    own, seen = [], set()
    for name, entry in module.state_dict(keep_vars=True).items():
        if isinstance(entry, Tensor) and id(entry) not in seen:  # tied ones are saved once
            seen.add(id(entry))
            own.append(name)
    missing, unknown = sorted(set(own) - given.keys()), sorted(given.keys() - set(own))
    if missing or unknown:
        raise ValueError(
            f"the file lacks {', '.join(missing) or 'nothing'} of the module, and has "
            f"{', '.join(unknown) or 'nothing'} that the module has not"
        )


class PackedLayer(nn.Module):
    """A Linear, Conv2d or Embedding whose weight is codes and levels, decoded when it is used.

    Its outputs are those of the layer with the unpacked weight, bit for bit.
    """

    codes: Tensor  # [bytes], uint8
    levels: Tensor  # [r, k]

    def __init__(self, layer: nn.Module, packed: Packed) -> None:
        super().__init__()
        if not isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding):
            raise TypeError(
                f"PackedLayer: expected a Linear, Conv2d or Embedding, got {type(layer).__name__}"
            )
        self.register_buffer("codes", packed.codes)
        self.register_buffer("levels", packed.levels)
        self.shape = tuple(packed.shape)
        weight, layer.weight = layer.weight, None  # type: ignore[assignment] # codes stand for it
        if tuple(weight.shape) != self.shape:
            layer.weight = weight
            raise ValueError(
                f"PackedLayer: packed weight of shape {self.shape} for a layer of shape "
                f"{tuple(weight.shape)}"
            )
        self.layer = layer

    @property
    def weight(self) -> Tensor:
        """The decoded weight."""
        (r, k), count = self.levels.shape, torch.Size(self.shape).numel()
        codes = decode(self.codes, count, k).reshape(r, -1)
        return self.levels.gather(1, codes).reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, self.weight, layer.bias)
        if isinstance(layer, nn.Conv2d):
            out: Tensor = layer._conv_forward(x, self.weight, layer.bias)
            return out
        return F.embedding(
            x,
            self.weight,
            layer.padding_idx,
            layer.max_norm,
            layer.norm_type,
            layer.scale_grad_by_freq,
            layer.sparse,
        )

    def extra_repr(self) -> str:
        return f"{self.levels.shape[1]} levels, {len(self.levels)} rows"


def quantized(module: nn.Module, file: str | os.PathLike[str]) -> nn.Module:
    """The module with packed layers where the file has packed weights, the rest loaded into it.

    The module is changed in place and returned. Packed weights of other layers are unpacked into
    them. Raises ValueError, and changes nothing, as `load_into` does.
    """
    packed = load(file)
    _check_names(module, packed)
    layers = dict(module.named_modules())
    own = module.state_dict(keep_vars=True)
    tied = {id(entry) for name, entry in own.items() if name not in packed}
    wrong = [name for name, entry in packed.items() if own[name].shape != torch.Size(entry.shape)]
    if wrong:
        raise ValueError(f"shapes of {', '.join(wrong)} in the file differ from the module's")
    with torch.no_grad():
        for name, entry in packed.items():
            path, _, last = name.rpartition(".")
            layer = layers[path]
            fits = last == "weight" and isinstance(layer, nn.Linear | nn.Conv2d | nn.Embedding)
            if isinstance(entry, Packed) and fits and path and id(own[name]) not in tied:
                above, _, attribute = path.rpartition(".")
                setattr(layers[above], attribute, PackedLayer(layer, entry))
            else:
                own[name].copy_(entry.unpack() if isinstance(entry, Packed) else entry)
    return module
