"""Residual networks for ImageNet: 18, 34, 50, 101 and 152 layers.

Parameters have the names that torchvision gave them, so that its checkpoints fit. In bottlenecks
the 3 x 3 kernel has the stride (v1.5).

Source: He, Zhang, Ren, Sun, arXiv 1512.03385, table 1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

#: Blocks of the four stages, by depth.
STAGES = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)


class Residual(nn.Module):
    """relu(shortcut(x) + branch(x)), the shortcut a 1 x 1 convolution where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            norm = nn.BatchNorm2d(outputs)
            self.downsample = nn.Sequential(conv(inputs, outputs, 1, stride), norm)

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define branch")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.downsample(x) + self.branch(x))


class Basic(Residual):
    """Two 3 x 3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__(inputs, width, stride)
        self.conv1, self.bn1 = conv(inputs, width, 3, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3), nn.BatchNorm2d(width)

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Bottleneck(Residual):
    """1 x 1, 3 x 3 and 1 x 1 convolutions, the last to four times the width."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__(inputs, 4 * width, stride)
        self.conv1, self.bn1 = conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.bn3(self.conv3(x))


class ResNet(nn.Module):
    """A 7 x 7 stem, four stages of 64, 128, 256 and 512 channels, and a head.

    [n, 3, h, w] -> [n, classes]. Kernels start from Kaiming's normal distribution, by fan out.
    """

    def __init__(self, depth: int, classes: int) -> None:
        super().__init__()
        block = Basic if depth < 50 else Bottleneck
        self.conv1, self.bn1 = conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        inputs = 64
        for i, count in enumerate(STAGES[depth]):
            width, stride = 64 << i, 2 if i else 1
            outputs = block.expansion * width
            rest = (block(outputs, width, 1) for _ in range(count - 1))
            stage = nn.Sequential(block(inputs, width, stride), *rest)
            self.add_module(f"layer{i + 1}", stage)
            inputs = outputs
        self.fc = nn.Linear(inputs, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        for i in range(4):
            x = self.get_submodule(f"layer{i + 1}")(x)
        return self.fc(x.mean((2, 3)))
