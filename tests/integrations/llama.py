"""A small Llama, trained with links by rules."""

from __future__ import annotations

from typing import Any

import torch

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, param_groups

SMALL: dict[str, Any] = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SPAN: dict[str, Any] = {"anneal_start": 0.1, "anneal_end": 0.8, "total_steps": 6, "period": 2}
BODY = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=pf.per_block(16))
LOOKUP = pf.parq_prox(pf.integer(4), **SPAN, granularity=pf.per_channel())
RULES = {"model.embed_tokens": LOOKUP, "lm_head": None, "*": 2}
TOKENS = torch.arange(16).reshape(2, 8) % 13


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM  # this module is read without it

    torch.manual_seed(0)
    small = {**SMALL, "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(**small))


def trained(model: Any, call: Any = None) -> tuple[Any, QuantOptimizer]:
    base = torch.optim.AdamW(param_groups(model, RULES), lr=0.01)
    optimizer = QuantOptimizer(base, BODY)
    call = model if call is None else call
    for _ in range(6):
        optimizer.zero_grad()
        call(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return model, optimizer
