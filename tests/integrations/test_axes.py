"""Rows along other dimensions in other ecosystems' files: held exactly, or refused by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime", reason="needs all of pip install 'parq_fn[integrations]'")

import gguf
import onnx
import onnxruntime
import torch
import transformers
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.pytorch_utils import Conv1D

import parq_fn as pf
from parq_fn.export import load_into, pack, pack_weight, save
from parq_fn.export.gguf import to_gguf
from parq_fn.export.hugging_face import quantize_pretrained
from parq_fn.export.onnx import to_onnx
from parq_fn.optim import QuantOptimizer, param_groups
from tests.export.helpers import on_levels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao's own
    from parq_fn.export.torchao import to_torchao

TOKENS = torch.arange(10).reshape(2, 5)


def test_hugging_face_keeps_the_cut(tmp_path: Path) -> None:
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


def test_torchao_refuses_rows_along_other_dimensions() -> None:
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
    weight, levels = on_levels((8, 8), cut, quantizer)
    packed = {"weight": pack_weight(weight, levels, granularity=cut)}
    net = nn.Linear(8, 8, bias=False)
    for fuse in (False, True):
        file = tmp_path / f"{fuse}.onnx"
        to_onnx(net, packed, (torch.eye(8),), file, fuse=fuse)
        session = onnxruntime.InferenceSession(file)
        (got,) = session.run(None, {session.get_inputs()[0].name: torch.eye(8).numpy()})
        assert torch.equal(torch.from_numpy(got), weight.t())


# Layers of transformers whose outputs are no first dimension

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_local_experts": 4}
#: Experts as one product, for the loop over those that tokens choose is no graph of ONNX.
OPTIONS: dict[str, Any] = {**SIZES, "experts_implementation": "batched_mm"}
LAYERS = {
    "Conv1D": lambda: Conv1D(48, 32),
    "Mixtral": lambda: MixtralSparseMoeBlock(transformers.MixtralConfig(**OPTIONS)),
    "GPT-OSS": lambda: GptOssMLP(transformers.GptOssConfig(**OPTIONS)),
}


class Layer(nn.Module):
    """One of these with random weights, without what it says of its routing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.own = LAYERS[kind]()
        for p in self.own.parameters():
            nn.init.normal_(p, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        out: Any = self.own(x)
        return out if isinstance(out, Tensor) else out[0]


@pytest.mark.slow  # torch.export takes a second of each
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_of_transformers_are_held_exactly_or_named(kind: str, tmp_path: Path) -> None:
    """ONNX holds their weights; torchao's tensors do not, of which to_torchao warns by name."""
    net, x = Layer(kind), torch.linspace(-1, 1, 6 * 32).view(1, 6, 32)
    link = pf.hard_prox(pf.uniform(2), granularity=pf.per_channel())
    optimizer = QuantOptimizer(torch.optim.SGD(param_groups(net, {"*": 2}), lr=0.0), link)
    net(x).sum().backward()
    optimizer.step()
    packed = pack(net, optimizer)
    names = [name for name, p in net.named_parameters() if not isinstance(packed[name], Tensor)]
    exact = Layer(kind)
    load_into(exact, packed)
    with torch.no_grad():
        wanted = exact(x)
        with pytest.warns(UserWarning, match=f"to_torchao: {', '.join(names)} are unpacked"):
            assert torch.equal(to_torchao(Layer(kind), packed)(x), wanted)
    assert list(to_onnx(Layer(kind), packed, (x,), tmp_path / "a.onnx")) == names
    model = onnx.load(tmp_path / "a.onnx")
    given, out = model.graph.input[0].name, model.graph.output[0].name
    for name in names:
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found, *weights = session.run([out, *names], {given: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-5)
    for name, weight in zip(names, weights, strict=True):
        assert torch.equal(torch.from_numpy(weight), exact.get_parameter(name))
