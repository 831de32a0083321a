"""What was given in the place of a packed model, a file or a module is told in one sentence."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import parq_fn as pf
from parq_fn import export
from parq_fn.export import Packed, pack_weight
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from tests.export.helpers import Net, trained

ONE = pack_weight(torch.ones(1, 8), torch.tensor([[0.0, 1.0]]))


@pytest.mark.parametrize("call", [export.unpack, export.table, lambda p: export.save(p, "x")])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("net.safetensors", r"got 'net.safetensors'; parq_fn.export.load\(file\) reads one"),
        (ONE, r"one weight has a name"),
        (None, r"got None; pack\(module, optimizer\) makes one"),
        (nn.Linear(2, 2), r"got Linear; pack"),
        ({"w": 3}, r"got 3 for 'w'"),
        ({3: ONE}, r"got the name 3"),
        ([1], r"got \[1\]"),
    ],
    ids=range(7),
)
def test_what_is_no_packed_model_is_named(call: Any, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call(given)


@pytest.mark.parametrize(
    ("ending", "writes"),
    [(".gguf", "to_gguf"), (".onnx", "to_onnx"), (".PT", "torch.save"), (".npz", "numpy.savez")],
)
def test_a_file_named_as_another_format_s_is_told_what_writes_it(ending, writes, tmp_path) -> None:
    with pytest.raises(ValueError, match=rf"'net\{ending}' .*{writes}.*'net\.safetensors'"):
        export.save({"w": ONE}, tmp_path / f"net{ending}")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_program_is_told_what_reads_it(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "torch")
    (tmp_path / "gguf").write_bytes(b"GGUF" + bytes(60))
    for name, reads in (("torch", r"torch\.load"), ("gguf", "the gguf package")):
        with pytest.raises(ValueError, match=rf"{name} is no packed model .*{reads} reads"):
            export.load(tmp_path / name)
    for given in (io.BytesIO(), None, 3):
        with pytest.raises(TypeError, match="load: expected a file's name, got"):
            export.load(given)  # type: ignore[arg-type] # it is refused
        with pytest.raises(TypeError, match="save: expected a file's name, got"):
            export.save({"w": ONE}, given)  # type: ignore[arg-type] # it is refused


def test_packed_models_are_loaded_without_a_file() -> None:
    net, optimizer = trained("QuantOptimizer")
    packed = export.pack(net, optimizer)
    tokens = torch.arange(10).reshape(2, 5)
    for put in (export.quantized, export.load_into):
        fresh = Net().eval()
        put(fresh, packed)
        assert torch.equal(fresh(tokens), net(tokens))
        with pytest.raises(TypeError, match="got None for the module"):
            put(None, packed)
        if put is export.quantized:
            with pytest.raises(ValueError, match=r"has packed layers already; .*dequantized"):
                put(fresh, packed)


def test_pack_is_told_from_what_it_takes() -> None:
    net, optimizer = trained("QuantOptimizer")
    for params in (optimizer, net.state_dict(), list(net.parameters()), Net):
        with pytest.raises(TypeError, match=r"expected \(module, optimizer\), got a"):
            export.pack(params, optimizer)
    with pytest.raises(TypeError, match="and a state"):
        export.pack(net, optimizer, ())
    with pytest.raises(TypeError, match="expected a transformation"):
        export.pack({"w": torch.ones(2)}, None)  # type: ignore[arg-type] # it is refused
    nothing = QuantOptimizer(torch.optim.SGD([{"params": net.parameters(), "quant_bits": 32}], 0.1))
    with pytest.raises(ValueError, match=r"packs nothing: .* no quant_bits below 16"):
        export.pack(net, nothing)


@pytest.mark.parametrize("adapter", ["QuantOptimizer", "TransformOptimizer"])
def test_parameters_that_were_exchanged_are_named_and_not_packed(adapter: str) -> None:
    """Another of the same name was packed by its levels."""
    net = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    prox = pf.hard_prox(pf.lsbq(1), period=1)
    names = ["a.weight", "b.weight"]
    if adapter == "QuantOptimizer":
        of = [(n, p) for n, p in net.named_parameters() if n in names]
        groups = [{"params": of, "quant_bits": 1}]
        optimizer: Any = QuantOptimizer(torch.optim.SGD(groups, lr=0.1), prox)
    else:
        transform = pf.chain(pf.sgd(0.1), pf.masked(prox, names))
        optimizer = TransformOptimizer(net.named_parameters(), transform)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    net["b"] = nn.Linear(8, 8)
    with pytest.warns(UserWarning, match=r"quantizes b\.weight, which the module has not"):
        packed = export.pack(net, optimizer, snap=True)
    assert isinstance(packed["a.weight"], Packed)
    assert packed["b.weight"].equal(net["b"].weight)


@pytest.mark.parametrize(
    ("weight", "levels", "kind"),
    [
        ([1.0], torch.ones(1, 1), "list for it"),
        (torch.ones(2), [1.0], "list for its levels"),
        (torch.ones(2, dtype=torch.int64), torch.ones(1, 1), "torch.int64, .* for it"),
        (torch.ones(2), torch.ones(1, 1, dtype=torch.complex64), "complex64, .* for its levels"),
        (torch.eye(2).to_sparse(), torch.ones(1, 1), "sparse_coo, .* for it"),
    ],
    ids=range(5),
)
def test_what_is_no_weight_is_refused_by_name(weight: Any, levels: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"parameter 'w': expected dense tensors .*{kind}"):
        pack_weight(weight, levels, name="w")


def test_weights_and_levels_without_numbers_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'w': it holds nothing, on the meta device"):
        pack_weight(torch.ones(2, device="meta"), torch.ones(1, 1), name="w")
    with pytest.raises(ValueError, match="'w': its levels are not numbers"):
        pack_weight(torch.ones(2), torch.tensor([[1.0, torch.nan]]), name="w")
