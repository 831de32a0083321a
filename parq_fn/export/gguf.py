"""Packed weights in GGUF files, as blocks that hold them exactly; and whole language models, as
llama.cpp loads them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from parq_fn.export import gguf_tokens
from parq_fn.export.gguf_blocks import KINDS, Held, Kind, Levels, match
from parq_fn.export.gguf_models import Model, config_of
from parq_fn.export.given import check_packed
from parq_fn.export.packing import Packed
from parq_fn.foundation.tree import matches

_WHOLE = (
    torch.float16, torch.float32, torch.float64,
    torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip


def to_gguf(
    packed: Mapping[str, Packed | Tensor],
    file: str | os.PathLike[str],
    *,
    config: Any = None,
    tokenizer: Any = None,
    arch: str = "parq_fn",
    ternary: Literal["TQ1_0", "TQ2_0"] = "TQ2_0",
    types: str | Iterable[str] = (),
    in_full: str | Iterable[str] = (),
    rounded: bool | Literal["scale"] = False,
) -> dict[str, str]:
    """Writes a packed model as a GGUF file; returns the type that each packed weight got.

    Each weight gets the first type of this table that holds its levels exactly and whose blocks
    divide its last dimension: ternary weights of 96 columns become Q4_0. A scale is a float16
    number; that of MXFP4 is a power of two, those of NVFP4 are E4M3 numbers, one for 16 weights.

    | type | bits | block | holds |
    |---|---|---|---|
    | Q1_0 | 1.1 | 128 | a scale times -1, 1 |
    | TQ2_0, or TQ1_0 | 2.1, 1.7 | 256 | a scale times -1, 0, 1 |
    | Q4_0 | 4.5 | 32 | a scale, of either sign, times -8 .. 7 |
    | IQ4_NL | 4.5 | 32 | a scale times the numbers of `codebook.iq4_nl` |
    | MXFP4 | 4.3 | 32 | a scale times the numbers of `codebook.fp4` |
    | NVFP4 | 4.5 | 64 | a scale times the numbers of `codebook.fp4` |
    | Q4_1 | 5 | 32 | a scale times 0 .. 15, and a minimum |
    | Q8_0 | 8.5 | 32 | a scale times -128 .. 127 |

    Levels in float32 of `stored(quantizer, torch.float16)` are exact in the type of the second
    column. Those of the quantizer itself are so with their scale rounded (`rounded="scale"`), in
    the type of the third.

    | quantizer | stored: exact | itself: scale rounded |
    |---|---|---|
    | `lsbq(1)`, `uniform(1)` | Q1_0 | Q1_0 |
    | `lsbq(0)`, `ternary_uniform()`, `max_uniform(2)` | TQ2_0 | TQ2_0 |
    | `uniform(2)`, `uniform(3)`, `gaussian(2)` | Q4_0 | Q4_0 |
    | `integer(2)` to `integer(4)`, `max_uniform(3)`, `max_uniform(4)` | Q4_0 | Q4_0 |
    | `integer(8)`, `max_uniform(8)` | Q8_0 | Q8_0 |
    | `uniform(4)`, `asymmetric(4)` | Q8_0 | Q4_1 |
    | `affine(2)` to `affine(4)` | Q4_1 | Q4_1 |
    | `codebook.iq4_nl` | IQ4_NL | IQ4_NL |
    | `codebook.fp4` | Q8_0 | Q8_0 |
    | `mxfp4()` | MXFP4, as it is | |
    | `nvfp4()` | | NVFP4 |
    | `lsbq(2)` and more, `codebook.nf4`, `lloyd_max` | refused | refused |

    packed: what `pack` gives, or `load` reads.
    config: of the model, for a file that llama.cpp loads: a configuration of transformers such as
    `model.config`, its dict, or its folder; of Llama, Qwen 2 and 3, Gemma 1 to 3 (text). Names,
    hyperparameters and the order of rows are then llama.cpp's; one-dimensional weights are in
    float32. Without it names stay, and what reads the file knows what they mean.
    tokenizer: of transformers, or its folder; "bytes" where token i is byte i. Without one programs
    of llama.cpp's library give numbers of tokens to the file, and its server does not load it.
    file: to write to.
    arch: the architecture that the file names, without config.
    ternary: the type of ternary weights.
    types: those that may be used, such as "Q4_0"; all without any.
    in_full: patterns of names, such as "head.*", of what is unpacked to float32.
    rounded: "scale" rounds scales (and Q4_1's minima) where no type holds levels exactly; True also
    takes the nearest levels of up to 5 bits. Either warns of the error.

    What is not packed is written as it is, bfloat16 as float32 (with config, matrices as BF16).
    A scale that NVFP4 has of the whole tensor is NAME.scale beside it, as llama.cpp has it, which
    for Gemma and for embeddings it has not.

    Raises ImportError without gguf; ValueError, with the parameter's name, for levels that no
    type holds, for last dimensions that are not whole blocks, for names of more than 63 bytes or
    tensors of more than 4 dimensions, which readers refuse, and for a config, a tokenizer or
    weights that llama.cpp has no program for.

    Source: the GGUF specification; ggml's ggml-quants.c for blocks; llama.cpp's src/models for what
    each architecture computes.
    """
    if ternary not in ("TQ1_0", "TQ2_0"):
        raise ValueError(f"to_gguf: ternary must be 'TQ1_0' or 'TQ2_0', got {ternary!r}")
    if not (isinstance(rounded, bool) or rounded == "scale"):
        raise TypeError(
            f"to_gguf: rounded must be True or False, got {rounded!r}; 'scale' rounds scales alone"
        )
    check_packed("to_gguf", packed)
    kinds = _kinds(types, ternary)
    gguf = _gguf()
    model = None if config is None else Model(config_of(config), gguf)
    vocabulary = None if tokenizer is None else gguf_tokens.vocabulary_of(tokenizer)
    patterns = [in_full] if isinstance(in_full, str) else list(in_full)
    chosen: dict[str, str] = {}
    tensors: dict[str, tuple[np.ndarray[Any, Any], Any]] = {}
    names = {name: name if model is None else model.name(name) for name in packed}
    if model is not None:
        model.check({names[name]: tuple(entry.shape) for name, entry in packed.items()})
    for name, entry in packed.items():
        own = names[name]
        if len(own.encode()) > 63 or len(entry.shape) > 4:
            raise ValueError(
                f"parameter {name!r}, shape {tuple(entry.shape)}: readers of GGUF take names of up "
                "to 63 bytes and 4 dimensions; rename or reshape it in the packed model"
            )
        whole = model is not None and len(entry.shape) < 2
        if not isinstance(entry, Packed) or whole or any(matches(p, name) for p in patterns):
            full = entry.unpack() if isinstance(entry, Packed) else entry
            if model is not None and model.is_norm(own):
                full = full.float() + 1
            tensors[own] = _in_full(gguf, name, full.detach().cpu(), model is not None)
        else:
            scaled = model is None or model.applies_scale(own)
            held = _chosen(name, entry, kinds, rounded, scaled)
            chosen[name] = held.kind.name
            data = _blocks(entry, held).reshape(*entry.shape[:-1], -1)
            tensors[own] = data, gguf.GGMLQuantizationType[held.kind.name]
            if held.whole != 1:
                beside = f"{own.removesuffix('.weight')}.scale"
                tensors[beside] = np.array([held.whole], np.float32), None
        rows = None if model is None else model.rows(own)
        if rows is not None:
            tensors[own] = np.ascontiguousarray(tensors[own][0][rows.numpy()]), tensors[own][1]
    if model is not None:
        tensors |= {name: (extra.numpy(), None) for name, extra in model.tensors().items()}
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        writer = gguf.GGUFWriter(unfinished, arch if model is None else model.own.name)
        if model is not None:
            model.write(writer, gguf)
            gguf_tokens.write(vocabulary, model.config, writer)
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, (data, stored) in tensors.items():
            writer.add_tensor(name, data, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return chosen


def _gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise ImportError("to_gguf needs gguf: pip install 'parq_fn[gguf]'") from None
    return gguf


def _kinds(types: str | Iterable[str], ternary: str) -> list[Kind]:
    named = [types] if isinstance(types, str) else list(types)
    unknown = [name for name in named if name not in KINDS]
    if unknown:
        raise ValueError(f"to_gguf: types must be among {', '.join(KINDS)}, got {unknown[0]!r}")
    other = {"TQ1_0": "TQ2_0", "TQ2_0": "TQ1_0"}[ternary]
    return [kind for name, kind in KINDS.items() if (name in named if named else name != other)]


def _in_full(gguf: Any, name: str, full: Tensor, narrow: bool) -> tuple[np.ndarray[Any, Any], Any]:
    """A tensor as it is. With `narrow` as llama.cpp takes it: vectors in float32, bfloat16 as
    such."""
    if narrow and (full.dim() < 2 or full.dtype == torch.float64):
        single = full.float()
        if not torch.equal(single.to(full.dtype), full):
            raise ValueError(
                f"parameter {name!r}: {full.dtype} numbers that float32 does not hold, and "
                "llama.cpp has no other; train the model in float32"
            )
        full = single
    if narrow and full.dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        return full.contiguous().view(torch.int16).numpy().view(np.uint8), kind
    wide = full.float() if full.dtype == torch.bfloat16 else full
    if wide.dtype not in _WHOLE:
        raise ValueError(f"{name!r} is {wide.dtype}, which GGUF has no type for")
    return wide.contiguous().numpy(), None


def _chosen(name: str, entry: Packed, kinds: list[Kind], rounded: bool | str, scaled: bool) -> Held:
    """The first type that holds a weight, whose scales may be rounded where no type is exact."""
    levels = Levels(entry.levels, entry.even)
    if not bool(levels.wide.isfinite().all()):
        raise ValueError(f"parameter {name!r}: levels are not finite")
    some, barred = levels.some(), False
    found: list[Held] = []  # of some rows
    near: list[Held] = []
    for kind in kinds:
        held = match(kind, some)
        if held.whole != 1 and not scaled:
            barred = barred or held.same
            continue
        found.append(held)
        if not _divides(entry, kind) or not (held.same or held.is_exact):
            continue
        held = match(kind, levels)
        if held.is_exact:
            return held
        if held.same and held.worst < 0.5:
            near.append(held)
    able = [h for h in found if h.worst < torch.inf and _divides(entry, h.kind)]
    if near:
        best = near[0]
    elif barred:
        raise ValueError(
            f"parameter {name!r}: NVFP4 has a scale of the whole tensor beside its blocks, which "
            "llama.cpp does not apply here; name it in in_full, or train it with mxfp4()"
        )
    elif able:
        few = [h for h in able if h.kind.name != "Q8_0"] if levels.wide.shape[1] <= 16 else able
        best = match(min(few or able, key=lambda held: held.worst).kind, levels)
    else:
        raise _no_type(name, entry, found)
    if not (rounded if near else rounded is True):
        raise _refusal(name, levels, best, bool(near))
    warnings.warn(
        f"parameter {name!r}: {_row(best, levels)}, rounded to those of {best.kind.name}, off "
        f"by up to {best.worst:.2g} of the largest",
        stacklevel=3,
    )
    return best


def _row(held: Held, levels: Levels) -> str:
    row = int(held.error.argmax())
    return f"levels of row {row}, {[round(level, 6) for level in levels.wide[row].tolist()]}"


def _no_type(name: str, entry: Packed, found: list[Held]) -> ValueError:
    about = f"parameter {name!r}: "
    if any(_divides(entry, held.kind) for held in found):
        return ValueError(
            f"{about}levels are not finite, or not in the format's range, that of float16 scales"
        )
    sizes: dict[int, list[str]] = {}
    for held in [held for held in found if held.is_exact] or found:
        sizes.setdefault(held.kind.size, []).append(held.kind.name)
    cut = "" if entry.cut is None else f" of {entry.cut!r}"
    (size, first), *more = ((size, ", ".join(names)) for size, names in sizes.items())
    others = "".join(f", {names} of {size}" for size, names in more)
    return ValueError(
        f"{about}{first} holds blocks of {size} along the last dimension{others}; its shape is "
        f"{tuple(entry.shape)} in rows of {entry.indices().shape[1]}{cut}; name it in in_full "
        "to keep it in float"
    )


def _refusal(name: str, levels: Levels, best: Held, near: bool) -> ValueError:
    about, off = f"parameter {name!r}: ", f"{best.worst:.2g} of the largest"
    if near:
        single = "" if levels.given.dtype == torch.float32 else ", in float32"
        return ValueError(
            f"{about}{_row(best, levels)} are what {best.kind.name} holds but for a scale that is "
            f"none of the file's; train with stored(quantizer, torch.float16){single}, or "
            f"rounded='scale' rounds it, off by up to {off}"
        )
    zero = ""
    if levels.grid is not None:
        row = int(best.error.argmax())
        ends = (torch.as_tensor(end).expand(len(levels.wide), 1)[row] for end in levels.grid[1:])
        low, high = (float(end) for end in ends)
        zero = f" (their zero point is {-low:g})" if low != -high else ""
    return ValueError(
        f"{about}{_row(best, levels)}{zero} are not numbers that a type holds times a scale, such "
        f"as -8 .. 7 times a float16 in Q4_0; rounded=True rounds them to {best.kind.name}, off by "
        f"up to {off}"
    )


def _divides(entry: Packed, kind: Kind) -> bool:
    """Whether the last dimension is whole blocks, and weights that share a scale are of one row."""
    (*_, last), (r, n) = (1, *entry.shape), (len(entry.levels), 0)
    if not entry.shape or last == 0 or last % kind.size:
        return False
    n = torch.Size(entry.shape).numel() // max(r, 1)
    if entry.cut is None:
        return n % kind.per_scale == 0 or r == 1
    of_row = entry.restored(torch.arange(r).unsqueeze(1).expand(r, n)).reshape(-1, kind.per_scale)
    return bool((of_row == of_row[:, :1]).all())


def _blocks(entry: Packed, held: Held) -> np.ndarray[Any, Any]:
    """A weight's blocks, [blocks, bytes]."""
    kind, indices = held.kind, entry.indices()
    codes = entry.restored(held.codes.gather(1, indices)).reshape(-1, kind.size)

    def of_blocks(column: Tensor) -> np.ndarray[Any, Any]:
        rows = entry.restored(column.expand_as(indices)).reshape(-1, kind.size)
        return rows[:, :: kind.per_scale].cpu().numpy()

    minima = None if held.minimum is None else of_blocks(held.minimum)
    return kind.to_bytes(codes.cpu().numpy(), of_blocks(held.scale), minima)
