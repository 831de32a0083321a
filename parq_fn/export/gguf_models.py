"""What GGUF says of a language model of transformers: names, hyperparameters, orders of rows."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's program of a model expects."""

    name: str  # in the file
    turned: bool = False  # rows of queries and keys in pairs, where transformers has halves
    plus_one: bool = False  # norms keep 1 more than transformers' weight
    biases: tuple[str, ...] = ()  # tensors that may have one
    scales: bool = True  # NVFP4's scale of a tensor is applied


_QKV = ("attn_q", "attn_k", "attn_v")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")
_GEMMA: dict[str, Any] = {"plus_one": True, "scales": False}
#: By transformers' `model_type`.
ARCHITECTURES = {
    "llama": Architecture("llama", turned=True, biases=(*_QKV, "attn_output", *_MLP)),
    "qwen2": Architecture("qwen2", biases=_QKV),
    "qwen3": Architecture("qwen3", biases=_QKV),
    "gemma": Architecture("gemma", **_GEMMA),
    "gemma2": Architecture("gemma2", **_GEMMA),
    "gemma3_text": Architecture("gemma3", **_GEMMA),
}
#: Layers of a sliding window: all of a period but the last.
_PERIODS = {"gemma2": 2, "gemma3_text": 6}


def config_of(given: Any) -> Any:
    """A configuration of transformers, from one, its dict, or a folder or file that has it.

    Raises TypeError for anything else, ValueError for what describes none, and ImportError without
    transformers where it is to be read.
    """
    if hasattr(given, "model_type") and hasattr(given, "to_dict"):
        return given
    if not isinstance(given, Mapping | str | os.PathLike):
        raise TypeError(
            "to_gguf: config must be a configuration of transformers such as model.config, its "
            f"dict, or a folder or file that has it, got {type(given).__name__}"
        )
    try:
        from transformers import AutoConfig
    except ImportError:
        raise ImportError(
            "to_gguf reads a config by transformers: pip install transformers"
        ) from None
    try:
        if isinstance(given, Mapping):
            return AutoConfig.for_model(**given)
        return AutoConfig.from_pretrained(given)
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise ValueError(f"to_gguf: config {given!r} is none of transformers: {why}") from error


class Model:
    """A model's names, hyperparameters and shapes in GGUF, from its configuration."""

    def __init__(self, config: Any, gguf: Any) -> None:
        kind = config.model_type
        if kind not in ARCHITECTURES:
            raise ValueError(
                f"to_gguf: config is of a {kind!r}, and it knows {', '.join(ARCHITECTURES)}; "
                "without config it writes a file for other readers than llama.cpp"
            )
        self.config, self.kind, self.own = config, kind, ARCHITECTURES[kind]
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        arch = {name: at for at, name in gguf.MODEL_ARCH_NAMES.items()}[self.own.name]
        self._names = gguf.get_tensor_name_map(arch, self.layers)
        self._rope = self._checked()

    def name(self, name: str) -> str:
        """A parameter's name in GGUF. Raises ValueError for one that the model has not."""
        found: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        stem, _, suffix = (found or "").rpartition(".")
        part = stem.rpartition(".")[2]
        if found is None or (suffix == "bias" and part not in self.own.biases):
            whole = "pack the whole causal language model that config describes, a "
            help = whole + type(self.config).__name__.removesuffix("Config")
            help = "tie it to the embedding" if name == "lm_head.weight" else help
            raise ValueError(
                f"parameter {name!r}: llama.cpp's {self.own.name} has none such; {help}"
            )
        return found

    def is_norm(self, name: str) -> bool:
        """Whether a parameter, by its name in GGUF, is a norm that keeps 1 more."""
        return self.own.plus_one and name.endswith("norm.weight")

    def rows(self, name: str) -> Tensor | None:
        """The order of a tensor's rows, by its name in GGUF, where it is another one."""
        part = name.split(".")[-2]
        if not self.own.turned or part not in ("attn_q", "attn_k"):
            return None
        heads = self.heads if part == "attn_q" else self.kv_heads
        order = torch.arange(heads * self.head).reshape(heads, 2, self.head // 2)
        return order.transpose(1, 2).flatten()

    def applies_scale(self, name: str) -> bool:
        """Whether llama.cpp multiplies with the scale that NVFP4 keeps beside a tensor."""
        biased = getattr(self.config, "mlp_bias", False) and ".ffn_" in name  # it stops at those
        return self.own.scales and name.startswith("blk.") and not biased

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ValueError for tensors, by their names in GGUF, that are missing or of other
        shapes than the configuration's."""
        own, wide = self.config, self.config.hidden_size
        q, kv, inner = self.heads * self.head, self.kv_heads * self.head, own.intermediate_size
        block = {
            "attn_norm": (wide,), "attn_q": (q, wide), "attn_k": (kv, wide), "attn_v": (kv, wide),
            "attn_output": (wide, q), "ffn_norm": (wide,), "ffn_gate": (inner, wide),
            "ffn_up": (inner, wide), "ffn_down": (wide, inner),
        }  # fmt: skip
        expected = {"token_embd.weight": (own.vocab_size, wide), "output_norm.weight": (wide,)}
        for i in range(self.layers):
            expected |= {f"blk.{i}.{part}.weight": shape for part, shape in block.items()}
        if not own.tie_word_embeddings or "output.weight" in shapes:
            expected["output.weight"] = (own.vocab_size, wide)
        for name, shape in expected.items():
            if shapes.get(name) != shape:
                got = f"of shape {shapes[name]}" if name in shapes else "missing"
                raise ValueError(
                    f"to_gguf: {name!r} is {got}, and by config ({self.kind}, {self.layers} "
                    f"layers) it has the shape {shape}; give the config of the model that was "
                    "packed"
                )

    def tensors(self) -> dict[str, Tensor]:
        """What the file has beside the parameters: the factors of frequencies, of Llama 3."""
        rope = self._rope
        if rope["rope_type"] != "llama3":
            return {}
        exponents = torch.arange(0, self.head, 2, dtype=torch.float64) / self.head
        waves = 2 * math.pi * rope["rope_theta"] ** exponents
        old, factor = rope["original_max_position_embeddings"], rope["factor"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = ((old / waves - low) / (high - low)).clamp(0, 1)
        return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).float()}

    def write(self, writer: Any, gguf: Any) -> None:
        """The hyperparameters."""
        own = self.config
        writer.add_context_length(own.max_position_embeddings)
        writer.add_embedding_length(own.hidden_size)
        writer.add_block_count(self.layers)
        writer.add_feed_forward_length(own.intermediate_size)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(self.head)
        writer.add_value_length(self.head)
        writer.add_layer_norm_rms_eps(own.rms_norm_eps)
        writer.add_vocab_size(own.vocab_size)
        writer.add_rope_dimension_count(self.head)
        writer.add_rope_freq_base(self._rope["rope_theta"])
        if self._rope["rope_type"] == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(self._rope["factor"])
        if self.kind in _PERIODS:
            writer.add_sliding_window(own.sliding_window)
        if self.kind == "gemma2":
            writer.add_attn_logit_softcapping(own.attn_logit_softcapping)
            writer.add_final_logit_softcapping(own.final_logit_softcapping)

    def _checked(self) -> dict[str, Any]:
        """The rotary embedding's parameters. Raises ValueError for what llama.cpp computes
        otherwise."""
        own, kind = self.config, self.kind
        rope: dict[str, Any] = dict(own.rope_parameters)
        if kind == "gemma3_text":
            local = rope["sliding_attention"]
            self._need("sliding layers' rope_theta", local["rope_theta"], 10000)
            self._need("sliding layers' rope_type", local.get("rope_type", "default"), "default")
            rope = rope["full_attention"]
        rope = {"rope_type": "default", **rope}
        scaled = ("linear", "llama3") if kind == "llama" else ("linear",)
        self._need("rope_type", rope["rope_type"], "default", *scaled)
        self._need("partial_rotary_factor", rope.get("partial_rotary_factor") or 1.0, 1.0)
        activation = getattr(own, "hidden_activation", None) or own.hidden_act
        self._need("activation", activation, "gelu_pytorch_tanh" if self.own.plus_one else "silu")
        if kind in _PERIODS:
            period = _PERIODS[kind]
            types = ["sliding_attention"] * (period - 1) + ["full_attention"]
            self._need(
                "layer_types", own.layer_types, [types[i % period] for i in range(self.layers)]
            )
            largest = {"gemma2": 46, "gemma3_text": 62}[kind]  # which has a rule of its own
            dim = own.hidden_size // self.heads if self.layers == largest else self.head
            self._need("query_pre_attn_scalar", own.query_pre_attn_scalar, dim)
        elif "sliding_attention" in (getattr(own, "layer_types", None) or ()):
            self._need("layer_types", own.layer_types, ["full_attention"] * self.layers)
        caps = ("attn_logit_softcapping", "final_logit_softcapping")
        for cap in caps:
            given = getattr(own, cap, None)
            if kind == "gemma2" and not given:
                raise ValueError(f"to_gguf: config has the {cap} {given!r}, which gemma2 needs")
            if kind != "gemma2":
                self._need(cap, given, None)
        if getattr(own, "use_bidirectional_attention", False):
            self._need("use_bidirectional_attention", True, False)
        return rope

    def _need(self, what: str, got: Any, *expected: Any) -> None:
        if got not in expected:
            known = " or ".join(map(repr, expected))
            raise ValueError(
                f"to_gguf: config has the {what} {got!r}; what llama.cpp computes for {self.kind} "
                f"has {known}"
            )
