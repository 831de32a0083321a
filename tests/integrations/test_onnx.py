"""ONNX models: onnxruntime's outputs are the module's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="needs onnx: pip install 'parq_fn[integrations]'")
pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install 'parq_fn[integrations]'")

import onnx
import onnxruntime
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.export import pack_weight
from parq_fn.export.onnx import to_onnx
from tests.export.helpers import EVEN, fitted
from tests.integrations.models import TOKENS, on_levels

#: (what stands for the linear layer's weight at opset 21, and at 25)
KINDS = {
    pf.uniform(2): ("DequantizeLinear, INT4", "DequantizeLinear, INT4"),
    pf.uniform(4): ("GatherElements, UINT4", "GatherElements, UINT4"),
    pf.lsbq(0): ("DequantizeLinear, INT4", "DequantizeLinear, INT2"),
    pf.lsbq(1): ("DequantizeLinear, INT4", "DequantizeLinear, INT2"),
    pf.lsbq(2): ("GatherElements, UINT4", "GatherElements, UINT2"),
    pf.lsbq(8): ("GatherElements, UINT8", "GatherElements, UINT8"),
    pf.max_uniform(4): ("DequantizeLinear, INT4", "DequantizeLinear, INT4"),
    pf.max_uniform(8): ("DequantizeLinear, INT8", "DequantizeLinear, INT8"),
    pf.asymmetric(2): ("DequantizeLinear, INT4", "DequantizeLinear, INT2"),
}


def run(file: Path) -> Any:
    session = onnxruntime.InferenceSession(file)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: TOKENS.numpy()})[0])


@pytest.mark.parametrize("opset", [21, 25])
@pytest.mark.parametrize("granularity", [pf.per_tensor(), pf.per_channel(), pf.per_block(32)])
@pytest.mark.parametrize("quantizer", KINDS, ids=repr)
def test_outputs_agree(quantizer, granularity, opset: int, tmp_path: Path) -> None:
    net, quantized, packed = on_levels(quantizer, granularity)
    kinds = to_onnx(net, packed, (TOKENS,), tmp_path / "net.onnx", opset=opset)
    assert kinds.keys() == {"lookup.weight", "conv.weight", "linear.weight"}
    assert kinds["linear.weight"] == KINDS[quantizer][opset == 25]
    with torch.no_grad():
        torch.testing.assert_close(
            run(tmp_path / "net.onnx"), quantized(TOKENS), rtol=1e-5, atol=1e-5
        )
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_bfloat16_models_become_float32(tmp_path: Path) -> None:
    net, quantized, packed = on_levels(pf.lsbq(2), pf.per_channel(), torch.bfloat16)
    to_onnx(net, packed, (TOKENS,), tmp_path / "net.onnx")
    with torch.no_grad():
        expected = quantized.float()(TOKENS)
    torch.testing.assert_close(run(tmp_path / "net.onnx"), expected, rtol=1e-5, atol=1e-5)
    assert net.linear.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("opset", [21, 25])
def test_levels_far_from_zero(opset: int, tmp_path: Path) -> None:
    levels = torch.tensor([[120.0, 121.0], [0.0, 16.0]])
    net = torch.nn.Linear(2, 2, bias=False)
    to_onnx(
        net, {"weight": pack_weight(levels, levels)}, (torch.eye(2).half(),),
        tmp_path / "net.onnx", opset=opset,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    name = session.get_inputs()[0].name
    got = torch.from_numpy(session.run(None, {name: torch.eye(2).numpy()})[0])
    assert torch.equal(got.T, levels)


def test_levels_beyond_float32_are_refused(tmp_path: Path) -> None:
    levels = torch.tensor([[1.0, 1e300]], dtype=torch.float64)
    net = torch.nn.Linear(2, 1, bias=False)
    with pytest.raises(ValueError, match="'weight': levels are not finite in float32"):
        to_onnx(net, {"weight": pack_weight(levels, levels)}, (torch.eye(2),), tmp_path / "x")


def test_kernels_that_fuse_round_activations(tmp_path: Path) -> None:
    net, quantized, packed = on_levels(pf.asymmetric(4), pf.per_channel())
    to_onnx(net, packed, (TOKENS,), tmp_path / "net.onnx", fuse=True)
    with torch.no_grad():
        torch.testing.assert_close(
            run(tmp_path / "net.onnx"), quantized(TOKENS), rtol=0.1, atol=0.1
        )


def test_old_opsets_are_refused(tmp_path: Path) -> None:
    net, _, packed = on_levels(pf.lsbq(1), pf.per_tensor())
    with pytest.raises(ValueError, match="opset must be 21 or more, got 20"):
        to_onnx(net, packed, (TOKENS,), tmp_path / "net.onnx", opset=20)


class Many(nn.ModuleList):
    """Layers beside each other."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_scales_are_those_of_the_state_and_onnxruntime_decodes_the_weights(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Half of it where multiples are halves; bfloat16's levels too, by the table where products in
    float32 are others."""
    cuts = [pf.per_tensor(), pf.per_channel(), pf.per_block(8)]
    cases = [(quantizer, cut) for quantizer in EVEN for cut in cuts]
    net, packed, expected = Many(), {}, []
    for i, (quantizer, cut) in enumerate(cases):
        draw = torch.Generator().manual_seed(i)
        weight = torch.randn(4, 16, generator=draw) * torch.logspace(-2, 2, 4)[:, None]
        packed[f"{i}.weight"], mapped, qparams = fitted(quantizer, cut, weight.to(dtype))
        net.append(nn.Linear(16, 4, bias=False))
        expected.append((mapped.float(), quantizer.grid(qparams)))
    kinds = to_onnx(net, packed, (torch.eye(16),), tmp_path / "net.onnx", opset=25)
    stored = {one.name: onnx.numpy_helper.to_array(one)
              for one in onnx.load(tmp_path / "net.onnx").graph.initializer}  # fmt: skip
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    found = session.run(None, {session.get_inputs()[0].name: torch.eye(16).numpy()})
    integers = 0
    for i, (got, (weight, grid)) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(torch.from_numpy(got).T, weight), cases[i]
        quantizer = cases[i][0]
        if kinds[f"{i}.weight"].startswith("DequantizeLinear"):
            half = bool((torch.as_tensor(grid.first) % 1 != 0).any())
            step = grid.step.flatten() / (2 if half else 1)
            scale = torch.from_numpy(stored[f"{i}.weight.scale"].copy()).reshape(-1)
            rounded = step.to(dtype).float()  # of bfloat16, where its small levels are themselves
            assert bool(((scale == step.float()) | (scale == rounded)).all()), cases[i]
            integers += 1
        else:
            wide = isinstance(quantizer, pf.uniform) and quantizer.bits >= 4  # odd ones past 7
            assert wide or dtype != torch.float32, cases[i]  # others were rounded
    assert integers >= len(cases) // 4
