"""The page on language models says which quantizer which format holds: what the exporters do."""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx", reason="needs all of pip install 'parq_fn[integrations]'")
pytest.importorskip("gguf", reason="needs all of pip install 'parq_fn[integrations]'")

import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.export import pack_weight
from parq_fn.export.gguf import to_gguf
from parq_fn.export.onnx import to_onnx
from tests.export.helpers import on_levels

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torchao's own
    from parq_fn.export.torchao import to_torchao

PAGE = Path(__file__).parents[2] / "notebooks" / "howto" / "language_models.md"
CUT, SHAPE = pf.per_block(32), (2, 256)


def rows() -> dict[str, list[str]]:
    """{quantizer: what the table says of it}."""
    found = re.findall(r"^\| (?:[0-9]|ternary) \| `(.+?)` \| (.+) \|$", PAGE.read_text(), re.M)
    return {name: told.split(" | ") for name, told in found}


@functools.cache
def packed_of(quantizer: Any) -> tuple[Tensor, Any]:
    weight, levels = on_levels(SHAPE, CUT, quantizer)
    return weight, pack_weight(weight, levels, granularity=CUT)


def in_torchao(quantizer: Any) -> str:
    weight, packed = packed_of(quantizer)
    try:
        made: Any = to_torchao(nn.Linear(*reversed(SHAPE), bias=False), {"weight": packed})
    except ValueError:
        return "refused"
    assert torch.equal(made.weight.dequantize(), weight)
    return "exact"


def in_gguf(quantizer: Any, file: Path) -> str:
    """Whether it is held as it is, with scales in float16, or not at all."""
    for how, told in ((False, "exact"), ("scale", "scale rounded")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # by how much it rounds
            try:
                to_gguf({"w": packed_of(quantizer)[1]}, file, rounded=how)
            except ValueError:
                continue
        return told
    return "refused"


class Sum(nn.Module):
    """A layer for each quantizer, so that one export tells of all."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.all = nn.ModuleList(nn.Linear(*reversed(SHAPE), bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Any:
        return sum(layer(x) for layer in self.all)


def in_onnx(quantizers: list[Any], file: Path) -> list[str]:
    packed = {f"all.{i}.weight": packed_of(q)[1] for i, q in enumerate(quantizers)}
    kinds = to_onnx(Sum(len(quantizers)), packed, (torch.zeros(1, SHAPE[1]),), file)
    return ["exact, by a table" if "Gather" in kinds[name] else "exact" for name in packed]


@pytest.mark.slow  # torch.onnx exports a model
def test_the_table_of_quantizers_and_formats_is_what_exporters_do(tmp_path: Path) -> None:
    told = rows()
    made = [eval(name, vars(pf)) for name in told]
    found = {}
    for name, quantizer, onnx in zip(told, made, in_onnx(made, tmp_path / "a.onnx"), strict=True):
        try:
            short = in_gguf(pf.stored(quantizer, torch.float16), tmp_path / "a.gguf")
        except ValueError:  # of what rounds its scales itself
            short = "–"  # noqa: RUF001 # a dash
        as_it_is = in_gguf(quantizer, tmp_path / "a.gguf")
        found[name] = [in_torchao(quantizer), onnx, as_it_is, short]
    assert found == told
    assert len(found) > 15
