"""The simple example: its table, its files, its flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from examples.qat_simple_report import main, packed_bytes, parse, share_on_levels
from parq_fn import per_channel
from parq_fn.export import pack_weight
from tests.helpers import sampled


def short(folder: Path, flags: str = "") -> list[str]:
    """A run of two epochs, unless the flags say otherwise."""
    return ["--epochs", "2", "--batch-size", "128", "--save-dir", str(folder), *flags.split()]


@pytest.mark.rare
@pytest.mark.parametrize(
    ("flags", "code_bits"),
    sampled(
        [
            ("--quant-bits 2 0 --quant-per-channel --quant-lsbq-optimal", [2, 1.6]),
            ("--quant-bits 3 --quant-proxmap soft --quant-lsbq-optimal", [3]),
            ("--quant-bits 1 --quant-proxmap hard --quant-warmup-steps 5", [1]),
            ("--quant-bits 0 --quant-method uniform --quant-proxmap binaryrelax", [1.6]),
            ("--quant-bits 4 --quant-method uniform --quant-block-size 16 --quant-shrink", [4]),
            ("--quant-bits 2 --anneal-start 0 --anneal-end 0.5 --quant-period 3", [2]),
        ],
        2,
    ),
)
def test_ends_on_levels(flags: str, code_bits: list[float], tmp_path: Path) -> None:
    full, *quantized = main(short(tmp_path, flags))
    assert [row.bits for row in quantized] == code_bits
    assert [row.on_levels for row in quantized] == [1.0] * len(quantized)
    assert full.on_levels is None
    assert full.packed == full.float32
    assert full.test_accuracy > 30  # chance: 10
    assert all(row.packed < row.float32 / 4 for row in quantized)


@pytest.mark.rare
def test_same_seed_same_table_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(1)
    rows = main(short(tmp_path / "a", "--quant-bits 2 1 --epochs 1"))
    first = capsys.readouterr()
    torch.manual_seed(2)
    main(short(tmp_path / "b", "--quant-bits 2 1 --epochs 1"))
    assert capsys.readouterr().out == first.out
    *trained, saved = first.err.splitlines()  # no bars: no terminal
    assert trained == [f"training: {name}" for name in ("full precision", "2 bits", "1 bit")]
    assert "saved in" in saved

    # a row does not depend on the rows before it
    assert main(short(tmp_path / "c", "--quant-bits 1 --epochs 1"))[-1] == rows[-1]
    assert main(short(tmp_path / "d", "--quant-bits 1 --epochs 1 --seed 1"))[-1] != rows[-1]

    tables = [json.loads((tmp_path / name / "table.json").read_text())["table"] for name in "ab"]
    assert tables[0] == tables[1] == [row._asdict() for row in rows]
    for name in "ab":
        assert (tmp_path / name / "weights.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.rare
def test_both_engines_give_the_same_table(tmp_path: Path) -> None:
    options = "--quant-bits 2 --epochs 2 --quant-warmup-steps 3 --quant-shrink"
    rows = [
        main(short(tmp_path / engine, f"{options} --engine {engine}"))
        for engine in ("functional", "torch")
    ]
    assert rows[0] == rows[1]
    images = [
        (tmp_path / engine / "weights.png").read_bytes() for engine in ("functional", "torch")
    ]
    assert images[0] == images[1]


@pytest.mark.rare
@pytest.mark.parametrize("engine", sampled(["functional", "torch"], 1))
def test_a_saved_network_has_the_printed_accuracy_and_size(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "net.safetensors"
    flags = f"--quant-bits 1 --quant-per-channel --epochs 2 --engine {engine} --save {file}"
    row = main(short(tmp_path, flags))[-1]
    capsys.readouterr()
    main(["--evaluate", str(file)])
    assert capsys.readouterr().out == f"{file}: {row.test_accuracy:.2f} %\n"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert row.packed <= file.stat().st_size - header <= 1.05 * row.packed


def test_packed_bytes_by_hand() -> None:
    kernel, bias = torch.zeros(2, 11), torch.zeros(3)

    def size(rows: int, levels: int) -> int:
        return packed_bytes(
            {"kernel": pack_weight(kernel, torch.zeros(rows, levels)), "bias": bias}
        )

    assert size(2, 4) == 6 + 2 * 4 * 4 + 3 * 4  # 44 bits: 6 bytes
    assert size(1, 3) == 5 + 3 * 4 + 3 * 4
    assert size(1, 2) == 3 + 2 * 4 + 3 * 4
    assert packed_bytes({"kernel": kernel, "bias": bias}) == (22 + 3) * 4


def test_share_on_levels_looks_at_the_bits() -> None:
    weights = {"head": torch.tensor([[1.0, -1.0], [2.0, 0.1 + 0.2]]), "bias": torch.ones(1)}
    levels = torch.tensor([[-1.0, 1.0], [0.3, 2.0]])
    above = torch.nextafter(torch.tensor(0.3), torch.tensor(1.0))

    def share(levels: torch.Tensor) -> float:
        options = (
            {"snap": True, "granularity": per_channel()} if len(levels) > 1 else {"snap": True}
        )
        packed = {"head": pack_weight(weights["head"], levels, **options), "bias": weights["bias"]}
        return share_on_levels(weights, packed)

    for value, expected in ((torch.tensor(0.3), 1.0), (above, 0.75)):
        weights["head"][1, 1] = value
        assert share(levels) == expected
    assert share(levels[:1]) == 0.5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--quant-bits 9", "--quant-bits: invalid choice: 9"),
        ("--quant-bits two", "--quant-bits: invalid int value"),
        ("--quant-method best", "--quant-method: invalid choice"),
        ("--quant-proxmap best", "--quant-proxmap: invalid choice"),
        ("--quant-block-size 7", "--quant-block-size: block size 7 does not divide"),
        ("--quant-block-size 0", "--quant-block-size: expected a whole number from 1 on, got '0'"),
        ("--quant-period 0", "--quant-period: expected a whole number from 1 on, got '0'"),
        ("--quant-warmup-steps -1", "--quant-warmup-steps"),
        ("--quant-warmup-steps 5000", "--quant-warmup-steps must be below 840, the end of"),
        ("--anneal-start 9 --anneal-end 9", "--anneal-start must be below --anneal-end, got 9"),
        ("--anneal-end 50", "--anneal-end must be below --epochs, got 50 and 50"),
        ("--anneal-steepness 0", "--anneal-steepness: expected a number"),
        ("--epochs 0", "--epochs: expected a whole number from 1 on, got '0'"),
        ("--epochs 1.5", "--epochs: expected a whole number"),
        ("--batch-size 5000", "--batch-size must be at most 1347, got 5000"),
        ("--lr nan", "--lr: expected a number from 0 on, got 'nan'"),
        ("--weight-decay inf", "--weight-decay: expected a number"),
        ("--seed -1", "--seed"),
    ],
)
def test_bad_flags_end_the_program(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(flags.split())
    assert error.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last


def test_help_gives_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        parse(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert text.count("\n  --") == text.count("(default:") == 24
