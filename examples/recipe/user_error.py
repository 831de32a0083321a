"""What a user can put right, told in one line."""

from __future__ import annotations

import os
import sys


class UserError(Exception):
    """Ends a program with its text as the only line.

    here: it may be met on one process alone, which then tells it; otherwise the first does.
    """

    def __init__(self, text: str, here: bool = False) -> None:
        super().__init__(text)
        self.here = here


def tell(text: object, here: bool = False) -> None:
    """The line, once for all processes."""
    if here or os.environ.get("RANK", "0") == "0":
        print(f"error: {text}", file=sys.stderr)
