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


def test_a_source_distribution_leaves_tests_out_altogether() -> None:
    left_out = re.findall(r"^prune (\w+)$", (ROOT / "MANIFEST.in").read_text(), re.M)
    assert {"tests", "examples", "notebooks"} == set(left_out)


def test_an_editable_install_is_a_path() -> None:
    """setuptools writes a path where the root is a package directory, else a finder's code, which
    type checkers do not run."""
    assert 'package-dir = {"" = "."}' in (ROOT / "pyproject.toml").read_text()


PROGRAM = """
import torch
import parq_fn as pf

params = {"w": torch.ones(2, 2)}
transform = pf.chain(pf.sgd(0.1), pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=5))
state = transform.init(params)
step = pf.value_and_grad(lambda w: w["w"].sum(), transform)
loss, grads = step(params, state)
updates, state = transform.update(grads, state, params)
params = pf.apply_updates(params, updates)
slope = pf.read(state, "slope")
optimizer = pf.optim.QuantOptimizer(
    torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(2, 2))], "quant_bits": 2}], lr=0.1),
    pf.hard_prox(pf.uniform(2), granularity=pf.per_channel()),
)
optimizer.step()
"""

#: The package is checked with torch's types by CI; all of them again would take half a minute.
SETTINGS = """
[mypy]
[mypy-torch.*]
follow_imports = skip
[mypy-parq_fn.*]
ignore_errors = True
"""


@pytest.mark.slow
def test_a_user_s_program_passes_a_strict_checker(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="needs mypy: pip install 'parq_fn[dev]'")
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "program.py"],
        cwd=tmp_path,
        env={"MYPYPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
