"""The recipes learn from drawn shapes: minutes of training, run by -m learning."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from examples import compare, qat_resnet_imagenet, qat_vit_imagenet
from examples.recipe.log import LOG, read

pytestmark = pytest.mark.learning


def test_two_bits_come_within_a_point_of_full_precision(tmp_path: Path) -> None:
    """By the command of the documentation, but for its other rows."""
    text = Path(compare.__file__).with_name("README.md").read_text()
    (command,) = re.findall(r"^python -m examples\.compare (qat_resnet_cifar10 --.*)$", text, re.M)
    flags = [*shlex.split(command), "--proxmaps", "parq", "--quant-bits", "2"]
    full, quantized = compare.main([*flags, "--save-dir", str(tmp_path), "--no-progress"])
    assert full.accuracy > 90
    assert quantized.accuracy > full.accuracy - 1
    assert quantized.on_levels == 1


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (qat_resnet_imagenet, "--arch resnet18 --lr 0.05 --warmup-epochs 1"),
        (
            qat_vit_imagenet,
            "--lr 1e-3 --warmup-epochs 1 --const-lr-epochs 1 --no-custom-train-transform "
            "--no-cutmix-mixup --no-repeat-aug",
        ),
    ],
)
def test_networks_for_imagenet_learn(module: Any, flags: str, tmp_path: Path) -> None:
    shared = "--data synthetic --synthetic-images 4000 --image-size 64 --epochs 6 --batch-size 40 "
    shared += f"--quant-warmup-steps 100 --workers 0 --no-progress --save-dir {tmp_path} "
    assert module.main((shared + flags).split()) == 0
    last = read(tmp_path / LOG)[-1]
    assert last["on_levels"] == 1
    assert last["test_accuracy"] > 35  # of ten classes
