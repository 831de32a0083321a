"""Files that somebody made up, with a checksum that is right: each is refused by a ValueError that
names the file, before anything large is made; and names and targets that are unusual but right."""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.export import Packed, load, pack, pack_weight, save, unpack
from parq_fn.quantizers import Grid

BLANK = "0" * 64


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def good() -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """(our part of a header, its tensors, their bytes): weights [2, 4] of 4 levels, 2 biases."""
    own = {
        "names": ["w", "b"],
        "packed": {"w": {"shape": [2, 4], "quantizer": "lsbq(2)", "granularity": "per_tensor()"}},
        "sha256": BLANK,
        "version": 1,
    }
    tensors = {
        "w.levels": entry("F32", [1, 4], 0, 16),
        "b": entry("F32", [2], 16, 24),
        "w.codes": entry("U8", [2], 24, 26),
    }
    numbers = torch.tensor([-3.0, -1.0, 1.0, 3.0, 0.5, 0.25]).numpy().tobytes()
    return own, tensors, numbers + bytes([0b11100100, 0b00011011])


def written(path: Path, own: Any, tensors: Any, data: bytes, text: str | None = None) -> Path:
    """The file, its checksum right."""
    if text is None:
        text = json.dumps(
            {"__metadata__": {"parq_fn": json.dumps(own, separators=(",", ":"))}, **tensors}
        )
    header = text.encode("utf-8", "surrogatepass")
    header += b" " * (-len(header) % 8)
    whole = bytearray(len(header).to_bytes(8, "little") + header + data)
    place = whole.find(rb"\"sha256\":\"", whole.find(b'"__metadata__"'))
    if place >= 0:
        place += len(rb"\"sha256\":\"")
        whole[place : place + 64] = hashlib.sha256(whole).hexdigest().encode()
    path.write_bytes(whole)
    return path


def test_the_file_that_the_others_are_made_of_is_read(tmp_path: Path) -> None:
    got = load(written(tmp_path / "file", *good()))
    assert unpack(got)["w"].tolist() == [[-3.0, -1.0, 1.0, 3.0], [3.0, 1.0, -1.0, -3.0]]
    assert got["b"].tolist() == [0.5, 0.25]


Edit = Callable[[dict[str, Any], dict[str, Any]], Any]
PACKED = {"shape": [2, 4], "quantizer": "q", "granularity": "g"}
EDITS: dict[str, Edit] = {
    "a negative shape": lambda own, _: own["packed"]["w"].update(shape=[-2, -4]),
    "a boolean shape": lambda own, _: own["packed"]["w"].update(shape=[True, 8]),
    "a fractional shape": lambda own, _: own["packed"]["w"].update(shape=[2.0, 4]),
    "a shape that is no list": lambda own, _: own["packed"]["w"].update(shape=8),
    "a shape of texts": lambda own, _: own["packed"]["w"].update(shape=["2", "4"]),
    "a shape beyond counting": lambda own, _: own["packed"]["w"].update(shape=[2**40, 2**40]),
    "another shape than the codes": lambda own, _: own["packed"]["w"].update(shape=[3, 4]),
    "no shape": lambda own, _: own["packed"]["w"].pop("shape"),
    "nothing about a weight": lambda own, _: own["packed"].update(w=None),
    "a list about a weight": lambda own, _: own["packed"].update(w=[]),
    "a quantizer that is no text": lambda own, _: own["packed"]["w"].update(quantizer=[1]),
    "no quantizer": lambda own, _: own["packed"]["w"].pop("quantizer"),
    "a granularity that is no text": lambda own, _: own["packed"]["w"].update(granularity={}),
    "packed that is a list": lambda own, _: own.update(packed=["w"]),
    "packed that is missing": lambda own, _: own.pop("packed"),
    "a packed weight of no name": lambda own, _: own.update(names=["b"]),
    "a packed weight without codes": lambda own, _: own["packed"].update(b=dict(PACKED)),
    "names that are missing": lambda own, _: own.pop("names"),
    "names that are no list": lambda own, _: own.update(names="wb"),
    "names that are numbers": lambda own, _: own.update(names=[1, 2]),
    "a name twice": lambda own, _: own.update(names=["w", "b", "b"]),
    "a name without a tensor": lambda own, _: own.update(names=["w", "b", "c"]),
    "a name that is no text": lambda own, _: own.update(names=["w", "b", "\ud800"]),
    "a tensor without a name": lambda own, _: own.update(names=["w"]),
    "a tensor that overlaps": lambda _, t: t.update(b=entry("F32", [2], 8, 16)),
    "a tensor beyond the end": lambda _, t: t.update(b=entry("F32", [2], 16, 2**40)),
    "a tensor of negative offsets": lambda _, t: t.update(b=entry("F32", [2], -8, 0)),
    "a tensor of boolean offsets": lambda _, t: t.update(b=entry("F32", [2], True, 24)),
    "a tensor of another size": lambda _, t: t.update(b=entry("F32", [3], 16, 24)),
    "a tensor of no dtype": lambda _, t: t.update(b=entry("F33", [2], 16, 24)),
    "a tensor that is a number": lambda _, t: t.update(b=3),
    "a hole between tensors": lambda _, t: t.pop("b"),
    "levels of one dimension": lambda _, t: t.update({"w.levels": entry("F32", [4], 0, 16)}),
    "levels of whole numbers": lambda _, t: t.update({"w.levels": entry("I32", [1, 4], 0, 16)}),
    "no levels in a row": lambda _, t: t.update({"w.levels": entry("F32", [4, 0], 0, 0)}),
    "rows that do not divide": lambda _, t: t.update({"w.levels": entry("F32", [3, 4], 0, 16)}),
    "codes of numbers": lambda _, t: t.update({"w.codes": entry("F16", [1], 24, 26)}),
    "codes of rows": lambda _, t: t.update({"w.codes": entry("U8", [1, 2], 24, 26)}),
    "a cut that is a text": lambda own, _: own["packed"]["w"].update(cut="axis"),
    "a cut along nothing": lambda own, _: own["packed"]["w"].update(cut={"axis": 7}),
    "a cut by a boolean": lambda own, _: own["packed"]["w"].update(cut={"axis": True}),
    "a cut of no size": lambda own, _: own["packed"]["w"].update(cut={"size": 0, "along": 0}),
    "a cut by code": lambda own, _: own["packed"]["w"].update(cut={"__class__": "os"}),
    "a cut into other rows": lambda own, _: own["packed"]["w"].update(cut={"axis": 0}),
    "an order of no name": lambda own, _: own.update(orders={"c": [1, 0]}),
    "an order that is no list": lambda own, _: own.update(orders={"w": 1}),
    "an order of other dimensions": lambda own, _: own.update(orders={"w": [0, 0]}),
    "an order of too many": lambda own, _: own.update(orders={"b": [0, 1]}),
    "an order of texts": lambda own, _: own.update(orders={"w": ["1", "0"]}),
    "orders that are a list": lambda own, _: own.update(orders=["w"]),
    "a grid that is a number": lambda own, _: own["packed"]["w"].update(grid=1),
    "a grid without tensors": lambda own, _: own["packed"]["w"].update(grid=True),
    "a step of no grid": lambda _, t: t.update({"w.step": t.pop("b")}),
    "codes that are a tensor too": lambda own, _: own["names"].append("w.codes"),
    "a tensor that is codes too": lambda own, _: own["names"].insert(0, "w.codes"),
    "a version that is no number": lambda own, _: own.update(version="1"),
    "a version that is a truth value": lambda own, _: own.update(version=True),
    "a newer version": lambda own, _: own.update(version=99),
}


def test_a_grid_of_other_levels_is_refused(tmp_path: Path) -> None:
    step, levels = torch.tensor([[0.3]]), torch.tensor([[0.3, 0.6]]).bfloat16()
    packed = pack_weight(levels, levels, grid=Grid(step, 1.0, 2.0))
    save({"w": packed}, tmp_path / "file")
    again = load(tmp_path / "file")["w"]
    assert again == packed
    for wrong in (Grid(step, torch.tensor([[2.0]]), 3.0), Grid(2 * step, torch.ones(1, 1), 2.0)):
        object.__setattr__(packed, "grid", wrong)
        save({"w": packed}, tmp_path / "crafted")
        with pytest.raises(ValueError, match=r"crafted .* levels are not those of their grid"):
            load(tmp_path / "crafted")


def few(*parts: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """As of `good`, of weights [2, 4] in two rows whose levels follow from other numbers."""
    own, tensors, numbers = good()
    sizes = {"step": 1, "first": 1, "scale": 1, "shift": 1, "half": 2}
    del tensors["w.levels"]
    end, data = 8, numbers[16:24]
    tensors["b"] = entry("F32", [2], 0, 8)
    for part in parts:
        columns, rows = sizes.get(part, 4), 1 if part == "numbers" else 2
        start, end = end, end + 4 * rows * columns
        tensors[f"w.{part}"] = entry("F32", [rows, columns], start, end)
        data += torch.arange(1.0, 1 + rows * columns).numpy().tobytes()
    tensors["w.codes"] = entry("U8", [2], end, end + 2)
    own["packed"]["w"]["from"] = {"levels": 4, "dtype": "F32", "parts": list(parts)}
    own["version"] = 3
    return own, tensors, data + numbers[24:]


FEW: list[tuple[str, ...]] = [
    ("step", "first"),
    ("scale", "numbers"),
    ("scale", "numbers", "shift"),
    ("half",),
]
CLAIMS: dict[str, Edit] = {
    "too many levels": lambda own, _: own["packed"]["w"]["from"].update(levels=257),
    "other levels": lambda own, _: own["packed"]["w"]["from"].update(levels=8),
    "no levels": lambda own, _: own["packed"]["w"]["from"].update(levels=0),
    "levels that are a truth value": lambda own, _: own["packed"]["w"]["from"].update(levels=True),
    "levels without a number": lambda own, _: own["packed"]["w"]["from"].pop("levels"),
    "whole numbers": lambda own, _: own["packed"]["w"]["from"].update(dtype="I32"),
    "another dtype": lambda own, _: own["packed"]["w"]["from"].update(dtype="F64"),
    "a dtype that is a list": lambda own, _: own["packed"]["w"]["from"].update(dtype=["F32"]),
    "no parts": lambda own, _: own["packed"]["w"]["from"].update(parts=[]),
    "parts of no kind": lambda own, _: own["packed"]["w"]["from"].update(parts=["codes"]),
    "parts that are a dict": lambda own, _: own["packed"]["w"]["from"].update(parts={}),
    "from nothing": lambda own, _: own["packed"]["w"].update({"from": None}),
    "from what is left out": lambda own, _: own["packed"]["w"].pop("from"),
    "a grid of other parts": lambda own, t: (
        own["packed"]["w"].update(grid=True), t.pop("w.first", 0), t.pop("w.half", 0)
    ),
    "parts of one dimension": lambda _, t: [
        one.update(shape=[one["shape"][0] * one["shape"][1]])
        for name, one in t.items() if name[:2] == "w." and name != "w.codes"
    ],
    "parts in another dtype": lambda _, t: [
        one.update(dtype="I32")
        for name, one in t.items() if name[:2] == "w." and name != "w.codes"
    ],
}  # fmt: skip


@pytest.mark.parametrize("parts", FEW, ids=repr)
def test_levels_from_few_numbers_are_checked(parts: tuple[str, ...], tmp_path: Path) -> None:
    got = load(written(tmp_path / "right", *few(*parts)))
    assert got["w"].levels.shape == (2, 4)  # type: ignore[union-attr] # it is packed
    for claim, edit in CLAIMS.items():
        own, tensors, data = few(*parts)
        edit(own, tensors)
        with pytest.raises(ValueError, match="crafted"):
            print(claim, load(written(tmp_path / "crafted", own, tensors, data)))


def test_few_numbers_claim_no_more_levels_than_weights_need(tmp_path: Path) -> None:
    own, tensors, data = few("half")
    own["packed"]["w"].update(shape=[2, 1])
    own["packed"]["w"]["from"].update(levels=34)
    tensors["w.half"] = entry("F32", [2, 17], 8, 144)
    tensors["w.codes"] = entry("U8", [2], 144, 146)
    data = data[:8] + bytes(136 + 2)
    with pytest.raises(ValueError, match=r"crafted .*'w' has 2 rows of 34 levels for 2 weights"):
        load(written(tmp_path / "crafted", own, tensors, data))


@pytest.mark.parametrize("edit", EDITS)
def test_a_header_that_describes_no_model_is_refused(edit: str, tmp_path: Path) -> None:
    own, tensors, data = good()
    EDITS[edit](own, tensors)
    with pytest.raises(ValueError, match="crafted"):
        load(written(tmp_path / "crafted", own, tensors, data))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        '{"__metadata__":3}',
        '{"__metadata__":{"parq_fn":3}}',
        '{"__metadata__":{"parq_fn":"[]"}}',
        '{"__metadata__":{"other":"{}"}}',
        "[" * 100_000,
        '{"a":{"__metadata__":{"parq_fn":"{\\"sha256\\":\\"' + BLANK + '\\"}"}}}',
    ],
    ids=range(9),
)
def test_a_header_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="crafted is no packed model of parq_fn"):
        load(written(tmp_path / "crafted", None, None, b"", text))


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    own, tensors, data = good()
    text = json.dumps(own, separators=(",", ":"))
    both = text.replace('"names":', '"names":["b"],"names":')
    for header in (
        json.dumps({"__metadata__": {"parq_fn": both}, **tensors}),
        json.dumps({"__metadata__": {"parq_fn": text}, **tensors}).replace('"b":', '"b":3,"b":'),
    ):
        with pytest.raises(ValueError, match="crafted is no packed model"):
            load(written(tmp_path / "crafted", None, None, data, header))


@pytest.mark.parametrize(("levels", "byte"), [(3, 243), (3, 255), (5, 0b111), (6, 0b110)])
def test_codes_of_levels_that_are_not_there_are_refused(levels, byte, tmp_path: Path) -> None:
    packed = pack_weight(torch.zeros(1, 8), torch.arange(float(levels))[None])
    codes = packed.codes.clone()
    codes[0] = byte
    save({"w": Packed(codes, packed.levels, packed.shape)}, tmp_path / "crafted")
    with pytest.raises(ValueError, match=rf"crafted .*'w' has the code .* of {levels} levels"):
        load(tmp_path / "crafted")


def test_a_small_file_claims_no_large_weight(tmp_path: Path) -> None:
    """A weight of one level takes no bytes: 2^33 of them were unpacked from a file of 400."""
    own, _, data = good()
    one = {"w.levels": entry("F32", [1, 1], 0, 4), "w.codes": entry("U8", [0], 4, 4)}
    own.update(names=["w"])
    for shape in ([2**33], [2**12, 2**13]):
        own["packed"]["w"]["shape"] = shape
        with pytest.raises(ValueError, match=r"crafted .* weights of one level"):
            load(written(tmp_path / "crafted", own, one, data[:4]))
    own["packed"]["w"]["shape"] = [3, 5]
    assert unpack(load(written(tmp_path / "right", own, one, data[:4])))["w"].shape == (3, 5)
    large = Packed(torch.zeros(0, dtype=torch.uint8), torch.ones(1, 1), (2**25,))
    with pytest.raises(ValueError, match=r"'w' the last of them, are 33554432 elements"):
        save({"w": large}, tmp_path / "large")


@given(st.data())
def test_a_byte_changed_with_a_right_checksum_loads_or_is_a_value_error(data) -> None:
    own, tensors, numbers = data.draw(st.sampled_from([good, *(partial(few, *p) for p in FEW)]))()
    text = json.dumps(
        {"__metadata__": {"parq_fn": json.dumps(own, separators=(",", ":"))}, **tensors}
    )
    changed = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(32, 126))
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder) / "crafted", None, None, numbers, changed.decode())
        got: dict[str, Any] = {}
        with contextlib.suppress(ValueError):
            got = load(path)
        unpack(got)


# What is unusual and right


NAMES = ['x"sha256":"', '"sha256":"' + BLANK, "0" * 300, 'x"__metadata__', "a\\b", "é", "\n", ""]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_of_any_text_come_back(name: str, tmp_path: Path) -> None:
    """Some looked like the place of the checksum."""
    packed = {
        name: torch.ones(2),
        "w" + name: pack_weight(torch.ones(1, 8), torch.tensor([[0.0, 1.0]])),
    }
    save(packed, tmp_path / "file")
    again = load(tmp_path / "file")
    assert list(again) == list(packed)
    assert torch.equal(again[name], packed[name])
    assert again["w" + name] == packed["w" + name]


@pytest.mark.parametrize("name", ["\ud800", "__metadata__"])
def test_names_that_no_file_can_hold_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="files take no tensor of the name"):
        save({name: torch.ones(2)}, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_long_file_names_links_and_wrong_targets(tmp_path: Path) -> None:
    packed = {"w": torch.ones(2)}
    save(packed, tmp_path / ("n" * 255))
    assert load(tmp_path / ("n" * 255)).keys() == {"w"}
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there/file")
    save(packed, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "there" / "file").keys() == {"w"}
    save({"v": torch.ones(2)}, tmp_path / "link")
    assert load(tmp_path / "there" / "file").keys() == load(tmp_path / "link").keys() == {"v"}
    for wrong, number in (
        ("", errno.ENOENT),
        (str(tmp_path / "there"), errno.EISDIR),
        (str(tmp_path / "new") + "/", errno.EISDIR),
    ):
        with pytest.raises(OSError) as told:  # noqa: PT011 # by its number
            save(packed, wrong)
        assert told.value.errno == number
    with pytest.raises(FileNotFoundError):
        load("")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "n" * 255, "there"]


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (3, 0, 2)])
@pytest.mark.parametrize("cut", [pf.per_channel(), pf.per_tensor(), pf.per_channel(-1)], ids=repr)
def test_an_empty_weight_packs_to_nothing(shape: tuple[int, ...], cut, tmp_path: Path) -> None:
    params = {"w": torch.zeros(shape), "v": torch.randn(2, 3)}
    transform = pf.chain(pf.sgd(0.1), pf.hard_prox(pf.lsbq(2), granularity=cut))
    state = transform.init(params)
    _, state = transform.update(params, state, params)
    packed = pack(params, transform, state)
    save(packed, tmp_path / "file")
    again = load(tmp_path / "file")
    assert again["w"] == packed["w"]
    assert again["w"].codes.numel() == 0
    assert unpack(again)["w"].shape == shape


@pytest.mark.parametrize("order", [(0, 2, 3, 1), (3, 2, 1, 0)])
def test_memory_formats_come_back(order: tuple[int, ...], tmp_path: Path) -> None:
    def laid(weight: Tensor) -> Tensor:
        back = [order.index(d) for d in range(4)]
        return weight.permute(order).contiguous().permute(back)

    levels = torch.tensor([[-1.0, 1.0]])
    kernel, plain = laid(torch.randn(4, 3, 2, 5).sign()), laid(torch.randn(2, 3, 4, 5))
    packed = {"w": pack_weight(kernel, levels), "plain": plain}
    save(packed, tmp_path / "file")
    for got in (unpack(packed), unpack(load(tmp_path / "file"))):
        assert torch.equal(got["w"], kernel)
        assert got["w"].stride() == kernel.stride()
        assert torch.equal(got["plain"], plain)
        assert got["plain"].stride() == plain.stride()


def test_files_without_orders_are_read_by_releases_before(tmp_path: Path) -> None:
    save({"w": pack_weight(torch.ones(2, 4), torch.tensor([[0.0, 1.0]]))}, tmp_path / "file")
    assert rb"\"version\":1}" in (tmp_path / "file").read_bytes()
    net = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    save(dict(net.state_dict()), tmp_path / "file")
    other = copy.deepcopy(net)
    pf.export.load_into(other, tmp_path / "file")
    assert other.weight.stride() == net.weight.stride()
    assert torch.equal(other.weight, net.weight)
