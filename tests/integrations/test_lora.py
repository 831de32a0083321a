"""Adapters of peft on packed layers: trained beside codes, merged into plain weights, and on."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs peft: pip install 'parq_fn[integrations]'")

import torch
from peft import LoraConfig, get_peft_model

from parq_fn import export
from parq_fn.optim import QuantOptimizer, param_groups, share_on_levels
from tests.integrations.llama import BODY, RULES, TOKENS, llama, trained

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def adapted_by_training(model: Any) -> Any:
    """The model with adapters, trained for some steps."""
    torch.manual_seed(1)
    chosen = LoraConfig(r=2, target_modules=["q_proj", "up_proj", "embed_tokens"])
    adapted: Any = get_peft_model(model, chosen)
    mine = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in mine)
    adam = torch.optim.AdamW(mine.values(), lr=0.01)
    for _ in range(4):
        adam.zero_grad()
        adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
        adam.step()
    return adapted


def test_adapters_train_on_codes_are_merged_and_training_goes_on() -> None:
    model, optimizer = trained(llama())
    packed = copy.deepcopy(model)
    export.quantized(packed, export.pack(model, optimizer))
    codes = {name: got.clone() for name, got in packed.named_buffers()}
    adapted = adapted_by_training(packed)
    logits = adapted(TOKENS).logits
    assert not torch.equal(logits, model(TOKENS).logits)
    assert torch.equal(logits, adapted_by_training(copy.deepcopy(model))(TOKENS).logits)
    up = "model.layers.0.mlp.up_proj"
    now = adapted.get_buffer(f"base_model.model.{up}.base_layer.codes")
    assert torch.equal(now, codes[f"{up}.codes"])

    with pytest.raises(RuntimeError, match=r"would be lost; parq_fn.export.dequantized\(module\)"):
        adapted.merge_adapter()
    export.dequantized(adapted)
    assert torch.equal(adapted(TOKENS).logits, logits)
    merged = adapted.merge_and_unload().requires_grad_(True)
    torch.testing.assert_close(merged(TOKENS).logits, logits)  # sums in another order

    again, optimizer = trained(merged)
    assert share_on_levels(optimizer) == 1.0
    file = export.pack(again, optimizer)
    assert torch.equal(
        export.quantized(copy.deepcopy(again), file)(TOKENS).logits, again(TOKENS).logits
    )


def test_groups_of_an_adapted_model_leave_adapters_alone() -> None:
    """Quantized training of the base layers beside trained adapters."""
    adapted: Any = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.requires_grad_(True)
    rules = {f"*{pattern}": how for pattern, how in RULES.items()}
    optimizer = QuantOptimizer(torch.optim.AdamW(param_groups(adapted, rules), lr=0.01), BODY)
    named = dict(adapted.named_parameters())
    quantized = {name for name, p in named.items() if optimizer.prox_of(p) is not None}
    assert not any("lora_" in name for name in quantized)
    assert any("q_proj.base_layer" in name for name in quantized)
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
