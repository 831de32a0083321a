"""Distributed checkpoints of a model and its optimizer that are whole or not there.

torch.distributed.checkpoint writes a folder: a file a rank and one that says what lies where. It
does not notice a file that was cut off until it reads past its end, when what stands before is
loaded already.
"""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer

from parq_fn.optim.adapter import Adapter


def save_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer,
    **others: Stateful | dict[str, Any],
) -> None:
    """Saves a model's and its optimizer's state in a folder, and others by name: what has a
    state_dict, such as a learning-rate scheduler, and dicts, such as progress={"epoch": 3}.

    Every rank calls it. The folder gets its name when all in it is written, and takes the place
    of the checkpoint that had it.

    Raises ValueError, before anything is written, for a path that holds something else than a
    checkpoint; TypeError for others that are neither.

    >>> import tempfile
    >>> import torch
    >>> from parq_fn import hard_prox, lsbq
    >>> from parq_fn.optim import QuantOptimizer, load_checkpoint
    >>> net = nn.Linear(4, 2)
    >>> base = torch.optim.SGD([{"params": net.parameters(), "quant_bits": 1}], lr=0.1)
    >>> optimizer, folder = QuantOptimizer(base, hard_prox(lsbq(1))), tempfile.mkdtemp() + "/last"
    >>> save_checkpoint(folder, net, optimizer, progress={"epoch": 3})
    >>> progress = {"epoch": 0}
    >>> load_checkpoint(folder, net, optimizer, progress=progress)
    >>> progress
    {'epoch': 3}
    """
    _check_others(others)
    final = Path(os.path.abspath(folder))
    if final in (Path.cwd(), *Path.cwd().parents):
        raise ValueError(f"{final} holds the working directory; give a folder of its own")
    unfinished, old = _beside(final, "unfinished"), _beside(final, "old")
    for path in (final, unfinished, old):
        if os.path.lexists(path) and not _is_replaceable(path, whole=path != unfinished):
            raise ValueError(f"{path} is no checkpoint, and would be deleted; give another path")
    _barrier()  # all have looked before one writes
    if _first():
        final.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
    _barrier()
    with _thawed(model), _quiet():
        parameters, state = get_state_dict(model, optimizer)
        saved = {"model": parameters, "optimizer": state, **others}
        save(saved, checkpoint_id=unfinished, no_dist=not _many())
    if _first():
        if final.exists():  # otherwise the old one may be the only one, see _found
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        unfinished.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    _barrier()


def load_checkpoint(
    folder: str | os.PathLike[str],
    model: nn.Module | None = None,
    optimizer: Optimizer | None = None,
    **others: Stateful | dict[str, Any],
) -> None:
    """Loads what `save_checkpoint` or torch.distributed.checkpoint saved, on as many ranks as it
    was saved on or on others. Without an optimizer the model's state alone is loaded, as to
    evaluate it; without a model, the others alone. Dicts among the others are filled in place with
    all that was saved under their name. Where saving was killed as one checkpoint took the place
    of another, that other is loaded. Every rank calls it.

    Raises FileNotFoundError where there is no checkpoint; ValueError, and changes nothing, where
    a part of it is missing, of another shape, or was cut off; TypeError as `save_checkpoint`, and
    for an optimizer without its model.
    """
    _check_others(others)
    if model is None and optimizer is not None:
        raise TypeError("got an optimizer without its model; its state is saved by their names")
    folder = _found(folder)
    check_whole_checkpoint(folder)
    saved: dict[str, Any] = {**others}
    with _quiet(), _thawed(model) if model is not None else nullcontext():
        if model is not None and optimizer is not None:
            saved["model"], saved["optimizer"] = get_state_dict(model, optimizer)
        elif model is not None:
            saved["model"] = get_model_state_dict(model)
        saved |= _with_all_keys(folder, others)
        try:
            if isinstance(optimizer, Adapter):
                _check_groups(folder, optimizer, saved["optimizer"])
                _leave_out_new(folder, saved["optimizer"])
            load(saved, checkpoint_id=folder, no_dist=not _many())
        except CheckpointException as error:
            causes = sorted({str(cause) for cause, _ in error.failures.values()})
            raise ValueError(f"checkpoint {folder} does not fit: {'; '.join(causes)}") from None
        if model is not None and optimizer is not None:
            state = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
            set_state_dict(model, optimizer, **state)
        elif model is not None:
            set_model_state_dict(model, saved["model"])
    for name, other in others.items():
        if isinstance(other, dict):
            other.update(saved[name])
    if isinstance(optimizer, Adapter):
        optimizer.sync()  # while it is known which parameters are frozen


def check_whole_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Raises FileNotFoundError where there is no checkpoint, ValueError for one cut off."""
    where = _found(folder)
    if not where.is_dir():
        raise FileNotFoundError(f"no checkpoint at {where}")
    try:
        stored = FileSystemReader(where).read_metadata().storage_data
    except FileNotFoundError:
        raise ValueError(
            f"checkpoint {where} has no .metadata, which is written last: its writing was cut off"
        ) from None
    except (EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {where}: .metadata was cut off ({error})") from None
    ends: dict[str, int] = {}
    for part in stored.values():
        end = part.offset + part.length
        ends[part.relative_path] = max(end, ends.get(part.relative_path, 0))
    for name, end in sorted(ends.items()):
        file = where / name
        size = file.stat().st_size if file.exists() else 0
        if size < end:
            raise ValueError(
                f"checkpoint {where}: {name} was cut off; it has {size} bytes, expected {end}"
            )


def _beside(final: Path, what: str) -> Path:
    return final.with_name(f".{final.name}.parq_fn-{what}")


def _found(folder: str | os.PathLike[str]) -> Path:
    """The folder, or the one that it was to take the place of when saving was killed."""
    final = Path(os.path.abspath(folder))
    if final.exists() or not final.name:
        return Path(folder)
    old = _beside(final, "old")
    return old if old.is_dir() else Path(folder)


def _with_all_keys(folder: Path, others: dict[str, Any]) -> dict[str, Any]:
    """The dicts among the others, with places for all that was saved under their names."""
    metadata = FileSystemReader(folder).read_metadata()
    filled = {name: copy.deepcopy(other) for name, other in others.items() if type(other) is dict}
    for key, path in (metadata.planner_data or {}).items():
        if path[0] not in filled or not all(isinstance(entry, str) for entry in path):
            continue
        inner: dict[str, Any] = filled
        for entry in path[:-1]:
            inner = inner.setdefault(entry, {})
        stored = metadata.state_dict_metadata[key]
        place: Any = None
        if isinstance(stored, TensorStorageMetadata):
            place = torch.empty(stored.size, dtype=stored.properties.dtype)
        inner.setdefault(path[-1], place)
    return filled


def _check_groups(folder: Path, optimizer: Adapter, state: dict[str, Any]) -> None:
    """Raises ValueError, before anything is loaded, for groups that were quantized otherwise."""
    own = state["param_groups"]
    saved = {"optimizer": {"param_groups": copy.deepcopy(own)}}
    load(saved, checkpoint_id=folder, no_dist=not _many())
    optimizer.check_groups({"state": {}, **saved["optimizer"]})


def _leave_out_new(folder: Path, state: dict[str, Any]) -> None:
    """Leaves out what checkpoints of earlier versions lack, and an optimizer can do without."""
    stored = FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, entries in state["state"].items():
        if f"optimizer.state.{name}.link" not in stored:
            entries.pop("link", None)


def _check_others(others: dict[str, Any]) -> None:
    for name, other in others.items():
        if not isinstance(other, dict | Stateful):
            raise TypeError(
                f"{name} is a {type(other).__name__}, expected something with a state_dict, or a "
                f'dict: {name}={{"value": ...}}'
            )


def _is_replaceable(path: Path, whole: bool = True) -> bool:
    """Whether it is a checkpoint, a part of one where it need not be whole, or an empty folder."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    parts = all(name.startswith((".metadata", "__")) for name in names)
    return not names or (".metadata" in names if whole else parts)


@contextmanager
def _thawed(model: nn.Module) -> Iterator[None]:
    """All parameters as if trained: torch saves the state of frozen ones but does not load it."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warning that there is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or unini")
        yield


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()


def _first() -> bool:
    return not _many() or dist.get_rank() == 0


def _barrier() -> None:
    if _many():
        dist.barrier()
