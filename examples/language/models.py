"""The language model that is trained, and its tokenizer: a trained one, one of a configuration with
random weights, or a small one of bytes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parq_fn.foundation.command import UserError

Made = Callable[[], Any]
#: What transformers raises of a model that it cannot make.
_REFUSALS = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError)


def transformers() -> Any:
    """The package, without its words, and those of what it imports."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        import transformers
    except ImportError:
        raise UserError(
            "examples.qat_causal_lm needs transformers: pip install -e '.[integrations]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def tokenizer_of(named: str | None) -> Any:
    """That of a model's name or folder; without one that of bytes."""
    if named is None:
        return transformers().ByT5Tokenizer(extra_ids=0)
    return _made(named, lambda: transformers().AutoTokenizer.from_pretrained(named))


def trained(named: str | Path) -> Any:
    """A model of that name or folder, in float32."""
    configuration_of(named)
    auto = transformers().AutoModelForCausalLM
    return _made(named, lambda: auto.from_pretrained(named, dtype=torch.float32))


def untrained(config: str, seed: int) -> Any:
    """A model of a configuration's file or folder, with random weights."""
    own, auto = configuration_of(config), transformers().AutoModelForCausalLM
    torch.manual_seed(seed)
    return _made(config, lambda: auto.from_config(own, dtype=torch.float32))


def configuration_of(named: str | Path) -> Any:
    """That of a name, a folder or a file. Raises UserError for one of no model that writes text
    from left to right, and of one that is quantized."""
    config = _made(named, lambda: transformers().AutoConfig.from_pretrained(named))
    if config.is_encoder_decoder:
        raise UserError(
            f"{named} has an encoder and a decoder ({type(config).__name__}); the recipe trains "
            "models that predict the next token"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{named} is quantized already; give the model that it was made of")
    return config


def of_bytes(width: int, layers: int, context: int, tokenizer: Any, seed: int) -> Any:
    """A Llama whose tokens are bytes, with random weights; heads have 32 features."""
    own = transformers().LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=max(1024, 2 * context),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    return transformers().LlamaForCausalLM(own)


def blocks_of(model: nn.Module) -> tuple[type, ...]:
    """The classes of modules that FSDP2 shards together."""
    named = set(getattr(model, "_no_split_modules", None) or ())
    return tuple({type(m) for m in model.modules() if type(m).__name__ in named})


def _made(named: object, make: Made) -> Any:
    try:
        return make()
    except _REFUSALS as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(f"{named}: {type(error).__name__}: {line}") from None
