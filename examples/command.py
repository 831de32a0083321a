"""What ends a program in one line: Ctrl-C, and what the system refuses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def command(main: Callable[[], Any]) -> None:
    """Runs a program; where Ctrl-C or an OSError ends it, it says so in a line, without a
    traceback, and exits with 130 or 1."""
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.exit(f"error: {error}")


def output_folder(path: Path) -> Path:
    """The folder, made where it is not there: before hours of work, not after.

    Raises OSError where it is no folder, or nothing may be written to it.
    """
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing may be written to {path}")
    return path
