"""Tokenizers of transformers as GGUF's metadata.

llama.cpp splits texts by rules that it knows by name. `SPLITS` are those of Llama 3, Qwen and
GPT-2; tokenizers of sentencepiece's kind (Llama 2, Gemma) need none. Others are refused: the file
would make other tokens than the model was trained with.
"""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: (regular expression, whether whole words are looked up first): the name.
SPLITS = {
    (_WORDS + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_WORDS + r"\p{N}" + _REST, False): "qwen2",
    (None, False): "gpt-2",
}
#: Two bytes that no text in UTF-8 has; llama.cpp wants a merge, and bytes have none.
_NO_MERGE = "\u00c0 \u00c1"
_NORMAL, _UNKNOWN, _CONTROL, _OWN, _UNUSED, _BYTE = range(1, 7)  # types of tokens


class Vocabulary(NamedTuple):
    """What the file tells of a tokenizer."""

    model: str  # llama.cpp's algorithm
    tokens: list[str]
    types: list[int]
    pre: str | None = None
    merges: list[str] | None = None
    scores: list[float] | None = None
    space: bool | None = None  # whether a space is put before a text
    special: dict[str, int] = {}  # noqa: RUF012 # nothing writes to it
    bos: bool = False  # whether a text's tokens begin with bos
    template: str | None = None


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """What GGUF holds of a tokenizer.

    tokenizer: one of transformers, or its folder; "bytes" where token i is byte i.
    Raises TypeError for anything else, and ValueError for one that llama.cpp has no rules for.
    """
    if isinstance(tokenizer, str | os.PathLike) and tokenizer != "bytes":
        tokenizer = _read(tokenizer)
    if isinstance(tokenizer, str):
        return _of_bytes([*map(chr, range(256))], set())
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TypeError(
            "to_gguf: tokenizer must be one of transformers, its folder, or 'bytes', got "
            f"{type(tokenizer).__name__}"
        )
    special = {
        name: int(at)
        for name in ("bos", "eos", "unk", "pad")
        if (at := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    if type(tokenizer).__name__ == "ByT5Tokenizer":
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        return _of_bytes(tokens, set(tokenizer.all_special_ids))._replace(special=special)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ValueError(
            f"to_gguf: {type(tokenizer).__name__} has no file of the tokenizers package to read; "
            "give the fast tokenizer, or 'bytes' where token i is byte i"
        )
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    first = tokenizer("a")["input_ids"][:1]
    template = getattr(tokenizer, "chat_template", None)
    return _of_backend(backend, tokenizer)._replace(
        special=special,
        bos=bool(first) and first[0] == special.get("bos"),
        template=template if isinstance(template, str) else None,
    )


def _read(folder: str | os.PathLike[str]) -> Any:
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ImportError(
            "to_gguf reads a tokenizer by transformers: pip install transformers"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        why = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"to_gguf: tokenizer {folder!r} is none of transformers, nor 'bytes': {why}"
        ) from error


def write(vocabulary: Vocabulary | None, config: Any, writer: Any) -> None:
    """A vocabulary as metadata, with a name for each of the embedding's rows, and special tokens,
    of the tokenizer or else of the configuration; without one llama.cpp takes and gives numbers of
    tokens alone."""
    if vocabulary is None:
        writer.add_tokenizer_model("none")
        return
    rows = config.vocab_size
    left = rows - len(vocabulary.tokens)
    if left < 0:
        raise ValueError(
            f"to_gguf: the tokenizer has {len(vocabulary.tokens)} tokens, and the model's "
            f"embedding {rows} rows; give the model's own tokenizer"
        )
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_token_list([*vocabulary.tokens, *(f"[unused {i}]" for i in range(left))])
    writer.add_token_types([*vocabulary.types, *[_UNUSED] * left])
    if vocabulary.scores is not None:
        writer.add_token_scores([*vocabulary.scores, *[-1e6] * left])
    if vocabulary.pre is not None:
        writer.add_tokenizer_pre(vocabulary.pre)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges or [_NO_MERGE])
    for name in ("bos", "eos", "unk", "pad"):
        at = vocabulary.special.get(name, getattr(config, f"{name}_token_id", None))
        at = at[0] if isinstance(at, list) and at else at
        if isinstance(at, int) and 0 <= at < rows:
            getattr(writer, f"add_{name}_token_id")(at)
    writer.add_add_bos_token(vocabulary.bos)
    writer.add_add_eos_token(False)
    if vocabulary.space is not None:
        writer.add_add_space_prefix(vocabulary.space)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def letters() -> list[str]:
    """The letter that stands for each byte in files of byte-level tokenizers: itself where it can
    be printed, else the next one from the 256th on.

    >>> "".join(letters()[i] for i in b"a \\n")
    'aĠĊ'
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(i if i in shown else next(others)) for i in range(256)]


def _of_bytes(tokens: list[str], special: set[int]) -> Vocabulary:
    """Tokens that are letters of Latin-1, one for each byte, and special ones."""
    own = letters()
    names = [t if i in special else own[ord(t)] for i, t in enumerate(tokens)]
    types = [_CONTROL if i in special else _NORMAL for i in range(len(tokens))]
    return Vocabulary("gpt2", names, types, "gpt-2", [])


def _of_backend(backend: dict[str, Any], tokenizer: Any) -> Vocabulary:
    model, added = backend["model"], backend.get("added_tokens") or []
    size = 1 + max([*model.get("vocab", {}).values(), *(t["id"] for t in added)])
    tokens, types = [f"[unused {i}]" for i in range(size)], [_UNUSED] * size
    if model.get("type") != "BPE":
        raise _unknown(tokenizer, f"a model {model.get('type')!r}; it takes BPE")
    by_bytes = bool(model.get("byte_fallback"))
    for token, at in model["vocab"].items():
        byte = by_bytes and len(token) == 6 and token.startswith("<0x")
        tokens[at], types[at] = token, _BYTE if byte else _NORMAL
    for token in added:
        at = token["id"]
        tokens[at], types[at] = token["content"], _CONTROL if token["special"] else _OWN
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if by_bytes:
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(model["merges"]):
            parts = merge.split(" ") if isinstance(merge, str) else merge
            ranks.setdefault("".join(parts), rank)
        scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
        unknown = model.get("unk_token")
        if unknown in model["vocab"]:
            types[model["vocab"][unknown]] = _UNKNOWN
        space = tokenizer.tokenize("a")[0].startswith("\u2581")
        return Vocabulary("llama", tokens, types, "default", None, scores, space)
    split = _split_of(backend.get("pre_tokenizer") or {})
    name = SPLITS.get((split, bool(model.get("ignore_merges"))))
    if split == "" or name is None:
        raise _unknown(tokenizer, f"the rules for words {backend.get('pre_tokenizer')!r}")
    return Vocabulary("gpt2", tokens, types, name, merges)


def _split_of(rules: dict[str, Any]) -> str | None:
    """The regular expression that words are split by; None for ByteLevel's own, "" for others."""
    if rules.get("type") == "ByteLevel":
        return None if rules.get("use_regex", True) and not rules.get("add_prefix_space") else ""
    parts = rules.get("pretokenizers", [])
    if len(parts) != 2 or [part.get("type") for part in parts] != ["Split", "ByteLevel"]:
        return ""
    split, level = parts
    plain = split.get("behavior") == "Isolated" and not split.get("invert")
    own = level.get("use_regex", True) or level.get("add_prefix_space")
    return str(split["pattern"].get("Regex", "")) if plain and not own else ""


def _unknown(tokenizer: Any, what: str) -> ValueError:
    return ValueError(
        f"to_gguf: {type(tokenizer).__name__} has {what}, which llama.cpp has no name for that is "
        f"known here ({', '.join(SPLITS.values())}, sentencepiece); give tokenizer=None for a file "
        "that takes numbers of tokens"
    )
