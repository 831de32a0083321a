"""The benchmarks beside the published package, on small inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchao", reason="torchao, of the extra integrations, is not installed")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_suite_measures_the_published_package(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    groups = ["pass", "fits", "steps", "packed", "generation"]
    flags = [*groups, "--tiny", "--repeats", "1", "--json", str(file)]
    command = [sys.executable, "-m", "tests.benchmarks", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(file.read_text())
    assert report["machine"]["torchao"] != "not installed"
    whats = {figure["what"] for figure in report["figures"]}
    assert {
        "eager, peer's time over ours",
        "peer's time over ours",
        "peer, time over AdamW's",
    } <= whats
