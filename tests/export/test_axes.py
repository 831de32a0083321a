"""Packed weights whose rows run along other dimensions: exact, or refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.export import Packed, load, load_into, pack, pack_weight, quantized, save, unpack
from parq_fn.export.cuts import cut_as_json, cut_from_json
from parq_fn.export.file import _BLANK, _header, _write
from parq_fn.export.layers import PackedLayer
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from tests.cuts import cases
from tests.export.helpers import on_levels
from tests.helpers import every_other

CUTS = {
    (8, 6): [pf.per_channel(1), pf.per_channel(-1), pf.per_block(4, along=0)],
    (3, 4, 5): [pf.per_channel((0, 1)), pf.per_channel((0, 2)), pf.per_block(6, along=(1, 0))],
    (4, 2, 3, 3): [pf.per_channel(1), pf.per_block(9, along=(1, 2, 3)), pf.per_block(2, along=1)],
}
TWO = pf.lsbq(2)
BOTH = [(shape, cut) for shape, cuts in CUTS.items() for cut in cuts]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape", "cut"), BOTH, ids=repr)
def test_what_was_trained_comes_back_through_a_file(
    shape: tuple[int, ...], cut, dtype: torch.dtype, tmp_path: Path
) -> None:
    """By the functional loop and both adapters, and in channels_last."""
    given_one = torch.randn(shape, dtype=torch.float64).to(dtype)
    if len(shape) == 4:
        given_one = given_one.to(memory_format=torch.channels_last)
    prox = pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=3, granularity=cut, period=1)
    transform = pf.chain(pf.sgd(0.1), prox)

    params = {"w": given_one}
    state = transform.init(params)
    for _ in range(5):
        updates, state = transform.update({"w": torch.sin(params["w"])}, state, params)
        params = pf.apply_updates(params, updates)
    made = [(pack(params, transform, state), transform.weights(state, params)["w"])]
    for adapter in ("QuantOptimizer", "TransformOptimizer"):
        net = nn.Module()
        net.w = nn.Parameter(given_one.clone())
        if adapter == "QuantOptimizer":
            groups = [{"params": [net.w], "quant_bits": 2}]
            optimizer: Any = QuantOptimizer(torch.optim.SGD(groups, lr=0.1), prox)
        else:
            optimizer = TransformOptimizer(net.named_parameters(), transform)
        for _ in range(5):
            net.w.grad = torch.sin(net.w.detach())
            optimizer.step()
        made.append((pack(net, optimizer), net.w.detach()))
        save(pf.export.stream(net, optimizer), tmp_path / "streamed")
        save(made[-1][0], tmp_path / "packed")
        assert (tmp_path / "streamed").read_bytes() == (tmp_path / "packed").read_bytes()
    for packed, weight in made:
        save(packed, tmp_path / "packed")
        again = load(tmp_path / "packed")
        for entry in (packed["w"], again["w"]):
            assert torch.equal(entry.unpack(), weight)
            assert entry.unpack().stride() == weight.stride()
            rows = entry.levels.gather(1, entry.indices())
            assert torch.equal(rows, cut.rows(weight))
            assert torch.equal(entry.restored(rows), weight)
            assert entry.granularity == repr(cut)
        assert again["w"].cut == packed["w"].cut
        assert torch.equal(unpack(again)["w"], weight)


@given(cases())
def test_any_cut_comes_back(case: tuple[Tensor, Any]) -> None:
    weight, cut = case
    if not weight.numel():
        return
    rows = cut.rows(weight)
    levels = torch.stack([rows.amin(-1), rows.amax(-1)], -1)
    half = (torch.arange(rows.numel()) % 3 == 0).reshape(rows.shape)
    weight = cut.restore(torch.where(half, levels[:, :1], levels[:, 1:]), weight)
    packed = pack_weight(weight, levels, granularity=cut)
    assert torch.equal(packed.unpack(), weight)
    assert packed.granularity == repr(cut)
    if packed.cut is not None:
        assert cut_from_json(json.loads(json.dumps(cut_as_json(packed.cut)))) == packed.cut == cut


def versions(file: Path) -> tuple[int, dict[str, Any]]:
    header = _header(file.read_bytes())
    return header["version"], header["packed"]


@pytest.mark.parametrize(
    ("cut", "field"),
    [
        (pf.per_tensor(), None),
        (pf.per_channel(), None),
        (pf.per_block(3), None),
        (pf.per_block(3, along=(0, 1)), None),
        (pf.per_channel((0, 1)), None),
        (pf.per_channel(1), {"axis": 1}),
        (pf.per_channel((-1,)), {"axis": [-1]}),
        (pf.per_block(4, along=0), {"size": 4, "along": 0}),
        (pf.per_block(6, along=(1, 0)), {"size": 6, "along": [1, 0]}),
        (pf.per_block(48, along=(1, 0)), None),
    ],
    ids=repr,
)
def test_files_say_how_rows_are_cut_where_it_matters(cut, field: Any, tmp_path: Path) -> None:
    """Others are of version 1, with the fields that they had."""
    weight, levels = on_levels((8, 6), cut)
    save({"w": pack_weight(weight, levels, granularity=cut)}, tmp_path / "file")
    version, packed = versions(tmp_path / "file")
    assert version == (1 if field is None else 2)
    assert packed["w"].pop("cut", None) == field
    assert packed["w"].keys() == {"shape", "quantizer", "granularity"}
    assert torch.equal(load(tmp_path / "file")["w"].unpack(), weight)


def test_a_weight_packed_without_a_granularity_is_in_rows_one_after_another() -> None:
    weight, levels = on_levels((8, 6), pf.per_channel())
    named, bare = (
        pack_weight(weight, levels, granularity="per_channel()"),
        pack_weight(weight, levels),
    )
    assert named.cut is bare.cut is None
    assert torch.equal(named.unpack(), bare.unpack())
    assert named.granularity == "per_channel()"


@pytest.mark.parametrize(
    "cut",
    [
        {"axis": 5}, {"axis": [0, 0]}, {"axis": []}, {"axis": "0"}, {"axis": True}, {}, 3, [1], "x",
        {"size": 0, "along": 0}, {"size": 7, "along": 0}, {"size": 2}, {"size": "2", "along": 0},
        {"axis": 1, "size": 2}, {"axis": [0, 1]}, {"axis": {"a": 1}}, {"axis": None},
    ],
    ids=repr,
)  # fmt: skip
def test_cuts_that_a_file_s_tensors_do_not_fit(cut: Any, tmp_path: Path) -> None:
    weight, levels = on_levels((8, 6), pf.per_channel(1))
    save({"w": pack_weight(weight, levels, granularity=pf.per_channel(1))}, tmp_path / "file")
    data = (tmp_path / "file").read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:size])
    own = json.loads(header["__metadata__"]["parq_fn"])
    own["packed"]["w"]["cut"], own["sha256"] = cut, _BLANK
    dump: dict[str, Any] = {"sort_keys": True, "separators": (",", ":")}
    header["__metadata__"]["parq_fn"] = json.dumps(own, **dump)
    text = json.dumps(header, **dump).encode()
    text += b" " * (-len(text) % 8)
    made = bytearray(len(text).to_bytes(8, "little") + text)
    _write(tmp_path / "file", made, [memoryview(data[size:])])
    with pytest.raises(ValueError, match="has a header that does not fit its tensors"):
        load(tmp_path / "file")


def test_levels_of_other_rows_raise() -> None:
    weight, levels = on_levels((8, 6), pf.per_channel(1))
    with pytest.raises(ValueError, match=r"'w': shape \(8, 6\) is not 6 rows"):
        pack_weight(weight, levels, name="w", granularity=pf.per_block(4, along=0))
    packed = pack_weight(weight, levels, granularity=pf.per_channel(1))
    with pytest.raises(ValueError, match=r"shape \(8, 6\) has other rows of per_block\(4, along=0"):
        Packed(packed.codes, levels, (8, 6), cut=pf.per_block(4, along=0))
    square, own = on_levels((8, 8), pf.per_channel(1))
    with pytest.raises(ValueError, match="on none of their levels"):
        pack_weight(square, own)


class halves(pf.Granularity):
    """A shape alone, which is all that one of your own needs."""

    def shape(self, weight: Tensor) -> tuple[int, int]:
        return 2, weight.numel() // 2


def test_granularities_of_ones_own(tmp_path: Path) -> None:
    params = {"a": {"w": torch.randn(4, 6)}}
    for cut in (halves(), every_other()):
        transform = pf.chain(pf.sgd(0.1), pf.hard_prox(pf.lsbq(2), granularity=cut))
        _, state = transform.update(params, transform.init(params), params)
        if isinstance(cut, halves):
            packed, weight = pack(params, transform, state), transform.weights(state, params)
            assert torch.equal(packed["a.w"].unpack(), weight["a"]["w"])
            continue
        for call in (pack, lambda *of: save(pf.export.stream(*of), tmp_path / "file")):
            with pytest.raises(ValueError, match=r"'a\.w': every_other\(\) makes rows in a way of"):
                call(params, transform, state)


# Packed layers.


def packed_net(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """(a network, the same on its levels, what is packed of it)"""
    torch.manual_seed(0)
    net = nn.ModuleDict(
        {
            "lookup": nn.Embedding(12, 8),
            "conv": nn.Conv2d(1, 4, 3, padding=1),
            "up": nn.ConvTranspose2d(4, 2, 3, padding=1),
            "linear": nn.Linear(8, 8),
        }
    ).to(dtype)
    cuts = {
        "lookup.weight": pf.per_channel(1),
        "conv.weight": pf.per_block(3, along=(2, 3)),
        "up.weight": pf.per_channel(1),
        "linear.weight": pf.per_block(4, along=0),
    }
    made, packed = copy.deepcopy(net), dict[str, Any]()
    with torch.no_grad():
        for name, p in made.named_parameters():
            packed[name] = p.detach()
            if name in cuts:
                rows = cuts[name].rows(p)
                levels = pf.lsbq(2)(rows)
                p.copy_(cuts[name].restore(pf.proxmaps.hard(rows, levels), p))
                packed[name] = pack_weight(p, levels, name=name, granularity=cuts[name])
    return net, made, packed


def run(net: Any, tokens: Tensor) -> Tensor:
    x = net["lookup"](tokens).unsqueeze(1)
    out: Tensor = net["linear"](net["up"](net["conv"](x)).mean(1))
    return out


TOKENS = torch.arange(10).reshape(2, 5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    net, exact, packed = packed_net(dtype)
    save(packed, tmp_path / "file")
    plain = copy.deepcopy(net)
    load_into(plain, tmp_path / "file")
    layers = quantized(copy.deepcopy(net), tmp_path / "file")
    for name in ("lookup", "conv", "linear", "up"):
        assert isinstance(layers[name], PackedLayer)
        assert torch.equal(layers[name].weight, exact[name].weight)
    assert "4 levels in 8 rows of per_channel(axis=1)" in repr(layers["lookup"])
    with torch.no_grad():
        expected = run(exact, TOKENS)
        for made in (plain, layers, copy.deepcopy(layers)):
            assert torch.equal(run(made, TOKENS), expected)
        linear = torch.compile(layers["linear"], fullgraph=True, backend="aot_eager")
        assert torch.equal(
            linear(torch.eye(8, dtype=dtype)), exact["linear"](torch.eye(8, dtype=dtype))
        )
