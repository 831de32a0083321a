"""Quantization-aware training from nothing, on scikit-learn's 8x8 scans of handwritten digits.

    python -m examples.qat_simple
    python -m examples.qat_simple --quant-bits 2 --quant-method uniform --quant-proxmap hard

This page is all of the training: the quantizing transformation, the loop of pure functions, and
the test. `digits.py` has the images and the network; `qat_simple_report.py` the flags, the table
and the figure that the command prints and draws.

Every conv kernel, the first one too, and the head are quantized. Training moves the latent weights
by SGD; the network computes with weights that a prox map makes of them, which is the identity
before `anneal_start` and puts every weight on one of a few levels from `anneal_end` on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import parq_fn as pq
from examples.digits import Data, ResNet, batches, load_data
from examples.options import PROXES, quantizer_of
from parq_fn import export

Params = dict[str, Tensor]  # by name


@dataclass(frozen=True)
class Settings:
    """What can be chosen of a training; the flags of the report explain each."""

    bits: int | None  # None is full precision, 0 ternary
    anneal_start: float  # epoch
    anneal_end: float  # epoch
    method: str = "lsbq"
    lsbq_optimal: bool = False
    proxmap: str = "parq"
    steepness: float = 10.0  # of parq's annealing
    center: float = 0.5
    per_channel: bool = False
    block_size: int | None = None
    period: int = 10  # steps from one fit of the levels to the next
    warmup: int = 0  # steps before the first fit
    shrink: bool = False
    epochs: int = 50
    batch_size: int = 64
    lr: float = 0.05
    weight_decay: float = 5e-4
    seed: int = 0


def granularities(s: Settings) -> dict[str, pq.Granularity]:
    """Which weights share levels; blocks are cut from matrices alone."""
    rule = pq.per_channel() if s.per_channel else pq.per_tensor()
    if s.block_size is None:
        return {"kernel": rule, "matrix": rule}
    return {"kernel": pq.per_channel(), "matrix": pq.per_block(s.block_size)}


def transformation(s: Settings, net: nn.Module, steps_per_epoch: int) -> pq.Transformation:
    """SGD, and behind it, on kernels and matrices, what makes quantized weights of latent ones."""
    rate = pq.schedules.cosine(s.lr, 0.0, 0, s.epochs * steps_per_epoch)
    sgd = pq.sgd(rate, momentum=0.9, nesterov=True, weight_decay=s.weight_decay)
    if s.bits is None:
        return pq.chain(sgd)
    options: dict[str, Any] = {"period": s.period, "warmup": s.warmup, "shrink": s.shrink}
    if s.proxmap != "hard":
        options["anneal_start"] = s.anneal_start * steps_per_epoch
        options["anneal_end"] = s.anneal_end * steps_per_epoch
    if s.proxmap == "parq":
        options |= {"steepness": s.steepness, "center": s.center}
    prox, quantizer = PROXES[s.proxmap], quantizer_of(s.method, s.bits, s.lsbq_optimal)
    links = {
        label: prox(quantizer, granularity=rule, learning_rate=rate, **options)
        for label, rule in granularities(s).items()
    }
    by_kind = pq.partition(links, lambda name, p: "matrix" if p.dim() == 2 else "kernel")
    return pq.chain(sgd, pq.masked(by_kind, pq.weight_mask(net)))


class Functional:
    """Training by pure functions: the latent weights and the state are all there is."""

    def __init__(self, net: nn.Module, transform: pq.Transformation) -> None:
        apply, self.latent = pq.functional(net)
        self.transform, self.state = transform, transform.init(self.latent)

        def loss(weights: Params, images: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(apply(weights, images), labels)

        self.loss_and_grads = pq.value_and_grad(loss, transform)  # at the weights

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        value, grads = self.loss_and_grads(self.latent, self.state, images, labels)
        updates, self.state = self.transform.update(grads, self.state, self.latent)
        self.latent = pq.apply_updates(self.latent, updates)
        return value

    def params(self) -> tuple[Params, Params]:
        """(latent weights, weights of the network)."""
        return self.latent, self.transform.weights(self.state, self.latent)

    def packed(self, snap: bool = False) -> dict[str, Any]:
        """Codes and levels of what is quantized, for `export.save`."""
        return export.pack(self.latent, self.transform, self.state, snap=snap)


def train(
    s: Settings, engine: Callable[..., Any] = Functional, watch: Callable[..., Any] | None = None
) -> tuple[Any, float]:
    """(the engine after all epochs, test accuracy in percent). `watch(epoch, loss, engine)` is
    called after each epoch."""
    generator = torch.Generator().manual_seed(s.seed)  # start and batches are the seed's alone
    data, test = load_data(s.seed)
    net = ResNet(generator)
    trained = engine(net, transformation(s, net, len(data.labels) // s.batch_size))
    for epoch in range(1, s.epochs + 1):
        for images, labels in batches(data, s.batch_size, generator):
            loss = trained.step(images, labels)
        if watch is not None:
            watch(epoch, loss.item(), trained)
    return trained, accuracy(net, trained.params()[1], test)


def accuracy(net: nn.Module, weights: Params, test: Data) -> float:
    """Of the network with those weights, in percent."""
    with torch.no_grad():
        scores = torch.func.functional_call(net, weights, (test.images,))
    right = scores.argmax(1) == test.labels
    return 100 * right.sum().item() / len(right)


if __name__ == "__main__":
    from examples.qat_simple_report import main
    from parq_fn.foundation.command import command

    command(main)
