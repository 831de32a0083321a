"""Packed layers where other code reads, writes and merges their weights."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import parq_fn as pf
from parq_fn import export
from parq_fn.export.packed_layer import Kept, PackedLinear, pack_layer
from tests.export.helpers import Net, trained


@pytest.fixture(scope="module")
def packed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    net, optimizer = trained("QuantOptimizer")
    file = tmp_path_factory.mktemp("packed") / "net.parq"
    export.save(export.pack(net, optimizer), file)
    return file


@pytest.fixture
def net(packed_file: Path) -> Net:
    return export.quantized(Net().eval(), packed_file)


def counted(layer: Any) -> None:
    with FlopCounterMode(display=False):
        layer.weight.add_(1)


WRITES: dict[str, Any] = {
    "data +=": lambda layer: layer.weight.data.__iadd__(1),
    "data =": lambda layer: setattr(layer.weight, "data", torch.zeros_like(layer.weight)),
    "add_": lambda layer: layer.weight.add_(1),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros_like(layer.weight)),
    "detached": lambda layer: layer.weight.detach().mul_(2),
    "a view": lambda layer: layer.weight[0].view(-1).zero_(),
    "a view of views": lambda layer: layer.weight.unbind()[0].unsqueeze(0).fill_(1),
    "an item": lambda layer: layer.weight.__setitem__(0, 1.0),
    "out=": lambda layer: torch.mul(layer.weight, 2, out=layer.weight),
    "many": lambda layer: torch._foreach_add_([layer.weight], 1.0),
    "init": lambda layer: nn.init.normal_(layer.weight),
    "numpy": lambda layer: layer.weight.numpy().fill(1),
    "inplace=True": lambda layer: functional.relu(layer.weight, inplace=True),
    "in place by position": lambda layer: functional.threshold(layer.weight, 9.0, 1.0, True),
    "a module in place": lambda layer: nn.Hardtanh(-0.1, 0.1, inplace=True)(layer.weight[0]),
    "max_norm": lambda layer: functional.embedding(
        torch.tensor([0]), layer.weight.flatten(1), max_norm=1e-3
    ),
    "an overload": lambda layer: torch.ops.aten.add_.Scalar(layer.weight, 1),
    "set_": lambda layer: layer.weight.set_(torch.zeros(1)),
    "resize_": lambda layer: layer.weight.resize_(1),
    "dlpack": lambda layer: torch.from_dlpack(layer.weight).zero_(),
    "under grad": lambda layer: torch.func.grad(lambda x: (layer.weight.add_(1) * x).sum())(
        torch.tensor(1.0)
    ),
    "under vmap": lambda layer: torch.vmap(lambda x: layer.weight[0].mul_(2) * x)(torch.ones(2)),
    "counted flops": counted,
    "compiled": lambda layer: torch.compile(lambda: layer.weight.add_(1), backend="eager")(),
    "given to compiled": lambda layer: torch.compile(lambda w: w.add_(1), backend="eager")(
        layer.weight
    ),
    "assigned": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(1))),
}


@pytest.mark.parametrize("way", WRITES)
@pytest.mark.parametrize("name", ["linear", "conv", "lookup"])
def test_a_write_to_a_packed_weight_raises_and_names_the_way_out(net: Net, name, way) -> None:
    layer = getattr(net, name)
    before = layer.weight.clone()
    kinds = (RuntimeError, AttributeError, ValueError)
    with torch.no_grad(), pytest.raises(kinds, match=r"dequantized\(module\)|read-only"):
        WRITES[way](layer)
    assert torch.equal(layer.weight, before)


def test_a_packed_weight_is_read_as_any_tensor(net: Net) -> None:
    weight = net.linear.weight
    plain = torch.zeros_like(weight).copy_(weight)
    plain += weight
    assert type(plain) is type(weight * 2) is type(copy.deepcopy(weight)) is Tensor
    assert torch.equal(plain, weight * 2)
    assert torch.equal(torch.cat([weight, weight]).add_(1)[:8], weight.clone().add_(1))
    buffer = io.BytesIO()
    torch.save({"weight": weight}, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=True)["weight"]
    assert type(read) is Tensor
    assert torch.equal(read, weight)
    trainable = nn.Parameter(weight.clone())
    trainable.square().sum().backward()
    assert torch.equal(trainable.grad, 2 * weight)


def test_dequantized_layers_are_plain_and_train(net: Net, packed_file: Path) -> None:
    tokens = torch.arange(20).reshape(4, 5) % 12
    expected, weights = (
        net(tokens),
        {n: v.clone() for n, v in export.load(packed_file).items() if isinstance(v, Tensor)},
    )
    assert export.dequantized(net) is net
    assert [type(m) for m in net.modules()] == [type(m) for m in Net().modules()]
    assert net.state_dict().keys() == Net().state_dict().keys()
    assert torch.equal(net(tokens), expected)
    assert net.head.weight is net.lookup.weight
    assert all(torch.equal(net.state_dict()[name], v) for name, v in weights.items())
    net.linear.weight.data += 1
    assert not torch.equal(net(tokens), expected)
    before = net.lookup.weight.detach().clone()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(tokens).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net.lookup.weight, before)
    copy.deepcopy(net)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got dict"):
        export.dequantized({})


def embeddings() -> dict[str, nn.Module]:
    """A packed table for each way that one is looked up, and the plain one beside it."""
    made = {}
    for name, cut in [
        ("rows", pf.per_channel()),
        ("blocks", pf.per_block(4)),
        ("one row", pf.per_tensor()),
        ("along", pf.per_channel(1)),
    ]:
        plain = nn.Embedding(6, 8)
        rows = cut.rows(plain.weight.detach())
        levels = pf.lsbq(2)(rows)
        plain.weight.data = cut.restore(pf.lsbq(2).nearest(rows, levels), plain.weight)
        made[name] = plain, cut, levels
    return made


@pytest.mark.parametrize("name", embeddings())
def test_a_packed_embedding_takes_the_indexes_that_torch_takes(name: str) -> None:
    plain, cut, levels = embeddings()[name]
    entry = export.pack_weight(plain.weight.detach(), levels, granularity=cut)
    packed = copy.deepcopy(plain)
    pack_layer(packed, entry.codes, entry.levels, Kept(tuple(entry.shape), entry.cut))
    good = [
        torch.tensor([[0, 5], [3, 3]]),
        torch.tensor(2),
        torch.tensor([1], dtype=torch.int32),
        torch.zeros(0, 3, dtype=torch.int64),
    ]
    for index in good:
        assert torch.equal(packed(index), plain(index))
    bad = [
        torch.tensor([-1]),
        torch.tensor([-100]),
        torch.tensor([6]),
        torch.tensor([[0], [-1]]),
        torch.tensor([1], dtype=torch.uint8),
        torch.tensor([True] * 6),
        torch.tensor([1.0]),
        [0, 1],
        3,
        torch.tensor([1], dtype=torch.int16),
    ]
    for index in bad:
        with pytest.raises((IndexError, RuntimeError, TypeError)) as expected:
            plain(index)
        with pytest.raises(expected.type):
            packed(index)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")  # from torch 2.14 on a FutureWarning
def test_a_packed_weight_that_is_read_compiles_and_is_traced(net: Net) -> None:
    """As of a tied head, h @ embedding.weight.T."""
    layer = next(module for module in net.modules() if isinstance(module, PackedLinear))

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) @ self.layer.weight

    x, read = torch.randn(5, layer.weight.shape[1]), Reads()
    expected = read(x)
    torch.compiler.reset()
    for run in (
        torch.compile(read, fullgraph=True, backend="eager"),
        torch.export.export(read, (x,), strict=True).module(),
        torch.export.export(read, (x,), strict=False).module(),
        torch.fx.symbolic_trace(read),
        torch.jit.trace(read, (x[:2],)),
        make_fx(read)(x),
        make_fx(read, pre_dispatch=True)(x),
        torch.vmap(read),
    ):
        assert torch.equal(run(x), expected)
    given = torch.compile(lambda w, x: x @ w.T, fullgraph=True, backend="eager")
    assert torch.equal(given(layer.weight, x), x @ layer.weight.T)
    assert torch.equal(torch.vmap(lambda row: layer.weight * row)(x)[0], layer.weight * x[0])
    gradient = torch.func.grad(lambda w: (x @ w.T).square().sum())(layer.weight)
    assert torch.equal(gradient, 2 * (x @ layer.weight.T).T @ x)
