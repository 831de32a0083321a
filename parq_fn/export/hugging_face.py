"""Packed layers in transformers' models: save_pretrained writes them, from_pretrained reads them.

Importing this module registers the quantization method "parq_fn" with transformers.
"""

from __future__ import annotations

import os
import re
from types import MethodType
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
from parq_fn.export.layers import quantized
from parq_fn.export.packed_layer import (
    WEIGHT,
    Kept,
    PackedLayer,
    keys_of,
    pack_layer,
    packs,
    set_exact,
)

METHOD = "parq_fn"


@register_quantization_config(METHOD)
class ParqFnConfig(QuantizationConfigMixin):  # type: ignore[misc] # of no known type
    """What config.json says of packed layers: {name: {"levels": [r, k], "shape": [...]}}, of
    layers that share codes, such as tied embeddings, under the first name; `tied` has the others.
    Where rows are not runs of a weight, {"levels": [r, k], "cut": {..., "shape": [...]}}, the cut
    as in packed files. Of a parameter that is not called weight there stands "parameter": its name.

    layers: what is said of them, see above, by the name of the layer, or of such a parameter.
    tied: {name: first name of those that share its codes}.
    exact: as of `quantized`; True of what was saved without it.
    unused: other entries of config.json, which are left alone.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        tied: dict[str, str] | None = None,
        exact: bool = True,
        **unused: Any,
    ) -> None:
        del unused
        self.exact = exact
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
            local = about.get("parameter", WEIGHT)
            r, k = about["levels"]
            layer, own = _layer(model, _above(name, local)), dict(about.get("cut", about))
            shape = tuple(own.pop("shape"))
            cut = cut_from_json(own) if "cut" in about else None
            if not packs(layer, local):
                raise ValueError(f"{name}: its {type(layer).__name__} cannot be packed")
            before = getattr(layer, local)
            codes = torch.empty(
                num_bytes(torch.Size(shape).numel(), k), device=before.device, dtype=torch.uint8
            )
            pack_layer(layer, codes, before.new_empty(r, k), Kept(shape, cut), local)
            set_exact(layer, config.exact)
        self._share(model)
        _untie(model)
        _refuse_resizing(model)
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        empty = [f"^{re.escape(name)}$" for name in _empty_of(config.layers)]
        model._keys_to_ignore_on_load_unexpected = {*ignored, *empty}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del kwargs
        self._share(model)
        return model

    def _share(self, model: Any) -> None:
        config: Any = self.quantization_config
        for name, first in config.tied.items():
            local = config.layers[first].get("parameter", WEIGHT)
            _share(_layer(model, _above(name, local)), _layer(model, _above(first, local)), local)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """The state, and under the name of one packed parameter nothing, a shape at which
        from_pretrained raises where this module was not imported, and draws no weights."""
        config: Any = self.quantization_config
        empty = {name: torch.empty(0) for name in _empty_of(config.layers)}
        return {**model.state_dict(), **empty}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def quantize_pretrained(
    model: PreTrainedModel, file: str | os.PathLike[str], *, exact: bool = False
) -> PreTrainedModel:
    """The model with packed layers, as of `quantized`, which save_pretrained keeps packed and
    from_pretrained reads again, where this module was imported. Where it was not, that raises: what
    it would draw at random has another shape in the files. Tied embeddings stay tied.

    model: of transformers; it is changed in place.
    file: of a packed model, or the packed model itself.
    exact: as of `quantized`; it is saved.

    Raises as `quantized` does.
    """
    quantized(model, file, exact=exact)
    layers: dict[str, dict[str, Any]] = {}
    tied: dict[str, str] = {}
    first: dict[int, tuple[str, Any]] = {}
    for name, layer in model.named_modules():
        for local, kept in layer.kept.items() if isinstance(layer, PackedLayer) else ():
            codes, levels = (getattr(layer, key) for key in keys_of(local))
            own = name if local == WEIGHT else f"{name}.{local}"
            owner, by = first.setdefault(id(codes), (own, layer))
            if owner != own:
                tied[own] = owner
                _share(layer, by, local)
                continue
            shape = {"shape": list(kept.shape)}
            said = shape if kept.cut is None else {"cut": {**cut_as_json(kept.cut), **shape}}
            more = {} if local == WEIGHT else {"parameter": local}
            layers[own] = {"levels": list(levels.shape), **said, **more}
    config = ParqFnConfig(layers, tied, exact)
    model.config.quantization_config = config
    model.hf_quantizer = ParqFnQuantizer(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, METHOD
    _untie(model)
    _refuse_resizing(model)
    return model


def _above(name: str, local: str) -> str:
    """The name of the layer that has what is said to have that name."""
    return name if local == WEIGHT else name.removesuffix(f".{local}")


def _empty_of(layers: dict[str, dict[str, Any]]) -> list[str]:
    """The parameter that files hold without elements: the first of the packed ones."""
    return [n if "parameter" in layers[n] else f"{n}.{WEIGHT}" for n in list(layers)[:1]]


def _layer(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(model).__name__} has no layer {name}; a packed checkpoint loads into the class "
            "that it was saved from"
        ) from None


def _share(layer: nn.Module, owner: Any, local: str) -> None:
    """Packs a layer with the codes of another, which alone has them in the state dict."""
    keys = keys_of(local)
    if not (isinstance(layer, PackedLayer) and local in layer.kept):
        codes, levels = (getattr(owner, key) for key in keys)
        pack_layer(layer, codes, levels, owner.kept[local], local)
        set_exact(layer, getattr(owner, "exact", True))
    for key in keys:
        layer.register_buffer(key, getattr(owner, key), persistent=False)


def _refuse_resizing(model: Any) -> None:
    """Embeddings get no other number of rows while they are packed: their codes have theirs."""
    model.resize_token_embeddings = MethodType(_resize_token_embeddings, model)


def _resize_token_embeddings(model: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(model.get_input_embeddings(), PackedLayer):
        raise ValueError(
            "resize_token_embeddings: the embeddings are packed; resize them before "
            "quantize_pretrained, or take parq_fn.export.dequantized(model)"
        )
    return type(model).resize_token_embeddings(model, *args, **kwargs)


_resize_token_embeddings.__name__ = "resize_token_embeddings"  # as pickles look it up


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
