"""Export under use that nobody planned: each test is a fault that a review found."""

from __future__ import annotations

import copy
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from parq_fn.export import load, load_into, pack, pack_weight, quantized, save
from parq_fn.export.file import _BLANK, _write
from parq_fn.export.grid import even_grid, shifted
from tests.export.helpers import trained


@pytest.mark.parametrize(
    "levels", [[[20.0, 21.0]], [[120.0, 121.0], [0.0, 16.0]], [[122.0, 127.0], [1.0, 50.0]]]
)
def test_zero_points_fit_the_codes_bits(levels: list[list[float]]) -> None:
    grid = even_grid(torch.tensor(levels))
    codes, zero, bits = shifted(grid)
    half = 2 ** (bits - 1)
    for got in (codes, zero):
        assert bool(((got >= -half) & (got < half)).all())
    assert torch.equal(codes - zero, grid.multiples)


class Twice(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(self.first(x)))
        return out


def signs(module: nn.Module) -> dict[str, Any]:
    """A module's matrices set to +-1/4, packed."""
    packed: dict[str, Any] = {}
    for name, p in module.named_parameters():
        if p.dim() > 1:
            p.data = torch.where(p >= 0, 0.25, -0.25)
            packed[name] = pack_weight(p, torch.tensor([[-0.25, 0.25]]))
        else:
            packed[name] = p.detach()
    return packed


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


@pytest.mark.parametrize(
    ("shape", "levels", "message"),
    [
        ((1, 257), torch.arange(257.0)[None], r"expected levels \[r, 1 to 256\], got \(1, 257\)"),
        ((4,), torch.ones(2), r"expected levels \[r, 1 to 256\], got \(2,\)"),
        ((4,), torch.ones(1, 0), "expected levels"),
        ((3, 3), torch.ones(2, 1), r"shape \(3, 3\) is not 2 rows of one length"),
        ((2, 2), torch.tensor([[1.0, -1.0]]), "its levels are not sorted"),
    ],
)
def test_levels_that_fit_no_weight_are_told(shape: Any, levels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"'w': {message}|'w'.*{message}"):
        pack_weight(torch.zeros(shape), levels, name="w")


def test_a_copy_of_the_module_is_refused() -> None:
    net, optimizer = trained("QuantOptimizer")
    with pytest.raises(ValueError, match="has none of the parameters that the optimizer quantizes"):
        pack(copy.deepcopy(net), optimizer)


def test_permissions_are_those_of_the_file_before_or_of_the_user(tmp_path: Path) -> None:
    packed, file = signs(nn.Linear(8, 2)), tmp_path / "file"
    before = os.umask(0o077)
    try:
        save(packed, file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    file.chmod(0o640)
    save(packed, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize("version", [-3, True, 0, "1", None])
def test_versions_that_never_were_are_refused(version: Any, tmp_path: Path) -> None:
    own = {"names": [], "packed": {}, "sha256": _BLANK, "version": version}
    text = json.dumps({"__metadata__": {"parq_fn": json.dumps(own, separators=(",", ":"))}})
    header = bytearray(len(text).to_bytes(8, "little") + text.encode())
    _write(tmp_path / "file", header, [])
    with pytest.raises(ValueError, match="is of format version"):
        load(tmp_path / "file")


@pytest.mark.parametrize(
    "own", [{"names": ["w"]}, {"packed": {"w": {"shape": [2]}}}, {"packed": [3]}]
)
def test_headers_that_fit_no_tensors_are_refused(own: dict[str, Any], tmp_path: Path) -> None:
    own = {"names": [], "packed": {}, "sha256": _BLANK, "version": 1, **own}
    text = json.dumps({"__metadata__": {"parq_fn": json.dumps(own, separators=(",", ":"))}})
    header = bytearray(len(text).to_bytes(8, "little") + text.encode())
    _write(tmp_path / "file", header, [])
    with pytest.raises(ValueError, match="has a header that does not fit its tensors"):
        load(tmp_path / "file")
