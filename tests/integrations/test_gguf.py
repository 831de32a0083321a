"""GGUF files: the gguf package reads the weights back as they were, of every type."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf", reason="needs gguf: pip install 'parq_fn[integrations]'")

import gguf
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import parq_fn as pf
from parq_fn.export import Packed, pack_weight
from parq_fn.export.gguf import to_gguf
from parq_fn.export.gguf_blocks import KINDS
from tests.export.helpers import EVEN, fitted
from tests.helpers import spread
from tests.twins.formats import minifloats

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


def decoded(data: Any, kind: str) -> Any:
    """What the gguf package makes of blocks, and of Q1_0, which it does not read, its definition:
    each bit is the sign of a float16 number before them."""
    if kind != "Q1_0":
        return gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    blocks = data.reshape(-1, 18)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    signs = 2 * np.unpackbits(blocks[:, 2:], axis=-1, bitorder="little").astype(np.float32) - 1
    return (scale * signs).reshape(*data.shape[:-1], -1)


def read(file: Path) -> dict[str, tuple[str, Tensor]]:
    found = {}
    for tensor in gguf.GGUFReader(file).tensors:
        values = decoded(tensor.data, tensor.tensor_type.name)
        shape = tuple(int(n) for n in reversed(tensor.shape))
        found[tensor.name] = tensor.tensor_type.name, torch.tensor(values).reshape(shape)
    return found


@pytest.mark.parametrize("granularity", CUTS, ids=repr)
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("quantizer", [pf.lsbq(0), pf.ternary_uniform(), pf.lsbq(1)], ids=repr)
def test_ternary_and_signs(quantizer, kind: str, granularity, tmp_path: Path) -> None:
    weight, bias = packed(quantizer, granularity), torch.randn(6)
    kinds = to_gguf({"w": weight, "b": bias}, tmp_path / "x.gguf", ternary=kind, types=kind)
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


_TABLE = [*pf.codebook.iq4_nl.table, *pf.codebook.fp4.table]
halves = st.floats(-1000, 1000, width=16).filter(bool)
scales = {
    "MXFP4": st.integers(-100, 100).map(lambda e: 2.0**e),
    "NVFP4": st.sampled_from([0.5 * x for x in minifloats(4, 3)[1:-1]]),
}


@given(st.sampled_from(sorted(KINDS)), st.data())
def test_readers_make_the_numbers_of_a_type_times_its_scale(name: str, data: Any) -> None:
    kind = KINDS[name]
    size, num_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert kind.size == size
    count = 2 * size // kind.per_scale
    drawn = st.lists(scales.get(name, halves), min_size=count, max_size=count)
    scale = np.array(data.draw(drawn), np.float32).reshape(2, -1)
    minimum = np.array(data.draw(drawn), np.float32).reshape(2, -1) if name == "Q4_1" else None
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, len(kind.numbers), (2, size))
    blocks = kind.to_bytes(codes, scale, minimum)
    assert blocks.shape == (2, num_bytes)
    expected = scale.repeat(kind.per_scale, -1) * np.array(kind.numbers, np.float32)[codes]
    expected += 0 if minimum is None else minimum
    assert np.array_equal(decoded(blocks, name), expected)


#: What help(to_gguf) says of quantizers: {quantizer: (its type, or "" where it is refused, with
#: scales in float16; where they are rounded to that)}
TABLE: dict[Any, tuple[str, str]] = {
    pf.lsbq(1): ("Q1_0", "Q1_0"),
    pf.uniform(1): ("Q1_0", "Q1_0"),
    pf.lsbq(0): ("TQ2_0", "TQ2_0"),
    pf.ternary_uniform(): ("TQ2_0", "TQ2_0"),
    pf.integer(2): ("Q4_0", "Q4_0"),
    pf.integer(4): ("Q4_0", "Q4_0"),
    pf.uniform(2): ("Q4_0", "Q4_0"),
    pf.uniform(3): ("Q4_0", "Q4_0"),
    pf.gaussian(2): ("Q4_0", "Q4_0"),
    pf.max_uniform(2): ("TQ2_0", "TQ2_0"),
    pf.max_uniform(4): ("Q4_0", "Q4_0"),
    pf.uniform(4): ("Q8_0", "Q4_1"),
    pf.asymmetric(4): ("Q8_0", "Q4_1"),
    pf.integer(8): ("Q8_0", "Q8_0"),
    pf.max_uniform(8): ("Q8_0", "Q8_0"),
    pf.affine(2): ("Q4_1", "Q4_1"),
    pf.affine(4): ("Q4_1", "Q4_1"),
    pf.codebook.iq4_nl: ("IQ4_NL", "IQ4_NL"),
    pf.codebook.fp4: ("Q8_0", "Q8_0"),
    pf.lsbq(2): ("", ""),
    pf.lloyd_max(2): ("", ""),
    pf.codebook.nf4: ("", ""),
}


@pytest.mark.parametrize("quantizer", TABLE, ids=repr)
def test_the_table_of_quantizers_and_types_is_true(quantizer: Any, tmp_path: Path) -> None:
    """With scales in float16 all but the refused are exact; without, their scales are rounded."""
    file = tmp_path / "x.gguf"
    for granularity in (pf.per_channel(), pf.per_block(256)):
        exact, near = TABLE[quantizer]
        weight = packed(pf.stored(quantizer, torch.float16), granularity, torch.float32)
        plain = packed(quantizer, granularity, torch.float32)
        with pytest.raises(ValueError, match=r"'w': levels of row "):
            to_gguf({"w": plain}, file)
        if not near:
            for entry, rounded in ((weight, False), (plain, "scale")):
                with pytest.raises(ValueError, match="are not numbers that a type holds times a"):
                    to_gguf({"w": entry}, file, rounded=rounded)
            with pytest.warns(UserWarning, match="rounded to those of"):
                to_gguf({"w": plain}, file, rounded=True)
            continue
        for rounded in (False, True, "scale"):
            assert to_gguf({"w": weight}, file, rounded=rounded) == {"w": exact}
            assert torch.equal(read(file)["w"][1], weight.unpack())
        with pytest.warns(UserWarning, match=r"rounded to those of .*, off by up to .* of the lar"):
            assert to_gguf({"w": plain}, file, rounded="scale") == {"w": near}
        off = (read(file)["w"][1] - plain.unpack()).abs().amax()
        assert off <= 2**-10 * plain.levels.abs().max()


def test_help_has_the_same_table() -> None:
    """Quantizers that it names alone or by a range."""
    names = {"torch": torch, **vars(pf)}
    rows = [line.split("|")[1:-1] for line in (to_gguf.__doc__ or "").splitlines() if "|" in line]
    told = {
        repr(eval(name, names)): (exact.strip(), near.strip())
        for named, exact, near, *_ in (row for row in rows if len(row) == 3)
        for name in re.findall(r"`([\w.]+(?:\(\d*\))?)`", named)
        if name != "lloyd_max"
    }
    for quantizer, (exact, near) in TABLE.items():
        if not isinstance(quantizer, pf.lloyd_max):
            assert told[repr(quantizer)] == (exact or "refused", near or "refused"), quantizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_mxfp4_and_nvfp4_are_their_own_types(dtype: Any, tmp_path: Path) -> None:
    """NVFP4's scale of the whole tensor stands beside it; a product of two scales and a number is
    rounded twice, and a reader rounds it once."""
    file, draw = tmp_path / "x.gguf", torch.Generator().manual_seed(0)
    weight = torch.randn(4, 64, generator=draw).to(dtype)
    entry, mapped, _ = fitted(pf.mxfp4(), pf.per_block(32), weight)
    assert to_gguf({"w": entry}, file) == {"w": "MXFP4"}
    assert torch.equal(read(file)["w"][1], mapped.float())
    entry, mapped, _ = fitted(pf.nvfp4(), pf.per_block(16), weight)
    with pytest.raises(ValueError, match="are what NVFP4 holds but for a scale"):
        to_gguf({"w": entry}, file)
    with pytest.warns(UserWarning, match="rounded to those of NVFP4"):
        assert to_gguf({"w.weight": entry}, file, rounded="scale") == {"w.weight": "NVFP4"}
    found = read(file)
    made = found["w.weight"][1] * found["w.scale"][1]
    assert (made - mapped.float()).abs().max() <= torch.finfo(dtype).eps * mapped.abs().max()
    # of a scale of the tensor that few digits hold there is nothing to round
    wide = 500 * weight.float()
    wide[0, 0] = 6 * 448
    entry, mapped, _ = fitted(pf.nvfp4(), pf.per_block(16), wide)
    assert to_gguf({"w": entry}, file) == {"w": "NVFP4"}
    assert torch.equal(read(file)["w"][1], mapped)


def test_rows_that_a_block_does_not_fit_get_the_next_type(tmp_path: Path) -> None:
    levels = torch.tensor([[-0.5, 0.0, 0.5]])
    signs = torch.tensor([[-0.5, 0.5]])
    found = {}
    for columns in (256, 128, 96):
        codes = torch.randint(2, (3, columns), generator=torch.Generator().manual_seed(0))
        for name, own in (("ternary", levels), ("signs", signs)):
            found |= {f"{name} {columns}": pack_weight(own[0, -1] * (2.0 * codes - 1), own)}
    assert to_gguf(found, tmp_path / "x.gguf") == {
        "ternary 256": "TQ2_0", "signs 256": "Q1_0", "ternary 128": "Q4_0", "signs 128": "Q1_0",
        "ternary 96": "Q4_0", "signs 96": "Q4_0",
    }  # fmt: skip
    for name, (_, made) in read(tmp_path / "x.gguf").items():
        assert torch.equal(made, found[name].unpack())
    with pytest.raises(ValueError, match=r"types must be among Q1_0, .*, Q8_0, got 'Q5_0'"):
        to_gguf(found, tmp_path / "x.gguf", types=("Q4_0", "Q5_0"))


levels_of_rows = st.integers(1, 17).flatmap(
    lambda k: st.lists(
        st.tuples(
            st.lists(
                st.one_of(
                    st.integers(-15, 15), st.integers(-128, 127), st.sampled_from(_TABLE), halves
                ),
                min_size=k, max_size=k, unique=True,
            ),
            st.one_of(halves, st.sampled_from([1.0, 2.0**-7, 0.1])),
        ),
        min_size=1, max_size=4,
    )
)  # fmt: skip


@given(levels_of_rows, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_a_file_holds_what_was_packed_or_there_is_none(rows: Any, dtype: Any) -> None:
    """Of any levels: numbers of the types and others, times scales that float16 holds or not."""
    levels = torch.tensor([[scale * number for number in row] for row, scale in rows])
    levels = levels.to(dtype).sort(-1).values
    codes = torch.arange(256).expand(len(levels), -1) % levels.shape[1]
    weight = pack_weight(levels.gather(1, codes), levels)
    with tempfile.TemporaryDirectory() as folder:
        file, refused = Path(folder) / "x.gguf", ""
        try:
            to_gguf({"w": weight}, file)
        except ValueError as error:
            refused = str(error)
        assert file.exists() != refused.startswith("parameter 'w': levels ")
        if refused:
            return
        found = read(file)
    whole = found["w.scale"][1] if "w.scale" in found else 1.0
    assert torch.equal(whole * found["w"][1], weight.unpack().float())


def test_one_row_among_thousands_decides(tmp_path: Path) -> None:
    levels = 0.25 * torch.arange(-8.0, 8).repeat(3000, 1)
    for number, message in ((0.1, "row 777, .* are not numbers that a"), (2.0**-13, "row 777, ")):
        levels[777, -1] = 1.75 + number
        weight = pack_weight(levels.repeat(1, 2), levels)
        with pytest.raises(ValueError, match=message):
            to_gguf({"w": weight}, tmp_path / "x.gguf")


def test_q4_0_takes_a_scale_of_either_sign(tmp_path: Path) -> None:
    """Of rows whose levels are -7 .. 8 and those whose are -8 .. 7."""
    numbers = torch.stack([torch.arange(-7.0, 9), torch.arange(-8.0, 8)])
    weight = pack_weight(0.25 * numbers.repeat(1, 2), 0.25 * numbers)
    assert to_gguf({"w": weight}, tmp_path / "x.gguf") == {"w": "Q4_0"}
    assert torch.equal(read(tmp_path / "x.gguf")["w"][1], weight.unpack())


def test_what_blocks_do_not_hold_is_refused_or_kept_in_full(tmp_path: Path) -> None:
    weight = packed(pf.uniform(4), pf.per_channel(), torch.float32)
    with pytest.raises(ValueError, match=r"'w': levels of row .* but for a scale that is none of"):
        to_gguf({"w": weight}, tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=r"rounded to those of Q4_0, off by up to 0\.06"):
        to_gguf({"w": weight}, tmp_path / "x.gguf", rounded=True, types="Q4_0")
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
    weight = pack_weight(torch.full((1, 256), 1e6), torch.tensor([[-1e6, 0.0, 1e6]]), name="w")
    for rounded in (False, True, "scale"):
        with pytest.raises(ValueError, match="'w': levels are not finite, or not in the format's"):
            to_gguf({"w": weight}, tmp_path / "x.gguf", rounded=rounded, types=("TQ2_0", "Q4_0"))


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
    at = slice(size - 2, size) if kind.startswith("TQ") else slice(0, 2)
    return blocks[:, at].contiguous().view(torch.float16).flatten()


@pytest.mark.parametrize(
    ("quantizer", "dtype"), spread(EVEN, [torch.float32, torch.bfloat16, torch.float16]), ids=repr
)
def test_scales_are_those_of_the_state_where_blocks_hold_them(
    quantizer, dtype, tmp_path: Path
) -> None:
    """Half of it where multiples are halves, or the level itself. Rows of small whole numbers have
    steps that float16 holds."""
    types = [name for name in KINDS if name not in ("Q4_1", "NVFP4", "MXFP4", "IQ4_NL")]
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
            if bool((numbers < -128).any() | (numbers > 127).any()) or not any(held):
                with pytest.raises(ValueError, match=r"'w': levels of row "):
                    to_gguf({"w": entry}, tmp_path / "x.gguf", types=types)
                continue
            kind = to_gguf({"w": entry}, tmp_path / "x.gguf", types=types)["w"]
            assert torch.equal(read(tmp_path / "x.gguf")["w"][1], mapped.float())
            data = gguf.GGUFReader(tmp_path / "x.gguf").tensors[0].data
            scales = scales_of(data, kind).reshape(4, -1)
            expected = steps[held.index(True)].reshape(-1, 1).expand_as(scales)
            assert torch.equal(scales.abs(), expected)


def test_a_zero_point_that_blocks_do_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    weight = torch.arange(-5.0, 11.0).repeat(2, 16)
    entry, mapped, _ = fitted(pf.asymmetric(4), pf.per_channel(), weight)
    with pytest.raises(ValueError, match=r"'w': levels of row 0.*\(their zero point is 5\)"):
        to_gguf({"w": entry}, tmp_path / "x.gguf", types="Q4_0")
    assert to_gguf({"w": entry}, tmp_path / "x.gguf") == {"w": "Q4_1"}
    assert torch.equal(read(tmp_path / "x.gguf")["w"][1], mapped)
    entry, mapped, _ = fitted(pf.asymmetric(4), pf.per_channel(), weight - 3)
    assert to_gguf({"w": entry}, tmp_path / "x.gguf") == {"w": "Q4_0"}
    assert torch.equal(read(tmp_path / "x.gguf")["w"][1], mapped)
