"""Files of packed models: safetensors, written whole or not at all, every byte checked.

A packed weight is two tensors, NAME.codes and NAME.levels; the others are as they are. What else
belongs to it is JSON under the one key "parq_fn" of the metadata (of several keys the order would
not be fixed), with the format's version and a SHA-256 of the file with zeros in its own place, so
that a change of any byte is noticed.

Version 3 has "from", {"levels": ..., "dtype": ..., "parts": [...]}, the number and the dtype of
levels that follow from fewer numbers, and what these are, which stand in the levels' place:
NAME.step and NAME.first, or NAME.scale, NAME.numbers and where there is one NAME.shift, or
NAME.half, the upper half of symmetric levels (see `few_numbers`).

Version 2 has "grid", true, where a packed weight is four tensors, NAME.step and NAME.first too: the
step and first multiple of evenly spaced levels, where these do not say them. It has "cut", {"axis":
...} or {"size": ..., "along": ...}, as of per_channel and per_block, where rows are not runs of a
weight's logical order, and "orders", the order of dimensions in memory of tensors that are not
contiguous, such as [0, 2, 3, 1] for channels_last. Files without any of them are of version 1. A
file is of the first version that has what it needs, so that older releases read it.

What a file claims is checked before it is believed, for a checksum shows that nothing was changed
by accident, not who wrote it: see `load`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parq_fn.export.claims import (
    MOST_OF_ONE_LEVEL,
    WRONG,
    believed,
    is_text,
)
from parq_fn.export.codes import num_bytes
from parq_fn.export.cuts import cut_as_json
from parq_fn.export.few_numbers import parts_of
from parq_fn.export.given import check_beginning, check_ending, check_file, check_packed
from parq_fn.export.packing import Entry, Packed
from parq_fn.foundation.memory import order_of
from parq_fn.transforms.sharded import is_dtensor

VERSION = 3
_BLANK = "0" * 64
_KEY = "parq_fn"
_OURS = re.compile(rb'"__metadata__"\s*:\s*\{\s*"parq_fn"\s*:\s*"')  # which no name can hold
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

    A file that is a symbolic link stays one: what it leads to is replaced.

    The same model gives the same bytes, sharded or not. Raises TypeError for what is not packed
    and for a dtype that files have no name for; ValueError for a file that is named as another
    format's, such as net.gguf, with what writes that, for names that would collide or that are no
    text, for weights of one level that are more than 16 Mi together, and as `pack` does;
    and OSError, on every rank, where the file cannot be written.
    """
    if not (isinstance(packed, list) and all(isinstance(entry, Entry) for entry in packed)):
        check_packed("save", packed)
    check_file("save", file)
    path = file_of(file)
    check_ending(path)
    parts = _parts(packed)
    sharded = any(isinstance(e, Entry) and is_dtensor(e.source) for _, e in _entries(packed))
    _in_ranks(path, parts, _header_of(packed, parts), sharded)


def file_of(given: str | os.PathLike[str]) -> Path:
    """Where a file of this name is to be written, behind symbolic links.

    Raises FileNotFoundError for an empty name, IsADirectoryError for a folder's.
    """
    name = os.fspath(given)
    if not name:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    path = Path(os.path.realpath(name))
    if name.endswith(os.sep) or path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    return path


class _Part(NamedTuple):
    """A tensor of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _parts(packed: Mapping[str, Packed | Tensor] | list[Entry]) -> list[_Part]:
    """The file's tensors in its order: the widest dtypes first, which keeps all aligned."""
    parts: dict[str, _Part] = {}
    constants = 0
    for name, entry in _entries(packed):
        if name == "__metadata__" or not is_text(name):
            raise ValueError(f"files take no tensor of the name {name!r}; choose another")
        levels = entry.levels if isinstance(entry, Packed | Entry) else None
        shape = tuple(entry.source.shape if isinstance(entry, Entry) else entry.shape)
        if levels is None:
            tensor = entry.source if isinstance(entry, Entry) else entry
            own = [_Part(name, tensor.dtype, shape, partial(_made, entry))]
        else:
            constants += torch.Size(shape).numel() if levels.shape[1] == 1 else 0
            if constants > MOST_OF_ONE_LEVEL:
                raise ValueError(
                    f"weights of one level, {name!r} the last of them, are {constants} elements, "
                    f"and files hold up to {MOST_OF_ONE_LEVEL}; leave them out, or keep them as "
                    "they are"
                )
            size = (num_bytes(torch.Size(shape).numel(), levels.shape[1]),)
            own = [_Part(f"{name}.codes", torch.uint8, size, partial(_made, entry))]
            own += [
                _Part(f"{name}.{what}", part.dtype, tuple(part.shape), partial(_itself, part))
                for what, part in _levels_of(entry).items()
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


def _levels_of(entry: Any) -> dict[str, Tensor]:
    """What a file holds of a packed weight's levels."""
    shape = entry.source.shape if isinstance(entry, Entry) else torch.Size(entry.shape)
    levels = entry.levels.detach()
    return parts_of(levels, entry.grid, entry.table, shape.numel())


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _made(entry: Packed | Tensor | Entry) -> Tensor:
    made = entry.make() if isinstance(entry, Entry) else entry
    return made.codes if isinstance(made, Packed) else made


def _header_of(packed: Mapping[str, Any] | list[Entry], parts: list[_Part]) -> bytearray:
    """The file's first bytes, up to the tensors, with the hash still blank."""
    about: dict[str, dict[str, Any]] = {}
    orders: dict[str, list[int]] = {}
    version = 1
    for name, entry in _entries(packed):
        tensor = entry.source if isinstance(entry, Entry) else entry
        order = tensor.order if isinstance(tensor, Packed) else order_of(tensor)
        if order is not None:
            orders[name], version = list(order), max(version, 2)
        if isinstance(entry, Packed) or (isinstance(entry, Entry) and entry.levels is not None):
            about[name] = {
                "shape": list(entry.source.shape if isinstance(entry, Entry) else entry.shape),
                "quantizer": entry.quantizer,
                "granularity": entry.granularity,
            }
            cut = entry.cut
            if cut is not None:
                about[name]["cut"], version = cut_as_json(cut), max(version, 2)
            if entry.grid is not None:
                about[name]["grid"], version = True, max(version, 2)
            held = _levels_of(entry)
            if "levels" not in held:
                levels: Any = entry.levels
                k, dtype = levels.shape[1], _NAMES[levels.dtype]
                about[name]["from"] = {"levels": k, "dtype": dtype, "parts": list(held)}
                version = 3
    names = [name for name, _ in _entries(packed)]
    own = {"names": names, "packed": about, "sha256": _BLANK, "version": version}
    if orders:
        own["orders"] = orders
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

    Raises ValueError, naming the file, for one that is cut off, was changed, is no packed model, is
    of a newer version, or claims what no model has (tensors that overlap or are in no list, shapes
    of other than whole numbers, codes of levels that are not there, more from one level than a file
    may hold); FileNotFoundError; ImportError without safetensors.
    """
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("files need safetensors: pip install 'parq_fn[export]'") from None
    check_file("load", file)
    if not os.fspath(file):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(file))
    path = Path(file)
    data = bytearray(path.read_bytes())
    own = _check(path, data)
    try:
        tensors = safetensors.torch.load(bytes(data))
        return believed(own, tensors)
    except (safetensors.SafetensorError, *WRONG) as error:
        what = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} has a header that does not fit its tensors: {what}") from None


def _end_of_header(data: bytes | bytearray) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def _header(data: bytes | bytearray) -> dict[str, Any]:
    """Our part of the metadata. Raises ValueError, KeyError or TypeError where there is none, or
    where a key stands twice."""
    whole = _read_json(bytes(data[8 : _end_of_header(data)]))
    found = _read_json(whole["__metadata__"][_KEY])
    if not isinstance(found, dict):
        raise TypeError(f"expected a dict, got {type(found).__name__}")
    return found


def _read_json(text: str | bytes) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key stands twice")
        return found

    return json.loads(text, object_pairs_hook=once)


def _place_of_hash(data: bytearray) -> int:
    """Where the hash stands in the header. Raises ValueError where there is none."""
    end = _end_of_header(data)
    ours = _OURS.search(data, 8, end)
    if ours is None:
        raise ValueError("no metadata of parq_fn")
    return data.index(_MARK, ours.end(), end) + len(_MARK)


def _check(path: Path, data: bytearray) -> dict[str, Any]:
    """Our part of the header. Raises ValueError unless every byte is as it was written."""
    check_beginning(path, data)
    if len(data) < 8 or len(data) < _end_of_header(data):
        raise ValueError(f"{path} is cut off: {len(data)} bytes are less than its header")
    try:
        own = _header(data)
        version, start = own["version"], _place_of_hash(data)
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
    return own


def _write(path: Path, header: bytearray, tensors: Iterable[memoryview]) -> None:
    """Writes a file beside the path and moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=".parq_fn-")
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
