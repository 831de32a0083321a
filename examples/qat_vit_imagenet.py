"""DeiT, a vision transformer, with quantized weights on ImageNet.

    torchrun --nproc-per-node 8 -m examples.qat_vit_imagenet --data-dir FOLDER

The matrices of the blocks are quantized, per channel; embeddings, norms and the head are not. The
defaults are the published recipe (arXiv 2503.15748, section 6.3): AdamW, 300 epochs, a cosine
after 5 epochs of warmup, the last 20 epochs at the rate 1e-8, RandAugment, mixup and cutmix,
erasing, repeated augmentation, stochastic depth and smoothed labels. Runs without data are in
examples/README.md.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from examples.recipe.deit import SIZES, Block, DeiT
from examples.recipe.flags import Recipe
from examples.recipe.training import main as run
from examples.recipe.transforms import IMAGENET
from parq_fn.foundation.command import command


def build(arch: str, classes: int, size: int) -> nn.Module:
    return DeiT(arch, classes, size)


RECIPE = Recipe(
    program="qat_vit_imagenet",
    about=__doc__ or "",
    build=build,
    archs=tuple(SIZES),
    blocks=Block,
    full_precision=("patch_embed", "head"),
    undecayed=("cls_token", "pos_embed"),
    data="imagenet",
    image_size=224,
    normal=IMAGENET,
    optimizer="adamw",
    cuts=(),
    full_precision_cuts=(),
    annealed=1.0,
    smoothing=0.1,
    repeats=3,
    defaults={
        "epochs": 300,
        "batch_size": 1024,
        "lr": 2e-3,
        "lr_min": 1e-8,
        "warmup_epochs": 5,
        "const_lr_epochs": 20,
        "weight_decay": 0.05,
        "workers": 8,
        "custom_train_transform": True,
        "cutmix_mixup": True,
        "quant_per_channel": True,
        "quant_warmup_steps": 600,
        "quant_period": 50,
        "anneal_steepness": 50.0,
    },
)


main = partial(run, RECIPE)

if __name__ == "__main__":
    command(main)
