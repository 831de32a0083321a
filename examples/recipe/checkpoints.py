"""How far a run is, in its checkpoints; and which runs a checkpoint fits."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from examples.recipe.flags import Flags
from parq_fn.foundation.command import UserError
from parq_fn.optim import load_checkpoint, save_checkpoint

LAST, BEST = "last", "best"


@dataclass
class Progress:
    """The next step, and what was found so far."""

    epoch: int = 0
    step: int = 0  # of the epoch; as many as it has, where only its test is left
    begun: int = 0  # epoch that the run began at
    best: float = -1.0  # highest test accuracy, in percent
    seconds: float = 0.0  # that the epoch has taken so far
    sums: list[list[float]] = field(default_factory=list)  # of the epoch so far, by process
    steps: int = 0  # of a whole epoch, which depend on the number of images

    def __post_init__(self) -> None:
        whole = self.epoch, self.step, self.begun, self.steps
        if not all(type(n) is int and n >= 0 for n in whole):
            raise ValueError(f"expected whole numbers from 0 on, got {self}")
        if not all(isinstance(x, (int, float)) for x in (self.best, self.seconds)):
            raise ValueError(f"expected numbers, got {self}")
        if not all(isinstance(own, list) and len(own) == 4 for own in self.sums):
            raise ValueError(f"expected four sums for each process, got {self}")


def source_of(args: Flags) -> Path:
    """What --resume names, a checkpoint or a run, which stands for its last; or --save-dir's."""
    named = Path(args.resume or args.save_dir)
    return named / LAST if not args.resume or (named / LAST).is_dir() else named


def progress_at(source: Path, args: Flags, fixed: list[str]) -> Progress | None:
    """A checkpoint's progress; None where there is none. Raises UserError for one that is cut off,
    is not of these scripts, or is of a run with other values of the flags named in `fixed`."""
    about: dict[str, Any] = {}
    try:
        load_checkpoint(source, progress=about)
        told = json.loads(about["json"])
        flags, progress = dict(told.pop("flags")), Progress(**told)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
        raise UserError(f"no checkpoint of these scripts at {source}: {_line(error)}") from None
    for name in fixed:
        got, own = flags.get(name), getattr(args, name)
        if got != own:
            raise UserError(
                f"{source} was trained {_said(name, got)}, and this run is {_said(name, own)}; "
                "give the same, or another --resume or --save-dir"
            )
    return progress


def load(source: Path, net: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Its state into the network and the optimizer. Raises UserError where it does not fit."""
    try:
        load_checkpoint(source, net, optimizer)
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise UserError(f"{source} cannot be loaded: {_line(error)}") from None


def save(
    folder: Path,
    net: nn.Module,
    optimizer: Optimizer,
    progress: Progress,
    args: Flags,
    fixed: list[str],
) -> None:
    """A checkpoint, with the flags that it fits no other values of. Raises UserError where it
    cannot be written."""
    told = asdict(progress) | {"flags": {name: getattr(args, name) for name in fixed}}
    try:
        save_checkpoint(folder, net, optimizer, progress={"json": json.dumps(told)})
    except (ValueError, OSError, CheckpointException) as error:
        raise UserError(f"{folder} cannot be saved: {_line(error)}") from None


def _said(name: str, value: object) -> str:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return f"{'with' if value else 'without'} {flag}"
    return f"with {flag} {value}"


def _line(error: BaseException) -> str:
    """What it says, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
