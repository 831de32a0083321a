"""The benchmarks beside the published package, on small inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchao", reason="torchao, of the extra integrations, is not installed")

ROOT = Path(__file__).parents[2]


def _figures(groups: list[str], folder: Path) -> dict[str, Any]:
    file = folder / "figures.json"
    flags = [*groups, "--tiny", "--repeats", "1", "--json", str(file)]
    command = [sys.executable, "-m", "tests.benchmarks", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(file.read_text())
    return report


@pytest.mark.slow
def test_the_suite_measures_the_published_package(tmp_path: Path) -> None:
    report = _figures(["pass", "fits", "steps"], tmp_path)
    assert report["machine"]["torchao"] != "not installed"
    whats = {figure["what"] for figure in report["figures"]}
    assert {
        "eager, peer's time over ours",
        "peer's time over ours",
        "peer, time over AdamW's",
    } <= whats


@pytest.mark.rare
@pytest.mark.slow
def test_packed_layers_and_models_are_measured_beside_others(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    figures = _figures(["packed", "generation"], tmp_path)["figures"]
    cases = {figure["case"].partition(",")[0] for figure in figures}
    assert {"float32", "bfloat16", "torchao", "packed", "ternary"} <= cases
    assert not [one for one in figures if one["what"] == "not measured"]
