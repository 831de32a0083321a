"""Every program that is run with python -m ends in one line where a user stops it or can put right
what is wrong, and says in --help what it does."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from parq_fn.foundation import command as ends
from parq_fn.foundation.command import UserError, command, output_file, output_folder

ROOT = Path(__file__).parents[1]
GUARD = 'if __name__ == "__main__"'
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for folder in ("parq_fn", "examples", "notebooks", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if f"\n{GUARD}" in path.read_text()
)


def test_the_programs_are_found() -> None:
    assert {"parq_fn.export", "examples.sweep", "notebooks", "tests.benchmarks"} < set(PROGRAMS)


def started(program: str, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """The status of a program that is run in this process, as by python -m."""
    folder = ROOT.joinpath(*program.split("."))
    name = f"{program}.__main__" if folder.is_dir() else program
    spec = importlib.util.find_spec(name)
    assert spec is not None
    module = types.ModuleType("__main__")
    vars(module).update(__spec__=spec, __package__=spec.parent, __file__=spec.origin)
    loader: Any = spec.loader
    monkeypatch.setitem(sys.modules, "__main__", module)
    monkeypatch.setattr(sys, "argv", [str(spec.origin), *flags])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(ends, "_name", program)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as end:
        exec(loader.get_code(name), vars(module))
    return int(end.value.code or 0)


def ended_by(error: BaseException, program: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The status of a program in which this is raised."""

    def parse(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    return started(program, monkeypatch)


ENDS: dict[str, tuple[BaseException, int, str]] = {
    "Ctrl-C": (KeyboardInterrupt(), 130, "stopped"),
    "no permission": (
        PermissionError(errno.EACCES, "Permission denied", "runs"),
        1,
        "error: Permission denied: runs",
    ),
    "a full disk": (
        OSError(errno.ENOSPC, "No space left on device"),
        1,
        "error: No space left on device",
    ),
    "a file that is not there": (
        FileNotFoundError(errno.ENOENT, "No such file or directory", "net.pt"),
        1,
        "error: No such file or directory: net.pt",
    ),
    "a reader that has ended": (
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        141,
        "error: what was to read the output has ended",
    ),
    "what a user can put right": (UserError("give\nanother"), 2, "error: give another"),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("what", ENDS)
def test_a_program_ends_in_one_line(
    what: str,
    program: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    error, status, line = ENDS[what]
    assert ended_by(error, program, monkeypatch) == status
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_names_the_extra_that_it_lacks(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = ModuleNotFoundError("No module named 'extra'", name="extra.part")
    assert ended_by(error, program, monkeypatch) == 1
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    parents = [program.rsplit(".", n)[0] for n in range(3)]
    own = next(ends.EXTRAS[name] for name in parents if name in ends.EXTRAS)
    where = f"'parq_fn[{own}]'" if program.startswith("parq_fn") else f"-e '.[{own}]'"
    assert f"extra.part cannot be imported (No module named 'extra'): pip install {where}" in shown


@pytest.mark.parametrize("program", PROGRAMS)
def test_faults_of_a_program_keep_their_traceback(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = ModuleNotFoundError("No module named 'parq_fn.gone'", name="parq_fn.gone")
    for error in (ZeroDivisionError("a fault"), lacking):
        with pytest.raises(type(error), match=str(error)):
            ended_by(error, program, monkeypatch)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_explains_a_program_and_every_flag(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[argparse.ArgumentParser] = []

    def parse(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        seen.append(parser)
        raise SystemExit(0)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
    monkeypatch.setenv("COLUMNS", "100")
    assert started(program, monkeypatch) == 0
    (parser,) = seen
    assert parser.prog == f"python -m {program}"
    assert parser.description
    assert [action.dest for action in parser._actions if not action.help] == []
    assert max(map(len, parser.format_help().splitlines())) <= 100


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_flag_that_is_none_is_told(
    program: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert started(program, monkeypatch, "--no-such-flag") == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert "error: " in line
    assert before == [] or program == "tests.mutation"  # which imports nothing of the package


# While torch is imported, before the program itself begins


STOP = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs ignore
class Stop:
    def find_spec(self, name, *_):
        if name == "torch":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Stop())
"""


@pytest.mark.parametrize("program", PROGRAMS)
def test_ctrl_c_is_one_line_while_a_program_is_imported(program: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(STOP)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    ran = subprocess.run(
        [sys.executable, "-m", program],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ran.returncode, ran.stderr) == (130, "stopped\n")


def test_ctrl_c_in_a_program_of_a_user_keeps_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(STOP)
    (tmp_path / "mine.py").write_text("import parq_fn")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    run = [sys.executable, "-m", "mine"]
    env = {**os.environ, "PYTHONPATH": path}
    ran = subprocess.run(run, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" in ran.stderr


# What is written


@pytest.mark.parametrize(("full", "status"), [(True, 1), (False, 141)])
def test_output_that_cannot_be_written_is_one_line(
    full: bool,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if full:
        output = open("/dev/full", "w")  # noqa: SIM115 # closed below
    else:
        read, write = os.pipe()
        os.close(read)
        output = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stdout", output)
    assert started("parq_fn.testing.table", monkeypatch) == status
    output.close()  # as Python does at its end: nothing is left to be written
    assert capsys.readouterr().err.count("\n") == 1


def test_a_program_runs_without_its_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)

    def main() -> int:
        print("nobody reads it", file=sys.stderr)
        return sys.stdout.write("nor this")

    with pytest.raises(SystemExit) as end:
        command(main)
    assert end.value.code == len("nor this")
    for stream in (sys.stdout, sys.stderr):
        stream.close()


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    for refused in (file, file / "folder"):
        with pytest.raises(OSError, match="file"):
            output_folder(refused)
    with pytest.raises(OSError, match="is a folder, expected a file"):
        output_file(tmp_path)
    assert output_file(tmp_path / "new" / "file").parent.is_dir()


def test_a_program_that_may_not_write_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from examples import qat_simple_report

    monkeypatch.setattr(qat_simple_report, "run", pytest.fail)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as end:
        command(lambda: qat_simple_report.main(["--save-dir", str(tmp_path / "file")]))
    assert end.value.code == 1
    assert capsys.readouterr().err == f"error: File exists: {tmp_path / 'file'}\n"


@pytest.mark.parametrize("content", [None, b"no packed file"])
@pytest.mark.parametrize("program", ["examples.qat_simple", "parq_fn.export"])
def test_a_file_that_is_missing_or_something_else_is_one_line(
    content: bytes | None,
    program: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "net.safetensors"
    if content is not None:
        file.write_bytes(content)
    flags = [str(file)] if program == "parq_fn.export" else ["--evaluate", str(file)]
    assert started(program, monkeypatch, *flags) == (1 if content is None else 2)
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "net.safetensors" in told
    assert told.count("\n") == 1
