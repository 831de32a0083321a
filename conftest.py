"""Every test and doctest draws the same numbers in any order; TORCH_SEED gives others."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

# Modules that cannot be imported without their extra have no doctests to collect.
collect_ignore = [] if find_spec("transformers") else ["parq_fn/export/hugging_face.py"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(int(os.environ.get("TORCH_SEED", "0")))
