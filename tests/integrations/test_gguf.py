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
from tests.export.helpers import EVEN, fitted
from tests.helpers import spread

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


def test_names_and_dimensions_that_readers_refuse_are_refused_by_name(tmp_path: Path) -> None:
    for name, shape in (("n" * 64, (2,)), ("deep", (1, 1, 1, 1, 2))):
        with pytest.raises(ValueError, match=rf"parameter '{name}', .* up to 63 bytes and 4"):
            to_gguf({name: torch.ones(shape)}, tmp_path / "x.gguf")
    to_gguf({"n" * 63: torch.ones(1, 1, 1, 2)}, tmp_path / "x.gguf")


def scales_of(data: Any, kind: str) -> Tensor:
    """The scale of each block, as its bytes say it."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    blocks = torch.from_numpy(data.copy()).reshape(-1, size)
    at = slice(0, 2) if kind == "Q4_0" else slice(size - 2, size)  # ternary blocks end in it
    return blocks[:, at].contiguous().view(torch.float16).flatten()


@pytest.mark.parametrize(
    ("quantizer", "dtype"), spread(EVEN, [torch.float32, torch.bfloat16, torch.float16]), ids=repr
)
def test_scales_are_those_of_the_state_where_blocks_hold_them(
    quantizer, dtype, tmp_path: Path
) -> None:
    """Half of it where multiples are halves, or the level itself; others are refused by name.
    Rows of small whole numbers have steps that float16 holds."""
    draw = torch.Generator().manual_seed(0)
    whole = torch.randint(-3, 5, (4, 256), generator=draw).float()
    whole[:, 0], whole[:, 1] = -3, 4
    signs = torch.where(whole > 0, 1.0, -1.0)
    for rows in (whole, signs, torch.randn(4, 256, generator=draw)):
        for cut in (pf.per_tensor(), pf.per_channel(), pf.per_block(256)):
            weight = (rows * torch.tensor([[0.5], [1.0], [2.0], [4.0]])).to(dtype)
            entry, mapped, qparams = fitted(quantizer, cut, weight)
            grid = quantizer.grid(qparams)
            half = 2 if bool((torch.as_tensor(grid.first) % 1 != 0).any()) else 1
            numbers = half * grid._replace(step=torch.ones_like(grid.step)).levels(
                quantizer.num_levels
            )
            steps = [(grid.step / half).to(d).half() for d in (torch.float32, dtype)]
            levels = entry.levels.float()
            held = [torch.equal(numbers * step.float(), levels) for step in steps]
            if bool((numbers < -8).any() | (numbers > 7).any()) or not any(held):
                with pytest.raises(ValueError, match=r"'w': levels of row .* are not multiples"):
                    to_gguf({"w": entry}, tmp_path / "x.gguf")
                continue
            kind = to_gguf({"w": entry}, tmp_path / "x.gguf")["w"]
            assert torch.equal(read(tmp_path / "x.gguf")["w"][1], mapped.float())
            data = gguf.GGUFReader(tmp_path / "x.gguf").tensors[0].data
            size = 32 if kind == "Q4_0" else 256
            scales = scales_of(data, kind).reshape(4, -1)
            expected = steps[held.index(True)].reshape(-1, 1).expand_as(scales)
            zeros = (mapped == 0).reshape(4, -1, size).all(-1)  # whose scale the package makes 0
            assert torch.equal(scales[~zeros], expected[~zeros])


def test_a_zero_point_that_blocks_do_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    weight = torch.arange(-5.0, 11.0).repeat(2, 16)
    entry, _, _ = fitted(pf.asymmetric(4), pf.per_channel(), weight)
    with pytest.raises(ValueError, match=r"'w': levels of row 0.*\(their zero point is 5\)"):
        to_gguf({"w": entry}, tmp_path / "x.gguf")
    entry, mapped, _ = fitted(pf.asymmetric(4), pf.per_channel(), weight - 3)
    to_gguf({"w": entry}, tmp_path / "x.gguf")
    assert torch.equal(read(tmp_path / "x.gguf")["w"][1], mapped)
