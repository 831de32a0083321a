"""Packed weights in GGUF files, as blocks that hold them exactly.

A block is a float16 scale d and whole numbers q: of TQ1_0 and TQ2_0 256 weights d q, q in -1, 0, 1;
of Q4_0 32 weights d q, q in -8 .. 7. Blocks run along the last dimension.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from parq_fn.export.given import check_packed
from parq_fn.export.grid import as_multiples, even_grid, off_grid
from parq_fn.export.packing import Packed
from parq_fn.foundation.tree import matches
from parq_fn.foundation.value import check_flags

_WHOLE = (
    torch.float16, torch.float32, torch.float64,
    torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
_SIZES = {"Q4_0": 32, "TQ1_0": 256, "TQ2_0": 256}


def to_gguf(
    packed: Mapping[str, Packed | Tensor],
    file: str | os.PathLike[str],
    *,
    arch: str = "parq_fn",
    ternary: Literal["TQ1_0", "TQ2_0"] = "TQ2_0",
    in_full: str | Iterable[str] = (),
    rounded: bool = False,
) -> dict[str, str]:
    """Writes a packed model as a GGUF file; returns the type that each packed weight got.

    Levels -v, 0, v become `ternary`: TQ2_0 at 2 bits a weight, TQ1_0 at 1.6. Levels that are
    multiples -8 .. 7 of one number become Q4_0, their scale the quantizer's, half of it for half
    multiples. What matches a pattern of `in_full` is unpacked to float32; what is not packed is
    written as it is, bfloat16 as float32.

    packed: what `pack` gives, or a file's content from `load`.
    file: to write to.
    arch: the architecture that the file names.
    ternary: the type of ternary weights.
    in_full: patterns of names, such as "head.*".
    rounded: round scales to float16, and levels that are not evenly spaced to multiples of a
    seventh of the largest, and warn of the error; without it such levels are refused.

    Raises ImportError without gguf; ValueError, with the parameter's name, for levels that no
    block holds exactly, for last dimensions that are not whole blocks, and for names of more than
    63 bytes or tensors of more than 4 dimensions, which readers refuse.
    """
    if ternary not in ("TQ1_0", "TQ2_0"):
        raise ValueError(f"to_gguf: ternary must be 'TQ1_0' or 'TQ2_0', got {ternary!r}")
    check_flags("to_gguf", rounded=rounded)
    check_packed("to_gguf", packed)
    gguf = _gguf()
    patterns = [in_full] if isinstance(in_full, str) else list(in_full)
    kinds: dict[str, str] = {}
    tensors: list[tuple[str, np.ndarray, Any]] = []
    for name, entry in packed.items():
        if len(name.encode()) > 63 or len(entry.shape) > 4:
            raise ValueError(
                f"parameter {name!r}, shape {tuple(entry.shape)}: readers of GGUF take names of up "
                "to 63 bytes and 4 dimensions; rename or reshape it in the packed model"
            )
        if not isinstance(entry, Packed) or any(matches(p, name) for p in patterns):
            full = entry.unpack() if isinstance(entry, Packed) else entry
            wide = full.float() if full.dtype == torch.bfloat16 else full
            if wide.dtype not in _WHOLE:
                raise ValueError(f"{name!r} is {wide.dtype}, which GGUF has no type for")
            tensors.append((name, wide.detach().cpu().contiguous().numpy(), None))
            continue
        kind, codes, scale = _blocks(name, entry, ternary, rounded)
        kinds[name] = kind
        data = (_q4_0 if kind == "Q4_0" else _ternary(gguf, kind))(codes, scale)
        data = data.reshape(*entry.shape[:-1], -1)
        tensors.append((name, data, gguf.GGMLQuantizationType[kind]))
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        writer = gguf.GGUFWriter(unfinished, arch)
        for name, data, stored in tensors:
            writer.add_tensor(name, data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return kinds


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("to_gguf needs gguf: pip install 'parq_fn[gguf]'") from None
    return gguf


def _blocks(
    name: str, entry: Packed, ternary: str, rounded: bool
) -> tuple[str, np.ndarray, np.ndarray]:
    """(type; whole numbers [rows, blocks, size], int8; scales [rows, blocks], float16)."""
    levels = entry.levels.float()  # readers multiply in float32
    grid = entry.even
    found = None if grid is None else as_multiples(entry.levels, grid, levels.dtype)
    if found is None or not bool(found.within(-8, 7).all()):
        found = even_grid(levels, -8, 7, rounded=7)
    multiples, unit = found.multiples, found.unit
    kind = ternary if bool((multiples.abs() <= 1).all()) else "Q4_0"
    error = (multiples.float() * unit.half().float() - levels).double().abs().amax(-1)
    error = torch.where(unit.half().isfinite().squeeze(-1), error, torch.inf)
    if bool(error.any()):
        reason = f"multiples -8 .. 7 of one float16, as {kind} blocks hold them"
        off_grid(name, levels, error, reason, rounded, grid)
    size = _SIZES[kind]
    (*_, last), (r, n) = (1, *entry.shape), entry.indices().shape
    held = bool(entry.shape) and last > 0 and last % size == 0
    if held and entry.cut is None:
        held = n % size == 0 or r == 1
    elif held:
        of_row = entry.restored(torch.arange(r).unsqueeze(1).expand(r, n)).reshape(-1, size)
        held = bool((of_row == of_row[:, :1]).all())
    if not held:
        cut = "" if entry.cut is None else f" of {entry.cut!r}"
        raise ValueError(
            f"parameter {name!r}: {kind} holds blocks of {size} along the last dimension; its "
            f"shape is {tuple(entry.shape)} in rows of {n}{cut}; name it in in_full to keep it in "
            "float"
        )
    codes = entry.restored(multiples.gather(1, entry.indices())).reshape(-1, last // size, size)
    scale = entry.restored(unit.half().expand(r, n)).reshape(-1, last // size, size)[..., 0]
    return kind, codes.to(torch.int8).cpu().numpy(), scale.cpu().numpy()


def _q4_0(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Blocks of a scale and 16 bytes: weight i in the low half of byte i, i + 16 in the high."""
    shifted = (codes + 8).astype(np.uint8)
    halves = shifted[..., :16] | (shifted[..., 16:] << 4)
    bytes_of_scale = scale.astype("<f2")[..., None].view(np.uint8)
    return np.concatenate([bytes_of_scale, halves], -1).reshape(len(codes), -1)


def _ternary(gguf: Any, kind: str) -> Any:
    def quantize(codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        weights = codes * scale.astype(np.float32)[..., None]
        made: np.ndarray = gguf.quants.quantize(
            weights.reshape(len(codes), -1), gguf.GGMLQuantizationType[kind]
        )
        return made

    return quantize
