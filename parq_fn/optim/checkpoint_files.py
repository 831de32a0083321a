"""The files of a checkpoint folder: which belong to it, whether they are as they were written, and
how new ones take the place of old ones.

torch.distributed.checkpoint writes data files and `.metadata`, a pickle that says what lies where
in them. Here a data file is named "__ID_RANK_NUMBER.distcp" with an ID of its checkpoint's own, and
".metadata.ID.sha256" holds the digests of all files, as `sha256sum -c` reads them. So the files of
two checkpoints may stand side by side, and the one that `.metadata` names is the one that counts: a
new one takes the place of an old one when its `.metadata` is renamed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pickle
import re
import secrets
import shutil
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan

from parq_fn.optim.checkpoint_bytes import Unpickler

INDEX = ".metadata"
_DATA = re.compile(r"__(?P<id>[0-9a-f]{8})_\d+_\d+\.distcp")
_DIGESTS = re.compile(r"\.metadata\.(?P<id>[0-9a-f]{8})\.sha256")
_TORCHS = re.compile(r"__\d+_\d+\.distcp")
_LONGEST = 255  # bytes of a file's name
_PIECE = 1 << 20  # bytes that are read at a time


# Where


def target_of(folder: str | os.PathLike[str]) -> Path:
    """The folder, absolute and behind symbolic links; raises ValueError for an empty path."""
    name = os.fsdecode(folder)
    if not name:
        raise ValueError("got an empty path, expected a folder for a checkpoint")
    return Path(os.path.realpath(name))


def unfinished_of(final: Path) -> Path:
    """Where a checkpoint is written, before it takes its place."""
    return _beside(final, "unfinished")


def found(folder: str | os.PathLike[str]) -> Path:
    """The folder, or the one that it was to take the place of when an earlier version's saving was
    killed between two renames."""
    final = target_of(folder)
    old = _beside(final, "old")
    return old if not final.exists() and old.is_dir() else final


def _beside(final: Path, what: str) -> Path:
    name = f".{final.name}.parq_fn-{what}"
    if len(os.fsencode(name)) > _LONGEST:
        name = f".{hashlib.sha256(os.fsencode(final.name)).hexdigest()}.parq_fn-{what}"
    return final.parent / name


def check_target(final: Path) -> None:
    """Raises ValueError unless a checkpoint may be written there: where there is nothing yet, an
    empty folder, or a checkpoint."""
    unfinished = unfinished_of(final)
    if os.path.lexists(final) and not (final.is_dir() and _is_empty_or_indexed(final)):
        raise ValueError(f"{final} is no checkpoint and not empty; give a folder of its own")
    if os.path.lexists(unfinished) and not _is_a_part(unfinished):
        raise ValueError(
            f"{unfinished} is in the way, and holds what no checkpoint does; move it, or give "
            "another path"
        )


def _is_empty_or_indexed(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return not names or INDEX in names


def _is_a_part(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(entry.name.startswith((INDEX, "__")) for entry in folder.iterdir())


# Writing


class Writer(FileSystemWriter):
    """torch's own, with names of files that no other checkpoint has, and OSErrors as such."""

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Names the files of all ranks; called on the first."""
        own = secrets.token_hex(4)
        named = []
        for plan in super().prepare_global_plan(plans):
            data = plan.storage_data
            prefix = f"__{own}_{data.prefix.removeprefix('__')}"
            named.append(
                dataclasses.replace(plan, storage_data=dataclasses.replace(data, prefix=prefix))
            )
        return named

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        """Writes a rank's files. torch raises a RuntimeError of its own over a full disk's."""
        try:
            return super().write_data(plan, planner)
        except Exception as error:
            raise _os_error(error) or error from None


def _os_error(error: BaseException) -> OSError | None:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def digests_of(folder: Path, rank: int, world: int) -> dict[str, str]:
    """{file: sha256} of this rank's share of a folder's files."""
    names = sorted(entry.name for entry in folder.iterdir())
    return {name: _digest(folder / name) for name in names[rank::world]}


def _digest(file: Path) -> str:
    found, piece = hashlib.sha256(), bytearray(_PIECE)
    with file.open("rb", buffering=0) as opened:
        while size := opened.readinto(piece):
            found.update(memoryview(piece)[:size])
    return found.hexdigest()


def start(final: Path) -> Path:
    """An empty folder to write to."""
    unfinished = unfinished_of(final)
    old = found(final)
    if old != final:
        old.rename(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    return unfinished


def take_place(final: Path, digests: dict[str, str]) -> None:
    """What was written becomes the checkpoint: by one rename, of the folder where there was none,
    of `.metadata` where there was. Of the old one the files are removed, and nothing else is
    touched. Raises FileNotFoundError where another save has written there too."""
    unfinished = unfinished_of(final)
    ids = {match["id"] for name in digests if (match := _DATA.fullmatch(name))}
    if len(ids) != 1 or INDEX not in digests:
        raise FileNotFoundError(
            f"{unfinished} does not hold what was written to it, but {sorted(digests)}; another "
            "save to the same folder runs at the same time"
        )
    listed = f"{INDEX}.{ids.pop()}.sha256"
    with (unfinished / listed).open("w", newline="\n") as file:
        file.writelines(f"{digests[name]}  {name}\n" for name in sorted(digests))
        file.flush()
        os.fsync(file.fileno())
    if not final.exists():
        unfinished.rename(final)
        return
    new = {*digests, listed}
    superseded = {name for name in _files_of(final) if name not in new}
    for name in sorted(new - {INDEX}):
        os.replace(unfinished / name, final / name)
    os.replace(unfinished / INDEX, final / INDEX)
    for name in sorted(superseded):
        (final / name).unlink(missing_ok=True)
    unfinished.rmdir()


def give_up(final: Path) -> None:
    """Removes what was written and did not take its place."""
    unfinished = unfinished_of(final)
    if not unfinished.exists():
        return
    shutil.rmtree(unfinished, ignore_errors=True)
    if (final / INDEX).exists():
        for name in _files_of(final) - _files_of(final, current=True):
            (final / name).unlink(missing_ok=True)


def _files_of(folder: Path, current: bool = False) -> set[str]:
    """The files in a folder that checkpoints wrote, all but `.metadata`: those that it names, and
    those whose names are ours.

    current: of the checkpoint that counts alone.
    """
    ours = {e.name for e in folder.iterdir() if _DATA.fullmatch(e.name) or _is_digests(e.name)}
    try:
        named = {*sizes_of(read_index(folder), folder)}
    except (ValueError, OSError):  # it is damaged, or there is none
        return ours
    named = {name for name in named if _TORCHS.fullmatch(name) or _DATA.fullmatch(name)}
    if not current:
        return ours | named
    ids = {match["id"] for name in named if (match := _DATA.fullmatch(name))}
    return named | {name for name in ours if (m := _DIGESTS.fullmatch(name)) and m["id"] in ids}


def _is_digests(name: str) -> bool:
    return _DIGESTS.fullmatch(name) is not None


# Reading


def check_files(where: Path, rank: int, world: int) -> Metadata:
    """The index of a checkpoint whose files are as they were written; of their contents each rank
    reads its share: for digests, or where there are none for the checksums of torch's own.

    Raises FileNotFoundError where there is no checkpoint, ValueError for one that was damaged.
    """
    if not where.is_dir():
        found = "is a file" if where.exists() else "is not there"
        raise FileNotFoundError(
            f"no checkpoint at {where}, which {found}; give the folder that save_checkpoint wrote"
        )
    index = read_index(where)
    sizes = sizes_of(index, where)
    ids = {match["id"] for name in sizes if (match := _DATA.fullmatch(name))}
    if not ids and all(map(_TORCHS.fullmatch, sizes)):
        listed: dict[str, str] = {}  # torch wrote it, perhaps over one of ours
    elif len(ids) != 1:
        raise ValueError(f"checkpoint {where}: {INDEX} was damaged or cut off: {sorted(sizes)}")
    else:
        listed = _listed(where, f"{INDEX}.{ids.pop()}.sha256")
        if _digest(where / INDEX) != listed.get(INDEX) or listed.keys() != {*sizes, INDEX}:
            raise ValueError(
                f"checkpoint {where}: {INDEX} was damaged or cut off, or its digests were; its "
                "sha256 is not theirs"
            )
    for name, end in sorted(sizes.items()):
        file = where / name
        size = file.stat().st_size if file.is_file() else 0
        if size < end:
            raise ValueError(
                f"checkpoint {where}: {name} was cut off; it has {size} bytes, expected {end}"
            )
    if not listed:
        for key in list(index.storage_data)[rank::world]:
            _check_part(where, index, key)
    for name in sorted(listed)[rank::world]:
        if _digest(where / name) != listed[name]:
            raise ValueError(
                f"checkpoint {where}: {name} was damaged or cut off; its sha256 is not that of its "
                "digests"
            )
    return index


def _check_part(where: Path, index: Metadata, key: MetadataIndex) -> None:
    """Raises ValueError unless a part of a file is what torch.save writes, with the checksums
    (CRC-32) of its contents, and the tensor that the index says."""
    name: Any = getattr(key, "fqn", key)  # of a damaged index anything
    try:
        part, stored = index.storage_data[key], index.state_dict_metadata[name]
        if part.transform_descriptors:  # it is compressed
            return
        with (where / part.relative_path).open("rb") as file:
            file.seek(part.offset)
            content = io.BytesIO(file.read(part.length))
        archive = zipfile.ZipFile(content)
        for entry in archive.infolist():
            if entry.CRC:  # or torch.serialization.set_crc32_options(False) was called
                archive.read(entry)
        if isinstance(stored, TensorStorageMetadata):
            content.seek(0)
            found = torch.load(content, map_location="cpu", weights_only=True)
            sizes = [chunk.sizes for chunk in stored.chunks if chunk.offsets == key.offset]
            if found.dtype != stored.properties.dtype or found.shape not in sizes:
                raise ValueError(f"a tensor {tuple(found.shape)} of {found.dtype}")
    except OSError:
        raise
    except Exception as error:  # a damaged archive or index may do anything
        raise ValueError(
            f"checkpoint {where}: {name!r}, or what {INDEX} says of it, was damaged or cut off "
            f"({error!r})"
        ) from None


def _listed(where: Path, name: str) -> dict[str, str]:
    try:
        lines = (where / name).read_bytes().decode("ascii").splitlines(keepends=True)
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ValueError(f"checkpoint {where}: {name} was damaged or cut off ({error})") from None
    found: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64})  (\S+)\n", line)
        if match is None or match[2] in found:
            raise ValueError(f"checkpoint {where}: {name} was damaged or cut off: {line!r}")
        found[match[2]] = match[1]
    return found


def read_index(where: Path) -> Metadata:
    """`.metadata`; raises ValueError where it is missing, damaged, or holds other classes than
    torch's checkpoints do."""
    try:
        with (where / INDEX).open("rb") as file:
            index = _Unpickler(file).load()
    except FileNotFoundError:
        raise ValueError(
            f"checkpoint {where} has no {INDEX}, which is written last: its writing was cut off"
        ) from None
    except OSError:
        raise
    except Exception as error:  # a pickle that was damaged may do anything
        raise ValueError(f"checkpoint {where}: {INDEX} was damaged or cut off ({error})") from None
    if not isinstance(index, Metadata):
        raise ValueError(f"checkpoint {where}: {INDEX} was damaged; it is a {type(index).__name__}")
    return index


def sizes_of(index: Metadata, where: Path) -> dict[str, int]:
    """{file: the bytes that it has at least}."""
    ends: dict[str, int] = {}
    try:
        for part in index.storage_data.values():
            name, end = part.relative_path, part.offset + part.length
            if Path(name).name != name or min(part.offset, part.length) < 0:
                raise ValueError(f"{name!r} from {part.offset} on, of {part.length} bytes")
            ends[name] = max(end, ends.get(name, 0))
        _check_entries(index)
    except Exception as error:
        raise ValueError(f"checkpoint {where}: {INDEX} was damaged ({error})") from None
    return ends


def _check_entries(index: Metadata) -> None:
    for stored in index.state_dict_metadata.values():
        if isinstance(stored, TensorStorageMetadata):
            torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")
        elif not isinstance(stored, BytesStorageMetadata):
            raise ValueError(f"an entry is a {type(stored).__name__}")
    paths: Any = index.planner_data or {}
    for key, path in paths.items():
        whole = isinstance(path, tuple) and path and all(isinstance(e, str | int) for e in path)
        if not whole or ".".join(map(str, path)) != key or key not in index.state_dict_metadata:
            raise ValueError(f"the entry {key!r} is called {path!r}")


#: Modules all of whose own classes are descriptions, and do nothing when they are made.
_DESCRIPTIONS = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed._shard.sharded_tensor.metadata",  # of earlier versions of torch
)
_ALLOWED = {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("torch", "device"),
    ("collections", "OrderedDict"),
}


def _member(owner: Any, name: Any) -> Any:
    """A member of an enumeration, which some versions of Python write as getattr(owner, name)."""
    if isinstance(owner, type) and issubclass(owner, Enum) and name in owner.__members__:
        return owner[name]
    raise pickle.UnpicklingError(f"it holds {name!r} of {owner!r}, which torch does not write")


class _Unpickler(Unpickler):
    """Of what torch writes to `.metadata`, and of no other class or function."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if module.split(".")[0] == "pathlib":  # where it was saved, perhaps on another system
            return Path
        if module in _DESCRIPTIONS or (module, name) in _ALLOWED:
            got = super().find_class(module, name)
            if (module, name) in _ALLOWED or (isinstance(got, type) and got.__module__ == module):
                return got
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which torch does not write")
