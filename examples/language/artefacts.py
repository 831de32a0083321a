"""What a quantized model is written as: every format that holds it exactly, and why others do not.

| artefact | what reads it |
|---|---|
| `quantized.safetensors` | `parq_fn.export.load` |
| `transformers/` | transformers, once `parq_fn.export.hugging_face` is imported |
| `torchao/` | transformers, where torchao is installed |
| `compressed-tensors/` | transformers, where compressed-tensors is installed, and vLLM |
| `model.gguf` | llama.cpp |
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parq_fn import export

PACKED, FOLDER, GGUF = "quantized.safetensors", "transformers", "model.gguf"
TORCHAO, COMPRESSED = "torchao", "compressed-tensors"


def write(
    folder: Path, packed: dict[str, Any], build: Callable[[], Any], tokenizer: Any
) -> tuple[Any, dict[str, str]]:
    """Writes all that hold the packed model; (a model with packed layers, {artefact: its size, or
    why there is none}).

    build: makes a model that the packed one fits, with any weights.
    """
    export.save(packed, folder / PACKED)
    told = {PACKED: size_of(folder / PACKED)}
    model = None
    makers: dict[str, Callable[[Path], Any]] = {
        FOLDER: lambda path: _to_transformers(path, folder / PACKED, build(), tokenizer),
        TORCHAO: lambda path: _to_torchao(path, packed, build(), tokenizer),
        COMPRESSED: lambda path: _to_compressed_tensors(path, packed, build(), tokenizer),
        GGUF: lambda path: _to_gguf(path, packed, build().config, tokenizer),
    }
    for name, make in makers.items():
        path = folder / name
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = make(path)
        except (ImportError, ValueError) as error:
            told[name] = f"none: {' '.join(str(error).split())}"
            continue
        model = made if name == FOLDER else model
        told[name] = size_of(path)
    return model, told


def _to_transformers(path: Path, file: Path, model: Any, tokenizer: Any) -> Any:
    from parq_fn.export.hugging_face import quantize_pretrained

    made = quantize_pretrained(model, file)
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return made


def _to_torchao(path: Path, packed: dict[str, Any], model: Any, tokenizer: Any) -> None:
    from parq_fn.export.torchao import to_torchao

    made: Any = to_torchao(model, packed)
    made.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _to_compressed_tensors(path: Path, packed: dict[str, Any], model: Any, tokenizer: Any) -> None:
    from parq_fn.export.compressed_tensors import to_compressed_tensors

    to_compressed_tensors(model, packed, path)
    tokenizer.save_pretrained(path)


def _to_gguf(path: Path, packed: dict[str, Any], config: Any, tokenizer: Any) -> None:
    from parq_fn.export.gguf import to_gguf

    to_gguf(packed, path, config=config, tokenizer=tokenizer)


def size_of(path: Path) -> str:
    """Bytes of a file, or of all in a folder.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "file"
    >>> _ = file.write_bytes(bytes(1234))
    >>> size_of(file)
    '1,234 bytes'
    """
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return f"{sum(f.stat().st_size for f in files):,} bytes"
