"""Packed layers in the place of a module's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parq_fn.export import load_into, quantized, save
from tests.export.helpers import signs


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(self.first(x)))
        return out


def test_a_layer_under_two_names(tmp_path: Path) -> None:
    net = Twice()
    save(signs(net), tmp_path / "file")
    for put in (quantized, load_into):
        fresh = Twice()
        put(fresh, tmp_path / "file")
        assert fresh.a is fresh.b
        assert torch.equal(fresh(torch.ones(2, 8)), net(torch.ones(2, 8)))


@pytest.mark.parametrize("put", [quantized, load_into])
def test_a_module_that_holds_nothing_is_refused(put: Any, tmp_path: Path) -> None:
    save(signs(nn.Linear(8, 2)), tmp_path / "file")
    with pytest.raises(ValueError, match="weight is on the meta device"):
        put(nn.Linear(8, 2, device="meta"), tmp_path / "file")
