"""One test run against one mutant, in a fork: the parent has loaded all but the package."""

from __future__ import annotations

import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies
import pytest
import torch

LIMIT_S = 150  # several times what the tests of a module take: slow is not caught
MEMORY = 12 << 30

torch.set_num_threads(1)


def load() -> None:
    """Loads, before the first fork, what the package and every test run need."""
    os.environ["TEST_CASES"] = "all"  # what a mutant is killed by is no matter of chance
    for name in ("numpy", "optree", "torch._dynamo", "torch._functorch.apis", "torch.testing"):
        importlib.import_module(name)

    @hypothesis.settings(max_examples=1, database=None)
    @hypothesis.given(hypothesis.strategies.floats())
    def nothing(_: float) -> None:
        pass

    nothing()
    gc.collect()
    gc.freeze()  # a child's collections then pass over what it shares


#: What pytest is told besides the files.
OPTIONS = ["-x", "-q", "-n0", "--tb=no", "-p", "no:cacheprovider"]
OPTIONS += ["-p", "no:unraisableexception"]  # it collects garbage again and again
for _early in ("pytest.PytestAssertRewrite", "hypothesis.errors.HypothesisSideeffect"):
    OPTIONS += ["-W", f"ignore::{_early}Warning"]


def is_quick(item: pytest.Item) -> bool:
    """Whether a test is not marked slow itself, as all integrations are."""
    return len([*item.iter_markers("slow")]) <= ("integrations" in item.path.parts)


def no_shrinking() -> None:
    """Hypothesis looks for no smaller example: that there is one is enough."""
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    hypothesis.settings.register_profile("mutation", hypothesis.settings(), phases=phases)
    hypothesis.settings.load_profile("mutation")


class _Mutated(importlib.machinery.SourceFileLoader):
    """Loads a module from text in place of its file."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> Any:
        return compile(self.text, self.path, "exec")


class Finder(importlib.abc.MetaPathFinder):
    """Finds one module, that one mutated."""

    def __init__(self, module: str, text: str) -> None:
        self.name = module.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.path, self.text = str(Path(module).resolve()), text

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.name:
            return None
        folder = [str(Path(self.path).parent)] if self.path.endswith("__init__.py") else None
        return importlib.util.spec_from_file_location(
            fullname,
            self.path,
            loader=_Mutated(fullname, self.path, self.text),
            submodule_search_locations=folder,
        )


class Watch:
    """A pytest plugin that notes how long each test takes, and what failed first."""

    def __init__(self) -> None:
        self.durations: dict[str, float] = {}
        self.by = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.by = self.by or report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            *_, why = "", *str(report.longrepr).splitlines()
            self.by = self.by or f"import of {report.nodeid}: {why}"


class _LikelyFirst(Watch):
    """With one module mutated, and likely killers first."""

    def __init__(self, finder: Finder, order: list[str]) -> None:
        super().__init__()
        self.finder = finder
        self.place = {test: i for i, test in reversed(list(enumerate(order)))}

    def pytest_configure(self) -> None:
        sys.meta_path.insert(0, self.finder)  # before pytest's own, of the files it is given, too
        no_shrinking()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = filter(is_quick, items)
        items.sort(key=lambda item: self.place.get(item.nodeid, len(self.place)))


def run(
    module: str, text: str, stages: tuple[tuple[str, ...], ...], order: list[str]
) -> dict[str, Any]:
    """Whether the tests notice that the module's source is this text: "killed", "survived" or
    "timed out", by which test, in how many seconds, and the durations of all tests run."""
    started = time.monotonic()
    limit = LIMIT_S * len(stages) if not order else LIMIT_S

    def work() -> dict[str, Any]:
        signal.alarm(limit)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        return _child(module, text, stages, order)

    result = {"durations": {}, **apart(work)}
    return {**result, "seconds": round(time.monotonic() - started, 1)}


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What work() gives in a fork; "killed" where it raises or ends, "timed out" at its alarm."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            told = work()
        except BaseException:
            told = {"status": "killed", "by": traceback.format_exc()[-500:]}
        with os.fdopen(writing, "w") as pipe:
            json.dump(told, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if answer:
        result: dict[str, Any] = json.loads(answer)
        return result
    late = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM
    return {"status": "timed out" if late else "killed", "by": ""}  # it did not live to tell


def _child(
    module: str, text: str, stages: tuple[tuple[str, ...], ...], order: list[str]
) -> dict[str, Any]:
    finder = Finder(module, text)
    name = finder.name
    sys.meta_path.insert(0, finder)  # for what conftest.py imports
    durations: dict[str, float] = {}
    for files in stages:
        watch = _LikelyFirst(finder, order)
        status = pytest.main([*OPTIONS, *files], plugins=[watch])
        durations |= watch.durations
        if name in sys.modules and not isinstance(sys.modules[name].__loader__, _Mutated):
            raise RuntimeError(f"{name} was loaded from its file")
        if status != pytest.ExitCode.OK:
            return {"status": "killed", "by": watch.by, "durations": durations}
    return {"status": "survived", "by": "", "durations": durations}
