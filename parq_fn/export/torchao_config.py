"""The config that transformers has for torchao's tensors, by which save_pretrained writes them and
from_pretrained reads them, in programs that know neither this library nor its formats."""

from __future__ import annotations

from typing import Any

from torch import nn
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    FqnToConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
)
from transformers import TorchAoConfig
from transformers.quantizers.quantizer_torchao import TorchAoHfQuantizer

from parq_fn.export.layers import names_of_tied


class SavesTiedOnce(TorchAoHfQuantizer):  # type: ignore[misc] # of no known type
    """torchao's quantizer of transformers, which would write tied weights twice and fail to compare
    them where they are read."""

    def get_state_dict_and_metadata(self, model: nn.Module) -> Any:
        state, tied = model.state_dict(), names_of_tied(model)
        return flatten_tensor_state_dict({name: state[name] for name in state if name in tied})


def attach(model: Any) -> None:
    """Gives a transformers model with torchao's integers its config, which says of each layer what
    its weight is."""
    found: dict[str, Any] = {}
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, IntxUnpackedToInt8Tensor):
            found[name] = _config_of(weight)
    if not found:
        return
    config = TorchAoConfig(FqnToConfig(found), include_input_output_embeddings=True)
    model.config.quantization_config = config
    model.hf_quantizer = SavesTiedOnce(config, pre_quantized=True)
    model.is_quantized, model.quantization_method = True, config.quant_method


def _config_of(weight: Any) -> Any:
    bits, (*_, last) = weight.target_dtype, weight.block_size
    cut: Any = PerAxis(0) if last == weight.shape[-1] or weight.dim() != 2 else PerGroup(last)
    if weight.activation_quantization is None:
        return IntxWeightOnlyConfig(weight_dtype=bits, granularity=cut)
    return Int8DynamicActivationIntxWeightConfig(weight_dtype=bits, weight_granularity=cut)
