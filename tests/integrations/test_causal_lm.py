"""The recipe for language models, from nothing to every format, stopped and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "transformers", reason="needs transformers: pip install 'parq_fn[integrations]'"
)

import transformers

from examples import qat_causal_lm
from examples.language.checks import check, continued
from examples.language.models import of_bytes, tokenizer_of, trained
from examples.language.quantization import names_of_tables
from examples.language.text import encoded
from examples.recipe.log import LOG, read
from parq_fn import export
from tests.helpers import sampled
from tests.processes import Program

TINY = [
    *("--width", "32", "--layers", "1", "--context", "16", "--block-size", "32", "--steps", "6"),
    *("--batch-size", "4", "--eval-tokens", "256", "--start-steps", "2", "--new-tokens", "12"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i}.txt").write_text(f"def function_{i}(x):\n    return x + {i}\n" * 8)
    return folder


def records(folder: Path) -> list[dict[str, Any]]:
    """The log, but for the times."""
    found = read(folder / LOG, "step")
    return [{k: v for k, v in line.items() if k != "seconds"} for line in found]


def test_tokens_of_bytes_are_those_of_the_tokenizer() -> None:
    tokenizer, texts = tokenizer_of(None), ["def f(x):\n\treturn 'naïve'", "", "日本"]
    assert encoded(tokenizer, texts) == tokenizer(texts)["input_ids"]


def test_embeddings_and_heads_are_the_tables() -> None:
    model = of_bytes(32, 1, 16, tokenizer_of(None), 0)
    assert names_of_tables(model) == ["model.embed_tokens.weight"]
    own = transformers.LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": False})
    untied = transformers.LlamaForCausalLM(own)
    assert names_of_tables(untied) == ["model.embed_tokens.weight", "lm_head.weight"]


@pytest.mark.rare
def test_the_recipe_trains_writes_every_format_and_prints_a_table(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*TINY, "--data", str(text), "--save-dir", str(tmp_path)]
    assert qat_causal_lm.main([*flags, "--bits", "16", "2", "0"]) == 0
    shown = capsys.readouterr().out
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == ["| start", "| full precision", "| 2 bits", "| ternary"]
    folder = tmp_path / "2 bits"
    told = json.loads((folder / "result.json").read_text())
    assert records(folder)[-1]["on_levels"] == 1
    assert told["share"] > 0.99
    assert {name: about.split(":")[0] for name, about in told["artefacts"].items()}.keys() == {
        *("quantized.safetensors", "transformers", "torchao", "compressed-tensors", "model.gguf")
    }
    assert not [about for about in told["artefacts"].values() if "bytes" not in about]
    ternary = json.loads((tmp_path / "ternary" / "result.json").read_text())["artefacts"]
    assert "bytes" in ternary["model.gguf"]  # in blocks of 32, which divide its rows
    # the packed folder writes what the dense model with the same weights writes
    dense, tokens = trained(tmp_path / "start"), torch.arange(3, 40)[None]
    export.load_into(dense, folder / "quantized.safetensors")
    packed = transformers.AutoModelForCausalLM.from_pretrained(folder / "transformers")
    more: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    mask = torch.ones_like(tokens)
    wanted = dense.eval().generate(tokens, attention_mask=mask, **more)
    assert torch.equal(packed.eval().generate(tokens, attention_mask=mask, **more), wanted)
    # what is done is not done again
    assert qat_causal_lm.main([*flags, "--resume", "--bits", "2", "16"]) == 0
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if line.startswith("| 2 bits")] == [
        line for line in shown.splitlines() if line.startswith("| 2 bits")
    ]
    assert qat_causal_lm.main([*flags, "--resume", "--lr", "0.5"]) == 2
    assert "was begun with --lr 0.001, and this run has 0.5" in capsys.readouterr().err
    assert qat_causal_lm.main(flags) == 2
    assert "has a run; give --resume, or another --save-dir" in capsys.readouterr().err
    (folder / "result.json").write_text("{")
    assert qat_causal_lm.main([*flags, "--resume", "--bits", "2"]) == 2
    assert "2 bits/result.json is damaged" in capsys.readouterr().err


WAYS = {
    "one process, distilled": (1, ["--distill", "0.5", "--parallel", "none"]),
    "sharded": (2, ["--parallel", "fsdp2", "--gradient-checkpointing"]),
    "replicated, distilled": (2, ["--distill", "0.5", "--parallel", "ddp"]),
}


@pytest.mark.rare
@pytest.mark.parametrize("way", sampled(WAYS, 1))
def test_a_run_that_was_stopped_resumes_bit_for_bit(way: str, text: Path, tmp_path: Path) -> None:
    world, own = WAYS[way]
    flags = [*TINY, *own, "--data", str(text), "--bits", "2", "--eval-every", "1", "--resume"]

    def started(folder: Path) -> Program:
        shown = folder.with_name(f"{folder.name}-shown")
        own = [*flags, "--save-dir", str(folder)]
        return Program("examples.qat_causal_lm", own, world, shown)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    started(whole).end()
    run = started(parts)
    run.until("inverse_slope")  # of the second training's first steps
    run.signal(signal.SIGTERM)
    assert "--resume goes on" in run.end(128 + signal.SIGTERM)
    assert not (parts / "2 bits" / "result.json").exists()
    assert "resumes from" in started(parts).end()
    assert records(parts / "2 bits") == records(whole / "2 bits")
    file = "2 bits/quantized.safetensors"
    assert (parts / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bits", "9"], "argument --bits: invalid choice: 9"),
        (["--width", "40"], "--width must be a multiple of 32, got 40"),
        (["--distill", "2"], "--distill is a share, at most 1, got 2"),
        (["--anneal-start", "0.9"], "--anneal-start must lie before --anneal-end"),
        (["--warmup", "3"], "--warmup is a share, at most 1, got 3.0"),
        (["--from-config", "/no/such", "--tokenizer", "a"], "there is no /no/such"),
        (["--model", "a", "--from-config", "b"], "--model is trained already"),
    ],
)
def test_flags_that_mean_nothing_are_one_line(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match="2"):
        qat_causal_lm.main([*flags, "--save-dir", str(tmp_path)])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "/no/such/folder"], "/no/such/folder: "),
        (["--context", "100000"], "less than a sequence of 100000"),
        (["--data", "/no/such/file.txt"], "there is no /no/such/file.txt"),
        (["--block-size", "24"], "--block-size 24 (0 is a row): parq_prox: parameter 'model."),
        (["--prompt", ""], "--prompt '' has no tokens"),
        (["--prompt", "a" * 2000], "or more than the 1024 positions of the model"),
    ],
)
def test_what_a_run_cannot_be_of_is_one_line_before_it_begins(
    flags: list[str], message: str, text: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = [*TINY, "--data", str(text), "--save-dir", str(tmp_path / "run"), *flags]
    assert qat_causal_lm.main(own) == 2
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert message in line
    assert not shown.out
    assert not (tmp_path / "run" / qat_causal_lm.FLAGS).exists()  # so that it may begin otherwise


SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "vocab_size": 259}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (transformers.T5Config(), "has an encoder and a decoder (T5Config); the recipe trains"),
        (transformers.BartConfig(), "has an encoder and a decoder (BartConfig)"),
        (transformers.BertConfig(**SMALL), "(BertLMHeadModel) predicts a token from those after"),
        (transformers.LlamaConfig(**{**SMALL, "vocab_size": 9}), "9 tokens and its tokenizer 259"),
        (
            transformers.LlamaConfig(**SMALL, max_position_embeddings=8),
            "has 8 positions, less",
        ),
    ],
    ids=["T5", "BART", "BERT", "few tokens", "few positions"],
)
def test_models_that_the_recipe_cannot_train_are_refused_by_name(
    own: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own.save_pretrained(tmp_path)
    tokenizer_of(None).save_pretrained(tmp_path / "own")
    given = ["--from-config", str(tmp_path), "--tokenizer", str(tmp_path / "own")]
    assert qat_causal_lm.main([*TINY, *given, "--save-dir", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_models_that_write_from_left_to_right_are_taken_whatever_their_vocabulary() -> None:
    """What they write is of the tokens that the tokenizer has, in the positions that they have."""
    tokenizer, args = tokenizer_of(None), qat_causal_lm.parse([*TINY, "--prompt", "a" * 20])
    args.new_tokens = 60
    configs = [
        transformers.LlamaConfig(**{**SMALL, "vocab_size": 5000}, max_position_embeddings=24),
        transformers.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4),
        transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=24, vocab_size=300),
    ]
    for own in configs:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(own)
        assert check(model, args, tokenizer)
        assert continued(model, args, tokenizer).startswith("a" * 20)


@pytest.mark.rare
def test_help_needs_no_package_but_those_of_examples() -> None:
    code = "import sys; sys.modules['transformers'] = None; sys.argv = ['', '--help']\n"
    code += "from examples import qat_causal_lm; qat_causal_lm.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--embedding-bits" in done.stdout
