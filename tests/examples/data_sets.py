"""Small data sets of drawn shapes, in the formats of the real ones."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

from examples.recipe.datasets import CIFAR_FOLDER, SHAPES, Shapes


def cifar_batches(folder: Path, train: int = 60, test: int = 20) -> Path:
    """CIFAR-10's python batches, so many images in all."""
    batches = folder / CIFAR_FOLDER
    batches.mkdir(parents=True)
    names = [name.encode() for name in SHAPES]
    (batches / "batches.meta").write_bytes(pickle.dumps({b"label_names": names}, protocol=2))
    for name, images in [
        *((f"data_batch_{i + 1}", range(i * train // 5, (i + 1) * train // 5)) for i in range(5)),
        ("test_batch", range(test)),
    ]:
        shapes = Shapes(max(train, test), 32, name != "test_batch")
        read = [shapes.read(index) for index in images]
        rows = [np.asarray(image).transpose(2, 0, 1).reshape(-1) for image, _ in read]
        batch = {b"data": np.stack(rows), b"labels": [label for _, label in read]}
        (batches / name).write_bytes(pickle.dumps(batch, protocol=2))
    return folder


def image_folders(folder: Path, each: int = 6, size: int = 48) -> Path:
    """ImageNet's folders: so many JPEGs of a class to train on, half as many to test on."""
    for part, count in (("train", each), ("val", each // 2)):
        shapes = Shapes(count * len(SHAPES), size, part == "train")
        for index in range(len(shapes)):
            image, label = shapes.read(index)
            own = folder / part / f"n{label:08d}"
            own.mkdir(parents=True, exist_ok=True)
            image.save(own / f"{index}.JPEG", quality=95)
    return folder
