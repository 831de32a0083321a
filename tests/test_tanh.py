"""tanh by arithmetic: near the true one, odd, and the same bits when compiled."""

from __future__ import annotations

import pytest
import torch

from parq_fn.proxmaps.tanh import tanh


def points() -> torch.Tensor:
    small = torch.logspace(-38, 0, 20_000, dtype=torch.float64)
    large = torch.linspace(0, 20, 200_000, dtype=torch.float64)
    return torch.cat([small, large, torch.tensor([1e30, torch.inf])]).float()


def test_it_is_tanh() -> None:
    x = points()
    true = x.double().tanh()
    assert bool(((tanh(x).double() - true).abs() <= 4e-7 * true).all())
    assert torch.equal(tanh(-x), -tanh(x))
    assert torch.equal(tanh(x.double()), true)
    assert bool(tanh(torch.tensor(torch.nan)).isnan())


@pytest.mark.rare
def test_compiled_it_has_the_same_bits() -> None:
    x = torch.cat([points(), -points()])
    assert torch.equal(torch.compile(tanh, fullgraph=True)(x), tanh(x))
    assert torch.equal(torch.cat([tanh(x[:7]), tanh(x[7:])]), tanh(x))


def test_it_has_tanh_s_derivative() -> None:
    x = torch.linspace(-5, 5, 101)
    slope = torch.func.vmap(torch.func.grad(tanh))(x)
    torch.testing.assert_close(slope, 1 - x.tanh().square(), rtol=1e-4, atol=1e-6)
