"""Text as tokens: documents of files and folders, joined, and cut into sequences.

Tokens stand in files of two or four bytes each, which are mapped into memory. The first process
makes them, and a run of the same text, tokenizer and cut takes them again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from examples.language import notes
from parq_fn.foundation.command import UserError

#: The endings of files that are text; of ".jsonl" each line is an object with a text.
ENDINGS = (".txt", ".md", ".rst", ".py", ".jsonl")
TESTED = 10  # one document in so many is for the test
_AT_ONCE = 64  # documents that the tokenizer is given


class Text(NamedTuple):
    """Tokens of the training and of the test, and how many bytes of text a token stands for."""

    train: np.ndarray  # [tokens], uint16 or uint32
    test: np.ndarray  # the same
    bytes_per_token: float  # of the test
    documents: int
    left_out: dict[str, int]  # how many files of endings that are no text
    patched: int  # documents not in UTF-8, in which something stands for what cannot be read


def standard_library() -> list[Path]:
    """The sources of Python's standard library, which are at hand on every machine."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not files:
        raise UserError("this Python keeps no sources of its standard library; give --data")
    return files


# Documents.


class Documents:
    """The texts of files and folders, in the order of their names.

    paths: files that end as `ENDINGS` do, folders of such files, and folders that the package
    datasets has saved. column: of these, and the key of lines of JSON. flag: that gave the paths.
    without: a folder whose files are left out, as those that a run writes.
    """

    def __init__(
        self, paths: Sequence[Path], column: str, flag: str = "--data", without: Path | None = None
    ) -> None:
        self.column, self.left_out = column, Counter[str]()
        self.without = without and without.resolve()
        self.count = self.patched = 0  # documents, and those not in UTF-8, once they were read
        self.sources: list[Path] = []
        for path in paths:
            if not path.exists():
                raise UserError(f"{flag}: there is no {path}")
            if path.is_dir() and not _is_saved(path):
                self.sources += self._files_in(path)
            elif path.is_dir() or path.suffix in ENDINGS:
                self.sources.append(path)
            else:
                raise UserError(
                    f"{flag}: {path} does not end in {', '.join(ENDINGS)}; rename it if it is text"
                )
        if not self.sources:
            shown = ", ".join(map(str, paths))
            raise UserError(f"{flag}: {shown}: no file there ends in {', '.join(ENDINGS)}")

    def _files_in(self, folder: Path) -> Iterator[Path]:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            if self.without in file.resolve().parents:
                continue
            if file.suffix in ENDINGS:
                yield file
            else:
                self.left_out[file.suffix or file.name] += 1

    @property
    def about(self) -> list[Any]:
        """What tells these documents from others, without reading them."""
        files = (f for s in self.sources for f in ([s] if s.is_file() else sorted(s.rglob("*"))))
        found = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        return [self.column, *map(list, found)]

    def __iter__(self) -> Iterator[str]:
        self.count = self.patched = 0
        for text in self._read():
            self.count += 1
            yield text

    def _read(self) -> Iterator[str]:
        for source in self.sources:
            if source.is_dir():
                yield from self._saved(source)
            elif source.suffix == ".jsonl":
                yield from self._lines(source)
            else:
                yield self._in_utf8(source.read_bytes())

    def _in_utf8(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            self.patched += 1
            return text.decode(errors="replace")

    def _lines(self, file: Path) -> Iterator[str]:
        with file.open("rb") as lines:
            for i, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    yield self._text(json.loads(line), f"{file}, line {i}")
                except ValueError as error:
                    raise UserError(f"{file}, line {i} is no JSON: {error}") from None

    def _saved(self, folder: Path) -> Iterator[str]:
        try:
            import datasets
        except ImportError:
            raise UserError(f"{folder} needs the package datasets: pip install datasets") from None
        found = datasets.load_from_disk(str(folder))
        if isinstance(found, dict):
            raise UserError(f"{folder} holds {', '.join(found)}; give one of these folders in it")
        for i, row in enumerate(found):
            yield self._text(row, f"{folder}, row {i}")

    def _text(self, row: Any, where: str) -> str:
        text = row.get(self.column) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{where} has no text {self.column!r}; name it by --text-column")
        return self._in_utf8(text.encode(errors="surrogatepass"))


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


# Tokens.


def text_of(
    documents: Documents,
    tests: Documents | None,
    tokenizer: Any,
    folder: Path,
    bar: Callable[[Iterable[str], str], Iterable[str]],
) -> Text:
    """The documents' tokens, of which one document in ten is for the test, or the last tenth of
    each where they are fewer; those of `tests`, where they are given.

    folder: where the tokens stand. bar: shows how far it is.
    Raises UserError for a text that is too short, or of which the tokenizer makes nothing.
    """
    about = [documents.about, tests and tests.about, _signature(tokenizer)]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()
    told = folder / "about.json"
    if notes.read(told).get("key") != key:
        folder.mkdir(parents=True, exist_ok=True)
        told.unlink(missing_ok=True)
        found = _written(documents, tests, tokenizer, folder, bar)
        notes.write(told, {"key": key, **found})
    found = notes.read(told)
    train, test = (
        np.memmap(folder / f"{name}.bin", found["dtype"], "r") for name in ("train", "test")
    )
    size, left_out = found["bytes"] / len(test), dict(documents.left_out)
    return Text(train, test, size, found["documents"], left_out, found.get("patched", 0))


def _written(
    documents: Documents, tests: Documents | None, tokenizer: Any, folder: Path, bar: Any
) -> dict[str, Any]:
    dtype = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    tokens, size = {"train": 0, "test": 0}, 0
    with (folder / "train.bin").open("wb") as train, (folder / "test.bin").open("wb") as test:
        files = {"train": train, "test": test}
        for name, texts in _at_once(_parted(bar(documents, "tokens"), documents, tests)):
            for one in encoded(tokenizer, texts):
                np.asarray(one, dtype).tofile(files[name])
                tokens[name] += len(one)
            size += sum(len(text.encode()) for text in texts) if name == "test" else 0
    if not size or not tokens["train"]:
        raise UserError(
            f"--data: {documents.count} documents make {tokens['train']} tokens, and "
            f"{tokens['test']} for the test; give more text"
        )
    patched = documents.patched + (tests.patched if tests is not None else 0)
    return {"dtype": dtype, "bytes": size, "documents": documents.count, "patched": patched}


def _parted(
    texts: Iterable[str], documents: Documents, tests: Documents | None
) -> Iterator[tuple[str, str]]:
    """(train or test, text) of the documents, of which `texts` are those, and of the tests."""
    few = len([*itertools.islice(documents, TESTED)]) < TESTED
    for i, text in enumerate(texts):
        if tests is not None:
            yield "train", text
        elif few:
            cut = len(text) - len(text) // TESTED
            yield "train", text[:cut]
            yield "test", text[cut:]
        else:
            yield ("train" if i % TESTED else "test"), text
    for text in tests or ():
        yield "test", text


def _at_once(parts: Iterable[tuple[str, str]]) -> Iterator[tuple[str, list[str]]]:
    """(train or test, texts), as many as the tokenizer is given at once."""
    waiting: dict[str, list[str]] = {"train": [], "test": []}
    for name, text in parts:
        waiting[name].append(text)
        if len(waiting[name]) == _AT_ONCE:
            yield name, waiting.pop(name)
            waiting[name] = []
    yield from waiting.items()


def encoded(tokenizer: Any, texts: list[str]) -> list[Any]:
    """The tokens of each text, and one that ends it, where the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if type(tokenizer).__name__ == "ByT5Tokenizer":  # which is slow, and has a token a byte
        shift = tokenizer.offset
        return [[*(b + shift for b in text.encode()), *end] for text in texts]
    if not texts:
        return []
    found = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [[*one, *end] for one in found]


def _signature(tokenizer: Any) -> list[Any]:
    sample = "The tokens of this text tell tokenizers apart: 0123456789, naïve café.\n\tdef f(x):"
    return [type(tokenizer).__name__, len(tokenizer), encoded(tokenizer, [sample])]


# Sequences.


def windows(tokens: np.ndarray, context: int) -> int:
    """How many sequences there are of so many tokens, each with the one that follows it."""
    return (len(tokens) - 1) // context


def sequences(tokens: np.ndarray, context: int, which: Iterable[int]) -> Tensor:
    """[sequences, context + 1] int64: those windows."""
    rows = [np.asarray(tokens[i * context : (i + 1) * context + 1], np.int64) for i in which]
    return torch.from_numpy(np.stack(rows))


def batch(
    tokens: np.ndarray, context: int, size: int, step: int, seed: int, rank: int, ranks: int
) -> Tensor:
    """[size / ranks, context + 1]: a rank's part of the sequences of a step. They follow from these
    numbers alone: all windows in an order that is drawn, then all of them in another."""
    count, each = windows(tokens, context), size // ranks
    first = step * size + rank * each
    places = (divmod(i, count) for i in range(first, first + each))
    return sequences(tokens, context, [int(_order(count, seed, epoch)[i]) for epoch, i in places])


@lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(count, generator=generator)
