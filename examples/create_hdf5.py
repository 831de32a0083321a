"""ImageNet's folders of JPEGs as two HDF5 files, which a file system reads faster.

    python -m examples.create_hdf5 --data-dir FOLDER --save-dir OTHER

FOLDER holds train and val, each with a folder of JPEGs for every class. The bytes of the JPEGs
are kept as they are ("images"), with "labels" and the names of the "classes". With --check every
image is decoded too, and what cannot be is left out and counted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from examples.recipe.datasets import ImageFolder, Unreadable, unfinished
from parq_fn.foundation.command import Parser, UserError, command, output_folder


def convert(images: ImageFolder, file: Path, check: bool) -> tuple[int, int]:
    """(images written, images left out) of one of the two files."""
    labels: list[int] = []
    left_out = 0
    with unfinished(file) as part, h5py.File(part, "w") as target:
        kind = h5py.vlen_dtype(np.uint8)
        stored = target.create_dataset("images", (len(images),), kind, maxshape=(None,))
        target["classes"] = np.array([name.encode() for name in images.classes])
        for index in tqdm(range(len(images)), file.name, disable=None):
            try:
                if check:
                    images.read(index)
            except Unreadable as error:
                left_out += 1
                tqdm.write(f"left out: {error}", file=sys.stderr)
                continue
            stored[len(labels)] = np.frombuffer(images.data(index), np.uint8)
            labels.append(int(images.labels[index]))
        stored.resize(len(labels), 0)
        target["labels"] = np.array(labels, np.int64)
    return len(labels), left_out


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("examples.create_hdf5", __doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of train and val")
    parser.add_argument("--save-dir", type=Path, help="folder of the files (default: --data-dir)")
    parser.add_argument("--check", action="store_true", help="decode every image, leave bad out")
    args = parser.parse_args(argv)
    folder = args.save_dir or args.data_dir
    both = {name: ImageFolder(args.data_dir, name == "train") for name in ("train", "val")}
    output_folder(folder)
    for name, images in both.items():
        file = folder / f"{name}.hdf5"
        count, left_out = convert(images, file, args.check)
        if not count:
            raise UserError(f"{file}: no image could be read")
        print(f"{file}: {count} images" + (f", {left_out} left out" if left_out else ""))


if __name__ == "__main__":
    command(main)
