"""Folders that from_pretrained loads in a program that knows nothing of this library, and how it
ends at one that needs it."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs: pip install 'parq_fn[integrations]'")
pytest.importorskip("torchao", reason="needs: pip install 'parq_fn[integrations]'")
pytest.importorskip("compressed_tensors", reason="needs: pip install 'parq_fn[integrations]'")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, Qwen3Config
from transformers.quantizers import auto

import parq_fn as pf
from parq_fn.export import pack, unpack
from parq_fn.export.compressed_tensors import to_compressed_tensors
from parq_fn.export.hugging_face import quantize_pretrained
from parq_fn.export.torchao import to_torchao
from parq_fn.optim import QuantOptimizer, param_groups
from tests.integrations.llama import SMALL

TOKENS = torch.arange(3, 12).view(1, 9)
WHERE = pf.per_channel()
CONFIGS = {
    "Llama": LlamaConfig(**SMALL),
    "Qwen3, tied": Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True),
    "GPT-2": GPT2Config(vocab_size=1000, n_embd=64, n_layer=2, n_head=4),
    "Mixtral": MixtralConfig(**SMALL, num_local_experts=4),
}


def of_family(name: str) -> Any:
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()


def trained(
    family: str, rules: dict[str, Any], dtype: torch.dtype = torch.float32
) -> tuple[Any, Any, dict[str, Any]]:
    """(a model on its levels; the same without what was trained; packed)."""
    torch.manual_seed(0)
    model = of_family(family)
    for p in model.parameters():
        p.data = p.data.to(dtype)  # buffers, such as frequencies, stay as from_pretrained has them
    base = torch.optim.SGD(param_groups(model, rules), lr=0.01)
    optimizer = QuantOptimizer(base, pf.hard_prox(pf.uniform(2), period=1, granularity=WHERE))
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()
    fresh = of_family(family)
    for p in fresh.parameters():
        p.data = p.data.to(dtype)
    return model, fresh, pack(model, optimizer)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def link(quantizer: Any, granularity: Any = WHERE) -> Any:
    return pf.hard_prox(quantizer, period=1, granularity=granularity)


TWO = {"*self_attn*": link(pf.asymmetric(4), pf.per_block(32)), "lm_head*": None, "*": 2}
EIGHT = {"*self_attn*": link(pf.integer(8)), "*mlp.up*": link(pf.uniform(4)), "*": 2}
GPT = {"*": 2}


@pytest.mark.parametrize("acts", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3, tied"])
def test_torchao_s_integers_are_saved_and_read_by_from_pretrained(
    family: str, acts: bool, tmp_path: Path
) -> None:
    rules = {name: rule for name, rule in TWO.items() if "head" not in name}
    dtype = torch.bfloat16 if acts else torch.float32
    _, fresh, packed = trained(family, rules, dtype)
    made = to_torchao(fresh, packed, int8_activations=acts)
    made.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {type(p) for p in again.parameters()} == {type(p) for p in made.parameters()}
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (family != "Llama")
    assert torch.equal(logits(again), logits(made))
    held = load_file(tmp_path / "model.safetensors")
    assert len(held) == len({id(t) for t in held.values()})
    assert any(name.startswith("lm_head") for name in held) == (family == "Llama")


@pytest.mark.parametrize(
    ("family", "rules", "dtype"),
    [
        ("Llama", TWO, torch.float32),
        ("Llama", EIGHT, torch.float32),
        ("Llama", {"*": link(pf.stored(pf.integer(4), torch.bfloat16))}, torch.bfloat16),
        ("Llama", {"*": link(pf.stored(pf.integer(4), torch.float16))}, torch.float16),
        ("Qwen3, tied", EIGHT, torch.float32),
        ("GPT-2", GPT, torch.float32),
    ],
)
def test_compressed_tensors_are_read_by_from_pretrained_and_by_its_own_decompressor(
    family: str, rules: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model, fresh, packed = trained(family, rules, dtype)
    before = {name: p.clone() for name, p in fresh.named_parameters()}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kinds = to_compressed_tensors(fresh, packed, tmp_path)
    assert all(torch.equal(before[name], p) for name, p in fresh.named_parameters())
    assert not hasattr(fresh.config, "quantization_config")
    (left,) = [str(one.message) for one in told if "full precision" in str(one.message)]
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, entry in packed.items():
        held = isinstance(entry, pf.export.Packed)
        assert held == (name in kinds or name in left), name
        assert name not in kinds or name in linear
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    weights = unpack(packed)  # what its first forward pass decompressed
    for name, p in again.named_parameters():
        if name in weights:
            assert torch.equal(p, weights[name]), name


@pytest.mark.slow  # the search for a unit of levels that have none
def test_what_compressed_tensors_cannot_hold_is_refused_by_name_or_rounded(tmp_path: Path) -> None:
    _, fresh, packed = trained("Llama", {"*": link(pf.lsbq(2))})
    with pytest.raises(
        ValueError, match=r"q_proj\.weight': levels of row \d+, .* rounded=True rounds"
    ):
        to_compressed_tensors(fresh, packed, tmp_path)
    with pytest.warns(UserWarning, match="rounded, off by up to"):
        kinds = to_compressed_tensors(fresh, packed, tmp_path, in_full="*embed*", rounded=True)
    again, weights = AutoModelForCausalLM.from_pretrained(tmp_path), unpack(packed)
    logits(again)
    found = dict(again.named_parameters())
    for name, weight in weights.items():
        near = weight.abs().amax() / 127 / 1.9 if name in kinds else 0.0
        assert float((found[name].detach() - weight).abs().max()) <= near
    with pytest.warns(
        UserWarning, match=r"embed_tokens\.weight are in full precision, 256,000 bytes"
    ):
        assert to_compressed_tensors(fresh, packed, tmp_path, in_full=["*proj*", "lm_*"]) == {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, weights[name]) for name, p in again.named_parameters())
    _, fresh, packed = trained("Llama", {"*": link(pf.integer(4))}, torch.bfloat16)
    with pytest.raises(ValueError, match=r"are not multiples of one torch\.bfloat16 in 8 bits"):
        to_compressed_tensors(fresh, packed, tmp_path)
    mixture = of_family("Mixtral")
    with pytest.raises(ValueError, match=r"mlp\.experts\.\w+_proj', shape .* is of experts"):
        to_compressed_tensors(mixture, dict(mixture.state_dict()), tmp_path)
    with pytest.raises(TypeError, match="expected a transformers model, got"):
        to_compressed_tensors(torch.nn.Linear(1, 1), {}, tmp_path)


@pytest.mark.parametrize("family", ["Llama", "Qwen3, tied", "GPT-2"])
def test_a_packed_folder_is_an_error_where_the_library_is_not_imported(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fresh, packed = trained(family, {"*": 2})
    quantize_pretrained(fresh, packed).save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "parq_fn")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "parq_fn")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


FRESH = """
import sys, torch
from transformers import AutoModelForCausalLM
tokens = torch.arange(3, 12).view(1, 9)
for name in sys.argv[2:]:
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{name}").eval()(tokens).logits
    torch.save(found, f"{sys.argv[1]}/{name}.pt")
assert not any(module.startswith("parq_fn") for module in sys.modules)
try:
    AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/packed")
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow  # a process that imports transformers
@pytest.mark.rare
def test_a_process_of_its_own_reads_the_folders_and_refuses_ours(tmp_path: Path) -> None:
    model, fresh, packed = trained("Llama", {"*": 2})
    to_torchao(fresh, packed).save_pretrained(tmp_path / "torchao")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        to_compressed_tensors(fresh, packed, tmp_path / "compressed")
    quantize_pretrained(fresh, packed).save_pretrained(tmp_path / "packed")
    names = ["torchao", "compressed"]
    command = [sys.executable, "-c", FRESH, str(tmp_path), *names]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), logits(model))
    assert "ignore_mismatched_sizes" in done.stdout
    assert "Unknown quantization type, got parq_fn" in done.stderr
