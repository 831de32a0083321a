"""Hypothesis profiles: "quick" unless HYPOTHESIS_PROFILE names another."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from parq_fn.foundation.value import Value

#: Programs of their own and oracles: no tests are there, nor doctests, for which pytest would
#: import them.
collect_ignore = ["benchmarks", "mutation", "twins", "typed_program.py"]

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("quick", derandomize=True, max_examples=15, **COMMON)
settings.register_profile("more", max_examples=150, **COMMON)
settings.register_profile("thorough", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


_MODULES = frozenset({"torch", "np", "pf", "pq", "optim", "nn", "sched", "lr_scheduler"})


def pytest_make_parametrize_id(config: Any, val: Any, argname: str) -> str | None:
    """Of a parameter that pytest would count ("dtype0", "<lambda>"): dtypes, shapes and
    values of the library as they print, tensors by their shape, lambdas by what they call."""
    del config, argname
    if isinstance(val, torch.dtype):
        return str(val)
    if isinstance(val, tuple) and all(type(x) is int for x in val):
        return str(val)
    if isinstance(val, Tensor):
        return f"{val.dtype} {list(val.shape)}".removeprefix("torch.")
    if isinstance(val, Value):
        text = repr(val)
        return text if len(text) < 80 and " at 0x" not in text and "\n" not in text else None
    if getattr(val, "__name__", "") == "<lambda>":
        return " ".join(name for name in val.__code__.co_names if name not in _MODULES) or None
    return None


@pytest.fixture
def graphs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile traces, and runs what it traced without generating code, unless TEST_CASES=all.

    For what is about graphs: that there is one, and no second.
    """
    if os.environ.get("TEST_CASES") != "all":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
