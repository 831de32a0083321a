"""The steps of .ci/run as sessions of nox, and the tests on other versions of Python and torch.

nox                    the steps of .ci/run
nox -s tests laws      these alone
nox -s torch           the tests with every version of torch that is looked after (by hand)
nox -s python          the tests with every version of Python (by hand)
nox -s oldest          the tests with the lowest versions that pyproject.toml asks for (by hand)

What is by hand takes words for pytest: nox -s torch -- -m "not slow"
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

STEPS = ["lint", "tests", "learning", "laws", "stacks", "notebooks", "pages", "job"]
TORCH = ["2.13.0", "2.14.1", "2.15.0"]
PYTHON = ["3.10", "3.11", "3.12", "3.13"]

nox.options.sessions = STEPS


def _step(name: str) -> None:
    @nox.session(name=name, venv_backend="none")
    def step(session: nox.Session) -> None:
        session.run("bash", ".ci/run", name, external=True)  # makes its own environments


for _name in STEPS:
    _step(_name)


def _lowest() -> list[str]:
    """What the package itself needs, in the lowest versions: "optree==0.14", and so on."""
    project = (Path(__file__).parent / "pyproject.toml").read_text()
    (asked,) = re.findall(r"^dependencies = \[(.*)\]$", project, re.MULTILINE)
    return [need.replace(">=", "==") for need in re.findall(r'"([^"]+)"', asked)]


def _tests(session: nox.Session, version: str, *needs: str) -> None:
    session.run("python", ".ci/torch_on_cpu.py", version)
    session.install("-e", ".[test]", *needs)
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
@nox.parametrize("version", TORCH)
def torch(session: nox.Session, version: str) -> None:
    _tests(session, version)


@nox.session(python=PYTHON)
def python(session: nox.Session) -> None:
    _tests(session, TORCH[0])


@nox.session(python=PYTHON[0])
def oldest(session: nox.Session) -> None:
    _tests(session, TORCH[0], *_lowest())
