"""Files of packed models: the same bytes every time, none changed unnoticed; packed layers."""

from __future__ import annotations

import importlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from parq_fn.export import (
    Packed,
    PackedLayer,
    load,
    load_into,
    pack,
    pack_weight,
    quantized,
    save,
    table,
    unpack,
)
from parq_fn.export.file import _BLANK, _write
from parq_fn.foundation.command import UserError
from tests.export.helpers import Net, signs, trained

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net, dict]:
    net, optimizer = trained("QuantOptimizer")
    packed, file = pack(net, optimizer), tmp_path_factory.mktemp("packed") / "net.safetensors"
    save(packed, file)
    return file, net, packed


def test_what_is_read_is_what_was_written(written) -> None:
    file, _, packed = written
    got = load(file)
    assert list(got) == list(packed)
    for name, entry in packed.items():
        assert type(got[name]) is type(entry)
        if isinstance(entry, Packed):
            assert got[name] == entry
        else:
            assert torch.equal(got[name], entry)
            assert got[name].dtype == entry.dtype


@pytest.mark.rare
def test_the_same_model_gives_the_same_bytes_in_another_process_too(written, tmp_path) -> None:
    file, _, _ = written
    code = "import sys; from parq_fn.export import load, save; save(load(sys.argv[1]), sys.argv[2])"
    other, env = tmp_path / "other.safetensors", {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code, str(file), str(other)]
    subprocess.run(command, check=True, cwd=ROOT, env=env)
    assert other.read_bytes() == file.read_bytes()


@pytest.mark.slow
def test_a_change_of_any_byte_is_noticed(written, tmp_path: Path) -> None:
    file, _, _ = written
    whole = file.read_bytes()
    for i in range(len(whole)):
        changed = bytearray(whole)
        changed[i] ^= 1 << (i % 8)
        (tmp_path / "changed").write_bytes(changed)
        with pytest.raises(ValueError, match="changed"):
            load(tmp_path / "changed")


def test_cut_off_files_newer_versions_and_other_files_are_refused(written, tmp_path) -> None:
    file, _, _ = written
    whole = file.read_bytes()
    for size in (0, 7, 100, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut off"):
            load(tmp_path / "cut")
    (tmp_path / "newer").write_bytes(whole.replace(rb"\"version\":1", rb"\"version\":4"))
    with pytest.raises(ValueError, match="of format version 4, this release reads up to 3"):
        load(tmp_path / "newer")
    import safetensors.torch

    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(ValueError, match="is no packed model of parq_fn"):
        load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nowhere")


def test_a_file_is_replaced_in_one_move(written, tmp_path, monkeypatch) -> None:
    _, _, packed = written
    save(packed, tmp_path / "file")
    before = (tmp_path / "file").read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save({"w": torch.ones(3)}, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    levels = torch.tensor([[-1.0, 1.0]])
    packed = {"w": pack_weight(torch.ones(1, 2), levels), "w.codes": torch.ones(2)}
    with pytest.raises(ValueError, match=r"would be named 'w\.codes'"):
        save(packed, tmp_path / "file")


def test_into_a_plain_module(written) -> None:
    file, net, _ = written
    other = Net().eval()
    load_into(other, file)
    for (name, one), two in zip(net.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert other.head.weight is other.lookup.weight
    small = nn.Linear(2, 2)
    before = small.weight.clone()
    with pytest.raises(ValueError, match=r"lacks bias, weight of the module, and has conv\.bias"):
        load_into(small, file)
    assert torch.equal(small.weight, before)


@pytest.mark.rare
@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize("compiled", [False, True])
def test_packed_layers_give_the_module_s_outputs(written, compiled: bool) -> None:
    file, net, packed = written
    tokens = torch.arange(15).reshape(3, 5) % 12
    other = quantized(Net().eval(), file)
    assert isinstance(other.conv, PackedLayer)
    assert isinstance(other.linear, PackedLayer)
    assert other.head.codes is other.lookup.codes  # tied ones stay so
    assert other.head.levels is other.lookup.levels
    run = torch.compile(other, fullgraph=True) if compiled else other
    with torch.no_grad():
        got, expected = run(tokens), net(tokens)
    if compiled:
        torch.testing.assert_close(got, expected)
    else:
        assert torch.equal(got, expected)
    held = {name for name, _ in other.named_parameters()}
    assert "linear.bias" in held
    assert "linear.weight" not in held
    assert torch.equal(other.linear.weight, unpack(packed)["linear.weight"])


@pytest.mark.parametrize("k", [2, 3, 4, 8, 5])
@pytest.mark.parametrize(("size", "rows"), [(8, 1), (10, 6), (10, 12), (40, 6), (40, 3), (5, 30)])
def test_packed_embeddings_decode_the_rows_that_are_looked_up(k, size, rows, tmp_path) -> None:
    net = nn.Sequential(nn.Embedding(6, size, padding_idx=0))
    draw = torch.Generator().manual_seed(0)
    levels = torch.randn(rows, k, generator=draw).sort(-1).values
    codes = torch.randint(k, (rows, 6 * size // rows), generator=draw)
    weight = levels.gather(1, codes).reshape(6, size)
    save({"0.weight": pack_weight(weight, levels)}, tmp_path / "file")
    run = quantized(net, tmp_path / "file")
    looked_up = torch.tensor([[5, 1, 1], [0, 2, 4]])
    assert torch.equal(run(looked_up), weight[looked_up])
    assert torch.equal(run[0].weight, weight)
    assert "PackedEmbedding" in repr(run)


@pytest.mark.rare
def test_the_command_verifies_and_prints_a_table(written, tmp_path: Path, monkeypatch) -> None:
    file, _, packed = written
    command = [sys.executable, "-m", "parq_fn.export"]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stdout.startswith(table(packed))
    assert f"{file.stat().st_size:,} bytes in the file" in done.stdout
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr(sys, "argv", ["export", str(tmp_path / "cut")])
    with pytest.raises(UserError, match="was changed or cut off"):  # of which a line is printed
        importlib.import_module("parq_fn.export.__main__").main()


# Found by reviews.


def test_permissions_are_those_of_the_file_before_or_of_the_user(tmp_path: Path) -> None:
    packed, file = signs(nn.Linear(8, 2)), tmp_path / "file"
    before = os.umask(0o077)
    try:
        save(packed, file)
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    finally:
        os.umask(before)
    file.chmod(0o640)
    save(packed, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640


@pytest.mark.parametrize("version", [-3, True, 0, "1", None])
def test_versions_that_never_were_are_refused(version: Any, tmp_path: Path) -> None:
    own = {"names": [], "packed": {}, "sha256": _BLANK, "version": version}
    text = json.dumps({"__metadata__": {"parq_fn": json.dumps(own, separators=(",", ":"))}})
    header = bytearray(len(text).to_bytes(8, "little") + text.encode())
    _write(tmp_path / "file", header, [])
    with pytest.raises(ValueError, match="is of format version"):
        load(tmp_path / "file")


@pytest.mark.parametrize(
    "own", [{"names": ["w"]}, {"packed": {"w": {"shape": [2]}}}, {"packed": [3]}]
)
def test_headers_that_fit_no_tensors_are_refused(own: dict[str, Any], tmp_path: Path) -> None:
    own = {"names": [], "packed": {}, "sha256": _BLANK, "version": 1, **own}
    text = json.dumps({"__metadata__": {"parq_fn": json.dumps(own, separators=(",", ":"))}})
    header = bytearray(len(text).to_bytes(8, "little") + text.encode())
    _write(tmp_path / "file", header, [])
    with pytest.raises(ValueError, match="has a header that does not fit its tensors"):
        load(tmp_path / "file")


def test_what_is_not_packed_and_no_module_are_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"save: expected a packed model, .* got Linear; pack"):
        save(nn.Linear(2, 2), tmp_path / "net")
    with pytest.raises(TypeError, match=r"load_into takes \(module, file\), got {} for the module"):
        load_into({}, tmp_path / "net")
