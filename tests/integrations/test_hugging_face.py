"""transformers: packed layers go through save_pretrained and from_pretrained, tied ones tied."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'parq_fn[integrations]'"
)

import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import parq_fn as pf
from parq_fn.export import PackedLayer, pack, save
from parq_fn.export.hugging_face import quantize_pretrained
from parq_fn.optim import QuantOptimizer
from tests.helpers import python_blocks, run_blocks

README = Path(__file__).parents[2] / "README.md"

TOKENS = torch.arange(14).reshape(2, 7)


def trained(tie: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A small language model after annealing, and what pack makes of it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tie,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    weights = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": weights, "quant_bits": 2}, {"params": others}]
    prox = pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=4, granularity=pf.per_channel())
    optimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=1e-3), prox)
    for _ in range(5):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return model.eval(), pack(model, optimizer)


@pytest.mark.parametrize("tie", [True, False])
def test_saved_and_reloaded(tie: bool, tmp_path: Path) -> None:
    model, packed = trained(tie)
    save(packed, tmp_path / "packed")
    with torch.no_grad():
        expected = model(TOKENS).logits
    quantize_pretrained(model, tmp_path / "packed")
    for k in range(2):  # what was reloaded saves as well
        with torch.no_grad():
            assert torch.equal(model(TOKENS).logits, expected)
        assert isinstance(model.lm_head, PackedLayer)
        assert (model.lm_head.codes is model.model.embed_tokens.codes) == tie
        assert model.generate(TOKENS[:1], max_new_tokens=2).shape == (1, 9)
        model.save_pretrained(tmp_path / str(k))
        names = load_file(tmp_path / str(k) / "model.safetensors")
        assert "model.layers.0.mlp.up_proj.codes" in names
        assert "model.layers.0.mlp.up_proj.weight" not in names
        assert ("lm_head.codes" in names) == (not tie)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(k)).eval()


def test_the_way_of_a_language_model_is_twelve_lines_of_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the packed model writes what the rounded one writes."""
    monkeypatch.chdir(tmp_path)
    (code,) = [b for b in python_blocks(README.read_text()) if "transformers" in b]
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 12
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained("trained")
    *training, end = code.replace("=800", "=104").splitlines(keepends=True)
    names = run_blocks(["".join(training)], {"batches": [TOKENS] * 110})
    dense = copy.deepcopy(names["model"])
    run_blocks([end], names)
    more: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    packed = AutoModelForCausalLM.from_pretrained("packed")
    found, wanted = (model.eval().generate(TOKENS[:1], **more) for model in (packed, dense))
    assert torch.equal(found, wanted)


def test_loading_into_another_class_raises(tmp_path: Path) -> None:
    model, packed = trained(tie=True)
    save(packed, tmp_path / "packed")
    quantize_pretrained(model, tmp_path / "packed").save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"LlamaModel has no layer .* loads into the class"):
        AutoModel.from_pretrained(tmp_path / "saved")
