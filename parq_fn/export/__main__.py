"""python -m parq_fn.export FILE: verifies a packed file and prints what is in it."""

from __future__ import annotations

from pathlib import Path

from parq_fn.export import load, table
from parq_fn.foundation.command import Parser, UserError, command


def main() -> None:
    parser = Parser("parq_fn.export", "Verifies a packed file and prints what is in it.")
    parser.add_argument("file", type=Path, help="a packed file, as parq_fn.export.save writes it")
    file = parser.parse_args().file
    try:
        packed = load(file)
    except ValueError as error:
        raise UserError(str(error)) from None
    print(table(packed))
    print(f"{file.stat().st_size:,} bytes in the file, every one as it was written")


if __name__ == "__main__":
    command(main)
