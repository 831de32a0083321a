"""What a run tells: a line of JSON an epoch, or after so many steps, TensorBoard's scalars and
figures, progress bars.

Only the first process tells anything. A run that resumes drops what was told of steps that it
takes again, so that the log is that of a run which never stopped.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import parq_fn as pq
from examples.recipe.datasets import unfinished
from examples.recipe.parallel import World, whole
from parq_fn import plot
from parq_fn.foundation.command import UserError
from parq_fn.optim import QuantOptimizer

LOG = "log.jsonl"


def read(file: Path, unit: str = "epoch") -> list[dict[str, Any]]:
    """The records of a log, each of an epoch or of another unit, none without one. A line whose
    writing was cut off is left out. Raises UserError for what is no log."""
    try:
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{file} is no log of a run: {error}; move it away") from None
    if not all(isinstance(r, dict) and type(r.get(unit)) is int for r in records):
        raise UserError(f"{file} is no log of a run: it has lines of no {unit}; move it away")
    return records


def _line(record: dict[str, Any]) -> str:
    """JSON, which has no numbers for what is infinite."""
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()
    }
    return json.dumps(finite) + "\n"


class Log:
    """Writes in a folder; silent on all processes but the first."""

    def __init__(
        self, folder: Path, world: World, begun: int, step: int, unit: str = "epoch"
    ) -> None:
        """begun: the first epoch, or other unit, that the run takes; step: those that it has
        taken, over all epochs."""
        self.world, self.file, self.unit = world, folder / LOG, unit
        self.board: SummaryWriter | None = None
        if not world.first:
            return
        if self.file.exists():
            kept = [record for record in read(self.file, unit) if record[unit] < begun]
            with unfinished(self.file) as part:
                part.write_text("".join(map(_line, kept)))
        # what was told after step n is filed under n, and hidden from the purged step on
        self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def record(self, step: int, record: dict[str, Any]) -> None:
        """Tells of an epoch, or other unit: JSON, scalars, and a line to read."""
        if self.board is None:
            return
        with self.file.open("a") as file:
            file.write(_line(record))
        self.scalars(step, {k: v for k, v in record.items() if k not in (self.unit, "skipped")})
        told = " ".join(f"{k} {v:.5g}" for k, v in record.items() if isinstance(v, float))
        tqdm.write(f"{self.unit} {record[self.unit]}: {told}")

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        if self.board is not None:
            for name, value in values.items():
                if value is not None:
                    self.board.add_scalar(name, value, step)

    def figure(self, step: int, name: str, figure: Figure) -> None:
        if self.board is not None:
            self.board.add_figure(name, figure, step)

    def say(self, text: str) -> None:
        """A line for who looks on."""
        if self.world.first:
            tqdm.write(text, file=sys.stderr)

    def bar(self, total: int, done: int, text: str, off: bool) -> Any:
        """A progress bar, where there is a terminal."""
        disable = True if off or not self.world.first else None
        return tqdm(total=total, initial=done, desc=text, disable=disable, leave=False)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


def levels_of(net: nn.Module, optimizer: QuantOptimizer) -> dict[str, float]:
    """Each fitted level of every quantized parameter, the mean over its rows."""
    found = {}
    for name, p in net.named_parameters():
        qparams = optimizer.state.get(p, {}).get("qparams")
        if qparams is not None and bool(qparams.any()):
            levels = whole(optimizer.levels(p))
            means = levels.float().reshape(-1, levels.shape[-1]).mean(0).tolist()
            found |= {f"levels/{name}/{i}": mean for i, mean in enumerate(means)}
    return found


#: A transformation for plots, whose "state" is the weights.
_GIVEN = pq.GradientTransformation(
    init=lambda params: params,
    update=lambda updates, state, params, **extra: (updates, state),
    weights=lambda state, params: state,
)


def latents_and_weights(net: nn.Module, optimizer: QuantOptimizer, most: int = 6) -> Figure:
    """Weights against latents, of up to so many layers, evenly chosen."""
    parameters = dict(net.named_parameters())
    names = [n for n, p in parameters.items() if "latent" in optimizer.state.get(p, {})]
    chosen = [names[round(i)] for i in torch.linspace(0, len(names) - 1, most).tolist()]
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, most // 2, squeeze=False).flat
    for panel, name in zip(panels, dict.fromkeys(chosen), strict=False):
        p = parameters[name]
        latent, weight = ({name: whole(t)} for t in (optimizer.state[p]["latent"], p))
        plot.latent_vs_weight(_GIVEN, weight, latent, ax=panel)
    return figure
