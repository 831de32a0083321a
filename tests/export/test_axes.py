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
from parq_fn.export.file import _BLANK, _header, _write, cut_as_json, cut_from_json
from parq_fn.export.layers import PackedLayer
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from tests.test_axes import cases

CUTS = {
    (8, 6): [pf.per_channel(1), pf.per_channel(-1), pf.per_block(4, along=0)],
    (3, 4, 5): [pf.per_channel((0, 1)), pf.per_channel((0, 2)), pf.per_block(6, along=(1, 0))],
    (4, 2, 3, 3): [pf.per_channel(1), pf.per_block(9, along=(1, 2, 3)), pf.per_block(2, along=1)],
}
TWO = pf.lsbq(2)
BOTH = [(shape, cut) for shape, cuts in CUTS.items() for cut in cuts]


def on_levels(shape: tuple[int, ...], cut: Any, quantizer: Any = TWO) -> tuple[Tensor, Tensor]:
    """(a weight on its levels, the levels)"""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = cut.rows(weight)
    levels = quantizer(rows)
    return cut.restore(pf.proxmaps.hard(rows, levels), weight), levels


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
            assert entry.unpack().is_contiguous()
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


def test_levels_of_other_rows_are_told() -> None:
    weight, levels = on_levels((8, 6), pf.per_channel(1))
    with pytest.raises(ValueError, match=r"'w': shape \(8, 6\) is not 6 rows"):
        pack_weight(weight, levels, name="w", granularity=pf.per_block(4, along=0))
    packed = pack_weight(weight, levels, granularity=pf.per_channel(1))
    with pytest.raises(ValueError, match=r"shape \(8, 6\) has other rows of per_block\(4, along=0"):
        Packed(packed.codes, levels, (8, 6), cut=pf.per_block(4, along=0))
    square, own = on_levels((8, 8), pf.per_channel(1))
    with pytest.raises(ValueError, match="on none of their levels"):
        pack_weight(square, own)


class every_other(pf.Granularity):
    """Rows that a weight's own order does not have, by methods of its own."""

    def shape(self, weight: Tensor) -> tuple[int, int]:
        return 2, weight.numel() // 2

    def rows(self, weight: Tensor) -> Tensor:
        return weight.reshape(-1, 2).t()

    def restore(self, rows: Tensor, weight: Tensor) -> Tensor:
        return rows.t().reshape(weight.shape)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layers_are_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    net, exact, packed = packed_net(dtype)
    save(packed, tmp_path / "file")
    plain = copy.deepcopy(net)
    load_into(plain, tmp_path / "file")
    layers = quantized(copy.deepcopy(net), tmp_path / "file")
    for name in ("lookup", "conv", "linear"):
        assert isinstance(layers[name], PackedLayer)
        assert torch.equal(layers[name].weight, exact[name].weight)
    assert type(layers["up"]) is nn.ConvTranspose2d
    assert "4 levels in 8 rows of per_channel(axis=1)" in repr(layers["lookup"])
    with torch.no_grad():
        expected = run(exact, TOKENS)
        for made in (plain, layers, copy.deepcopy(layers)):
            assert torch.equal(run(made, TOKENS), expected)
        linear = torch.compile(layers["linear"], fullgraph=True, backend="aot_eager")
        assert torch.equal(
            linear(torch.eye(8, dtype=dtype)), exact["linear"](torch.eye(8, dtype=dtype))
        )


def test_hugging_face_keeps_the_cut(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from parq_fn.export.hugging_face import quantize_pretrained

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model, packed = transformers.AutoModelForCausalLM.from_config(config).eval(), dict[str, Any]()
    with torch.no_grad():
        for name, p in model.named_parameters():
            packed[name] = p.detach()
            if p.dim() > 1:
                cut = pf.per_channel(1) if "mlp" not in name else pf.per_block(8)
                rows = cut.rows(p)
                levels = pf.lsbq(2)(rows)
                p.copy_(cut.restore(pf.proxmaps.hard(rows, levels), p))
                packed[name] = pack_weight(p, levels, granularity=cut)
        expected = model(TOKENS).logits
        save(packed, tmp_path / "packed")
        quantize_pretrained(model, tmp_path / "packed").save_pretrained(tmp_path / "model")
        own = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
        assert own["layers"]["model.embed_tokens"] == {
            "levels": [16, 4], "cut": {"axis": 1, "shape": [32, 16]},
        }  # fmt: skip
        assert own["layers"]["model.layers.0.mlp.up_proj"].keys() == {"levels", "shape"}
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
        for made in (model, again):
            assert torch.equal(made(TOKENS).logits, expected)
        assert again.lm_head.codes is again.model.embed_tokens.codes


# Exporters.


def test_torchao_refuses_rows_along_other_dimensions() -> None:
    pytest.importorskip("torchao")
    from parq_fn.export.torchao import to_torchao

    for shape, cut in (((8, 8), pf.per_channel(1)), ((8, 6), pf.per_block(4, along=0))):
        weight, levels = on_levels(shape, cut, pf.uniform(2))
        net = nn.Linear(*reversed(shape), bias=False)
        packed = {"weight": pack_weight(weight, levels, granularity=cut)}
        with pytest.raises(ValueError, match="'weight': torchao's integer tensors have scales for"):
            to_torchao(net, packed)
    for cut in (pf.per_block(4, along=(0, 1)), pf.per_block(48, along=(1, 0))):
        weight, levels = on_levels((8, 6), cut, pf.uniform(2))
        net = nn.Linear(6, 8, bias=False)
        packed = {"weight": pack_weight(weight, levels, granularity=cut)}
        if cut.size == 48:
            assert torch.equal(to_torchao(net, packed).weight.dequantize(), weight)
        else:
            with pytest.raises(ValueError, match=r"its shape is \(8, 6\) and it has 12 rows"):
                to_torchao(net, packed)


def test_gguf_holds_what_has_one_scale_a_block(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    from parq_fn.export.gguf import to_gguf

    levels = torch.tensor([[-1.0, 0.0, 1.0]]) * 2.0 ** torch.arange(4)[:, None]
    codes = torch.randint(3, (3, 4, 512), generator=torch.Generator().manual_seed(0))
    weight = (codes - 1.0) * 2.0 ** torch.arange(4.0)[:, None]
    packed = pack_weight(weight, levels, granularity=pf.per_channel(1))
    assert packed.cut is not None
    assert to_gguf({"w": packed}, tmp_path / "file") == {"w": "TQ2_0"}
    (tensor,) = gguf.GGUFReader(tmp_path / "file").tensors
    read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    assert torch.equal(torch.from_numpy(read).reshape(weight.shape), weight)

    along = pack_weight(weight[0].t().contiguous(), levels, granularity=pf.per_channel(1))
    message = r"'w': TQ2_0 holds blocks of 256 along the last .* rows of 512 of per_channel\(axis=1"
    for entry in (
        along,
        pack_weight(weight.permute(2, 0, 1), levels, granularity=pf.per_channel(2)),
    ):
        wide = {"w": entry}
        with pytest.raises(ValueError, match="'w': TQ2_0 holds blocks of 256 along the last"):
            to_gguf(wide, tmp_path / "other")
    square = torch.randint(3, (256, 256), generator=torch.Generator().manual_seed(1)) - 1.0
    scales = 2.0 ** (torch.arange(256) % 4)
    entry = pack_weight(
        square * scales, torch.tensor([[-1.0, 0.0, 1.0]]) * scales[:, None],
        granularity=pf.per_channel(1), name="w",
    )  # fmt: skip
    with pytest.raises(ValueError, match=message.replace("512", "256")):
        to_gguf({"w": entry}, tmp_path / "other")


@pytest.mark.parametrize("quantizer", [pf.uniform(2), pf.lsbq(2), pf.lsbq(0)], ids=repr)
@pytest.mark.parametrize(
    "cut",
    [pf.per_channel(1), pf.per_block(4, along=0), pf.per_block(16, along=(1, 0))],
    ids=repr,
)
def test_onnx_holds_rows_along_any_dimension(cut, quantizer, tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from parq_fn.export.onnx import to_onnx

    weight, levels = on_levels((8, 8), cut, quantizer)
    packed = {"weight": pack_weight(weight, levels, granularity=cut)}
    net = nn.Linear(8, 8, bias=False)
    for fuse in (False, True):
        file = tmp_path / f"{fuse}.onnx"
        to_onnx(net, packed, (torch.eye(8),), file, fuse=fuse)
        session = onnxruntime.InferenceSession(file)
        (got,) = session.run(None, {session.get_inputs()[0].name: torch.eye(8).numpy()})
        assert torch.equal(torch.from_numpy(got), weight.t())
