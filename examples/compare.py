"""A recipe in full precision and with quantized weights, map by map, as a table.

    python -m examples.compare qat_resnet_cifar10 --data synthetic --epochs 40
    python -m examples.compare qat_resnet_cifar10 --quant-bits 2 0 1 --proxmaps hard parq

Flags that are not this program's are the recipe's, the same for all rows; so are the start and
the order of the images. Every row has a folder in --save-dir, from which it resumes when the
same command is given again. Prints a table in Markdown, and writes it to table.md there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from examples.options import name_of_bits
from examples.recipe.flags import Recipe, parse
from examples.recipe.log import LOG, read
from examples.recipe.plan import WEIGHTS
from parq_fn.foundation.command import Parser, UserError, command

RECIPES = ("qat_resnet_cifar10", "qat_resnet_imagenet", "qat_vit_imagenet")
NAMES = {"hard": "STE", "binaryrelax": "BinaryRelax", "parq": "PARQ", "soft": "soft"}


class Row(NamedTuple):
    """What came of one training."""

    name: str
    accuracy: float  # percent, on the test images, after the last epoch
    on_levels: float | None  # share of the quantized weights
    size: int | None  # bytes of the packed weights
    minutes: float


def check(recipe: Recipe, rows: Iterable[Sequence[str]]) -> None:
    """Parses the flags of every row, before one is trained. Raises UserError for what a comparison
    cannot take."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("rows are trained on one process; start without torchrun")
    parsed = [parse(recipe, flags) for flags in rows]
    if any(args.evaluate for args in parsed):
        raise UserError("--evaluate tests one checkpoint; a comparison trains")


def trained(program: str, name: str, folder: Path, flags: Sequence[str]) -> Row:
    """One row: the recipe, run with these flags; it resumes where it was stopped."""
    status = importlib.import_module(f"examples.{program}").main(
        [*flags, "--save-dir", str(folder), "--resume"]
    )
    if status:
        raise SystemExit(status)
    told = read(folder / LOG)
    packed = folder / WEIGHTS
    return Row(
        name,
        told[-1]["test_accuracy"],
        told[-1].get("on_levels"),
        packed.stat().st_size if packed.exists() else None,
        sum(line["seconds"] for line in told) / 60,
    )


def table(rows: Sequence[Row]) -> str:
    """In Markdown; the first row is what the others are compared with."""
    lines = ["| weights | test accuracy | difference | on levels | bytes | minutes |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        apart = "" if row is rows[0] else f"{row.accuracy - rows[0].accuracy:+.2f}"
        on = "" if row.on_levels is None else f"{row.on_levels:.4f}"
        size = "" if row.size is None else f"{row.size:,}"
        cells = [row.name, f"{row.accuracy:.2f} %", apart, on, size, f"{row.minutes:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Trains every row, prints and writes the table."""
    parser = Parser("examples.compare", __doc__)
    text = f"what is trained: {', '.join(RECIPES)}"
    parser.add_argument("recipe", choices=RECIPES, help=text, metavar="recipe")
    default = ["hard", "binaryrelax", "parq"]
    text = f"maps, of {', '.join(NAMES)} (default: {' '.join(default)})"
    maps = {"nargs": "+", "choices": tuple(NAMES), "default": default, "metavar": "MAP"}
    parser.add_argument("--proxmaps", **maps, help=text)
    bits = {"nargs": "+", "type": int, "choices": range(9), "default": [2], "metavar": "BITS"}
    parser.add_argument("--quant-bits", **bits, help="bits, 0 is ternary (default: 2)")
    folder = Path("runs/compare")
    text = f"folder of the rows (default: {folder})"
    parser.add_argument("--save-dir", type=Path, default=folder, help=text)
    args, flags = parser.parse_known_args(argv)
    own = {"--full-prec", "--quant-proxmap", "--resume"}
    given = sorted(own & {flag.partition("=")[0] for flag in flags})
    if given:
        parser.error(f"{given[0]} is set for each row by the comparison itself")
    todo = {"full precision": ("full", [*flags, "--full-prec"])}
    for width in args.quant_bits:
        for proxmap in args.proxmaps:
            own = [*flags, "--quant-bits", str(width), "--quant-proxmap", proxmap]
            todo[f"{NAMES[proxmap]}, {name_of_bits(width)}"] = f"{proxmap}_{width}", own
    recipe = importlib.import_module(f"examples.{args.recipe}").RECIPE
    check(recipe, (own for _, own in todo.values()))
    rows: list[Row] = []
    for name, (where, own) in todo.items():
        rows.append(trained(args.recipe, name, args.save_dir / where, own))
        print(table(rows), flush=True)
    (args.save_dir / "table.md").write_text(table(rows) + "\n")
    return rows


if __name__ == "__main__":
    command(main)
