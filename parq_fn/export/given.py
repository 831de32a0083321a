"""What callers give in the place of a packed model or of a file, told in a sentence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from parq_fn.foundation.value import briefly

_TORCH = "torch.save(parq_fn.export.unpack(packed), file) writes plain weights there"
#: How files of other formats are written, by what their names end in.
_OTHERS = {
    ".gguf": "parq_fn.export.gguf.to_gguf(packed, file) writes one",
    ".onnx": "parq_fn.export.onnx.to_onnx(module, packed, args, file) writes one",
    **dict.fromkeys((".pt", ".pth", ".ckpt"), _TORCH),
    ".npz": "numpy.savez(file, **parq_fn.export.unpack(packed)) writes plain weights there",
}
#: What files of other programs begin with, what they are, and what reads them.
_BEGINNINGS = {
    b"PK\x03\x04": "a file of torch.save or a zip archive; torch.load reads the first",
    b"GGUF": "a GGUF file; the gguf package reads it",
    b"\x89HDF": "an HDF5 file; h5py reads it",
    b"\x80": "a pickle, such as torch.save wrote before 1.6",
}


def check_packed(who: str, packed: Any) -> None:
    """Raises TypeError unless this is a packed model, {name: Packed or tensor}.

    >>> check_packed("table", "net.safetensors")
    Traceback (most recent call last):
    TypeError: table: expected a packed model, {name: Packed or tensor}, got 'net.safetensors';
    parq_fn.export.load(file) reads one
    """
    if isinstance(packed, Mapping):
        wrong = {k: e for k, e in packed.items() if not (_is_entry(e) and isinstance(k, str))}
        if not wrong:
            return
        name, entry = next(iter(wrong.items()))
        got = f"the name {name!r}" if _is_entry(entry) else f"{briefly(entry)} for {name!r}"
        raise TypeError(
            f"{who}: expected a packed model, {{name: Packed or tensor}}, got {got}; "
            "pack(module, optimizer) makes one"
        )
    help = "pack(module, optimizer) makes one"
    if isinstance(packed, str | os.PathLike):
        help = "parq_fn.export.load(file) reads one"
    elif _is_entry(packed):
        help = "one weight has a name, as in {'weight': packed}"
    elif isinstance(packed, list):
        help = "of what stream gives, {entry.name: entry.make() for entry in entries} is one"
    kind = type(packed).__name__ if isinstance(packed, nn.Module) else briefly(packed)
    raise TypeError(
        f"{who}: expected a packed model, {{name: Packed or tensor}}, got {kind}; {help}"
    )


def _is_entry(given: Any) -> bool:
    """Whether it is a tensor, or a Packed, which is defined above this file."""
    return isinstance(given, Tensor) or hasattr(given, "unpack")


def check_file(who: str, file: Any) -> None:
    """Raises TypeError unless this is a file's name."""
    if not isinstance(file, str | os.PathLike):
        raise TypeError(f"{who}: expected a file's name, got {type(file).__name__}")


def check_ending(file: Path) -> None:
    """Raises ValueError for a name by which other programs would take a packed file for theirs."""
    other = _OTHERS.get(file.suffix.lower())
    if other is not None:
        raise ValueError(
            f"save: {file.name!r} is to be a packed file, which is none of {file.suffix}: {other}; "
            f"or name the packed file {file.stem + '.safetensors'!r}"
        )


def check_beginning(file: Path, data: bytes | bytearray) -> None:
    """Raises ValueError for a file of another program."""
    for start, what in _BEGINNINGS.items():
        if data[: len(start)] == start and data[8:9] != b"{":
            raise ValueError(f"{file} is no packed model of parq_fn but {what}")
