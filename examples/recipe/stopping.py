"""How a run is told to stop: signals that it obeys before its next step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

#: What stops a run, sent to all its processes.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
STATUS_STOPPED = 128 + signal.SIGTERM


class Stopped(Exception):
    """The run was told to stop."""


@contextmanager
def stop_on_signals(run: Any) -> Iterator[None]:
    """SIGTERM and SIGUSR1, by which schedulers preempt, and Ctrl-C set `run.stopping`, which it
    looks at before each step; a second Ctrl-C stops it at once."""

    def stop(number: int, frame: Any) -> None:
        del frame
        if run.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stopping = True

    before = {s: signal.signal(s, stop) for s in STOPPING}
    try:
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
