"""The recipes learn from drawn shapes, by the commands of the documentation: minutes of training,
run by -m learning."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from examples import compare, qat_resnet_imagenet, qat_vit_imagenet
from examples.recipe.log import LOG, read

pytestmark = pytest.mark.learning


def flags_of(program: str) -> list[str]:
    """What follows the program in the command without data."""
    text = Path(compare.__file__).with_name("README.md").read_text()
    (command,) = re.findall(rf"^python -m examples\.{program} (.*--data synthetic.*)$", text, re.M)
    return [*shlex.split(command), "--workers", "0", "--no-progress"]


def test_two_bits_come_within_a_point_of_full_precision(tmp_path: Path) -> None:
    """One row of the table, and the one it is compared with."""
    flags = [*flags_of("compare"), "--proxmaps", "parq", "--quant-bits", "2"]
    full, quantized = compare.main([*flags, "--save-dir", str(tmp_path)])
    assert full.accuracy > 90
    assert quantized.accuracy > full.accuracy - 1
    assert quantized.on_levels == 1


@pytest.mark.parametrize("module", [qat_resnet_imagenet, qat_vit_imagenet])
def test_networks_for_imagenet_learn(module: Any, tmp_path: Path) -> None:
    program = module.RECIPE.program
    assert module.main([*flags_of(program), "--save-dir", str(tmp_path)]) == 0
    last = read(tmp_path / LOG)[-1]
    assert last["on_levels"] == 1
    assert last["test_accuracy"] > 35  # of ten classes
