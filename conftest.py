"""Every test and doctest draws the same numbers, on one thread; TORCH_SEED gives other numbers."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

pytest_plugins = ["tests.plugin"]

# Modules that cannot be imported without their extra have no doctests to collect.
of_transformers = ["parq_fn/export/hugging_face.py", "parq_fn/integrations/trainer.py"]
collect_ignore = [] if find_spec("transformers") else of_transformers
if not (find_spec("transformers") and find_spec("torchao")):
    collect_ignore = [*collect_ignore, "parq_fn/export/torchao_config.py"]


@pytest.fixture(autouse=True)
def _as_alone() -> None:
    """What a test before this one has changed: the generator, and how many threads torch takes.

    Two workers share two cores, where threads that wait for each other cost more than they give.
    """
    torch.manual_seed(int(os.environ.get("TORCH_SEED", "0")))
    torch.set_num_threads(1)
