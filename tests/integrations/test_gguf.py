"""GGUF files: the gguf package reads the weights back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="needs gguf: pip install 'parq_fn[integrations]'")

import gguf
import torch
from torch import Tensor

import parq_fn as pf
from parq_fn.export import Packed, pack_weight
from parq_fn.export.gguf import to_gguf

CUTS = [pf.per_tensor(), pf.per_channel(), pf.per_block(256)]


def packed(quantizer: Any, granularity: pf.Granularity, dtype: Any = torch.bfloat16) -> Packed:
    torch.manual_seed(0)
    weight = torch.randn(6, 512, dtype=dtype)
    if isinstance(quantizer, Tensor):
        levels = quantizer.to(dtype).expand(granularity.shape(weight)[0], -1)
    else:
        levels = quantizer(granularity.rows(weight))
    mapped = pf.proxmaps.hard(granularity.rows(weight), levels)
    return pack_weight(granularity.restore(mapped, weight), levels, name="w")


def read(file: Path) -> dict[str, tuple[str, Tensor]]:
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        found[tensor.name] = tensor.tensor_type.name, torch.tensor(values).reshape(shape)
    return found


@pytest.mark.parametrize("granularity", CUTS, ids=repr)
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("quantizer", [pf.lsbq(0), pf.ternary_uniform(), pf.lsbq(1)], ids=repr)
def test_ternary_and_signs(quantizer, kind: str, granularity, tmp_path: Path) -> None:
    weight, bias = packed(quantizer, granularity), torch.randn(6)
    kinds = to_gguf({"w": weight, "b": bias}, tmp_path / "x.gguf", ternary=kind)
    assert kinds == {"w": kind}
    found = read(tmp_path / "x.gguf")
    assert found["w"][0] == kind
    assert torch.equal(found["w"][1], weight.unpack().float())
    assert torch.equal(found["b"][1], bias)


@pytest.mark.parametrize("granularity", [*CUTS, pf.per_block(32)], ids=repr)
@pytest.mark.parametrize("levels", [list(range(-8, 8)), [-3, -1, 1, 3], [-7, -2, 0, 5]])
def test_4_bits(levels: list[int], granularity, tmp_path: Path) -> None:
    weight = packed(torch.tensor(levels) * 0.3125, granularity, torch.float32)
    to_gguf({"w": weight}, tmp_path / "x.gguf")
    found = read(tmp_path / "x.gguf")
    assert found["w"][0] == "Q4_0"
    assert torch.equal(found["w"][1], weight.unpack())


def test_integers_whose_scales_are_stored_are_what_was_trained(tmp_path: Path) -> None:
    """Exact as they are, which integers of any scale are not."""
    integer, blocks = pf.integer(4), pf.per_block(32)
    with pytest.raises(ValueError, match=r"'w': levels of row .* not multiples -8 \.\. 7 of"):
        to_gguf({"w": packed(integer, blocks, torch.float32)}, tmp_path / "x.gguf")
    weight = packed(pf.stored(integer, torch.float16), blocks, torch.float32)
    assert to_gguf({"w": weight}, tmp_path / "x.gguf") == {"w": "Q4_0"}
    assert torch.equal(read(tmp_path / "x.gguf")["w"][1], weight.unpack())


def test_what_blocks_do_not_hold_is_refused_rounded_or_kept_in_full(tmp_path: Path) -> None:
    weight = packed(pf.uniform(4), pf.per_channel(), torch.float32)
    with pytest.raises(ValueError, match=r"'w': levels of row .* not multiples -8 \.\. 7 of"):
        to_gguf({"w": weight}, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=r"rounded, off by up to 0\.06"):
        to_gguf({"w": weight}, tmp_path / "x.gguf", rounded=True)
    off = (read(tmp_path / "x.gguf")["w"][1] - weight.unpack()).abs().amax(-1)
    assert bool((off <= 0.08 * weight.levels.amax(-1)).all())
    assert to_gguf({"w": weight}, tmp_path / "x.gguf", in_full=["w"]) == {}
    assert torch.equal(read(tmp_path / "x.gguf")["w"][1], weight.unpack())


def test_shapes_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    levels = torch.tensor([[-1.0, 0.0, 1.0]])
    weight = pack_weight(torch.zeros(4, 100), levels)
    with pytest.raises(ValueError, match=r"'w': TQ2_0 holds blocks of 256 .* shape is \(4, 100\)"):
        to_gguf({"w": weight}, tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="ternary must be 'TQ1_0' or 'TQ2_0', got 'Q4_0'"):
        to_gguf({}, tmp_path / "x.gguf", ternary="Q4_0")  # type: ignore[arg-type] # it is refused


def test_scales_beyond_float16_are_refused_even_when_rounded(tmp_path: Path) -> None:
    weight = pack_weight(torch.full((1, 256), 1e5), torch.tensor([[-1e5, 0.0, 1e5]]), name="w")
    for rounded in (False, True):
        with pytest.raises(ValueError, match="'w': levels are not finite, or not in the format's"):
            to_gguf({"w": weight}, tmp_path / "x.gguf", rounded=rounded)


def test_shapes_are_kept_and_a_pattern_may_stand_alone(tmp_path: Path) -> None:
    levels = torch.tensor([[-0.5, 0.0, 0.5]])
    weight = pack_weight(torch.full((2, 3, 256), 0.5), levels)
    assert to_gguf({"a.w": weight, "b.w": weight}, tmp_path / "x.gguf", in_full="a.*") == {
        "b.w": "TQ2_0"
    }
    found = read(tmp_path / "x.gguf")
    assert torch.equal(found["a.w"][1], weight.unpack())
    assert torch.equal(found["b.w"][1], weight.unpack())
    with pytest.raises(ValueError, match=r"'mask' is torch\.bool, which GGUF has no type for"):
        to_gguf({"mask": torch.ones(2, dtype=torch.bool)}, tmp_path / "x.gguf")
