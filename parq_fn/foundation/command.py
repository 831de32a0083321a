"""How a program ends: what a user can put right is one line on stderr and a status, no traceback.

    if __name__ == "__main__":
        command(main)

Ctrl-C, a path that the system refuses, a full disk, a reader of the output that has ended
(`| head`) and a package that is not installed end a program so wherever they are met. Nothing but
Python's own library is imported here: the package imports this module first, so that Ctrl-C is one
line while torch is imported, too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

#: {program, or the package that it is in: the extra of this project that has what it imports}
EXTRAS = {
    "examples": "examples",
    "notebooks": "notebooks",
    "parq_fn.export": "export",
    "parq_fn.testing": "laws",
    "tests": "test",
    "tests.benchmarks": "bench",
}
STOPPED, UNREAD = 130, 141  # as shells say of a process that SIGINT or SIGPIPE ended


class UserError(Exception):
    """What a user can put right: ends a program with its text as the only line, and status 2.

    here: of several processes, it may be met on this one alone, which then tells it; otherwise the
    first does.
    """

    def __init__(self, text: str, here: bool = False) -> None:
        super().__init__(text)
        self.here = here


def tell(text: object, here: bool = False) -> None:
    """The line, once for all processes that torchrun started."""
    if here or os.environ.get("RANK", "0") == "0":
        line = " ".join(str(text).split())
        print(f"error: {line}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """Tells what is wrong with the flags in one line; what they are is in --help.

    program: "examples.sweep", as it is run by python -m. about: as --help shows it.
    """

    def __init__(self, program: str, about: str | None, **options: Any) -> None:
        super().__init__(
            f"python -m {program}",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str) -> NoReturn:
        tell(f"{message} (see --help)")
        raise SystemExit(2)


def command(main: Callable[[], Any]) -> NoReturn:
    """Runs a program and ends it: with the status that it returns, 0 for anything else than a whole
    number, or with that of what ended it."""
    sys.excepthook = sys.__excepthook__
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed when the program began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 # to the program's end
    try:
        try:
            got = main()
        finally:
            sys.stdout.flush()
    except (KeyboardInterrupt, Exception) as error:
        status = told(error)
    else:
        status = got if isinstance(got, int) else 0
    sys.exit(status)


def told(error: BaseException) -> int:
    """The status for what ended a program, of which a line is told; what is a fault of the program
    is raised again."""
    if _was_stopped(error):
        print("stopped", file=sys.stderr)
        return STOPPED
    if isinstance(error, BrokenPipeError):
        _leave_output()
        tell("what was to read the output has ended", here=True)
        return UNREAD
    if isinstance(error, UserError):
        tell(error, error.here)
        return 2
    if isinstance(error, ImportError) and not _is_own(error.name):
        tell(_absent(error, _name), here=True)
        return 1
    if isinstance(error, OSError):
        _leave_output()
        tell(_refused(error), here=True)
        return 1
    raise error


def output_folder(path: Path) -> Path:
    """The folder, made where it is not there: before hours of work, not after.

    Raises OSError where it is no folder, or nothing may be written to it.
    """
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing may be written to {path}")
    return path


def output_file(path: Path) -> Path:
    """The file that is to be written, in a folder that is there.

    Raises OSError where it is a folder, or it or its folder may not be written to.
    """
    output_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a file")
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} may not be written to")
    return path


def _was_stopped(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind it: packages that are being imported make other errors of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _refused(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    return f"{error.strerror}: {error.filename}" if error.filename else error.strerror


def _is_own(module: str | None) -> bool:
    return module is not None and module.split(".")[0] in {name.split(".")[0] for name in EXTRAS}


def _absent(error: ImportError, program: str) -> str:
    """What is not installed, and how it is; an error of ours, which has no name, says so."""
    extras = [extra for name, extra in EXTRAS.items() if f"{program}.".startswith(f"{name}.")]
    if error.name is None or not extras:
        return str(error)
    where = f"'parq_fn[{extras[-1]}]'" if program.startswith("parq_fn") else f"-e '.[{extras[-1]}]'"
    return f"{error.name} cannot be imported ({error}): pip install {where}"


def _leave_output() -> None:
    """Output that cannot be written goes nowhere, for Python would tell of it again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # of what is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# While a program is imported, `command` does not run yet.


def _program(words: Sequence[str]) -> str:
    """What python -m runs, of the words that started Python; "" where it runs anything else.

    >>> _program(["python", "-X", "dev", "-m", "examples.sweep"]), _program(["python", "a", "-mb"])
    ('examples.sweep', '')
    """
    rest = iter(words[1:])
    for word in rest:
        if word.startswith("-m"):
            return word.removeprefix("-m") or next(rest, "")
        if word in ("-W", "-X"):
            next(rest, None)
        elif word.startswith("-c") or not word.startswith("-"):
            break
    return ""


def _stop(*_: Any) -> NoReturn:
    """Ctrl-C among imports, some of which go on after a KeyboardInterrupt and fail later."""
    os.write(2, b"stopped\n")
    os._exit(STOPPED)


def _ended(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    try:
        status = told(error)
    except BaseException:
        sys.__excepthook__(kind, error, trace)
    else:
        sys.stderr.flush()
        os._exit(status)  # Python would exit with 1, or as killed


_name = _program(sys.orig_argv)
if _is_own(_name) and (Path(__file__).parents[2] / _name.split(".")[0]).is_dir():
    sys.excepthook = _ended
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)
