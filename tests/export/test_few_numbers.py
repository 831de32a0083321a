"""Files hold a row's levels as the few numbers that they follow from, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import parq_fn as pf
from parq_fn.export import load, pack_weight, save
from parq_fn.export.few_numbers import table_of
from tests.export.helpers import fitted, on_levels

BLOCKS = pf.per_block(32)
#: Quantizer: (bits a weight of blocks of 32 in float32, with their share of a common table; parts).
HELD: dict[Any, tuple[float, str]] = {
    pf.uniform(4): (5, "step first"),
    pf.uniform(4, center=True): (6, "scale numbers shift"),
    pf.integer(8): (9, "step first"),
    pf.asymmetric(4): (6, "step first"),
    pf.affine(4): (6, "scale numbers shift"),
    pf.gaussian(4): (5, "step first"),
    pf.codebook.nf4: (5, "scale numbers"),
    pf.centered(pf.codebook.nf4): (6, "scale numbers shift"),
    pf.stored(pf.integer(4), torch.float16): (5, "step first"),
    pf.mxfp4(): (5, "scale numbers"),
    pf.nvfp4(): (5, "scale numbers"),
    pf.lsbq(0): (2.6, "step first"),
    pf.lsbq(2): (4, "half"),
    pf.lloyd_max(3): (7, "half"),
    pf.lloyd_max(3, symmetric=False): (11, "levels"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("quantizer", HELD, ids=repr)
def test_files_hold_few_numbers_for_each_row(quantizer: Any, dtype: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    packed, weight, _ = fitted(quantizer, BLOCKS, torch.randn(64, 256).to(dtype))
    save({"w": packed}, tmp_path / "file")
    again: Any = load(tmp_path / "file")["w"]
    assert again == packed
    assert torch.equal(again.unpack(), weight)
    assert torch.equal(again.unpack().signbit(), packed.unpack().signbit())
    save({"w": again}, tmp_path / "again")
    data = (tmp_path / "file").read_bytes()
    assert (tmp_path / "again").read_bytes() == data
    bits, parts = HELD[quantizer]
    assert all(f'"w.{part}":{{"data'.encode() in data for part in parts.split())
    assert (b'"w.levels":' in data) == (parts == "levels")
    header = 8 + int.from_bytes(data[:8], "little")
    assert len(data) - header == packed.num_bytes
    if dtype == torch.float32:
        assert bits <= 8 * packed.num_bytes / weight.numel() <= bits + 0.07


def test_levels_of_a_few_rows_and_old_files_stay_as_they_are(tmp_path: Path) -> None:
    """So that older releases read them."""
    weight, levels = on_levels((8, 64), pf.per_channel(), pf.uniform(4))
    save({"w": pack_weight(weight, levels, granularity=pf.per_channel())}, tmp_path / "file")
    assert rb"\"version\":1}" in (tmp_path / "file").read_bytes()


def test_a_table_is_taken_only_where_it_gives_the_levels() -> None:
    quantizer, scale = pf.codebook.nf4, torch.tensor([[0.3], [2.0]])
    levels = quantizer.levels(scale)
    assert table_of(quantizer, scale, levels) is not None
    assert table_of(quantizer, scale, levels.nextafter(torch.tensor(9.0))) is None
    v = torch.tensor([[1.0, 0.25]])
    assert table_of(pf.lsbq(2), v, pf.lsbq(2).levels(v)) is None
