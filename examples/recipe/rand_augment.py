"""RandAugment as DeiT is trained with: rand-m9-mstd0.5-inc1 by the name of its strengths.

Two of fifteen operations are drawn, either may be twice, and each is applied half of the times,
at a strength of 9 of 10 with a deviation of 0.5. What a moved image leaves free is filled.

Source: Cubuk et al., arXiv 1909.13719; strengths: Touvron et al., arXiv 2012.12877, table 9, as
the library timm defines them.
"""

from __future__ import annotations

from collections.abc import Callable

import kornia as K
import torch
from torch import Tensor

Operation = Callable[[Tensor, float, float], Tensor]  # image, strength in [0, 1], 1 or -1


def _gray(x: Tensor) -> Tensor:
    return K.color.rgb_to_grayscale(x)


def _blended(other: Callable[[Tensor], Tensor]) -> Operation:
    """Away from another image, or up to 0.1 of the way back from it."""

    def operation(x: Tensor, strength: float, sign: float) -> Tensor:
        factor = max(0.1, 1 + 0.9 * strength * sign)
        return torch.lerp(other(x).expand_as(x), x, factor)

    return operation


def _smooth(x: Tensor) -> Tensor:
    kernel = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 5.0, 1.0], [1.0, 1.0, 1.0]]]) / 13
    return K.filters.filter2d(x, kernel, border_type="replicate")


def _moved(x: Tensor, sheared: tuple[float, float], shifted: tuple[float, float]) -> Tensor:
    """By parts of its width for each of its height, and by parts of its width and height."""
    if any(sheared):
        return K.geometry.shear(x, torch.tensor([sheared]))
    height, width = x.shape[-2:]
    return K.geometry.translate(x, torch.tensor([[shifted[0] * width, shifted[1] * height]]))


COLORS: dict[str, Operation] = {
    "auto contrast": lambda x, *_: K.enhance.normalize_min_max(x),
    "equalize": lambda x, *_: K.enhance.equalize(x),
    "invert": lambda x, *_: 1 - x,
    "posterize": lambda x, s, _: K.enhance.posterize(x, 4 - int(4 * s)),
    "solarize": lambda x, s, _: torch.where(x < 1 - s, x, 1 - x),
    "solarize add": lambda x, s, _: torch.where(x < 0.5, x + s * 110 / 255, x),
    "color": _blended(_gray),
    "contrast": _blended(lambda x: _gray(x).mean((1, 2, 3), keepdim=True)),
    "brightness": _blended(torch.zeros_like),
    "sharpness": _blended(_smooth),
}
PLACES: dict[str, Operation] = {
    "rotate": lambda x, s, sign: K.geometry.rotate(x, torch.tensor([30 * s * sign])),
    "shear x": lambda x, s, sign: _moved(x, (0.3 * s * sign, 0.0), (0.0, 0.0)),
    "shear y": lambda x, s, sign: _moved(x, (0.0, 0.3 * s * sign), (0.0, 0.0)),
    "translate x": lambda x, s, sign: _moved(x, (0.0, 0.0), (0.45 * s * sign, 0.0)),
    "translate y": lambda x, s, sign: _moved(x, (0.0, 0.0), (0.0, 0.45 * s * sign)),
}


def rand_augment(x: Tensor, fill: Tensor) -> Tensor:
    """x: [3, h, w] in [0, 1]; fill: [3, 1, 1], a color. Draws from torch's generator."""
    names = [*COLORS, *PLACES]
    for _ in range(2):
        name = names[int(torch.randint(len(names), ()))]
        applied, sign = torch.rand(()) < 0.5, 1.0 if torch.rand(()) < 0.5 else -1.0
        strength = float((0.9 + 0.05 * torch.randn(())).clamp(0, 1))
        if not applied:
            continue
        if name in COLORS:
            x = COLORS[name](x[None], strength, sign)[0]
        else:
            x = PLACES[name]((x - fill)[None], strength, sign)[0] + fill
        x = x.clamp(0, 1)
    return x
