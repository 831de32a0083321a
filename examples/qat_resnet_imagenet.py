"""Residual networks with quantized weights on ImageNet.

    torchrun --nproc-per-node 8 -m examples.qat_resnet_imagenet --arch resnet50 --data-dir FOLDER

All kernels but the first are quantized, per channel; the head is not. The defaults are the
published recipe (arXiv 2503.15748, section 6.2): SGD, 90 epochs, the rate divided by ten every 30.
Runs without data are in examples/README.md.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from examples.recipe.flags import Recipe
from examples.recipe.resnet import STAGES, Residual, ResNet
from examples.recipe.training import main as run
from examples.recipe.transforms import IMAGENET
from parq_fn.foundation.command import command


def build(arch: str, classes: int, size: int) -> nn.Module:
    del size  # any will do
    return ResNet(int(arch.removeprefix("resnet")), classes)


RECIPE = Recipe(
    program="qat_resnet_imagenet",
    about=__doc__ or "",
    build=build,
    archs=tuple(f"resnet{depth}" for depth in STAGES),
    blocks=Residual,
    full_precision=("conv1", "fc"),
    undecayed=(),
    data="imagenet",
    image_size=224,
    normal=IMAGENET,
    optimizer="sgd",
    cuts=(30 / 90, 60 / 90),
    full_precision_cuts=(30 / 90, 60 / 90),
    annealed=1.0,
    smoothing=0.0,
    repeats=1,
    defaults={
        "arch": "resnet50",
        "epochs": 90,
        "batch_size": 256,
        "lr": 0.1,
        "weight_decay": 1e-4,
        "workers": 8,
        "quant_per_channel": True,
        "quant_warmup_steps": 2500,
        "quant_period": 50,
        "anneal_steepness": 75.0,
    },
)


main = partial(run, RECIPE)

if __name__ == "__main__":
    command(main)
