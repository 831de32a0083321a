"""Packed parameters of modules of any class, whatever they are called."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import parq_fn as pf
from parq_fn.export import PackedLayer, dequantized, pack_weight, quantized


class Conv1D(nn.Module):
    """x @ weight + bias, as GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Scaled(nn.Embedding):
    """Rows times a number, as Gemma's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class Experts(nn.Module):
    """One expert after another, each of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4))
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for i in range(len(self.gate_up_proj)):
            up, gate = functional.linear(x, self.gate_up_proj[i]).chunk(2, -1)
            out = out + functional.linear(up * gate.sigmoid(), self.down_proj[i]) * self.scale
        return out


def attention() -> nn.Module:
    class Attention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, x, x, need_weights=False)[0]

    return Attention(6, 2, bias=False)


ROWS = torch.linspace(-1, 1, 5 * 6).view(5, 6)
#: {name: (module, what it is given)}
MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "Conv1D": (Conv1D, torch.linspace(-1, 1, 24).view(3, 8)),
    "an embedding that scales": (lambda: Scaled(7, 6), torch.tensor([[0, 6], [3, 3]])),
    "experts": (Experts, ROWS),
    "attention": (attention, ROWS),
    "bilinear": (lambda: Both(), ROWS),
    "a transposed kernel": (
        lambda: nn.ConvTranspose1d(4, 6, 3), torch.linspace(-1, 1, 20).view(1, 4, 5)
    ),
}  # fmt: skip


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(6, 6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.pair(x, x)
        return out


def packed_of(module: nn.Module) -> tuple[dict[str, Any], nn.Module]:
    """(the module's matrices packed by rows of the last dimension, it with these weights)."""
    exact, found = copy.deepcopy(module), {}
    for name, p in exact.state_dict().items():
        found[name] = p
        if p.dim() > 1:
            rows = p.reshape(-1, p.shape[-1])
            levels = pf.lsbq(2)(rows)
            p.copy_(pf.lsbq(2).nearest(rows, levels).view_as(p))
            found[name] = pack_weight(p, levels)
    return found, exact


@pytest.fixture(params=MODULES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    """(a packed module, the plain one with the same weights, what it is given)."""
    torch.manual_seed(0)
    make, given = MODULES[request.param]
    module = make()
    packed, exact = packed_of(module)
    return quantized(module, packed), exact, given


def through_a_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


def test_modules_of_any_class_give_what_they_give_with_unpacked_weights(
    case: tuple[nn.Module, nn.Module, Tensor],
) -> None:
    """So do copies of them, which have the same class; and gradients reach what they are given."""
    module, exact, given = case
    kept = [part for part in module.modules() if isinstance(part, PackedLayer)]
    names = {key for part in kept for key in part.kept}
    assert names == {n.rpartition(".")[2] for n, p in exact.named_parameters() if p.dim() > 1}
    assert "4 levels in" in repr(module)
    for made in (module, copy.deepcopy(module), copy.deepcopy(copy.deepcopy(module))):
        assert [type(part) for part in made.modules()] == [type(p) for p in module.modules()]
        if given.is_floating_point():
            x, y = (given.clone().requires_grad_() for _ in range(2))
            made(x).sum().backward()
            exact(y).sum().backward()
            assert torch.equal(x.grad, y.grad)
        assert torch.equal(made(given), exact(given))
    for part in kept:
        assert "_now" not in part.__dict__  # nothing decoded stays
        assert not any(p.dim() > 1 for p in part.parameters(recurse=False))


def test_modules_of_any_class_convert_and_become_plain_again(
    case: tuple[nn.Module, nn.Module, Tensor],
) -> None:
    module, exact, given = case
    given = given.double() if given.is_floating_point() else given
    assert torch.equal(copy.deepcopy(module).double()(given), copy.deepcopy(exact).double()(given))
    plain = dequantized(module)
    assert [type(part) for part in plain.modules()] == [type(p) for p in exact.modules()]
    assert list(plain.state_dict()) == list(exact.state_dict())  # as optimizers number them
    for (name, p), (own, q) in zip(plain.named_parameters(), exact.named_parameters(), strict=True):
        assert name == own
        assert torch.equal(p, q)


class Locked(Conv1D):
    """It has what cannot be copied, and keeps a state without it."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "lock"}


@pytest.mark.parametrize(("make", "given"), [(Experts, ROWS), (Locked, MODULES["Conv1D"][1])])
def test_a_packed_module_of_a_class_that_can_be_imported_is_pickled_as_that_class_says(
    make: Callable[[], nn.Module], given: Tensor
) -> None:
    module = make()
    packed, exact = packed_of(module)
    made = quantized(module, packed)
    for again in (pickle.loads(pickle.dumps(made)), through_a_file(made)):
        assert type(again) is type(made)
        assert not hasattr(again, "lock")
        assert torch.equal(again(given), exact(given))


def test_a_packed_parameter_of_any_name_refuses_to_be_written_to() -> None:
    module = Experts()
    module = quantized(module, packed_of(module)[0])
    with pytest.raises(RuntimeError, match="decoded at each use"):
        module.gate_up_proj[0].zero_()
    with pytest.raises(AttributeError, match="down_proj: the weight of a packed layer is decoded"):
        module.down_proj = nn.Parameter(torch.zeros(3, 6, 4))


def test_experts_are_decoded_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Experts()
    module = quantized(module, packed_of(module)[0])
    calls: list[str] = []
    decode = PackedLayer.decoded
    monkeypatch.setattr(
        PackedLayer, "decoded", lambda self, name: calls.append(name) or decode(self, name)
    )
    module(ROWS)
    assert sorted(calls) == ["down_proj", "gate_up_proj"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Conv1D", "experts"])
def test_packed_modules_of_any_class_compile_whole(name: str) -> None:
    make, given = MODULES[name]
    module = make()
    packed, exact = packed_of(module)
    made = torch.compile(quantized(module, packed), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(made(given), exact(given), rtol=0, atol=0)


def with_own(**more: Any) -> Callable[[], nn.Module]:
    """Makes a layer with these attributes, which it computes with."""

    def make() -> nn.Module:
        layer = Conv1D()
        for name, value in more.items():
            setattr(layer, name, value)
        return layer

    return make


class Final(Conv1D):
    def __init_subclass__(cls) -> None:
        raise TypeError("it takes no subclass")


class Plain(Conv1D):
    plain = True


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(4, 3),
        lambda: nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)),
        lambda: nn.EmbeddingBag(5, 4, max_norm=1.0),
        lambda: nn.ParameterList([torch.randn(3, 4)]),
        with_own(codes=nn.Parameter(torch.ones(3))),
        with_own(kept=3),
        with_own(decoded=lambda: 2.0),
        Plain,
        Final,
    ],
    ids=["recurrent", "max_norm", "bag", "list", "codes", "kept", "decoded", "plain", "final"],
)
def test_layers_that_can_hold_no_packed_weight_are_unpacked_and_named(
    make: Callable[[], nn.Module],
) -> None:
    module = make()
    packed, exact = packed_of(module)
    first = next(name for name, p in exact.named_parameters() if p.dim() > 1)
    size = sum(p.nbytes for p in exact.parameters() if p.dim() > 1)
    with pytest.warns(UserWarning, match=f"quantized: {first}.* are unpacked, {size} bytes"):
        made = quantized(module, packed)
    assert not any(isinstance(part, PackedLayer) for part in made.modules())
    for name, p in made.state_dict().items():
        assert torch.equal(p, exact.state_dict()[name])
