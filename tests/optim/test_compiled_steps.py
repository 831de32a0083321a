"""Steps within torch.compile, and compiled maps within dispatch modes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.flop_counter import FlopCounterMode

from tests.optim.adapters import ADAPTERS, ones_for, parameters, quantized
from tests.optim.helpers import ADAPTERS as OF_NETS
from tests.optim.helpers import begin, train
from tests.processes import on_processes


def compiled_steps(folder: str, adapter: str) -> None:
    net, optimizer = begin(adapter, "float32", split=True)
    straight, other = begin(adapter, "float32", split=True)
    eager = optimizer.step
    optimizer.step = torch.compile(eager, backend="eager")
    for _ in range(6):
        train(net, optimizer, 1)
        train(straight, other, 1)
        for p, q in zip(net.parameters(), straight.parameters(), strict=True):
            assert torch.equal(p.to_local(), q.to_local())


@pytest.mark.rare
@pytest.mark.parametrize("adapter", OF_NETS)
def test_torch_compile_of_a_sharded_step_maps_all(adapter: str, tmp_path: Path) -> None:
    on_processes(compiled_steps, 2, tmp_path, str(tmp_path), adapter)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_torch_compile_of_a_step_gives_an_eager_ones(adapter: str) -> None:
    torch.compiler.reset()
    one, two = parameters(), parameters()
    alone, optimizer = ADAPTERS[adapter](one), ADAPTERS[adapter](two)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(7):
        ones_for(*one, *two)
        alone.step()
        step()
        assert all(map(torch.equal, one, two))


@pytest.mark.parametrize("mode", [CommDebugMode, lambda: FlopCounterMode(display=False)])
def test_compile_true_maps_eagerly_in_a_dispatch_mode(mode) -> None:
    one, two = parameters(), parameters()
    alone, optimizer = quantized(one), quantized(two, compile=True)
    for _ in range(3):
        ones_for(*one, *two)
        alone.step()
        with mode():
            optimizer.step()
        assert all(map(torch.equal, one, two))
