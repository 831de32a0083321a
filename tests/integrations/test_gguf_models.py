"""Language models in GGUF files: what the gguf package reads of them, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="needs gguf: pip install 'parq_fn[integrations]'")
pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'parq_fn[integrations]'"
)

import gguf
import torch
import transformers

import parq_fn as pf
from parq_fn import export
from parq_fn.export.gguf import to_gguf
from parq_fn.optim import QuantOptimizer, param_groups

SMALL: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
BYTES = transformers.ByT5Tokenizer(extra_ids=0)
HALF = torch.float16
#: Mixed bits: of embeddings, of one projection, of the rest.
RULES = {
    "*embed*": pf.hard_prox(pf.stored(pf.integer(8), HALF), granularity=pf.per_block(32)),
    "*down_proj*": pf.hard_prox(pf.stored(pf.lsbq(0), HALF), granularity=pf.per_channel()),
    "*": pf.hard_prox(pf.stored(pf.uniform(2), HALF), granularity=pf.per_block(32)),
}


def config_of(**more: Any) -> Any:
    return transformers.LlamaConfig(**{**SMALL, **more})


def plain(config: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return {name: p.detach() for name, p in model.named_parameters()}


def read(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the metadata; tensors by name)"""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: tensor for tensor in reader.tensors}


def unpacked(tensor: Any) -> torch.Tensor:
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.tensor(values).reshape(*reversed([int(n) for n in tensor.shape]))


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows in pairs (0, 1), (2, 3), ... as transformers has them: those of even numbers first."""
    rows = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return rows.transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_model_of_mixed_bits_is_read_as_it_was(dtype: Any, tmp_path: Path) -> None:
    """Its embeddings tied. Levels of fewer digits than float32's are rounded, to a last place."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config_of()).to(dtype)
    optimizer = QuantOptimizer(torch.optim.SGD(param_groups(model, RULES), lr=0.1), RULES["*"])
    tokens = torch.arange(12)[None]
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    packed = export.pack(model, optimizer)
    file, rounded = tmp_path / "x.gguf", False if dtype == torch.float32 else "scale"
    with warnings.catch_warnings():
        warnings.simplefilter("error" if dtype == torch.float32 else "ignore")
        kinds = to_gguf(packed, file, config=model.config, tokenizer=BYTES, rounded=rounded)
    assert {name.split(".")[-2]: kind for name, kind in kinds.items()} == {
        "embed_tokens": "Q8_0", "down_proj": "Q4_0",  # in rows of 96
        **{f"{part}_proj": "Q4_0" for part in ("q", "k", "v", "o", "gate", "up")},
    }  # fmt: skip
    fields, tensors = read(file)
    assert {
        name.removeprefix("llama."): fields[name] for name in fields if name.startswith("llama.")
    } == {
        "context_length": 128, "embedding_length": 64, "block_count": 2, "vocab_size": 264,
        "feed_forward_length": 96, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": 16, "attention.value_length": 16, "rope.freq_base": 10000.0,
        "rope.dimension_count": 16,
        "attention.layer_norm_rms_epsilon": pytest.approx(model.config.rms_norm_eps),
    }  # fmt: skip
    assert fields["general.architecture"] == "llama"
    assert fields["tokenizer.ggml.tokens"][3 + 97] == "a"
    assert len(fields["tokenizer.ggml.tokens"]) == 264
    assert fields["tokenizer.ggml.eos_token_id"] == BYTES.eos_token_id
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert len(tensors) == len(packed)
    for name, p in model.named_parameters():
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        found = unpacked(tensor)
        for part, heads in (("q_proj", 4), ("k_proj", 2)):
            found = halves(found, heads) if part in name else found
        off = (found - p.detach().float()).abs().max()
        assert off <= (dtype != torch.float32) * 4 * torch.finfo(dtype).eps * p.abs().max()
        if p.dim() < 2:
            assert tensor.tensor_type.name == "F32"


def test_what_is_not_packed_keeps_its_dtype_but_vectors(tmp_path: Path) -> None:
    """llama.cpp reads bfloat16, and norms in float32; Gemma's have 1 more there."""
    config = transformers.Gemma2Config(**{**SMALL, "query_pre_attn_scalar": 16})
    for dtype, kind in ((torch.bfloat16, "BF16"), (torch.float16, "F16"), (torch.float64, "F32")):
        params = plain(config)
        params = {name: p.to(dtype) for name, p in params.items()}
        to_gguf(params, tmp_path / "x.gguf", config=config)
        fields, tensors = read(tmp_path / "x.gguf")
        assert fields["tokenizer.ggml.model"] == "none"
        embedding, norm = tensors["token_embd.weight"], tensors["blk.1.attn_norm.weight"]
        assert (embedding.tensor_type.name, norm.tensor_type.name) == (kind, "F32")
        assert torch.equal(unpacked(embedding), params["model.embed_tokens.weight"].float())
        assert torch.equal(unpacked(norm), torch.ones(64))
    params["model.embed_tokens.weight"] += 2.0**-40
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight': torch.float64 numbers"):
        to_gguf(params, tmp_path / "x.gguf", config=config)


def test_a_configuration_may_be_a_dict_or_a_folder(tmp_path: Path) -> None:
    config = config_of()
    config.save_pretrained(tmp_path)
    params, made = plain(config), []
    for given in (config, config.to_dict(), tmp_path, str(tmp_path)):
        to_gguf(params, tmp_path / "x.gguf", config=given)
        made.append((tmp_path / "x.gguf").read_bytes())
    assert len(set(made)) == 1


def other(name: str, **more: Any) -> Any:
    return getattr(transformers, name)(**{**SMALL, **more})


GEMMA = {"query_pre_attn_scalar": 16}
REFUSED: dict[str, tuple[Any, str]] = {
    "experts": (lambda: other("MixtralConfig"), "config is of a 'mixtral', and it knows llama, "),
    "another architecture": (lambda: transformers.GPT2Config(), "config is of a 'gpt2'"),
    "no configuration": (lambda: 3, "config must be a configuration of transformers such as "),
    "a dict of none": (lambda: {"model_type": "none such"}, "is none of transformers"),
    "no folder": (lambda: "/nowhere", "'/nowhere' is none of transformers"),
    "yarn": (
        lambda: config_of(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
        "config has the rope_type 'yarn'; what llama.cpp computes for llama has 'default' or",
    ),
    "a gelu": (lambda: config_of(hidden_act="gelu"), "the activation 'gelu'; .* has 'silu'"),
    "more layers": (
        lambda: config_of(num_hidden_layers=3),
        "'blk.2.attn_norm.weight' is missing, and by config",
    ),
    "fewer layers": (
        lambda: config_of(num_hidden_layers=1),
        "'model.layers.1.self_attn.q_proj.weight': llama.cpp's llama has none such",
    ),
    "other heads": (
        lambda: config_of(num_key_value_heads=4),
        r"'blk.0.attn_k.weight' is of shape \(32, 64\), and by config",
    ),
    "untied": (
        lambda: config_of(tie_word_embeddings=False),
        "'output.weight' is missing, and by config",
    ),
    "a window": (
        lambda: other("Qwen2Config", use_sliding_window=True, max_window_layers=0),
        "config has the layer_types",
    ),
    "a window elsewhere": (
        lambda: other("Gemma2Config", **GEMMA, layer_types=["full_attention"] * 2),
        "config has the layer_types",
    ),
    "another scale": (
        lambda: other("Gemma2Config", query_pre_attn_scalar=32),
        "config has the query_pre_attn_scalar 32; what llama.cpp computes for gemma2 has 16",
    ),
    "local frequencies": (
        lambda: other(
            "Gemma3TextConfig", **GEMMA,
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e4},
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            },
        ),
        "sliding layers' rope_theta 50000.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused(case: str, tmp_path: Path) -> None:
    made, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        to_gguf(plain(config_of()), tmp_path / "x.gguf", config=made())
    assert not list(tmp_path.iterdir())


def test_names_and_tokenizers_of_others_are_refused(tmp_path: Path) -> None:
    config, file = config_of(), tmp_path / "x.gguf"
    params = plain(config)
    wrapped = {f"module.{name}": p for name, p in params.items()}
    with pytest.raises(
        ValueError, match=r"'module.model.embed_tokens.weight': llama.cpp's llama h"
    ):
        to_gguf(wrapped, file, config=config)
    own = transformers.Gemma2Config(**{**SMALL, **GEMMA})
    head = {"lm_head.weight": torch.ones(264, 64)}
    with pytest.raises(ValueError, match=r"'lm_head.weight': .* none such; tie it to the emb"):
        to_gguf(plain(own) | head, file, config=own)
    with pytest.raises(TypeError, match=r"tokenizer must be one of transformers, .* got int"):
        to_gguf(params, file, config=config, tokenizer=3)
    with pytest.raises(
        ValueError, match="tokenizer '/nowhere' is none of transformers, nor 'bytes'"
    ):
        to_gguf(params, file, config=config, tokenizer="/nowhere")
    with pytest.raises(ValueError, match="the tokenizer has 269 tokens, and the model's embedding"):
        to_gguf(params, file, config=config, tokenizer=transformers.ByT5Tokenizer(extra_ids=10))
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {chr(97 + i): i for i in range(26)}
    for model, message in ((models.WordLevel(letters), "it takes BPE"), (None, "rules for words")):
        own = Tokenizer(model or models.BPE(letters, []))
        own.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=own)
        with pytest.raises(ValueError, match=message):
            to_gguf(params, file, config=config, tokenizer=fast)
    assert not list(tmp_path.iterdir())


def test_a_scale_of_a_whole_tensor_is_refused_where_llama_cpp_has_none(tmp_path: Path) -> None:
    """NVFP4 of a head; its blocks' scales are then rounded, in a type without."""
    config = config_of(tie_word_embeddings=False)
    prox = pf.hard_prox(pf.nvfp4(), granularity=pf.per_block(16))
    params = plain(config)
    weight = {"lm_head.weight": params["lm_head.weight"]}
    transform = pf.chain(pf.sgd(0.0), prox)
    _, state = transform.update(
        {"lm_head.weight": torch.zeros(264, 64)}, transform.init(weight), weight
    )
    packed = params | export.pack(weight, transform, state)
    with pytest.raises(
        ValueError, match=r"'lm_head.weight': NVFP4 has a scale of the whole tensor"
    ):
        to_gguf(packed, tmp_path / "x.gguf", config=config, types="NVFP4", rounded="scale")
    to_gguf(packed, tmp_path / "x.gguf", config=config, in_full="lm_head*")
