"""Test runs against mutants, each in a fork of one process that has collected the tests already.

Modules are imported once, as the syntax tree prints them. A mutant that changes what a function
does takes the place of that function's code; one that changes what a module or a class holds
cannot, and is left to `forked.run`. Which statements each test runs is noted once, by functions put
in place that tell it, and a mutant is run against the tests that reach it, by speed.
"""

from __future__ import annotations

import ast
import builtins
import gc
import inspect
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

import pytest

from tests.mutation import forked
from tests.mutation.mutants import Mutant, printed

LEAST_S = 20  # a test is stopped after ten times its own time, and no sooner than this


class Untold(Exception):
    """The tests fail without a mutant, or what runs them does."""


class Job(NamedTuple):
    module: str
    mutant: Mutant


def in_place(base: CodeType, mutant: CodeType) -> dict[CodeType, CodeType] | None:
    """What takes the place of functions' code, by the code; None where that is not all."""
    parts = [[c for c in code.co_consts if isinstance(c, CodeType)] for code in (base, mutant)]
    alike = len(parts[0]) == len(parts[1])
    found: dict[CodeType, CodeType] = {}
    for pair in zip(*parts, strict=True) if alike else ():
        inner = in_place(*pair)
        if inner is None:
            return None
        found |= inner
    function = bool(base.co_flags & inspect.CO_OPTIMIZED)
    if not alike or _alone(base) != _alone(mutant):
        if not function:
            return None
        found[base] = mutant
    elif found and function:
        found[base] = mutant
    fit = {a: b for a, b in found.items() if a.co_freevars == b.co_freevars}
    return fit if function or fit == found else None  # of a function inside, the outer one's is it


def _alone(code: CodeType) -> CodeType:
    """The code without that of functions inside, nor where it stands."""
    kept = tuple(None if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_consts=kept, co_linetable=b"", co_firstlineno=1)


def changed_lines(base: str, mutant: str) -> set[int]:
    """The lines of the base that a mutant changes."""
    pairs = enumerate(zip(base.splitlines(), mutant.splitlines(), strict=False), 1)
    return {number for number, (a, b) in pairs if a != b}


def run(
    sources: dict[str, str], files: list[str], jobs: list[Job], seconds: float
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each job's result as `forked.run` gives it, or the status "left" where a mutant changes more
    than functions, or changes what importing runs and no test noticed. seconds: how much
    processor time the tests of one mutant may take together."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            try:
                _Collector(sources, jobs, pipe, seconds).collect(files)
            except BaseException as error:
                print(json.dumps({"error": repr(error)}), file=pipe, flush=True)
            finally:
                os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        for line in pipe:
            told = json.loads(line)
            if "error" in told:
                raise Untold(told["error"])
            yield jobs[told.pop("job")], told
    os.waitpid(child, 0)


def _rank(few: dict[str, int], durations: dict[str, float], test: str) -> tuple[int, float]:
    """By how many tests the rarest statement of the function is reached that this one reaches, and
    its time: what ends early, such as at an error, tells most."""
    return few.get(test, len(few)), durations[test]


def _one_of_each_first(tests: list[str]) -> list[str]:
    """Cases of one test after the first of it behind the first of all others."""
    found: set[str] = set()
    later = {}
    for test in tests:
        name = test.partition("[")[0]
        later[test] = name in found
        found.add(name)
    return sorted(tests, key=later.__getitem__)


def telling(text: str, name: str) -> ast.Module:
    """The module with a call of this function before each statement of its functions, with its
    line."""
    tree = ast.parse(text)
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            _tell(function, name)
    return ast.fix_missing_locations(tree)


def _tell(node: ast.AST, name: str) -> None:
    for field, content in ast.iter_fields(node):
        parts = content if isinstance(content, list) else []
        if parts and isinstance(parts[0], ast.stmt):
            calls = [ast.parse(f"{name}({part.lineno})").body[0] for part in parts]
            setattr(node, field, [one for pair in zip(calls, parts, strict=True) for one in pair])
        for part in parts:
            if isinstance(part, ast.AST) and not isinstance(part, ast.FunctionDef):
                _tell(part, name)


class _Collector(forked.Watch):
    """A pytest plugin that runs, in place of the tests, the tests that reach each mutant."""

    def __init__(self, sources: dict[str, str], jobs: list[Job], pipe: Any, seconds: float) -> None:
        super().__init__()
        self.jobs, self.pipe, self.seconds = jobs, pipe, seconds
        self.texts = {module: printed(text) for module, text in sources.items()}
        self.paths = {str(Path(module).resolve()): module for module in sources}
        self.hits: set[tuple[str, int]] = set()

    def collect(self, files: list[str]) -> None:
        self._find()  # for what conftest.py imports
        folder = tempfile.mkdtemp(prefix="mutation")
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        sys.settrace(self._entered)
        options = [*forked.OPTIONS, "--capture=sys", f"--basetemp={folder}/tests"]
        try:
            status = pytest.main([*options, *files], plugins=[self])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise Untold(f"pytest ends with {status}; {self.by}")

    def _entered(self, frame: FrameType, event: str, arg: Any) -> Any:
        module = self.paths.get(frame.f_code.co_filename)
        if module is None:
            return None

        def at(frame: FrameType, event: str, arg: Any) -> Any:
            self.hits.add((module, frame.f_lineno))
            return at

        return at

    def _find(self) -> None:
        for module, text in self.texts.items():
            sys.meta_path.insert(0, forked.Finder(module, text))

    def pytest_configure(self) -> None:
        self._find()  # before pytest's own, of the files it is given
        forked.no_shrinking()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = filter(forked.is_quick, items)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if self.by:
            raise Untold(self.by)
        sys.settrace(None)
        importing = set(self.hits)
        functions: dict[CodeType, list[FunctionType]] = {}
        for one in gc.get_objects():
            if type(one) is FunctionType and one.__code__.co_filename in self.paths:
                functions.setdefault(one.__code__, []).append(one)
        bases = {
            module: compile(self.texts[module], path, "exec") for path, module in self.paths.items()
        }
        gc.collect()
        gc.freeze()
        untouched = forked.apart(lambda: self._told(session.items, bases, functions))
        if untouched.get("by") or "reached" not in untouched:
            raise Untold(f"the tests fail without a mutant, at {untouched}")
        durations = untouched["durations"]
        reached: dict[tuple[str, int], list[str]] = {}
        for test, lines in untouched["reached"].items():
            for module, line in lines:
                reached.setdefault((module, line), []).append(test)
        items = {item.nodeid: item for item in session.items}
        near: dict[tuple[str, str], Counter[str]] = {}
        for number, (module, mutant) in enumerate(self.jobs):
            started = time.monotonic()
            path = str(Path(module).resolve())
            code = in_place(bases[module], compile(mutant.source, path, "exec"))
            lines = {(module, n) for n in changed_lines(self.texts[module], mutant.source)}
            places = {a: b for a, b in (code or {}).items() if a in functions}
            if not places:
                told: dict[str, Any] = {"status": "left", "by": ""}
            else:
                tests = {test for line in lines for test in reached.get(line, ())}
                own = near.setdefault((module, mutant.function), Counter())
                first = [test for test, _ in own.most_common() if test in tests]
                spans = {n for at in places for *_, n in at.co_lines() if n is not None}
                reaching = [reached[module, n] for n in spans if (module, n) in reached]
                few: dict[str, int] = {}
                for some in sorted(reaching, key=len, reverse=True):
                    few |= dict.fromkeys(some, len(some))
                key = partial(_rank, few, durations)
                rest = sorted(tests - {*first}, key=key)
                todo = [items[test] for test in (*first, *_one_of_each_first(rest))]
                told = forked.apart(partial(self._mutated, places, functions, todo, durations))
                if told["by"] in items:
                    own[told["by"]] += 1
                elif told["by"]:
                    raise Untold(told["by"])
                if told["status"] == "survived" and lines & importing:
                    told["status"] = "left"
                told["of"] = len(tests)
            told |= {"job": number, "seconds": round(time.monotonic() - started, 1)}
            print(json.dumps(told), file=self.pipe, flush=True)
        return True

    def _told(
        self,
        items: list[pytest.Item],
        bases: dict[str, CodeType],
        functions: dict[CodeType, list[FunctionType]],
    ) -> dict[str, Any]:
        """How long each test takes, and the lines that it runs."""
        for path, module in self.paths.items():
            name = "told_" + "".join(c if c.isalnum() else "_" for c in module)
            setattr(builtins, name, lambda line, module=module: self.hits.add((module, line)))
            tree = telling(self.texts[module], name)
            self._put(in_place(bases[module], compile(tree, path, "exec")) or {}, functions)
        reached: dict[str, list[tuple[str, int]]] = {}
        for item, after in zip_longest(items, items[1:]):
            self.hits.clear()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            reached[item.nodeid] = sorted(self.hits)
            if self.by:
                break
        return {"by": self.by, "reached": reached, "durations": self.durations}

    @staticmethod
    def _put(
        places: dict[CodeType, CodeType], functions: dict[CodeType, list[FunctionType]]
    ) -> None:
        for code, new in places.items():
            for function in functions.get(code, ()):
                function.__code__ = new

    def _mutated(
        self,
        places: dict[CodeType, CodeType],
        functions: dict[CodeType, list[FunctionType]],
        items: list[pytest.Item],
        durations: dict[str, float],
    ) -> dict[str, Any]:
        ran, ends = 0, time.process_time() + self.seconds
        self._put(places, functions)
        for item, after in zip_longest(items, items[1:]):
            if time.process_time() > ends:
                break
            ran += 1
            signal.alarm(int(LEAST_S + 10 * durations[item.nodeid]))
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if self.by:
                break
        return {"status": "killed" if self.by else "survived", "by": self.by, "tests": ran}
