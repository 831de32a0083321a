"""Products with codes, against those of the decoded weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._inductor.exc import InductorError
from torch.nn import functional

import parq_fn as pf
from parq_fn.export import dequantized, pack_weight, product, quantized
from parq_fn.export.codes import decode, encode
from parq_fn.export.packed_layer import PackedLinear
from parq_fn.export.packing import decoded
from parq_fn.export.product import LEAST, fits, numbers_of, packed_product, widened

#: Units in the last place of float32 of sum |x| max |level|.
CLOSE = 4 * torch.finfo(torch.float32).eps
BITS = {2: 1, 4: 2, 16: 4, 256: 8}


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of this test alone, which are not compiled."""
    monkeypatch.setattr(product, "_PROGRAMS", {})
    monkeypatch.setattr(product, "compiled", lambda formula, options, dynamic: formula)


def levels_of(form: str, r: int, k: int) -> Tensor:
    """Sorted levels [r, k] of a form."""
    unit, other = torch.rand(r, 1) + 0.1, torch.rand(r, 1) + 1.2
    if form == "even":
        return unit * (torch.arange(k) - (k - 1) / 2)
    if form == "offset":  # evenly spaced, each row from a place of its own
        return unit * torch.arange(k) - 3 * other
    if form == "additive":
        return torch.cat([-unit - other, unit - other, other - unit, unit + other], 1)
    return torch.randn(r, k).sort(-1).values


def check(x: Tensor, codes: Tensor, levels: Tensor, shape: tuple[int, int]) -> None:
    """The product is that of the decoded weight, within its bound."""
    weight = decoded(codes, levels, shape).double()
    found = packed_product(x, codes, levels, shape[0]).double()
    wanted, sizes = x.double() @ weight.t(), x.double().abs().sum(-1, keepdim=True)
    bound = CLOSE * sizes * weight.abs().amax(-1)
    assert found.shape == wanted.shape
    assert bool(((found - wanted).abs() <= bound).all())


def codes_of(shape: tuple[int, int], k: int) -> Tensor:
    return encode(torch.randint(k, (shape[0] * shape[1],)), k)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("form", ["even", "offset", "additive", "free"])
@pytest.mark.parametrize("rows", ["tensor", "channel", "blocks", "words"])
def test_products_with_codes_are_those_of_the_decoded_weight(form: str, rows: str) -> None:
    torch.manual_seed(0)
    shape = (6, 256)
    r = {"tensor": 1, "channel": 6, "blocks": 12, "words": 48}[rows]
    for k in BITS if form in ("even", "offset") else [4]:
        assert fits(shape, r, k)
        codes, levels = codes_of(shape, k), levels_of(form, r, k)
        made = numbers_of(levels, 6)
        assert made is not None
        assert made.form == (form if form in ("additive", "free") and k == 4 else "even")
        assert (made.middle is None) == (form in ("even", "additive") or (form, r) == ("offset", 0))
        for inputs in ((1,), (2, 2), (9,)):
            check(torch.randn(*inputs, 256), codes, levels, shape)


@given(st.integers(0, 10**6), st.sampled_from([2, 4, 16, 256]), st.sampled_from([1, 3, 12]))
def test_the_numbers_of_a_weight_make_its_levels(seed: int, k: int, r: int) -> None:
    torch.manual_seed(seed)
    form = ["even", "offset", *(["additive", "free"] if k == 4 else [])][
        seed % (4 if k == 4 else 2)
    ]
    levels = levels_of(form, r, k)
    made = numbers_of(levels, 3)
    assert made is not None
    code = torch.arange(k)
    if made.form == "even":
        own = made.units[0].reshape(-1, 1) * (code + made.start)
    else:
        low, high = (code & 1), code >> 1
        factors = low + made.start, high + made.start, low * high
        own = sum(u.reshape(-1, 1) * f for u, f in zip(made.units, factors, strict=False))
    if made.middle is not None:
        own = own + made.middle.reshape(-1, 1)
    wanted = levels.expand(max(r, 3), k)
    assert bool(((own - wanted).abs() <= 2.0**-21 * wanted.abs().amax(-1, keepdim=True)).all())


def test_levels_of_no_form_are_decoded() -> None:
    levels = torch.randn(4, 16).sort(-1).values
    assert numbers_of(levels, 4) is None
    codes, x = codes_of((4, 64), 16), torch.randn(3, 64)
    wanted = functional.linear(x, decoded(codes, levels, (4, 64)))
    assert torch.equal(packed_product(x, codes, levels, 4), wanted)


@pytest.mark.usefixtures("programs")
def test_levels_that_are_written_to_give_the_product_of_now() -> None:
    codes, levels, x = codes_of((4, 64), 4), levels_of("even", 4, 4), torch.randn(1, 64)
    check(x, codes, levels, (4, 64))
    levels.copy_(levels_of("free", 4, 4))
    check(x, codes, levels, (4, 64))


@pytest.mark.usefixtures("programs")
def test_codes_that_begin_anywhere_in_memory_give_the_same_product() -> None:
    shape, levels = (4, 256), levels_of("even", 32, 4)
    codes = codes_of(shape, 4)
    apart = torch.cat([codes.new_zeros(3), codes])[3:]
    x = torch.randn(2, 256)
    wanted = packed_product(x, codes, levels, 4)
    assert torch.equal(packed_product(x, apart, levels, 4), wanted)
    assert torch.equal(packed_product(torch.randn(3, 2, 256)[1].copy_(x), apart, levels, 4), wanted)
    assert torch.equal(packed_product(x.t().contiguous().t(), codes, levels, 4), wanted)


@pytest.mark.usefixtures("programs")
def test_levels_of_inference_mode_may_be_written_to() -> None:
    with torch.inference_mode():
        codes, levels, x = codes_of((4, 64), 4), levels_of("even", 4, 4), torch.randn(1, 64)
        check(x, codes, levels, (4, 64))
        levels.mul_(3)
        check(x, codes, levels, (4, 64))


@pytest.mark.parametrize("k", [3, 5, 8, 17, 100])
def test_codes_of_other_widths_are_widened_to_the_same_weight(k: int) -> None:
    levels = levels_of("even", 5, k)
    codes = codes_of((5, 120), k)
    wider, more = widened(codes, levels, (5, 120))
    assert fits((5, 120), 5, more.shape[1])
    assert torch.equal(more[:, :k], levels)
    assert bool((more.diff(dim=1) > 0).all())
    assert torch.equal(decode(wider, 600, more.shape[1]), decode(codes, 600, k))
    uneven = levels_of("free", 5, k)
    if k > 3:
        assert widened(codes, uneven, (5, 120))[0] is codes


class Net(nn.Module):
    """A large layer and a small one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.large, self.small = nn.Linear(256, LEAST // 256), nn.Linear(256, 8)


def packed_net(quantizer: pf.Quantizer, dtype: torch.dtype = torch.float32) -> tuple[Net, Any]:
    """The network on its levels, and packed."""
    net, packed = Net().to(dtype).requires_grad_(False), {}
    for name, p in net.named_parameters():
        if p.dim() == 1:
            packed[name] = p
            continue
        levels = quantizer(p)
        p.copy_(pf.proxmaps.hard(p, levels))
        packed[name] = pack_weight(p, levels, name=name)
    return net, packed


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("quantizer", [pf.lsbq(2), pf.lsbq(0), pf.uniform(3)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_large_layers_multiply_with_codes_and_are_exact_where_asked(
    quantizer: pf.Quantizer, dtype: torch.dtype
) -> None:
    dense, packed = packed_net(quantizer, dtype)
    fast, exact = (quantized(copy.deepcopy(dense), packed, exact=e) for e in (False, True))
    x = torch.randn(3, 256, dtype=dtype)
    for name in ("large", "small"):
        wanted = dense.get_submodule(name)(x)
        assert torch.equal(exact.get_submodule(name)(x), wanted)
        found = fast.get_submodule(name)(x)
        assert found.dtype == dtype
        near = {"atol": 1e-3, "rtol": 2e-2} if dtype == torch.bfloat16 else {}  # rounded twice
        torch.testing.assert_close(found, wanted, **near)
    assert isinstance(fast.large, PackedLinear)
    assert not fast.large.exact
    assert torch.equal(fast.small(x), dense.small(x))
    fast.large.exact = True
    assert torch.equal(fast.large(x), dense.large(x))
    for plain, own in zip(dense.parameters(), dequantized(fast).parameters(), strict=True):
        assert torch.equal(plain, own)
    assert not hasattr(fast.large, "exact")


@pytest.mark.usefixtures("programs", "graphs_alone")
def test_gradients_batches_and_compilers_go_through_products_with_codes() -> None:
    dense, packed = packed_net(pf.lsbq(2))
    fast = quantized(copy.deepcopy(dense), packed).large
    x = torch.randn(3, 256)
    own, wanted = (x.clone().requires_grad_() for _ in range(2))
    fast(own).square().sum().backward()
    dense.large(wanted).square().sum().backward()
    assert own.grad is not None
    torch.testing.assert_close(own.grad, wanted.grad)
    compiled = torch.compile(fast, fullgraph=True)
    torch.testing.assert_close(compiled(x), dense.large(x))
    over = torch.compile(lambda rows: torch.func.vmap(fast, in_dims=1)(rows), fullgraph=True)
    torch.testing.assert_close(over(x.t().contiguous()), dense.large(x))
    assert torch.equal(torch.func.vmap(fast)(x), torch.func.vmap(dense.large)(x))
    exported = torch.export.export(fast, (x,)).module()(x)
    torch.testing.assert_close(exported, dense.large(x))


def test_without_a_compiler_weights_are_decoded_with_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: Any) -> None:
        raise InductorError(RuntimeError("no-such-compiler\nand much more"), None)

    monkeypatch.setattr(product, "_PROGRAMS", {})
    monkeypatch.setattr(product, "_FAILED", [])
    monkeypatch.setattr(product, "compiled", lambda formula, options, dynamic: fails)
    dense, packed = packed_net(pf.lsbq(2))
    fast, x = quantized(copy.deepcopy(dense), packed).large, torch.randn(2, 256)
    with pytest.warns(UserWarning, match=r"decode their weights before.*no-such-compiler$"):
        assert torch.equal(fast(x), dense.large(x))
    assert torch.equal(fast(x), dense.large(x))  # and once


@pytest.mark.rare
@pytest.mark.slow
def test_compiled_products_are_within_their_bound() -> None:
    """A program is compiled, 10 s and more; of others the graphs run in the tests above."""
    torch.manual_seed(0)
    codes, levels = codes_of((64, 256), 4), levels_of("additive", 64, 4)
    check(torch.randn(2, 256), codes, levels, (64, 256))
