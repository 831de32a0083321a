"""examples/compare.py: a row for every training, and none of them trained twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples import compare
from parq_fn.foundation.command import command


@pytest.mark.rare
def test_rows_of_a_comparison(tmp_path: Path, capsys) -> None:
    flags = ["qat_resnet_cifar10", "--save-dir", str(tmp_path), "--proxmaps", "hard", "parq"]
    flags += ["--data", "synthetic", "--synthetic-images", "60", "--epochs", "1", "--batch-size"]
    flags += ["20", "--workers", "0", "--quant-warmup-steps", "0", "--no-progress"]
    rows = compare.main(flags)
    assert [row.name for row in rows] == ["full precision", "STE, 2 bits", "PARQ, 2 bits"]
    assert rows[0].on_levels is None
    assert rows[0].size is None
    assert all(row.on_levels == 1 and row.size is not None for row in rows[1:])
    assert (tmp_path / "table.md").read_text() == compare.table(rows) + "\n"
    assert "| STE, 2 bits | " in capsys.readouterr().out
    assert compare.main(flags) == rows  # read, not trained again
    capsys.readouterr()
    for more, message in (
        (["--lr", "0.01"], "was trained with --lr 0.1, and this run is with --lr 0.01"),
        (["--evaluate"], "a comparison trains"),
        (["--anneal-wd-frac", "0.5"], "hard has none"),
    ):
        with pytest.raises(SystemExit):
            command(lambda more=more: compare.main([*flags, *more]))
        assert message in capsys.readouterr().err


def test_what_the_recipe_refuses_ends_the_comparison(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        compare.main(["qat_resnet_cifar10", "--save-dir", str(tmp_path), "--epochz", "3"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --epochz 3" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--full-prec", "--quant-proxmap=soft", "--resume"])
def test_what_the_rows_differ_in_is_refused(flag: str, capsys) -> None:
    with pytest.raises(SystemExit):
        compare.main(["qat_resnet_cifar10", "--data", "synthetic", flag])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is set for each row by the comparison itself" in line
