"""What a run keeps of itself beside its weights: small files of JSON, whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from parq_fn.foundation.command import UserError


def write(file: Path, value: dict[str, Any]) -> None:
    """Replaces the file in one move: a run that is killed leaves the one of before, or none."""
    part = file.with_name(f".{file.name}-unfinished")
    part.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(part, file)


def read(file: Path) -> dict[str, Any]:
    """What was written; {} where there is no file. Raises UserError for one that is damaged."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); delete it, or the folder") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged (no object); delete it, or the folder")
    return found
