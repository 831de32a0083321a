"""Text of the recipe for language models: which documents, which tokens, which sequences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.language.text import Documents, Text, batch, sequences, text_of, windows
from parq_fn.foundation.command import UserError


class Letters:
    """A tokenizer with a token for each character, and 0 for the end."""

    eos_token_id = 0

    def __len__(self) -> int:
        return 70_000

    def __call__(self, texts: list[str], **unused: Any) -> dict[str, Any]:
        return {"input_ids": [[ord(c) for c in text] for text in texts]}


def made(folder: Path, documents: Documents, tests: Documents | None = None) -> Text:
    return text_of(documents, tests, Letters(), folder, lambda texts, _: texts)


def shown(tokens: Any) -> list[str]:
    """The documents that tokens are of."""
    return "".join(map(chr, tokens)).split("\0")[:-1]


@pytest.fixture
def texts(tmp_path: Path) -> list[str]:
    """Documents in three kinds of files, in the order in which they are read, and another file."""
    some = [f"document {i}, naïve" for i in range(20)]
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    for i, text in enumerate(some[:5]):
        (folder / f"a{i}.txt").write_text(text)
    (folder / "b.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in some[5:15]) + "\n\n")
    for i, text in enumerate(some[15:]):
        (folder / "below" / f"c{i}.md").write_text(text)
    (folder / "image.png").write_bytes(b"\x89")
    return some


def test_one_document_in_ten_is_for_the_test_and_none_is_left_out(
    texts: list[str], tmp_path: Path
) -> None:
    documents = Documents([tmp_path / "texts"], "text")
    found = made(tmp_path / "tokens", documents)
    assert shown(found.test) == [texts[0], texts[10]]
    assert shown(found.train) == [t for t in texts if t not in (texts[0], texts[10])]
    assert found.documents == 20
    assert found.left_out == {".png": 1}
    size = sum(len(texts[i].encode()) for i in (0, 10))
    assert found.bytes_per_token == size / len(found.test)
    assert made(tmp_path / "tokens", documents).train.tobytes() == found.train.tobytes()


def test_tokens_are_made_again_of_other_text_alone(texts: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "tokens"
    made(folder, Documents([tmp_path / "texts"], "text"))
    kept = (folder / "train.bin").stat().st_mtime_ns
    made(folder, Documents([tmp_path / "texts"], "text"))
    assert (folder / "train.bin").stat().st_mtime_ns == kept
    (tmp_path / "texts" / "a1.txt").write_text("another")
    assert "another" in shown(made(folder, Documents([tmp_path / "texts"], "text")).train)


def test_the_last_tenth_of_few_documents_is_for_the_test(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("0123456789" * 2)
    found = made(tmp_path / "tokens", Documents([tmp_path / "one.txt"], "text"))
    assert (shown(found.train), shown(found.test)) == (["012345678901234567"], ["89"])


def test_a_test_text_of_its_own_is_the_test(texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("other")
    tests = Documents([tmp_path / "other.txt"], "text")
    found = made(tmp_path / "tokens", Documents([tmp_path / "texts"], "text"), tests)
    assert shown(found.test) == ["other"]
    assert shown(found.train) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "there is no .*none.txt"),
        ("image.png", "", "image.png does not end in .txt, .md"),
        ("a.jsonl", "{}\n", r"a.jsonl, line 1 has no text 'text'; name it by --text-column"),
        ("a.jsonl", '{"text": "a"}\n{', "a.jsonl, line 2 is no JSON"),
        (
            "a.jsonl",
            b'{"text": "na\xefve"}',
            "a.jsonl, line 1 is no JSON: 'utf-8' codec",
        ),
        ("a.jsonl", "3", "a.jsonl, line 1 has no text 'text'"),
        ("a.txt", "", "1 documents make 1 tokens, and 1 for the test; give more text"),
        ("folder/image.png", "", "no file there ends in .txt"),
    ],
)
def test_what_is_no_text_is_refused_by_name(
    name: str, content: str | bytes | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / name
    if content is not None:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    given = file.parent if "/" in name else file
    with pytest.raises(UserError, match=message):
        made(tmp_path / "tokens", Documents([given], "text"))


def test_documents_that_are_not_in_utf_8_are_patched_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("naïve, naïve".encode("latin-1"))
    half = [{"text": "a \ud800"}, {"text": "whole"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, half)))
    found = made(tmp_path / "tokens", Documents([tmp_path], "text"))
    first, second, third = shown(found.train)
    assert (first[:5], second[:2], third) == ("na\ufffdve", "a ", "whole")
    assert found.patched == 2
    assert made(tmp_path / "tokens", Documents([tmp_path], "text")).patched == 2


def test_what_a_run_writes_beside_its_text_is_no_text(texts: list[str], tmp_path: Path) -> None:
    run = tmp_path / "texts" / "run"
    run.mkdir()
    (run / "log.jsonl").write_text('{"step": 1}')
    documents = Documents([tmp_path / "texts"], "text", without=run)
    assert made(run / "tokens", documents).documents == len(texts)
    assert documents.left_out == {".png": 1}


def test_sequences_overlap_in_the_token_that_one_predicts_last() -> None:
    tokens = np.arange(11, dtype=np.uint16)
    assert windows(tokens, 5) == 2
    assert sequences(tokens, 5, [0, 1]).tolist() == [[0, 1, 2, 3, 4, 5], [5, 6, 7, 8, 9, 10]]
    assert windows(tokens[:10], 5) == 1


def test_a_step_has_the_same_sequences_on_any_number_of_processes() -> None:
    """All windows in an order, then all of them in another."""
    tokens = np.arange(5 * 8 + 1, dtype=np.uint16)
    alone = [batch(tokens, 5, 4, step, 7, 0, 1) for step in range(4)]
    for ranks in (2, 4):
        for step, whole in enumerate(alone):
            parts = [batch(tokens, 5, 4, step, 7, rank, ranks) for rank in range(ranks)]
            assert torch.equal(torch.cat(parts), whole)
    first, second = (torch.cat(alone[i : i + 2])[:, 0].tolist() for i in (0, 2))
    assert sorted(first) == sorted(second) == list(range(0, 40, 5))
    assert first != second
