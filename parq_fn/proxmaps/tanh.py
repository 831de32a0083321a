"""tanh from sums, products and one quotient.

Libraries of vector functions round tanh differently, so that a compiled program and the eager one
would give different weights. IEEE arithmetic gives the same bits everywhere, and costs less.
"""

from __future__ import annotations

import torch
from torch import Tensor

from parq_fn.foundation.scalar import is_plain


def tanh(x: Tensor) -> Tensor:
    """tanh(x), odd bit for bit; in float32 within 4e-7 of itself, in other dtypes torch's own.

    NaN gives NaN.

    >>> tanh(torch.tensor([-0.5, 0.0, 0.5]))
    tensor([-0.4621,  0.0000,  0.4621])
    """
    if x.dtype != torch.float32:
        return x.tanh()
    # x P(x^2) / Q(x^2), the rational function of these degrees with the least largest relative
    # error on (0, 9.2], by Lawson's reweighted least squares: 2.6e-8. Beyond, tanh rounds to 1.
    # Numbers in the code are constants to a compiler; those of a tuple are read for every weight.
    x, plain = x.clamp(-9.2, 9.2), is_plain(x)
    s = x * x
    p = (s * 1.300231350375687e-08).add_(2.0353496655854884e-05)
    p = _next(p, s, 0.0034800058969691717, plain)
    p = _next(p, s, 0.13367890253210457, plain)
    p = _next(p, s, 0.9999999747230116, plain)
    x = x.mul_(p) if plain else x * p
    del p
    q = (s * 7.631952527775498e-07).add_(0.0003260186255164975)
    q = _next(q, s, 0.025817653289098224, plain)
    q = _next(q, s, 0.4670120206652163, plain)
    q = _next(q, s, 1.0, plain)
    return x.div_(q) if plain else x / q


def _next(p: Tensor, s: Tensor, coefficient: float, plain: bool) -> Tensor:
    """p s + coefficient; of plain tensors in the memory of p, for what a map holds is counted."""
    return p.mul_(s).add_(coefficient) if plain else p * s + coefficient
