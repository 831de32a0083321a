"""What is distributed, and what type checkers see of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import parq_fn

ROOT = Path(__file__).parent.parent


def test_the_version_stands_in_one_place() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^dynamic = \["version"', project, re.M)
    assert 'version = {attr = "parq_fn.__version__"}' in project
    assert re.fullmatch(r"\d+\.\d+\.\d+", parq_fn.__version__)
    assert not re.search(r"^version", (ROOT / "CITATION.cff").read_text(), re.M)


def _description(address: str | None) -> str:
    code: dict[str, Any] = {"__name__": "setup", "__file__": str(ROOT / "setup.py")}
    exec((ROOT / "setup.py").read_text(), code)
    return str(code["description"]((ROOT / "README.md").read_text(), address))


def test_an_index_shows_no_link_or_picture_that_leads_nowhere() -> None:
    """setup.py: absolute where the repository has an address, text where it has none."""
    targets = re.compile(r'\]\(([^)]+)\)|src="([^"]+)"')
    with_paths = ["".join(t) for t in targets.findall((ROOT / "README.md").read_text())]
    for address in ("https://host.example/parq_fn", None):
        shown = ["".join(t) for t in targets.findall(_description(address))]
        assert all(target.startswith("https://") for target in shown)
        assert (len(shown) == len(with_paths)) is (address is not None)
    assert 'src="https://host.example/parq_fn/raw/main/notebooks/figures/training.png"' in (
        _description("https://host.example/parq_fn")
    )


def test_the_addresses_are_https_and_the_paper_is_the_one_that_is_cited() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (table,) = re.findall(r"^\[project\.urls\].*\n((?:\w+ = .*\n)+)", project, re.M)
    urls = dict(re.findall(r'^(\w+) = "(https://[^"]+)"$', table, re.M))
    assert len(urls) == len(table.splitlines())
    assert f"url: {urls['Paper']}\n" in (ROOT / "CITATION.cff").read_text()


def test_a_source_distribution_leaves_tests_out_altogether() -> None:
    left_out = re.findall(r"^prune (\w+)$", (ROOT / "MANIFEST.in").read_text(), re.M)
    assert {"tests", "examples", "notebooks"} == set(left_out)


def test_an_editable_install_is_a_path() -> None:
    """setuptools writes a path where the root is a package directory, else a finder's code, which
    type checkers do not run."""
    assert 'package-dir = {"" = "."}' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow  # a checker reads torch's types
def test_a_user_s_program_passes_checkers_of_types() -> None:
    """mypy checks it with the package, in .ci/run lint; pyright is quick."""
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^files = \["parq_fn", "tests/typed_program.py"\]$', project, re.M)
    pytest.importorskip("pyright", reason="needs pyright: pip install 'parq_fn[dev]'")
    ran = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    done = subprocess.run(ran, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_sessions_of_nox_are_the_steps_of_ci() -> None:
    noxfile, ci = (ROOT / "noxfile.py").read_text(), (ROOT / ".ci" / "run").read_text()
    (steps,) = re.findall(r"^STEPS = \[(.*)\]$", noxfile, re.M)
    (run,) = re.findall(r"\|\| steps=\((.*)\)$", ci, re.M)
    assert sorted(re.findall(r'"(\w+)"', steps)) == sorted(run.split())
    (known,) = re.findall(r'^  case " (.*) " in$', ci, re.M)
    assert set(known.split()) == {*run.split(), "full"}
    assert set(known.split()) == set(re.findall(r"^(\w+)\(\) \{  #", ci, re.M)) - {
        "environment",
        "beside",
    }
    (lowest,) = re.findall(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    (versions,) = re.findall(r"^TORCH = \[(.*)\]$", noxfile, re.M)
    assert versions.startswith(f'"{lowest}')
