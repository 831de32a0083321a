"""Files of packed models: safetensors, written whole or not at all, every byte checked.

A packed weight is two tensors, NAME.codes and NAME.levels; the others are as they are. What else
belongs to it is JSON under the one key "parq_fn" of the metadata (of several keys the order would
not be fixed), with the format's version and a SHA-256 of the file with zeros in its own place, so
that a change of any byte is noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parq_fn.export.packing import Packed

VERSION = 1
_BLANK = "0" * 64
_KEY = "parq_fn"
_MARK = rb"\"sha256\":\""  # JSON within JSON


def save(packed: Mapping[str, Packed | Tensor], file: str | os.PathLike[str]) -> None:
    """Writes a packed model, as of `pack`, to a file, which is replaced in one move.

    The same model gives the same bytes. Raises ImportError without safetensors, ValueError for
    names that would collide.
    """
    safetensors = _safetensors()
    tensors: dict[str, Tensor] = {}
    about: dict[str, Any] = {}
    for name, entry in packed.items():
        parts = {name: entry}
        if isinstance(entry, Packed):
            parts = {f"{name}.codes": entry.codes, f"{name}.levels": entry.levels}
            own = {"shape": list(entry.shape), "quantizer": entry.quantizer}
            about[name] = {**own, "granularity": entry.granularity}
        taken = parts.keys() & tensors.keys()
        if taken:
            raise ValueError(f"two tensors of the file would be named {sorted(taken)}")
        for key, part in parts.items():
            assert isinstance(part, Tensor)
            tensors[key] = part.detach().cpu().contiguous()
    header = {"names": list(packed), "packed": about, "sha256": _BLANK, "version": VERSION}
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    data = bytearray(safetensors.torch.save(tensors, {_KEY: text}))
    start = _place_of_hash(data)
    data[start : start + 64] = hashlib.sha256(data).hexdigest().encode()
    _write(Path(file), data)


def load(file: str | os.PathLike[str]) -> dict[str, Packed | Tensor]:
    """Reads what `save` wrote.

    Raises ValueError, naming the file, for one that is cut off, was changed, is no packed model,
    or is of a newer version; FileNotFoundError; ImportError without safetensors.
    """
    safetensors = _safetensors()
    path = Path(file)
    data = bytearray(path.read_bytes())
    _check(path, data)
    whole = bytes(data)
    tensors = safetensors.torch.load(whole)
    header = _header(whole)
    for name, own in header["packed"].items():
        codes, levels = tensors[f"{name}.codes"], tensors[f"{name}.levels"]
        shape = tuple(own["shape"])
        tensors[name] = Packed(codes, levels, shape, own["quantizer"], own["granularity"])
    return {name: tensors[name] for name in header["names"]}


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("files need safetensors: pip install 'parq_fn[export]'") from None
    return safetensors


def _end_of_header(data: bytes | bytearray) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _header(data: bytes | bytearray) -> dict[str, Any]:
    """Our part of the metadata. Raises ValueError, KeyError or TypeError where there is none."""
    text = json.loads(bytes(data[8 : _end_of_header(data)]))["__metadata__"][_KEY]
    found: dict[str, Any] = json.loads(text)
    return found


def _place_of_hash(data: bytearray) -> int:
    """Where the hash stands in the header."""
    return data.index(_MARK, 8, _end_of_header(data)) + len(_MARK)


def _check(path: Path, data: bytearray) -> None:
    """Raises ValueError unless every byte is as it was written."""
    if len(data) < 8 or len(data) < _end_of_header(data):
        raise ValueError(f"{path} is cut off: {len(data)} bytes are less than its header")
    try:
        version, start = _header(data)["version"], _place_of_hash(data)
    except (ValueError, KeyError, TypeError):  # wrong UTF-8 and JSON are ValueErrors
        raise ValueError(
            f"{path} is no packed model of parq_fn, or its header was changed"
        ) from None
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"{path} is of format version {version}, this release reads up to {VERSION}"
        )
    kept, blank = bytes(data[start : start + 64]), bytearray(data)
    blank[start : start + 64] = _BLANK.encode()
    if hashlib.sha256(blank).hexdigest().encode() != kept:
        raise ValueError(f"{path} was changed or cut off: its checksum does not fit")


def _write(path: Path, data: bytearray) -> None:
    """Writes a file beside the path and moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def table(packed: Mapping[str, Packed | Tensor]) -> str:
    """Layer, shape, bits, granularity, bytes and compression against float32, as text.

    >>> from parq_fn.export import pack_weight
    >>> print(table({"w": pack_weight(torch.ones(4, 8), torch.tensor([[-1.0, 1.0]]))}))
    layer  shape   dtype    bits  granularity  bytes  of float32
    w      [4, 8]  float32     1                  12        9.4%
    all                                           12        9.4%
    """
    rows = [("layer", "shape", "dtype", "bits", "granularity", "bytes", "of float32")]
    total = full = 0
    for name, entry in packed.items():
        tensor = entry.levels if isinstance(entry, Packed) else entry
        count = torch.Size(entry.shape).numel()
        size = entry.num_bytes if isinstance(entry, Packed) else count * entry.element_size()
        bits = entry.bits if isinstance(entry, Packed) else 8 * entry.element_size()
        granularity = entry.granularity if isinstance(entry, Packed) else "-"
        kind = str(tensor.dtype).removeprefix("torch.")
        share = f"{100 * size / max(1, 4 * count):.1f}%"
        rows.append(
            (name, str(list(entry.shape)), kind, f"{bits:g}", granularity, f"{size:,}", share)
        )
        total, full = total + size, full + 4 * count
    rows.append(("all", "", "", "", "", f"{total:,}", f"{100 * total / max(1, full):.1f}%"))
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    left = (0, 1, 2, 4)
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
