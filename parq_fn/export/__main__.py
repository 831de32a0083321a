"""python -m parq_fn.export FILE: verifies a packed file and prints what is in it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from parq_fn.export import load, table


def main() -> int:
    parser = argparse.ArgumentParser("python -m parq_fn.export", description=__doc__)
    parser.add_argument("file", type=Path, help="a packed file")
    file = parser.parse_args().file
    try:
        packed = load(file)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(table(packed))
    print(f"{file.stat().st_size:,} bytes in the file, every one as it was written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
