"""GGUF files in llama.cpp itself: it loads them, and its greedy tokens are torch's.

llama.cpp multiplies with activations of 8 bits where weights are blocks, so that logarithms of
probabilities agree to a few hundredths; models are trained on one text, so that their tokens are
far apart.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip(
    "xllamacpp", reason="needs llama.cpp: pip install 'parq_fn[integrations]' brings xllamacpp"
)
pytest.importorskip("gguf", reason="needs gguf: pip install 'parq_fn[integrations]'")
pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'parq_fn[integrations]'"
)

import torch
import transformers
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

import parq_fn as pf
from parq_fn import export
from parq_fn.export import gguf_tokens
from parq_fn.export.gguf import to_gguf
from parq_fn.optim import QuantOptimizer, param_groups
from tests.integrations.llama_cpp import LlamaCpp

SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
#: Architectures with what makes each its own.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama, its own head, biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "llama 3": ("LlamaConfig", {"rope_parameters": LLAMA3, "head_dim": 32}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "gemma": ("GemmaConfig", {"head_dim": 32}),
    "gemma2": ("Gemma2Config", GEMMA),
    "gemma3": ("Gemma3TextConfig", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3, its own head": ("Gemma3TextConfig", {**GEMMA, "tie_word_embeddings": False}),
}
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
TEXT = "def parity(n):\n    return n % 2 == 0\n\n"


MERGES = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("r", "e"), ("re", "t"), ("e", "f"), ("i", "t"), ("1", "2")]


def words(split: str | None = None, *, full: bool = False, **more: Any) -> Any:
    """A tokenizer of bytes, those that are printed or all, and a few merges."""
    letters = gguf_tokens.letters()
    shown = letters if full else [letters[i] for i in (10, *range(32, 127))]
    names = ["<pad>", "</s>", *shown, *map("".join, MERGES)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(names)}, MERGES, **more))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    tokenizer.pre_tokenizer = level
    if split is not None:
        first = pre_tokenizers.Split(Regex(split), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, level])
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>"
    )


def pieces(*, prepend: bool) -> Any:
    """A tokenizer as sentencepiece makes them: of letters, a few merges, and bytes for the rest."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581"]
    names += [chr(i) for i in range(33, 127)]
    merges = [("\u2581", "r"), ("e", "t"), ("\u2581", "\u2581"), ("\u2581r", "et"), ("i", "t")]
    names += map("".join, merges)
    tokenizer = Tokenizer(
        models.BPE(
            {t: i for i, t in enumerate(names)}, merges, unk_token="<unk>", fuse_unk=True,
            byte_fallback=True,
        )
    )  # fmt: skip
    spaces = normalizers.Replace(" ", "\u2581")
    first = [normalizers.Prepend("\u2581")] if prepend else []
    tokenizer.normalizer = normalizers.Sequence([*first, spaces])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


TOKENIZER = words()


def model_of(name: str, **more: Any) -> Any:
    kind, own = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**SMALL, **own, **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() < 2:
                p.add_(0.1 * torch.randn(p.shape))
            else:
                p.mul_(5)  # so that attention tells positions apart
    return model


def torch_greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    tokens = torch.tensor([prompt])
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_each_architecture_computes_what_torch_does(name: str, tmp_path: Path) -> None:
    """In float32, with random weights: names, orders of rows, norms, rotations, windows."""
    model = model_of(name).eval()
    packed = {n: p.detach() for n, p in model.named_parameters()}
    to_gguf(packed, tmp_path / "x.gguf", config=model.config, tokenizer=TOKENIZER)
    prompt = TOKENIZER(TEXT)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    expected = logits.log_softmax(-1)
    with LlamaCpp(tmp_path / "x.gguf") as run:
        for token, found in run.next(prompt).items():
            assert abs(found - expected[token]) < 1e-2


#: A quantizer whose levels each type holds, and its blocks.
TYPES: dict[str, tuple[Any, int]] = {
    "Q1_0": (pf.stored(pf.lsbq(1), torch.float16), 128),
    "TQ1_0": (pf.stored(pf.lsbq(0), torch.float16), 256),
    "TQ2_0": (pf.stored(pf.lsbq(0), torch.float16), 256),
    "Q4_0": (pf.stored(pf.uniform(2), torch.float16), 32),
    "IQ4_NL": (pf.stored(pf.codebook.iq4_nl, torch.float16), 32),
    "MXFP4": (pf.mxfp4(), 32),
    "NVFP4": (pf.nvfp4(), 16),
    "Q4_1": (pf.stored(pf.affine(4), torch.float16), 32),
    "Q8_0": (pf.stored(pf.uniform(4), torch.float16), 32),
}


def train(model: Any, optimizer: Any, steps: int) -> Any:
    tokens = torch.tensor([TOKENIZER(ALPHABET)["input_ids"]])
    for _ in range(steps):
        optimizer.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def trained() -> Any:
    """A model that knows the alphabet."""
    wide = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256, "num_hidden_layers": 1}
    model = model_of("llama 3", **wide)
    return train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), 20)


@pytest.mark.parametrize("kind", TYPES)
def test_greedy_tokens_are_those_of_torch_in_every_type(
    kind: str, trained: Any, tmp_path: Path
) -> None:
    """Of a model trained with its matrices on levels. The scale that NVFP4 has of a whole tensor
    llama.cpp applies in blocks alone."""
    quantizer, size = TYPES[kind]
    prox = pf.hard_prox(quantizer, granularity=pf.per_block(size), period=1)
    model, own = copy.deepcopy(trained), kind == "NVFP4"
    rules = {"*embed*": None, "lm_head*": None} if own else {}
    groups = param_groups(model, {**rules, "*": prox})
    optimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=1e-3), prox)
    train(model, optimizer, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if own else "error")
        kinds = to_gguf(
            export.pack(model, optimizer), tmp_path / "x.gguf", config=model.config,
            tokenizer=TOKENIZER, types=kind, rounded="scale" if own else False,
        )  # fmt: skip
    assert set(kinds.values()) == {kind}
    prompt = TOKENIZER(ALPHABET)["input_ids"][:8]
    with LlamaCpp(tmp_path / "x.gguf") as run, torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
        for token, found in run.next(prompt).items():
            assert abs(found - expected[token]) < 0.2
        expected = TOKENIZER(ALPHABET)["input_ids"][8:24]
        assert run.greedy(prompt, 16) == torch_greedy(model, prompt, 16) == expected


REGEX = {name: split for (split, _), name in gguf_tokens.SPLITS.items()}
TOKENIZERS: dict[str, Any] = {
    "gpt-2": lambda: words(full=True),
    "qwen2": lambda: words(REGEX["qwen2"], full=True),
    "llama-bpe": lambda: words(REGEX["llama-bpe"], full=True, ignore_merges=True),
    "llama 2": lambda: pieces(prepend=True),
    "gemma": lambda: pieces(prepend=False),
    "bytes": lambda: transformers.ByT5Tokenizer(extra_ids=3),
}
TEXTS = ["def f(x):\n    return it", "  1234 it's l'\u00e9t\u00e9\n\n  ret", "\u65e5\u672c r\t"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_have_the_tokens_that_the_tokenizer_gives(name: str, tmp_path: Path) -> None:
    """A ByT5Tokenizer puts an end behind a text, which a prompt has not."""
    model, tokenizer = model_of("llama", vocab_size=384), TOKENIZERS[name]()
    packed = {n: p.detach() for n, p in model.named_parameters()}
    to_gguf(packed, tmp_path / "x.gguf", config=model.config, tokenizer=tokenizer)
    with LlamaCpp(tmp_path / "x.gguf") as run:
        for text in TEXTS:
            expected = tokenizer(text)["input_ids"]
            expected = expected[:-1] if name == "bytes" else expected
            assert run.tokens(text) == expected


def test_bytes_are_their_own_tokens(tmp_path: Path) -> None:
    model = model_of("llama", vocab_size=256)
    packed = {n: p.detach() for n, p in model.named_parameters()}
    to_gguf(packed, tmp_path / "x.gguf", config=model.config, tokenizer="bytes")
    with LlamaCpp(tmp_path / "x.gguf") as run:
        for text in TEXTS:
            assert run.tokens(text) == [*text.encode()]
