"""Packed layers in the place of a module's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.export import dequantized, load_into, pack_weight, quantized, save
from tests.export.helpers import signs, trained


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


CONVERSIONS: dict[str, Any] = {
    "a copy": copy.deepcopy,
    "bfloat16": lambda net: net.to(torch.bfloat16),
    "half": lambda net: net.half(),
    "a type": lambda net: net.type(torch.float64),
    "meta": lambda net: net.to("meta"),
    "empty": lambda net: net.to_empty(device="cpu"),
    "twice": lambda net: net.double().bfloat16(),
}


@pytest.mark.parametrize("way", CONVERSIONS)
def test_converted_packed_layers_stay_tied(way: str, tmp_path: Path) -> None:
    net, optimizer = trained("QuantOptimizer")
    save(pf.export.pack(net, optimizer), tmp_path / "file")
    packed = quantized(type(net)().eval(), tmp_path / "file")
    expected = CONVERSIONS[way](copy.deepcopy(net))
    got = CONVERSIONS[way](packed)
    assert got.head.codes is got.lookup.codes
    assert got.head.levels is got.lookup.levels
    assert got.linear.codes.dtype == torch.uint8
    assert got.linear.weight.dtype == expected.linear.weight.dtype
    assert got.linear.weight.device == expected.linear.weight.device
    if way not in ("meta", "empty"):
        assert torch.equal(got.linear.weight, expected.linear.weight)
    plain = dequantized(got)
    assert plain.head.weight is plain.lookup.weight


def test_one_tied_layer_is_converted_alone(tmp_path: Path) -> None:
    net, optimizer = trained("QuantOptimizer")
    save(pf.export.pack(net, optimizer), tmp_path / "file")
    packed = quantized(type(net)().eval(), tmp_path / "file")
    packed.head.to(torch.bfloat16)
    assert packed.lookup.share_memory().weight.dtype == torch.float32
    assert packed.lookup.to(torch.float16).weight.dtype == torch.float16


@pytest.mark.parametrize("file_s", [True, False])
def test_packed_kernels_keep_their_order_in_memory(file_s: bool, tmp_path: Path) -> None:
    """The file's, or where that has none the module's; a conversion changes it."""

    def last(kernel: Tensor) -> bool:
        return kernel.is_contiguous(memory_format=torch.channels_last)

    kernel = torch.randn(4, 3, 2, 2).sign()
    if file_s:
        kernel = kernel.to(memory_format=torch.channels_last)
    net = nn.Conv2d(3, 4, 2, bias=False)
    fresh = net if file_s else net.to(memory_format=torch.channels_last)
    save({"weight": pack_weight(kernel, torch.tensor([[-1.0, 1.0]]))}, tmp_path / "file")
    packed: Any = quantized(fresh, tmp_path / "file")
    for made in (packed, copy.deepcopy(packed), copy.deepcopy(packed).bfloat16()):
        assert torch.equal(made.weight.float(), kernel)
        assert last(made.weight)
        assert last(dequantized(copy.deepcopy(made)).weight)
    plain = packed.to(memory_format=torch.contiguous_format)
    assert plain.weight.is_contiguous()
    assert last(plain.to(memory_format=torch.channels_last).weight)
