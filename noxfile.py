"""The steps of .ci/run as sessions of nox, and the tests on other versions of Python and torch.

nox                    the steps of .ci/run
nox -s tests laws      these alone
nox -s torch           the tests with every version of torch that is looked after (by hand)
nox -s python          the tests with every version of Python (by hand)
"""

from __future__ import annotations

import nox

STEPS = ["lint", "tests", "laws", "learning", "stacks", "notebooks", "pages", "job"]
TORCH = ["2.13.0", "2.14.1", "2.15.0"]
PYTHON = ["3.10", "3.11", "3.12", "3.13"]

nox.options.sessions = STEPS


def _step(name: str) -> None:
    @nox.session(name=name, venv_backend="none")
    def step(session: nox.Session) -> None:
        session.run("bash", ".ci/run", name, external=True)  # makes its own environments


for _name in STEPS:
    _step(_name)


def _tests(session: nox.Session, version: str) -> None:
    session.run("python", ".ci/torch_on_cpu.py", version)
    session.install("-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
@nox.parametrize("version", TORCH)
def torch(session: nox.Session, version: str) -> None:
    _tests(session, version)


@nox.session(python=PYTHON)
def python(session: nox.Session) -> None:
    _tests(session, TORCH[0])
