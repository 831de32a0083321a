"""Files of packed models: safetensors, written whole or not at all, every byte checked.

A packed weight is two tensors, NAME.codes and NAME.levels; the others are as they are. What else
belongs to it is JSON under the one key "parq_fn" of the metadata (of several keys the order would
not be fixed), with the format's version and a SHA-256 of the file with zeros in its own place, so
that a change of any byte is noticed.

Version 2 has weights whose rows are not runs of their logical order, with "cut", {"axis": ...} or
{"size": ..., "along": ...}, as of per_channel and per_block. Files without such weights are of
version 1, which older releases read.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from parq_fn.export.codes import num_bytes
from parq_fn.export.packing import Entry, Packed
from parq_fn.quantizers.granularity import Granularity, per_block, per_channel

VERSION = 2
_BLANK = "0" * 64
_KEY = "parq_fn"
_MARK = rb"\"sha256\":\""  # JSON within JSON
#: What safetensors calls the dtypes of models.
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save(packed: Mapping[str, Packed | Tensor] | list[Entry], file: str | os.PathLike[str]) -> None:
    """Writes a packed model, as of `pack` or `stream`, to a file, which is replaced in one move.

    save(stream(module, optimizer), file) holds one parameter at a time. Every rank of a sharded
    module calls it; the first one writes, the others return when the file is there. What is not
    sharded is written by whoever calls.

    The same model gives the same bytes, sharded or not. Raises TypeError for a dtype that files
    have no name for, ValueError for names that would collide and as `pack` does; and OSError, on
    every rank, where the file cannot be written.
    """
    parts = _parts(packed)
    sharded = any(
        isinstance(e, Entry) and isinstance(e.source, DTensor) for _, e in _entries(packed)
    )
    _in_ranks(Path(file), parts, _header_of(packed, parts), sharded)


class _Part(NamedTuple):
    """A tensor of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _parts(packed: Mapping[str, Packed | Tensor] | list[Entry]) -> list[_Part]:
    """The file's tensors in its order: the widest dtypes first, which keeps all aligned."""
    parts: dict[str, _Part] = {}
    for name, entry in _entries(packed):
        levels = entry.levels if isinstance(entry, Packed | Entry) else None
        shape = tuple(entry.source.shape if isinstance(entry, Entry) else entry.shape)
        if levels is None:
            tensor = entry.source if isinstance(entry, Entry) else entry
            own = [_Part(name, tensor.dtype, shape, partial(_made, entry))]
        else:
            dtype = entry.source.dtype if isinstance(entry, Entry) else levels.dtype
            size = (num_bytes(torch.Size(shape).numel(), levels.shape[1]),)
            kept = partial(levels.detach().to, dtype)
            own = [
                _Part(f"{name}.codes", torch.uint8, size, partial(_made, entry)),
                _Part(f"{name}.levels", dtype, tuple(levels.shape), kept),
            ]
        for part in own:
            if part.name in parts:
                raise ValueError(f"two tensors of the file would be named {part.name!r}")
            if part.dtype not in _NAMES:
                raise TypeError(f"{part.name!r} is {part.dtype}, which files have no name for")
            parts[part.name] = part
    return sorted(parts.values(), key=lambda part: (-part.dtype.itemsize, part.name))


def _entries(packed: Mapping[str, Any] | list[Entry]) -> list[tuple[str, Any]]:
    if isinstance(packed, Mapping):
        return list(packed.items())
    return [(entry.name, entry) for entry in packed]


def _made(entry: Packed | Tensor | Entry) -> Tensor:
    made = entry.make() if isinstance(entry, Entry) else entry
    return made.codes if isinstance(made, Packed) else made


def _header_of(packed: Mapping[str, Any] | list[Entry], parts: list[_Part]) -> bytearray:
    """The file's first bytes, up to the tensors, with the hash still blank."""
    about: dict[str, dict[str, Any]] = {}
    version = 1
    for name, entry in _entries(packed):
        if isinstance(entry, Packed) or (isinstance(entry, Entry) and entry.levels is not None):
            about[name] = {
                "shape": list(entry.source.shape if isinstance(entry, Entry) else entry.shape),
                "quantizer": entry.quantizer,
                "granularity": entry.granularity,
            }
            cut = entry.cut
            if cut is not None:
                about[name]["cut"], version = cut_as_json(cut), 2
    names = [name for name, _ in _entries(packed)]
    own = {"names": names, "packed": about, "sha256": _BLANK, "version": version}
    header: dict[str, Any] = {"__metadata__": {_KEY: _json(own)}}
    end = 0
    for part in parts:
        start, end = end, end + torch.Size(part.shape).numel() * part.dtype.itemsize
        offsets = [start, end]
        header[part.name] = {
            "dtype": _NAMES[part.dtype], "shape": list(part.shape), "data_offsets": offsets
        }  # fmt: skip
    text = _json(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin aligned
    return bytearray(len(text).to_bytes(8, "little") + text)


def cut_as_json(cut: Granularity) -> dict[str, Any]:
    """The fields of a `Packed.cut`, by name, for JSON.

    >>> cut_as_json(per_channel((0, 2))), cut_as_json(per_block(32, along=0))
    ({'axis': [0, 2]}, {'size': 32, 'along': 0})
    """
    return {k: list(got) if isinstance(got, tuple) else int(got) for k, got in vars(cut).items()}


def cut_from_json(fields: dict[str, Any]) -> Granularity:
    """What `cut_as_json` gave, read again.

    Raises ValueError or TypeError for anything else.
    """
    own: dict[str, Any] = {
        k: tuple(got) if isinstance(got, list) else got for k, got in fields.items()
    }
    return per_channel(**own) if own.keys() == {"axis"} else per_block(**own)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _bytes_of(part: _Part) -> memoryview:
    tensor = part.make().detach().cpu().contiguous()
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _in_ranks(path: Path, parts: list[_Part], header: bytearray, many: bool) -> None:
    """Makes the tensors on every rank, where there are many, and writes them on the first; what
    fails there fails on all, when all have made theirs."""
    if many and dist.get_rank():
        for part in parts:
            part.make()
    failed: list[Any] = [None]
    if not many or not dist.get_rank():
        left = iter(parts)
        try:
            _write(path, header, map(_bytes_of, left))
        except OSError as error:
            failed = [error]
            for part in left:
                part.make()
    if many:
        dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]


def load(file: str | os.PathLike[str]) -> dict[str, Packed | Tensor]:
    """Reads what `save` wrote.

    Raises ValueError, naming the file, for one that is cut off, was changed, is no packed model,
    or is of a newer version; FileNotFoundError; ImportError without safetensors.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("files need safetensors: pip install 'parq_fn[export]'") from None
    path = Path(file)
    data = bytearray(path.read_bytes())
    _check(path, data)
    whole = bytes(data)
    tensors: dict[str, Any] = safetensors.torch.load(whole)
    header = _header(whole)
    try:
        for name, own in header["packed"].items():
            codes, levels = tensors[f"{name}.codes"], tensors[f"{name}.levels"]
            shape, cut = tuple(own["shape"]), own.get("cut")
            cut = None if cut is None else cut_from_json(cut)
            tensors[name] = Packed(codes, levels, shape, own["quantizer"], own["granularity"], cut)
        return {name: tensors[name] for name in header["names"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a header that does not fit its tensors: {error}") from None


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
    except (ValueError, KeyError, TypeError, RecursionError):  # wrong UTF-8 and JSON among them
        raise ValueError(
            f"{path} is no packed model of parq_fn, or its header was changed"
        ) from None
    if type(version) is not int or not 1 <= version <= VERSION:
        raise ValueError(
            f"{path} is of format version {version}, this release reads up to {VERSION}"
        )
    kept, blank = bytes(data[start : start + 64]), bytearray(data)
    blank[start : start + 64] = _BLANK.encode()
    if hashlib.sha256(blank).hexdigest().encode() != kept:
        raise ValueError(f"{path} was changed or cut off: its checksum does not fit")


def _write(path: Path, header: bytearray, tensors: Iterable[memoryview]) -> None:
    """Writes a file beside the path and moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            hashed = hashlib.sha256(header)
            stream.write(header)
            for tensor in tensors:
                hashed.update(tensor)
                stream.write(tensor)
            stream.seek(_place_of_hash(header))
            stream.write(hashed.hexdigest().encode())
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(unfinished, _mode(path))
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def _mode(path: Path) -> int:
    """The permissions of the file that is replaced, or of a new one."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


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
