"""Packed layers in transformers' models: save_pretrained writes them, from_pretrained reads them.

Importing this module registers the quantization method "parq_fn" with transformers.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

try:
    from transformers import PreTrainedModel
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError:
    raise ImportError(
        "parq_fn.export.hugging_face needs transformers: pip install transformers"
    ) from None

from parq_fn.export.codes import num_bytes
from parq_fn.export.cuts import cut_as_json, cut_from_json
from parq_fn.export.layers import PackedLayer, pack_layer, packs, quantized

METHOD = "parq_fn"


@register_quantization_config(METHOD)
class ParqFnConfig(QuantizationConfigMixin):  # type: ignore[misc] # of no known type
    """What config.json says of packed layers: {name: {"levels": [r, k], "shape": [...]}}, of
    layers that share codes, such as tied embeddings, under the first name; `tied` has the others.
    Where rows are not runs of a weight, {"levels": [r, k], "cut": {..., "shape": [...]}}, the cut
    as in packed files.

    layers: {name: what is said of it}, see above.
    tied: {name: first name of the layers that share its codes}.
    unused: other entries of config.json, which are left alone.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        tied: dict[str, str] | None = None,
        **unused: Any,
    ) -> None:
        del unused
        self.quant_method = METHOD
        self.layers, self.tied = layers or {}, tied or {}


@register_quantizer(METHOD)
class ParqFnQuantizer(HfQuantizer):  # type: ignore[misc] # of no known type
    """Makes packed layers of a model before its weights are loaded.

    quantization_config: a `ParqFnConfig`.
    """

    requires_calibration = False

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        del kwargs
        config: Any = self.quantization_config
        for name, about in config.layers.items():
            r, k = about["levels"]
            layer, own = _layer(model, name), dict(about.get("cut", about))
            shape = tuple(own.pop("shape"))
            cut = cut_from_json(own) if "cut" in about else None
            if not packs(layer):
                raise ValueError(f"{name} is a {type(layer).__name__}, which cannot be packed")
            empty = {"device": layer.weight.device, "dtype": torch.uint8}
            codes = torch.empty(num_bytes(torch.Size(shape).numel(), k), **empty)
            pack_layer(layer, codes, layer.weight.new_empty(r, k), shape, cut)
        for name, first in config.tied.items():
            _share(model.get_submodule(name), model.get_submodule(first))
        _untie(model)
        for layer in model.modules():
            if isinstance(layer, PackedLayer):  # has no weight to begin at random
                layer._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        for name, first in self.quantization_config.tied.items():
            _share(model.get_submodule(name), model.get_submodule(first))
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def quantize_pretrained(model: PreTrainedModel, file: str | os.PathLike[str]) -> PreTrainedModel:
    """The model with packed layers, as of `quantized`, which save_pretrained keeps packed and
    from_pretrained reads again, where this module was imported. Tied embeddings stay tied.

    Raises as `quantized` does.
    """
    quantized(model, file)
    layers: dict[str, dict[str, Any]] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLayer):
            owner = first.setdefault(id(layer.codes), name)
            if owner == name:
                shape, cut = {"shape": list(layer.packed_shape)}, layer.packed_cut
                own = shape if cut is None else {"cut": {**cut_as_json(cut), **shape}}
                layers[name] = {"levels": list(layer.levels.shape), **own}
            else:
                tied[name] = owner
                _share(layer, model.get_submodule(owner))
    config = ParqFnConfig(layers, tied)
    model.config.quantization_config = config
    model.hf_quantizer = ParqFnQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, METHOD
    _untie(model)
    return model


def _layer(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no layer {name}; a packed checkpoint loads into the class "
            "that it was saved from"
        ) from None


def _share(layer: nn.Module, owner: Any) -> None:
    """Packs a layer with the codes of another, which alone has them in the state dict."""
    if not isinstance(layer, PackedLayer):
        pack_layer(layer, owner.codes, owner.levels, owner.packed_shape, owner.packed_cut)
    for name in ("codes", "levels"):
        layer.register_buffer(name, getattr(owner, name), persistent=False)


def _untie(model: Any) -> None:
    """No weights are left that transformers could tie: layers share codes instead."""
    packed = {name for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}
    for module in model.modules():
        keys = getattr(module, "_tied_weights_keys", None)
        if isinstance(keys, dict):
            module._tied_weights_keys = {
                one: other for one, other in keys.items() if not _is_packed(one, packed)
            }
    model.all_tied_weights_keys = {
        one: other
        for one, other in getattr(model, "all_tied_weights_keys", {}).items()
        if not _is_packed(one, packed)
    }


def _is_packed(name: str, packed: set[str]) -> bool:
    above, _, last = name.rpartition(".")
    return last == "weight" and any(own == above or own.endswith(f".{above}") for own in packed)
