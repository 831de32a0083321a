"""Distributed checkpoints of a model and its optimizer that are whole or not there.

torch.distributed.checkpoint writes a folder: a file a rank and one that says what lies where. It
does not notice a file that was cut off until it reads past its end, when what stands before is
loaded already.
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.optim import Optimizer


def save_checkpoint(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **others: Stateful
) -> None:
    """Saves a model's and its optimizer's state in a folder, and by name what else has a
    state_dict, such as a learning-rate scheduler.

    Every rank calls it. The folder gets its name when all in it is written, and takes the place
    of one that has it.
    """
    parameters, state = get_state_dict(model, optimizer)
    final = Path(folder)
    unfinished = final.with_name(f"unfinished-{final.name}")
    final.parent.mkdir(parents=True, exist_ok=True)
    save(
        {"model": parameters, "optimizer": state, **others},
        checkpoint_id=unfinished,
        no_dist=not _many(),
    )
    if not _many() or dist.get_rank() == 0:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
    if _many():
        dist.barrier()


def load_checkpoint(
    folder: str | os.PathLike[str], model: nn.Module, optimizer: Optimizer, **others: Stateful
) -> None:
    """Loads what `save_checkpoint` or torch.distributed.checkpoint saved, on as many ranks as it
    was saved on or on others. Every rank calls it.

    Raises FileNotFoundError where there is no checkpoint; ValueError, and changes nothing, where
    a part of it is missing or was cut off.
    """
    check_whole_checkpoint(folder)
    parameters, state = get_state_dict(model, optimizer)
    saved: dict[str, Any] = {"model": parameters, "optimizer": state, **others}
    load(saved, checkpoint_id=folder, no_dist=not _many())
    set_state_dict(
        model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
    )


def check_whole_checkpoint(folder: str | os.PathLike[str]) -> None:
    """Raises FileNotFoundError where there is no checkpoint, ValueError for one cut off."""
    where = Path(folder)
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


def _many() -> bool:
    return dist.is_available() and dist.is_initialized()
