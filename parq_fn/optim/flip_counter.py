"""How many weights have changed their level between two looks at an optimizer."""

from __future__ import annotations

import torch
from torch import Tensor

from parq_fn.optim.quantized import QuantOptimizer
from parq_fn.optim.quantized_parameters import Quantized, quantized_parameters
from parq_fn.optim.transformed import TransformOptimizer
from parq_fn.transforms.flips import codes
from parq_fn.transforms.layout import part_of
from parq_fn.transforms.sharded import gathered, local, placed


class FlipCounter:
    """Called, the share of quantized weights whose nearest level has another index than when it
    was called, or built, before:

        flips = #{i: k(u_i; q) != k(u_i at the last call; q then)} / #{i}

    k(u; q) is the index of the level of qparams q that the latent u is nearest to. It keeps one
    byte for each quantized weight. A parameter without fitted levels has no flips. Counts of a
    sharded parameter are summed over ranks, so every rank calls it.

    optimizer: a QuantOptimizer or a TransformOptimizer; else TypeError. ValueError where none of
        its weights are quantized.

    >>> import torch
    >>> from parq_fn import hard_prox, lsbq
    >>> from parq_fn.optim import FlipCounter, QuantOptimizer
    >>> p = torch.nn.Parameter(torch.tensor([1.0, -1.0, 3.0, -3.0]))
    >>> base = torch.optim.SGD([{"params": [p], "quant_bits": 1}], lr=1.0)
    >>> optimizer = QuantOptimizer(base, hard_prox(lsbq(1)))
    >>> p.grad = torch.tensor([0.0, 0.0, 0.0, 0.0])
    >>> optimizer.step()
    >>> flips = FlipCounter(optimizer)
    >>> p.grad = torch.tensor([2.0, 0.0, 0.0, 0.0])
    >>> optimizer.step()
    >>> flips(), flips()
    (0.25, 0.0)
    """

    def __init__(self, optimizer: QuantOptimizer | TransformOptimizer) -> None:
        self.optimizer = optimizer
        self._seen: dict[str, Tensor] = {}
        self._count()

    def __call__(self) -> float:
        """The share since it was called last."""
        return self._count()

    @torch.no_grad()
    def _count(self) -> float:
        flips = total = 0
        for one in quantized_parameters("FlipCounter", self.optimizer):
            total += one.parameter.numel()
            if int(one.state.count) <= one.link.warmup:
                continue
            now, before = _codes_of(one), self._seen.get(one.name)
            self._seen[one.name] = now
            if before is not None:
                flips += int(gathered(placed(now != before, one.parameter).sum()))
        if not total:
            raise ValueError("FlipCounter: the optimizer quantizes no weights")
        return flips / total


def _codes_of(one: Quantized) -> Tensor:
    """[of this rank's part of the parameter], uint8."""
    part = part_of(one.parameter, one.link.granularity)
    found = codes(one.link, one.state, one.qparams, one.latent, part)
    return part.granularity.restore(found.to(torch.uint8), local(one.latent))
