"""The shapes of the parameters of three networks, without the networks."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def resnet18() -> Shapes:
    """11.7 million: kernels, norms, a linear layer."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for planes in (64, 128, 256, 512):
        for block in range(2):
            shapes += [(planes, width, 3, 3), (planes,), (planes,)]
            shapes += [(planes, planes, 3, 3), (planes,), (planes,)]
            if block == 0 and width != planes:
                shapes += [(planes, width, 1, 1), (planes,), (planes,)]
            width = planes
    return [*shapes, (1000, 512), (1000,)]


def _block(width: int) -> Shapes:
    shapes: Shapes = [(width,), (width,), (3 * width, width), (3 * width,)]
    shapes += [(width, width), (width,), (width,), (width,)]
    shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return shapes


def deit_s() -> Shapes:
    """22.1 million: patches of 16, twelve blocks of width 384, a head."""
    blocks = [shape for _ in range(12) for shape in _block(384)]
    return [(384, 3, 16, 16), (384,), *blocks, (384,), (384,), (1000, 384), (1000,)]


def transformer() -> Shapes:
    """100.8 million: an embedding of 20,480 tokens and twelve blocks of width 768."""
    return [(20480, 768), *(shape for _ in range(12) for shape in _block(768)), (768,), (768,)]


LISTS = {"ResNet-18": resnet18, "DeiT-S": deit_s, "transformer": transformer}


def quantized(shapes: Shapes) -> Shapes:
    """Matrices and kernels, which are what is quantized."""
    return [shape for shape in shapes if len(shape) > 1]
