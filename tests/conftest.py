"""Hypothesis profiles: "quick" unless HYPOTHESIS_PROFILE names another."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, settings

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", derandomize=True, max_examples=15, **COMMON)
settings.register_profile("more", max_examples=150, **COMMON)
settings.register_profile("thorough", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture
def graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces, and runs what it traced without generating code, unless TEST_CASES=all.

    For what is about graphs: that there is one, and no second.
    """
    if os.environ.get("TEST_CASES") != "all":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
