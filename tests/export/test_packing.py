"""Packing and back is exact, for every number of levels, dtype, shape and granularity."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.export import Packed, pack, pack_weight, stream, unpack
from parq_fn.export.codes import decode, encode, num_bytes
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from tests.export.helpers import Net, trained


def naive_bytes(codes: list[int], levels: int) -> list[int]:
    """The bit stream as a whole number, cut into bytes; trits as digits of base 3."""
    if levels == 3:
        groups = [codes[i : i + 5] for i in range(0, len(codes), 5)]
        return [sum(trit * 3**i for i, trit in enumerate(group)) for group in groups]
    bits = (levels - 1).bit_length()
    stream = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(stream.to_bytes(-(-len(codes) * bits // 8), "little"))


@given(data=st.data(), levels=st.integers(1, 256), count=st.integers(0, 40))
def test_codes_are_the_naive_bytes_and_come_back(data, levels: int, count: int) -> None:
    drawn = st.lists(st.integers(0, levels - 1), min_size=count, max_size=count)
    codes = torch.tensor(data.draw(drawn), dtype=torch.int64)
    packed = encode(codes, levels)
    assert packed.tolist() == naive_bytes(codes.tolist(), levels)
    assert len(packed) == num_bytes(count, levels)
    assert torch.equal(decode(packed, count, levels), codes)


@given(
    bits=st.integers(0, 8),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    cut=st.sampled_from(["tensor", "channel", "block"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    strides=st.sampled_from(["contiguous", "channels_last", "transposed", "every_other"]),
    seed=st.integers(0, 99),
)
def test_weights_on_their_levels_come_back_bit_for_bit(
    bits: int, shape: list[int], cut: str, dtype: torch.dtype, strides: str, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    if cut == "block":
        shape = [*shape[:1], 2 * shape[-1]][-2:]
    block = pf.per_block(max(1, shape[-1] // 2))
    granularity = {"tensor": pf.per_tensor(), "channel": pf.per_channel(), "block": block}[cut]
    drawn = torch.randn(shape, generator=draw).to(dtype)
    if strides == "channels_last" and len(shape) == 4:
        drawn = drawn.to(memory_format=torch.channels_last)
    elif strides == "transposed":
        drawn = drawn.mT.contiguous().mT if drawn.dim() > 1 else drawn
    elif strides == "every_other":
        drawn = drawn.repeat_interleave(2, -1)[..., ::2]
    params = {"w": drawn}
    quantizer = pf.lsbq(bits) if bits < 7 else pf.uniform(bits)
    transform = pf.chain(pf.sgd(0.0), pf.hard_prox(quantizer, granularity=granularity))
    _, state = transform.update({"w": params["w"] * 0}, transform.init(params), params)
    packed = pack(params, transform, state)
    (weight,) = transform.weights(state, params).values()
    assert torch.equal(packed["w"].unpack(), weight)
    assert packed["w"].levels.dtype == dtype
    assert packed["w"].bits == (1.6 if bits == 0 else bits)


def test_every_way_to_nest_a_prox_link_is_found() -> None:
    params = {"a": torch.randn(4, 4), "b": {"w": torch.randn(2, 8), "bias": torch.randn(3)}}
    two = pf.hard_prox(pf.lsbq(2), granularity=pf.per_block(2))
    one = pf.hard_prox(pf.lsbq(1))
    labels = {"a": "one", "b.w": "two", "*": "rest"}
    kinds = {"one": one, "two": two, "rest": pf.identity()}
    for transform in (
        pf.chain(pf.adamw(0.1), pf.partition(kinds, labels)),
        pf.chain(pf.sgd(0.1), pf.masked(one, "a"), pf.masked(two, "b.w")),
        pf.named_chain(base=pf.sgd(0.1), prox=pf.partition(kinds, labels)),
        pf.accumulate(pf.chain(pf.sgd(0.1), pf.partition(kinds, labels)), 1),
        pf.apply_if_finite(pf.chain(pf.sgd(0.1), pf.partition(kinds, labels))),
    ):
        zeros = pf.tree.tree_map(torch.zeros_like, params)
        _, state = transform.update(zeros, transform.init(params), params)
        packed = pack(params, transform, state)
        weights = transform.weights(state, params)
        assert packed["a"].levels.shape == (1, 2)
        assert packed["b.w"].levels.shape == (8, 4)
        assert packed["b.w"].granularity == "per_block(2)"
        assert packed["b.w"].quantizer == "lsbq(2)"
        back = unpack(packed)
        assert torch.equal(back["a"], weights["a"])
        assert torch.equal(back["b.w"], weights["b"]["w"])
        assert torch.equal(back["b.bias"], params["b"]["bias"])


@pytest.mark.parametrize("adapter", ["QuantOptimizer", "TransformOptimizer"])
def test_modules_with_buffers_and_tied_weights(adapter: str) -> None:
    net, optimizer = trained(adapter)
    packed = pack(net, optimizer)
    kept = net.state_dict()
    assert packed.keys() == kept.keys() - {"head.weight"}  # tied to lookup.weight
    names = {name for name, entry in packed.items() if isinstance(entry, Packed)}
    assert names == {"conv.weight", "linear.weight", "lookup.weight"}
    for name, weight in unpack(packed).items():
        assert weight.dtype == kept[name].dtype
        assert torch.equal(weight, kept[name]), name


def test_packed_bf16_weights_of_float32_latents() -> None:
    weight = nn.Parameter(torch.randn(4, 8, dtype=torch.bfloat16))
    module = nn.ParameterDict({"w": weight})
    optimizer = TransformOptimizer([("w", weight)], pf.chain(pf.sgd(0.1), pf.hard_prox(pf.lsbq(2))))
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    packed = pack(module, optimizer)["w"]
    assert packed.levels.dtype == torch.bfloat16
    assert torch.equal(packed.unpack(), weight)


def test_weights_off_their_levels_are_refused_or_rounded() -> None:
    net, optimizer = trained("QuantOptimizer", 2)
    with pytest.raises(ValueError, match=r"'lookup.weight': 50 % of its weights are on none"):
        pack(net, optimizer)
    packed = pack(net, optimizer, snap=True)["linear.weight"]
    nearest = pf.lsbq(2).nearest(net.linear.weight.detach(), packed.levels)
    assert torch.equal(packed.unpack(), nearest)


def test_bad_input() -> None:
    with pytest.raises(TypeError, match="takes a QuantOptimizer or TransformOptimizer, got SGD"):
        pack(Net(), torch.optim.SGD(Net().parameters()))
    levels = torch.tensor([[-1.0, 1.0]])
    with pytest.raises(ValueError, match="expected 1 bytes of codes for shape"):
        Packed(torch.zeros(2, dtype=torch.uint8), levels, (1, 4))
    with pytest.raises(ValueError, match="is not 2 rows of one length"):
        Packed(torch.zeros(1, dtype=torch.uint8), levels.expand(2, 2), (1, 3))
    with pytest.raises(ValueError, match="'w': some of its weights are not numbers"):
        pack_weight(torch.full((1, 2), torch.nan), levels, name="w")


HELD = [
    (pf.integer(4), pf.per_channel()),
    (pf.affine(3), pf.per_block(8)),
    (pf.gaussian(2), pf.per_tensor()),
    (pf.codebook.nf4, pf.per_block(16)),
    (pf.mxfp4(), pf.per_block(8)),
    (pf.nvfp4(), pf.per_block(16)),
    (pf.stored(pf.integer(4), torch.float16), pf.per_block(8)),
    (pf.centered(pf.integer(4)), pf.per_channel()),
]


@pytest.mark.parametrize(("quantizer", "cut"), HELD, ids=repr)
def test_weights_of_every_quantizer_are_packed(quantizer: Any, cut: Any) -> None:
    net = nn.Linear(32, 3)
    prox = pf.hard_prox(quantizer, granularity=cut, period=1)
    transform = pf.chain(pf.sgd(0.1), pf.masked(prox, "weight"))
    optimizer = TransformOptimizer(net.named_parameters(), transform)
    for _ in range(2):
        net(torch.ones(1, 32)).square().sum().backward()
        optimizer.step()
    packed = pack(net, optimizer)
    held = packed["weight"]
    assert isinstance(held, Packed)
    assert held.quantizer == repr(quantizer)
    assert torch.equal(unpack(packed)["weight"], net.weight)


# Found by reviews.


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
def test_levels_that_fit_no_weight_raise(shape: Any, levels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"'w': {message}|'w'.*{message}"):
        pack_weight(torch.zeros(shape), levels, name="w")


def test_a_copy_of_the_module_is_refused() -> None:
    net, optimizer = trained("QuantOptimizer")
    with pytest.raises(ValueError, match="has none of the parameters that the optimizer quantizes"):
        pack(copy.deepcopy(net), optimizer)


# What packing is not for.


def stepped(adapter: str, frozen_after: int, steps: int) -> tuple[nn.Module, Any]:
    """Two layers, of which the first is frozen after so many of the steps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    prox = pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=3, period=1)
    if adapter == "QuantOptimizer":
        groups = [{"params": list(net.parameters()), "quant_bits": 2}]
        optimizer: Any = QuantOptimizer(torch.optim.SGD(groups, lr=0.1), prox)
    else:
        optimizer = TransformOptimizer(net.named_parameters(), pf.chain(pf.sgd(0.1), prox))
    for i in range(steps):
        net[0].weight.requires_grad_(i < frozen_after)
        optimizer.zero_grad()
        net(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
    return net, optimizer


@pytest.mark.parametrize("adapter", ["QuantOptimizer", "TransformOptimizer"])
def test_layers_that_were_never_trained_are_refused_rounded_or_not(adapter: str) -> None:
    """To snap them would make them all zeros. Frozen ones of TransformOptimizer have levels."""
    frozen = stepped(adapter, 0, 5)
    for net, optimizer in (stepped(adapter, 0, 0), frozen):
        if adapter == "TransformOptimizer" and net is frozen[0]:
            with pytest.raises(ValueError, match=r"'0\.weight': .* on none of .* frozen"):
                pack(net, optimizer)
            assert bool(pack(net, optimizer, snap=True)["0.weight"].unpack().any())
            continue
        for snap in (False, True):
            with pytest.raises(ValueError, match=r"'0\.weight': its levels are all 0, .* frozen"):
                pack(net, optimizer, snap=snap)
    net, optimizer = stepped(adapter, 2, 5)
    with pytest.raises(
        ValueError, match=r"'0\.weight': .* end of annealing \(.* frozen, or gets no"
    ):
        pack(net, optimizer)
    packed = pack(net, optimizer, snap=True)
    assert bool(packed["0.weight"].unpack().any())
    assert torch.equal(packed["1.weight"].unpack(), net[1].weight)


def test_params_that_were_never_updated_are_refused_and_zeros_are_not() -> None:
    transform = pf.chain(pf.sgd(0.1), pf.hard_prox(pf.lsbq(2)))
    params = {"w": torch.ones(2, 4)}
    with pytest.raises(ValueError, match="'w': its levels are all 0"):
        pack(params, transform, transform.init(params))
    zeros = {"w": torch.zeros(2, 4)}
    assert torch.equal(unpack(pack(zeros, transform, transform.init(zeros)))["w"], zeros["w"])


@pytest.mark.parametrize("call", [pack, stream])
def test_a_transformation_that_quantizes_nothing_packs_nothing(call) -> None:
    params, transform = {"w": torch.ones(2)}, pf.chain(pf.sgd(0.1), pf.identity())
    with pytest.raises(ValueError, match=r"packs nothing: no prox link .* chain\(sgd\(0\.1\)"):
        call(params, transform, transform.init(params))
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"packs nothing: no prox link .* chain\(sgd\(0\.1\)"):
        call(net, TransformOptimizer(net.named_parameters(), transform))
