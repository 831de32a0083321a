"""From images to what a network sees, and what training makes of them at random.

All that is random is drawn from torch's generator, under a seed that follows from what is drawn
(`drawing`): the seed of a run, the epoch and the image. So it depends neither on the process
that reads the image nor on what was read before, and a run that resumes equals one that never
stopped.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import kornia.augmentation as K
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from examples.recipe.rand_augment import rand_augment


class Transform(Protocol):
    """From an image to [3, size, size]."""

    size: int

    def __call__(self, image: Image.Image) -> Tensor: ...


def seed_of(*what: int | str) -> int:
    """A seed of 63 bits for whatever is named."""
    digest = hashlib.blake2b(repr(what).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def drawing(*what: int | str) -> Iterator[None]:
    """Draws what is named, and leaves the generators of the process as they were."""
    python = random.getstate()
    with torch.random.fork_rng(devices=()):
        torch.default_generator.manual_seed(seed_of(*what))
        random.seed(seed_of(*what))
        try:
            yield
        finally:
            random.setstate(python)


class Normal(NamedTuple):
    """Mean and deviation of the colors, of all images."""

    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]

    @property
    def fill(self) -> Tensor:
        """[3, 1, 1], the mean color."""
        return torch.tensor(self.mean)[:, None, None]

    def __call__(self, image: Tensor) -> Tensor:
        """[..., 3, h, w] in [0, 1] -> about mean 0 and deviation 1."""
        mean, deviation = (torch.tensor(c)[:, None, None] for c in self)
        return (image - mean) / deviation


CIFAR = Normal((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = Normal((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def pixels(image: Image.Image) -> Tensor:
    """[3, h, w] float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def flipped(image: Image.Image) -> Image.Image:
    """Left and right changed, half of the times."""
    left = Image.Transpose.FLIP_LEFT_RIGHT
    return image.transpose(left) if torch.rand(()) < 0.5 else image


def shifted(image: Image.Image, by: int = 4) -> Image.Image:
    """A window of the image's size, up to `by` pixels aside, with black beyond its edges."""
    x, y = (int(torch.randint(-by, by + 1, ())) for _ in range(2))
    width, height = image.size
    return image.crop((x, y, x + width, y + height))


def resized_crop(image: Image.Image, size: int, filter: Image.Resampling) -> Image.Image:
    """A window of 8 to 100 % of the area and a ratio of 3 : 4 to 4 : 3, resized to size x size;
    where ten drawn do not fit, the largest in the middle.

    Source: Szegedy et al., arXiv 1409.4842, section 6.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * _uniform(0.08, 1.0)
        ratio = math.exp(_uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(torch.randint(width - w + 1, ())), int(torch.randint(height - h + 1, ()))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        x, y = (width - w) // 2, (height - h) // 2
    return image.resize((size, size), filter, box=(x, y, x + w, y + h))


def middle(image: Image.Image, size: int, filter: Image.Resampling) -> Image.Image:
    """The shorter side resized to size / 0.875, then the size x size in the middle."""
    scale = size / 0.875 / min(image.size)
    width, height = (max(size, round(scale * side)) for side in image.size)
    x, y = (width - size) // 2, (height - size) // 2
    return image.resize((width, height), filter).crop((x, y, x + size, y + size))


class Evaluation:
    """The middle of an image; with `small` all of it, as for CIFAR-10."""

    def __init__(
        self, size: int, filter: Image.Resampling, normal: Normal, small: bool = False
    ) -> None:
        self.size, self.filter, self.normal, self.small = size, filter, normal, small

    def __call__(self, image: Image.Image) -> Tensor:
        if not self.small:
            image = middle(image, self.size, self.filter)
        return self.normal(pixels(image))


class Training:
    """A window and a flip; with `custom` also RandAugment, and after normalizing a rectangle
    erased in one image of four.

    small: the window is shifted by up to 4 pixels, as for CIFAR-10; otherwise it is
    `resized_crop`'s.

    Source of erasing: Zhong et al., arXiv 1708.04896.
    """

    def __init__(
        self, size: int, filter: Image.Resampling, normal: Normal, small: bool, custom: bool
    ) -> None:
        self.size, self.filter, self.normal, self.small = size, filter, normal, small
        self.erase = None
        if custom:
            self.erase = K.RandomErasing(p=0.25, scale=(0.02, 1 / 3), ratio=(0.3, 3.3))

    def __call__(self, image: Image.Image) -> Tensor:
        image = shifted(image) if self.small else resized_crop(image, self.size, self.filter)
        x = pixels(flipped(image))
        if self.erase is None:
            return self.normal(x)
        x = rand_augment(x, self.normal.fill)
        return self.erase(self.normal(x)[None])[0]


def mixed(images: Tensor, labels: Tensor, classes: int, *drawn: int | str) -> tuple[Tensor, Tensor]:
    """Mixup (Beta(0.8, 0.8)) or cutmix (Beta(1, 1)) of a whole batch, as likely, by kornia; by
    chance as `drawing` names it. Returns the images, and the share of each class in them
    [n, classes], which `F.cross_entropy` takes as probabilities.

    Source: Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899.
    """
    with drawing(*drawn):
        if torch.rand(()) < 0.5:
            one = torch.distributions.Beta(0.8, 0.8).sample().item()
            mix = K.RandomMixUpV2((one, one), p=1.0, data_keys=["input", "class"])
            out, found = mix(images, labels)
            other, share = found[:, 1], found[:, 2]
        else:
            cut = K.RandomCutMixV2(p=1.0, data_keys=["input", "class"], use_correct_lambda=True)
            out, found = cut(images, labels)
            other, share = found[0, :, 1], 1 - found[0, :, 2]  # kornia gives the share that is left
    own, other = (F.one_hot(i.to(labels), classes).to(images) for i in (labels, other))
    return out, torch.lerp(own, other, share.to(images)[:, None])
