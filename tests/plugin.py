"""What every run of the tests does: a printed seed, a limit of processor time, a slow mark.

A test may use 20 seconds of processor time, one that is marked slow 60: its own, that of programs
it started and waited for, and that of ranks (`tests.processes`). Processor time, unlike the
time on a clock, is hardly changed by what else a machine does.

    python -m pytest -m "not slow"     # a minute or so: for each change
    python -m pytest                   # five minutes: before each commit
    python -m pytest tests/some_file.py   # whole, tests that are marked rare among it
    TEST_SEED=7 python -m pytest       # the same rare tests and sampled cases again
    TEST_CASES=all python -m pytest    # all of them
    python -m pytest --minutes 4       # in an order that the seed draws, until time is up

Five minutes are kept on a slow machine too: tests that are marked rare come last, and what is not
begun after four minutes is named by its number.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

QUICK_S, SLOW_S = 20.0, 60.0
_UNLIMITED = {"learning"}  # marks of tests that train for minutes, which no usual run takes
RARE = 6  # a run of everything takes one in so many of the tests that are marked rare,
RARE_FOR_S = 240.0  # last, and starts none of them after so many seconds

_charged = 0.0  # seconds, of processes that are not this one's children

os.environ.setdefault("TEST_SEED", str(random.SystemRandom().randrange(100_000)))  # workers' too


def seed() -> int:
    """The seed of this run, the same in all its processes."""
    return int(os.environ["TEST_SEED"])


def charge(seconds: float) -> None:
    """Counts processor time of a process that this one did not start itself."""
    global _charged
    _charged += seconds


def spent() -> float:
    """Processor time so far, of this process and those it has waited for, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system + _charged


# Limits


_USED = "processor seconds"
_began = pytest.StashKey[float]()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    item.stash[_began] = spent()
    return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield
    used = spent() - item.stash[_began]
    item.user_properties.append((_USED, used))
    limit = SLOW_S if item.get_closest_marker("slow") else QUICK_S
    if used > limit and not any(map(item.get_closest_marker, _UNLIMITED)) and not _thorough():
        pytest.fail(
            f"{item.nodeid} used {used:.1f} s of processor time, expected at most {limit:.0f}; "
            "make it smaller, share what it builds, or sample its cases (tests.helpers.sampled)",
            pytrace=False,
        )
    return result


def _thorough() -> bool:
    return (
        os.environ.get("HYPOTHESIS_PROFILE", "quick") != "quick"
        or os.environ.get("TEST_CASES") == "all"
    )


# A run that is sized by time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--minutes",
        type=float,
        help="start no test after so many minutes; the order is drawn by TEST_SEED",
    )


def pytest_report_header(config: pytest.Config) -> str:
    rare = f"one in {RARE} of the rare tests" if _draws_rare(config) else "all rare tests"
    cases = "all cases" if os.environ.get("TEST_CASES") == "all" else "sampled cases"
    return f"{rare}, {cases}; TEST_SEED={seed()} draws the same"


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # workers are given all they run as arguments
        chosen = config.args_source is pytest.Config.ArgsSource.ARGS or config.option.keyword
        every = chosen or config.option.minutes is not None  # which are run is drawn all the same
        os.environ["TEST_RARE"] = "all" if every else "drawn"
        os.environ["TEST_BEGAN"] = str(time.time())


def _draws_rare(config: pytest.Config) -> bool:
    """Whether this run takes some of the rare tests: where nothing was asked for by name."""
    return os.environ["TEST_RARE"] == "drawn" and os.environ.get("TEST_CASES") != "all"


def _left_out(items: list[pytest.Item]) -> list[pytest.Item]:
    """All rare tests but one, drawn by the seed, of every `RARE` that follow one another."""
    rare = [item for item in items if item.get_closest_marker("rare")]
    draw = random.Random(seed())
    runs = [rare[i : i + RARE] for i in range(0, len(rare), RARE)]
    kept = {draw.choice(run + [None] * (RARE - len(run))) for run in runs}
    return [item for item in rare if item not in kept]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        marked = any(map(item.get_closest_marker, {*_UNLIMITED, "rare"}))
        if marked or "integrations" in item.path.parts:
            item.add_marker(pytest.mark.slow)
    if _draws_rare(config):
        out = set(_left_out(items))
        config.hook.pytest_deselected(items=[item for item in items if item in out])
        rare = [item for item in items if item.get_closest_marker("rare") and item not in out]
        items[:] = [item for item in items if not item.get_closest_marker("rare")] + rare
    if config.getoption("--minutes") is not None:
        random.Random(seed()).shuffle(items)


_OUT_OF_TIME = "no time was left"
_ends = pytest.StashKey[float]()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    minutes = item.config.getoption("--minutes")
    if minutes is not None:
        ends = item.config.stash.setdefault(_ends, time.time() + 60 * minutes)  # from the first
    elif _draws_rare(item.config) and item.get_closest_marker("rare"):
        ends = float(os.environ["TEST_BEGAN"]) + RARE_FOR_S
    else:
        return
    if time.time() > ends:
        item.add_marker(pytest.mark.skip(reason=_OUT_OF_TIME))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    ended = [
        report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, [])
    ]
    used = sorted(
        (dict(r.user_properties).get(_USED, 0.0), r.nodeid) for r in ended if r.when == "call"
    )
    if used and used[-1][0] > 1:
        total = sum(seconds for seconds, _ in used)
        terminalreporter.section(f"most processor time, of {total:.0f} s in all")
        for seconds, name in used[:-21:-1]:
            terminalreporter.write_line(f"{seconds:6.1f} s  {name}")
    skipped = terminalreporter.stats.get("skipped", [])
    late = sum(_OUT_OF_TIME in str(report.longrepr) for report in skipped)
    if late:
        terminalreporter.write_line(f"{late} tests were not started, for {_OUT_OF_TIME}")
