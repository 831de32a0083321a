"""The optimizers of pytorch_optimizer, wrapped: each trains as it trains alone and is resumed to
the bit, or is refused by name."""

from __future__ import annotations

import contextlib
import inspect
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, load_checkpoint, save_checkpoint

po = pytest.importorskip(
    "pytorch_optimizer", reason="needs pytorch_optimizer: pip install 'parq_fn[integrations]'"
)

LATE = pf.parq_prox(pf.lsbq(2), anneal_start=1000, anneal_end=2000)
MID = pf.parq_prox(pf.lsbq(2), anneal_start=1, anneal_end=9, period=2)

#: What QuantOptimizer says of those that it refuses, or they of themselves.
REFUSED = {
    "a2grad": "group 0 has no lr",
    "adahessian": "AdaHessian cannot be wrapped",  # of a gradient of gradients
    "adalomo": "AdaLOMO keeps parameter|AdaLOMO cannot be wrapped",
    "adammini": "AdamMini keeps parameter",
    "alig": "group 0 has no lr",
    "bsam": "BSAM cannot be wrapped",  # without a closure
    "demo": "",  # needs another package
    "distributedmuon": "",  # needs several processes
    "lbfgs": "",
    "lomo": "LOMO keeps parameter|LOMO cannot be wrapped",
    "lorarite": "",  # of pairs of matrices alone
    "magma": "Magma is around another optimizer",
    "sophiah": "SophiaH cannot be wrapped",
}
#: Of these no checkpoint is read, for they keep objects of their own classes in their state.
OBJECTS = {"alice", "apollo", "conda", "fira", "galore", "racs", "scalableshampoo", "scion"}
OBJECTS |= {"scionlight", "adashift", "shampoo"}


class Net(nn.Module):
    """A kernel, a weight, one of zeros, and vectors; or matrices alone."""

    def __init__(self, seed: int, matrices: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight, self.zeros = nn.Linear(24, 8), nn.Parameter(torch.zeros(8, 8) + seed)
        self.conv = nn.Linear(18, 24, bias=False) if matrices else nn.Conv2d(2, 6, 3)
        if matrices:
            self.weight.bias = None

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)[:, :18] if isinstance(self.conv, nn.Linear) else x
        return self.weight(self.conv(x).relu().flatten(1)) @ (self.zeros + torch.eye(8))


def base_of(name: str, net: Net, bits: int | None) -> Any:
    kind = po.load_optimizer(name)
    takes = inspect.signature(kind.__init__).parameters
    options = {"lr": 1e-2, "num_iterations": 100, "num_data": 4}
    if "lr" not in takes:
        del options["lr"]
    options = {key: got for key, got in options.items() if key in takes or key == "lr"}
    if "model" in takes:
        made = kind(net, **options)
        for group in made.param_groups:
            group |= {} if bits is None else {"quant_bits": bits}
        return made
    parts = [
        [p for p in net.parameters() if p.dim() > 1],
        [p for p in net.parameters() if p.dim() < 2],
    ]
    groups: list[dict[str, Any]] = [{"params": params} for params in parts if params]
    if "uon" in name or name == "adago":
        for i, group in enumerate(groups):
            group["use_muon"] = i == 0
    if bits is not None:
        groups[0]["quant_bits"] = bits
    return kind(groups, **options)


def trained(net: Net, optimizer: Any, steps: int, first: int = 0) -> list[Tensor]:
    if callable(getattr(optimizer, "train", None)):
        optimizer.train()
    drawn = torch.Generator().manual_seed(7)
    inputs = torch.randn(first + steps, 4, 2, 4, 4, generator=drawn)
    for x in inputs[first:]:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


@contextlib.contextmanager
def drawn_alike(state: Any = None) -> Any:
    """With the global generators as they were then, or as a seed has them."""
    if state is None:
        torch.manual_seed(3)
        random.seed(3)
        np.random.seed(3)  # noqa: NPY002 # the global generator
    else:
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])  # noqa: NPY002
    yield


def drawn() -> Any:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", po.get_supported_optimizers())
def test_an_optimizer_trains_wrapped_as_alone_and_is_resumed(name: str, tmp_path: Path) -> None:
    matrices = name == "spectralsphere"

    def wrapped(net: Net, prox: Any) -> QuantOptimizer:
        return QuantOptimizer(base_of(name, net, 2), prox)

    if name in REFUSED:
        with pytest.raises(Exception, match=REFUSED[name]):
            trained(net := Net(0, matrices), wrapped(net, LATE), 1)
        return
    nets = [Net(0, matrices) for _ in range(3)]
    with drawn_alike():
        alone = trained(nets[0], base_of(name, nets[0], None), 4)
    with drawn_alike():
        assert same(alone, trained(nets[1], wrapped(nets[1], LATE), 4))
    net, optimizer = nets[2], wrapped(nets[2], MID)
    trained(net, optimizer, 3)
    state = drawn()
    weights, saved = net.state_dict(), optimizer.state_dict()
    others = [Net(1, matrices) for _ in range(2)]
    resumed = [wrapped(other, MID) for other in others]
    others[0].load_state_dict(weights)
    resumed[0].load_state_dict(saved)
    if name not in OBJECTS:
        save_checkpoint(tmp_path / "last", net, optimizer)
        load_checkpoint(tmp_path / "last", others[1], resumed[1])
    with drawn_alike(state):
        expected = trained(net, optimizer, 3, 3)
    for other, fresh in list(zip(others, resumed, strict=True))[: 1 if name in OBJECTS else 2]:
        with drawn_alike(state):
            assert same(expected, trained(other, fresh, 3, 3))
