"""tanh from sums, products and one quotient.

Libraries of vector functions round tanh differently, so that a compiled program and the eager one
would give different weights. IEEE arithmetic gives the same bits everywhere, and costs less.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    x = x.clamp(-9.2, 9.2)
    s = x * x
    p = (s * 1.300231350375687e-08 + 2.0353496655854884e-05) * s + 0.0034800058969691717
    p = (p * s + 0.13367890253210457) * s + 0.9999999747230116
    q = (s * 7.631952527775498e-07 + 0.0003260186255164975) * s + 0.025817653289098224
    q = (q * s + 0.4670120206652163) * s + 1.0
    return x * p / q
