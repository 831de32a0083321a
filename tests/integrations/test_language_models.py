"""Which weights of transformers' models are quantized, by the models' own layouts."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'parq_fn[integrations]'"
)

import torch
import transformers

import parq_fn as pf
from parq_fn.export import PackedLayer, dequantized, pack
from parq_fn.export.hugging_face import quantize_pretrained
from parq_fn.optim import QuantOptimizer, param_groups, share_on_levels
from tests.helpers import sampled
from tests.integrations.llama import SMALL, llama, trained

HEADS = {"head_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
PLAIN = {
    "d_model": 64, "vocab_size": 1000, "encoder_layers": 1, "decoder_layers": 1,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
GPT2 = {"vocab_size": 1000, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1}

#: {name: (model, config, arguments, names that are left in full precision, axes but the first)}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], set[str], dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", SMALL, set(), {}),
    "Qwen3, tied": (
        "Qwen3ForCausalLM", "Qwen3Config", SMALL | HEADS | {"tie_word_embeddings": True}, set(), {},
    ),
    "Gemma, tied": ("GemmaForCausalLM", "GemmaConfig", SMALL | HEADS, set(), {}),
    "Mixtral": (
        "MixtralForCausalLM", "MixtralConfig", SMALL | {"num_local_experts": 4},
        {"model.layers.*.mlp.gate.weight"},
        {"gate_up_proj": (0, 1), "down_proj": (0, 1)},
    ),
    "Qwen3 MoE": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", SMALL | HEADS | EXPERTS,
        {"model.layers.*.mlp.gate.weight"},
        {"gate_up_proj": (0, 1), "down_proj": (0, 1)},
    ),
    "GPT-OSS": (
        "GptOssForCausalLM", "GptOssConfig", SMALL | HEADS | {"num_local_experts": 4},
        {"model.layers.*.mlp.router.weight", *(
            f"model.layers.*.mlp.experts.{one}_proj_bias" for one in ("gate_up", "down")
        )},
        {"gate_up_proj": (0, 2), "down_proj": (0, 2)},
    ),
    "Llama 4": (
        "Llama4ForCausalLM", "Llama4TextConfig",
        SMALL | HEADS | {"num_local_experts": 4, "intermediate_size_mlp": 96},
        {"model.layers.*.feed_forward.router.weight"},
        {"gate_up_proj": (0, 2), "down_proj": (0, 2)},
    ),
    "GPT-2": (
        "GPT2LMHeadModel", "GPT2Config", GPT2 | {"eos_token_id": 2}, {"transformer.wpe.weight"},
        {"c_attn.weight": 1, "c_proj.weight": 1, "c_fc.weight": 1},
    ),
    "ViT": (
        "ViTForImageClassification", "ViTConfig",
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 128},
        {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}, {},
    ),
    "Whisper": (
        "WhisperForConditionalGeneration", "WhisperConfig", PLAIN,
        {f"model.{part}.embed_positions.weight" for part in ("encoder", "decoder")}, {},
    ),
}  # fmt: skip


def of_family(name: str, device: str = "meta") -> Any:
    model, config, arguments, *_ = FAMILIES[name]
    with torch.device(device):
        return getattr(transformers, model)(getattr(transformers, config)(**arguments))


def folded(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_matrices_but_routers_and_tables_are_quantized(family: str) -> None:
    *_, left, axes = FAMILIES[family]
    model = of_family(family)
    groups = param_groups(model)
    names = {
        folded(name): group.get("quant_axis")
        for group in groups
        for name, p in group["params"]
        if "quant_bits" in group
    }
    matrices = {folded(name) for name, p in model.named_parameters() if p.dim() > 1}
    assert matrices - names.keys() == left
    found = {name: axis for name, axis in names.items() if axis is not None}
    assert {name for name in names if name.endswith(tuple(axes))} == found.keys() or not axes
    assert all(axes[next(end for end in axes if n.endswith(end))] == a for n, a in found.items())
    table = pf.coverage(model, groups)
    assert table.total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "rules"])
def test_of_a_mixture_all_but_the_routers_is_quantized(mask: bool) -> None:
    arguments = {**SMALL, "hidden_size": 256, "intermediate_size": 512, "num_local_experts": 8}
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**arguments))
    by: Any = pf.weight_mask(model) if mask else param_groups(model)
    rows = pf.coverage(model, by).rows
    body = [row for row in rows if "embed" not in row.name]
    assert sum(r.numel for r in body if r.quantized) >= 0.95 * sum(r.numel for r in body)
    assert not any(row.quantized for row in rows if "mlp.gate." in row.name)


def conv1d() -> tuple[Any, str, int]:
    """GPT-2, the name of a weight [input, output], and its number of rows."""
    config = transformers.GPT2Config(**GPT2, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config), "transformer.h.0.attn.c_attn.weight", 192


def experts() -> tuple[Any, str, int]:
    config = transformers.GptOssConfig(**SMALL, **HEADS, num_local_experts=4)
    return transformers.GptOssForCausalLM(config), "model.layers.0.mlp.experts.down_proj", 4 * 64


@pytest.mark.slow
@pytest.mark.parametrize("build", [conv1d, experts], ids=["Conv1D", "experts"])
def test_turned_layers_have_levels_by_output(build: Callable[[], tuple[Any, str, int]]) -> None:
    torch.manual_seed(0)
    model, name, rows = build()
    link = pf.hard_prox(pf.lsbq(2), granularity=pf.per_channel(), period=1)
    optimizer = QuantOptimizer(torch.optim.SGD(param_groups(model), lr=0.01), link)
    tokens = torch.randint(0, 1000, (2, 8))
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    weight = model.get_parameter(name).detach()
    levels = optimizer.levels(model.get_parameter(name))
    assert levels.shape[:-1].numel() == rows
    by_output = weight.transpose(-1, -2).reshape(rows, -1)
    assert max(row.unique().numel() for row in by_output) <= 4
    assert torch.equal(pf.export.unpack(pf.export.pack(model, optimizer))[name], weight)


@pytest.mark.filterwarnings("ignore")  # of transformers, about its cache
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_that_computes_anew_or_is_compiled_trains_to_the_same_bits(compiled: bool) -> None:
    plain, optimizer = trained(llama())
    assert share_on_levels(optimizer) == 1.0
    model = llama().train()
    model.gradient_checkpointing_enable()
    other, _ = trained(model, torch.compile(model, backend="eager") if compiled else None)
    assert all(map(torch.equal, plain.parameters(), other.parameters()))


WHOLE = ("Gemma, tied", "Mixtral", "Qwen3 MoE", "GPT-OSS", "GPT-2")


@pytest.mark.slow
@pytest.mark.rare
@pytest.mark.parametrize("family", sampled(WHOLE, 2))
def test_packed_models_are_whole_and_write_what_the_dense_ones_write(
    family: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Conv1D, experts, scaled embeddings: all that is quantized is packed, saved and loaded."""
    torch.manual_seed(0)
    dense, tokens = of_family(family, "cpu").eval(), torch.arange(3, 12).view(1, 9)
    prox = pf.hard_prox(pf.uniform(2), period=1, granularity=pf.per_channel())
    optimizer = QuantOptimizer(torch.optim.SGD(param_groups(dense), lr=0.01), prox)
    for _ in range(2):
        dense(tokens, labels=tokens).loss.backward()
        optimizer.step()
    quantized = {n for n, p in dense.named_parameters() if "qparams" in optimizer.state[p]}
    model = quantize_pretrained(copy.deepcopy(dense), pack(dense, optimizer), exact=True)
    parts = [(n, m) for n, m in model.named_modules() if isinstance(m, PackedLayer)]
    packed = {f"{name}.{key}" for name, part in parts for key in part.kept}
    assert quantized <= packed
    assert not quantized & {name for name, _ in model.named_parameters()}
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    more: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    mask = torch.ones_like(tokens)
    wanted = dense.generate(tokens, attention_mask=mask, **more)
    with torch.no_grad():
        for made in (model, again.eval()):
            assert torch.equal(made(tokens).logits, dense(tokens).logits)
            assert torch.equal(made.generate(tokens, attention_mask=mask, **more), wanted)
            with pytest.raises(ValueError, match="resize_token_embeddings: the embeddings are"):
                made.resize_token_embeddings(1008)
    other = copy.deepcopy(again)
    assert dequantized(other).resize_token_embeddings(1008).weight.shape[0] == 1008
    assert again.get_input_embeddings().num_embeddings == 1000
    assert not [w for w in recwarn if "unpacked" in str(w.message)]
