"""The README runs as written, and its commands are those of pyproject and CI."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from parq_fn.testing import table
from tests.helpers import python_blocks, run_blocks

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


KIT = (ROOT / "parq_fn" / "testing" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize("text", [README, KIT], ids=["library", "kit"])
def test_the_code_runs_from_top_to_bottom(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it writes a file
    blocks = python_blocks(text)
    assert len(blocks) >= 2
    run_blocks(
        [block for block in blocks if "torchao" not in block]
    )  # tests/integrations runs that too


def test_the_tables_of_laws_are_those_of_the_traits() -> None:
    """Mend with: python -m parq_fn.testing.table, for all from the first table on."""
    assert KIT.rstrip().endswith(table.document())


def test_the_commands_are_ci_s_word_for_word() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^    (pip install .*)$", README, re.MULTILINE)
    assert len(commands) >= 3
    assert all(command in ci for command in commands)


def test_every_extra_that_is_installed_exists() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", project, re.DOTALL)
    assert extras is not None
    named = {line.partition(" = ")[0] for line in extras[1].splitlines()}
    assert {"test", "examples", "notebooks", "dev"} <= named
    assert set(re.findall(r"pip install .*?'\.\[(\w+)\]'", README)) <= named


def test_every_test_that_the_readme_names_exists() -> None:
    faults = (ROOT / "tests" / "test_published_faults.py").read_text()
    for name in re.findall(r"`(test_\w+)`$", README, re.MULTILINE):
        assert re.search(rf"def {name}", faults), name


def test_what_is_pinned_is_what_some_extra_asks_for() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    pinned = re.findall(r"^([\w-]+)==", (ROOT / ".ci" / "tested.txt").read_text(), re.MULTILINE)
    asked = set(re.findall(r'"([\w-]+)>=', project))
    assert set(pinned) >= asked - {"setuptools", "nox"}
    assert set(pinned) <= asked
