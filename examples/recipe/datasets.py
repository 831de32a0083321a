"""Images with labels, read one at a time: CIFAR-10, ImageNet as folders or HDF5, drawn shapes.

A data set has `classes`, the names of its labels; `len`; and `read(index)`, which gives an image
and its label, or raises Unreadable.
"""

from __future__ import annotations

import hashlib
import http.client
import io
import math
import os
import pickle
import shutil
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from parq_fn.foundation.command import UserError


class Unreadable(Exception):
    """An image that cannot be decoded, with where it lies."""


class DataSet(Protocol):
    """See the module."""

    classes: list[str]

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]: ...


# CIFAR-10, as it is distributed.

CIFAR_FOLDER = "cifar-10-batches-py"
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR_MD5 = "c58f30108f718f92721af3b95e74349a"


class _Arrays(pickle.Unpickler):
    """Unpickles arrays and plain values, and nothing that could do anything else."""

    allowed = frozenset({"_reconstruct", "ndarray", "dtype", "scalar", "encode"})

    def find_class(self, module: str, name: str) -> Any:
        if name in self.allowed and module.split(".")[0] in ("numpy", "_codecs"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")


def _again(folder: Path) -> str:
    return f"delete {folder}, and it is downloaded anew"


def _unpickle(file: Path) -> dict[bytes, Any]:
    if not file.is_file():
        raise UserError(f"{file} is missing; {_again(file.parent)}")
    try:
        with file.open("rb") as opened:
            found = _Arrays(opened, encoding="bytes").load()
        if not isinstance(found, dict):
            raise pickle.UnpicklingError(f"it holds a {type(found).__name__}, not a dict")
    except Exception as error:  # a pickle raises whatever it comes upon
        raise UserError(
            f"{file} is no batch of CIFAR-10 or was cut off ({error}; {file.stat().st_size} "
            f"bytes); {_again(file.parent)}"
        ) from None
    return found


class Cifar10:
    """The batches of python pickles: 32 x 32 images, 10 classes.

    Raises UserError for batches that are missing, cut off, or hold something else.
    """

    def __init__(self, data_dir: Path, train: bool) -> None:
        folder = data_dir / CIFAR_FOLDER
        if not folder.is_dir():
            download_cifar10(data_dir)
        names = _unpickle(folder / "batches.meta").get(b"label_names")
        if not (names and isinstance(names, list) and all(isinstance(n, bytes) for n in names)):
            raise UserError(f"{folder / 'batches.meta'} names no labels; {_again(folder)}")
        self.classes = [name.decode(errors="replace") for name in names]
        images, labels = [], []
        for name in [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]:
            batch = _unpickle(folder / name)
            data, own = batch.get(b"data"), batch.get(b"labels")
            whole = isinstance(own, list) and all(isinstance(label, int) for label in own)
            shape = getattr(data, "shape", None)
            if not whole or shape != (len(own), 3072) or data.dtype != np.uint8:
                raise UserError(
                    f"{folder / name}: expected uint8 data of shape [n, 3072] and n whole labels; "
                    f"{_again(folder)}"
                )
            if not all(0 <= label < len(self.classes) for label in own):
                raise UserError(
                    f"{folder / name}: expected labels from 0 to {len(self.classes) - 1}"
                )
            images.append(data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
            labels += own
        self.images, self.labels = np.ascontiguousarray(np.concatenate(images)), labels

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.labels[index])


def download_cifar10(data_dir: Path, url: str = CIFAR_URL, md5: str = CIFAR_MD5) -> None:
    """Downloads, checks and unpacks the batches; what was only begun leaves nothing behind.

    Raises UserError where the address is out of reach or the bytes are others.
    """
    by_hand = f"put the folder {CIFAR_FOLDER} there by hand, or pass --data synthetic"
    if data_dir.is_file():
        raise UserError(f"--data-dir takes a folder, and {data_dir} is a file")
    archive = data_dir / f"cifar-10-python.tar.gz.{os.getpid()}.part"
    unpacked = data_dir / f"{CIFAR_FOLDER}.{os.getpid()}.part"
    found = hashlib.md5(usedforsecurity=False)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=30) as source, archive.open("wb") as target:
            total = int(source.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc="CIFAR-10") as progress:
                while block := source.read(1 << 20):
                    target.write(block)
                    found.update(block)
                    progress.update(len(block))
        if found.hexdigest() != md5:
            raise UserError(
                f"{url} gave other bytes than expected (md5 {found.hexdigest()}, not {md5}): "
                f"try again, or {by_hand}"
            )
        # more care than these known bytes need, and not in Python before 3.10.12 and 3.11.4
        careful: Any = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        with tarfile.open(archive) as opened:
            opened.extractall(unpacked, **careful)
        (unpacked / CIFAR_FOLDER).rename(data_dir / CIFAR_FOLDER)
    except (OSError, http.client.HTTPException, tarfile.TarError) as error:
        raise UserError(f"no {CIFAR_FOLDER} in {data_dir}, and {url}: {error}; {by_hand}") from None
    finally:
        archive.unlink(missing_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)


# ImageNet, as folders of JPEGs or as HDF5 files of them.

_SUFFIXES = {".jpeg", ".jpg", ".png"}


def decoded(read: Callable[[], bytes], where: str) -> Image.Image:
    """The image of the bytes that are read, as RGB. Raises Unreadable, with where they are."""
    try:
        return Image.open(io.BytesIO(read())).convert("RGB")
    except Exception as error:  # decoders raise whatever they come upon
        raise Unreadable(f"{where}: {error}") from None


class ImageFolder:
    """A folder for each class, as ImageNet is unpacked: train/n01440764/....JPEG, val/...

    Labels count the folders in alphabetical order. Raises UserError where there are none, or one
    is empty.
    """

    def __init__(self, data_dir: Path, train: bool) -> None:
        folder = data_dir / ("train" if train else "val")
        if not folder.is_dir():
            file = folder.with_suffix(".hdf5")
            if file.exists():
                raise UserError(f"no folder {folder}, but {file}: pass --hdf5-data to read that")
            raise UserError(
                f"no folder {folder}; --data-dir takes a folder of train and val, each with a "
                "folder of JPEGs for every class, or pass --data synthetic"
            )
        self.classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
        if not self.classes:
            raise UserError(f"{folder} has no folders of classes")
        names: list[bytes] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            own = sorted(
                f for f in os.listdir(folder / name) if Path(f).suffix.lower() in _SUFFIXES
            )
            if not own:
                raise UserError(f"{folder / name} holds no .jpeg, .jpg or .png")
            names += [os.fsencode(file) for file in own]
            labels += [label] * len(own)
        # arrays, for a million objects would be copied into every worker, as it counts their uses
        self.folder, self.names, self.labels = folder, np.array(names), np.array(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, index: int) -> Path:
        """Where the image lies."""
        name = os.fsdecode(bytes(self.names[index]))
        return self.folder / self.classes[self.labels[index]] / name

    def data(self, index: int) -> bytes:
        """The file's bytes."""
        return self.file(index).read_bytes()

    def read(self, index: int) -> tuple[Image.Image, int]:
        image = decoded(partial(self.data, index), str(self.file(index)))
        return image, int(self.labels[index])


class Hdf5:
    """train.hdf5 and val.hdf5, as examples.create_hdf5 makes them of folders: the bytes of the
    JPEGs ("images"), their labels, and the names of the classes.

    Raises UserError for a file that is missing, cut off, or of something else.
    """

    def __init__(self, data_dir: Path, train: bool) -> None:
        import h5py

        self.path = data_dir / ("train.hdf5" if train else "val.hdf5")
        how = f"python -m examples.create_hdf5 --data-dir FOLDER --save-dir {data_dir}"
        if not self.path.is_file():
            raise UserError(f"no file {self.path}; make it of folders of JPEGs: {how}")
        try:
            with h5py.File(self.path, "r") as file:
                labels = file["labels"][:]
                self.classes = [name.decode() for name in file["classes"][:]]
                count = len(file["images"])
        except (OSError, KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.path} is not such a file, or was cut off ({error}): {how}"
            ) from None
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise UserError(f"{self.path}: expected labels that are whole numbers: {how}")
        self.labels = labels.tolist()
        if not count or count != len(self.labels):
            raise UserError(f"{self.path} has {count} images and {len(self.labels)} labels: {how}")
        if not all(0 <= label < len(self.classes) for label in self.labels):
            raise UserError(
                f"{self.path}: expected labels from 0 to {len(self.classes) - 1}, got "
                f"{min(self.labels)} to {max(self.labels)}: {how}"
            )
        self._file: Any = None  # of the process that reads

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __len__(self) -> int:
        return len(self.labels)

    def data(self, index: int) -> bytes:
        """The bytes of an image's file."""
        import h5py

        if self._file is None:
            self._file = h5py.File(self.path, "r")
        return self._file["images"][index].tobytes()

    def read(self, index: int) -> tuple[Image.Image, int]:
        where = f"{self.path}, image {index}"
        return decoded(partial(self.data, index), where), self.labels[index]


# Drawn shapes, for runs without data.

SHAPES = [
    "disk", "ring", "square", "frame", "triangle", "diamond", "plus", "cross", "star", "half disk",
]  # fmt: skip


class Shapes:
    """Shapes of ten classes at random places, in random sizes, light colors and turns, on a dark
    background, under noise. Image i is always the same; train and test share none.
    """

    classes = SHAPES

    def __init__(self, count: int, size: int, train: bool) -> None:
        self.count, self.size, self.train = count, size, train

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Image.Image, int]:
        random = np.random.default_rng([index, int(self.train)])
        label, fine = index % len(SHAPES), 2 * self.size  # drawn twice as large, for smooth edges
        ends, ink = random.integers(32, 128, (2, 3)), random.integers(112, 224, 3)
        ramp = np.linspace(0, 1, self.size)[:, None, None]
        ground = (1 - ramp) * ends[0] + ramp * ends[1] + np.zeros((1, self.size, 1))
        mask = Image.new("L", (fine, fine))
        radius = fine * random.uniform(0.16, 0.36)
        center = random.uniform(radius, fine - radius, 2)
        turn = math.radians(random.uniform(-15, 15))
        _draw(ImageDraw.Draw(mask), SHAPES[label], center, radius, turn)
        cover = (
            np.asarray(mask.resize((self.size, self.size), Image.Resampling.BOX))[..., None] / 255
        )
        pixels = (1 - cover) * ground + cover * ink + random.normal(0, 64, ground.shape)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), label


def _draw(
    draw: ImageDraw.ImageDraw, shape: str, center: np.ndarray, radius: float, turn: float
) -> None:
    def points(angles: Any, radii: Any) -> list[tuple[float, float]]:
        at = np.asarray(angles) + turn
        xy = center + np.stack([np.cos(at), np.sin(at)], -1) * np.asarray(radii)[..., None]
        return [(float(x), float(y)) for x, y in xy]

    def regular(corners: int, begin: float, radius: float) -> list[tuple[float, float]]:
        angles = np.linspace(0, 2 * np.pi, corners, endpoint=False) + begin
        return points(angles, np.full(corners, radius))

    x, y = center
    box = (x - radius, y - radius, x + radius, y + radius)
    half, quarter = np.pi / 2, np.pi / 4
    if shape == "disk":
        draw.ellipse(box, fill=255)
    elif shape == "half disk":
        begin = math.degrees(turn)
        draw.pieslice(box, begin, begin + 180, fill=255)
    elif shape == "ring":
        draw.ellipse(box, outline=255, width=round(0.35 * radius))
    elif shape == "square":
        draw.polygon(regular(4, quarter, radius), fill=255)
    elif shape == "frame":
        draw.polygon(regular(4, quarter, radius), fill=255)
        draw.polygon(regular(4, quarter, 0.6 * radius), fill=0)
    elif shape == "diamond":
        draw.polygon(
            points([0, half, 2 * half, 3 * half], radius * np.array([0.6, 1, 0.6, 1])), 255
        )
    elif shape == "triangle":
        draw.polygon(regular(3, -half, radius), fill=255)
    elif shape == "star":
        radii = radius * np.where(np.arange(10) % 2, 0.42, 1.0)
        draw.polygon(points(np.linspace(0, 2 * np.pi, 10, endpoint=False) - half, radii), fill=255)
    else:  # plus, or turned by 45 degrees, a cross
        begin = quarter if shape == "cross" else 0.0
        for bar in (begin, begin + half):
            reach = [bar - 0.25, bar + 0.25, bar + np.pi - 0.25, bar + np.pi + 0.25]
            draw.polygon(points(reach, np.full(4, radius)), fill=255)


@contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A path to write to, which takes its name when all is written; else nothing is left."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
