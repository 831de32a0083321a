"""How much of what an optimizer quantizes has reached its levels."""

from __future__ import annotations

from parq_fn.optim.quantized import QuantOptimizer
from parq_fn.optim.quantized_parameters import quantized_parameters
from parq_fn.optim.transformed import TransformOptimizer
from parq_fn.proxmaps.levels import nearest
from parq_fn.transforms.prox_state import in_rows
from parq_fn.transforms.sharded import gathered


def share_on_levels(optimizer: QuantOptimizer | TransformOptimizer) -> float:
    """#{w = a level of its row} / #{w}, over all quantized weights w, bit for bit.

    A sharded parameter is gathered, one at a time, so every rank calls it. NaN is on no level, nor
    is a weight whose levels are not fitted yet.
    Raises TypeError for another optimizer, ValueError where none of its weights are quantized.

    >>> import torch
    >>> from parq_fn import hard_prox, uniform
    >>> from parq_fn.optim import QuantOptimizer, share_on_levels
    >>> p = torch.nn.Parameter(torch.tensor([[0.5, -2.0, 3.0, 0.0]]))
    >>> base = torch.optim.SGD([{"params": [p], "quant_bits": 2}], lr=0.1)
    >>> optimizer = QuantOptimizer(base, hard_prox(uniform(2)))
    >>> p.grad = torch.zeros_like(p)
    >>> optimizer.step()
    >>> share_on_levels(optimizer)
    1.0
    >>> with torch.no_grad():
    ...     p[0, 0] += 0.125
    >>> share_on_levels(optimizer)
    0.75
    """
    on = total = 0
    for _, p, _, link, state, _ in quantized_parameters("share_on_levels", optimizer):
        total += p.numel()
        if int(state.count) <= link.warmup:
            continue
        levels = in_rows(gathered(optimizer.levels(p)))
        rows = link.granularity.rows(gathered(p.detach()))
        on += int((nearest(rows, levels) == rows).sum())
    if not total:
        raise ValueError("share_on_levels: the optimizer quantizes no weights")
    return on / total
