"""Residual networks with quantized weights on CIFAR-10.

    python -m examples.qat_resnet_cifar10 --quant-bits 2

Every kernel and the head are quantized. The defaults are the published recipe (arXiv 2503.15748,
section 6.1): SGD, 200 epochs, the rate divided by ten three times, annealing over 150 epochs. Runs
without data are in examples/README.md.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from examples.recipe.flags import Recipe
from examples.recipe.resnet_cifar import DEPTHS, Block, CifarResNet
from examples.recipe.training import main as run
from examples.recipe.transforms import CIFAR
from parq_fn.foundation.command import command


def build(arch: str, classes: int, size: int) -> nn.Module:
    del size  # any will do
    return CifarResNet(int(arch.removeprefix("resnet")), classes)


RECIPE = Recipe(
    program="qat_resnet_cifar10",
    about=__doc__ or "",
    build=build,
    archs=tuple(f"resnet{depth}" for depth in DEPTHS),
    blocks=Block,
    full_precision=(),
    undecayed=(),
    data="cifar10",
    image_size=32,
    normal=CIFAR,
    optimizer="sgd",
    cuts=(80 / 200, 120 / 200, 150 / 200),
    full_precision_cuts=(100 / 200, 150 / 200),
    annealed=150 / 200,
    smoothing=0.0,
    repeats=1,
    defaults={
        "epochs": 200,
        "batch_size": 128,
        "lr": 0.1,
        "weight_decay": 2e-4,
        "quant_warmup_steps": 200,
        "quant_period": 10,
        "anneal_steepness": 100.0,
    },
)


main = partial(run, RECIPE)

if __name__ == "__main__":
    command(main)
