"""Scikit-learn's 8x8 scans of handwritten digits, and a small residual network for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The data: 1,797 scans, a quarter of them held out.


class Data(NamedTuple):
    images: Tensor  # [n, 1, 8, 8], in [0, 1]
    labels: Tensor  # [n]


def load_data(seed: int) -> tuple[Data, Data]:
    """(train, test): a stratified split of the digits."""
    from sklearn.datasets import load_digits  # which take as long to import as torch
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(
        range(len(labels)), test_size=0.25, random_state=seed, stratify=digits.target
    )
    return Data(images[train], labels[train]), Data(images[test], labels[test])


def batches(data: Data, size: int, generator: torch.Generator) -> Iterator[Data]:
    """One epoch of shuffled batches of one size, each image shifted by at most one pixel."""
    windows = F.pad(data.images, (1, 1, 1, 1)).unfold(2, 8, 1).unfold(3, 8, 1)
    order = torch.randperm(len(data.labels), generator=generator)
    for index in order[: len(order) // size * size].split(size):
        down, right = torch.randint(3, (2, size), generator=generator)
        yield Data(windows[index, :, down, right], data.labels[index])


# The network: 77,562 parameters. Its norms are GroupNorm, which keeps no state: running statistics
# would be one more thing to carry through a pure training step.


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Norm(nn.GroupNorm):
    """GroupNorm written out: torch.func and backward() round the fused one differently, and the
    functional loop and the torch optimizer are to give the same weights."""

    def forward(self, x: Tensor) -> Tensor:
        groups = x.reshape(len(x), self.num_groups, -1)
        centered = groups - groups.mean(-1, keepdim=True)
        variance = centered.square().mean(-1, keepdim=True)
        normal = (centered * (variance + self.eps).rsqrt()).reshape(x.shape)
        return normal * self.weight[:, None, None] + self.bias[:, None, None]


def norm(channels: int) -> Norm:
    return Norm(channels // 8, channels)


class Block(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x))))))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs, 3, stride), norm(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs, 3), norm(outputs)
        self.shortcut = conv(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    """A stem, three residual blocks of 16, 32 and 64 channels, and a head."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.stem, self.norm = conv(1, 16, 3), norm(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, generator=generator)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))
