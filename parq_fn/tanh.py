"""tanh from sums, products and one quotient.

Libraries of vector functions round tanh differently, so that a compiled program and the eager one
would give different weights. IEEE arithmetic gives the same bits everywhere, and costs less.
"""

from __future__ import annotations

import torch
from torch import Tensor

# x P(x^2) / Q(x^2), the rational function of these degrees with the least largest relative error
# on (0, 9.2], by Lawson's reweighted least squares: 2.6e-8. Beyond, tanh rounds to 1.
_P = (
    0.9999999747230116,
    0.13367890253210457,
    0.0034800058969691717,
    2.0353496655854884e-05,
    1.300231350375687e-08,
)
_Q = (
    1.0,
    0.4670120206652163,
    0.025817653289098224,
    0.0003260186255164975,
    7.631952527775498e-07,
)
_END = 9.2


def tanh(x: Tensor) -> Tensor:
    """tanh(x), odd bit for bit; in float32 within 4e-7 of itself, in other dtypes torch's own.

    NaN gives NaN.

    >>> tanh(torch.tensor([-0.5, 0.0, 0.5]))
    tensor([-0.4621,  0.0000,  0.4621])
    """
    if x.dtype != torch.float32:
        return x.tanh()
    x = x.clamp(-_END, _END)
    square = x * x
    return x * _polynomial(square, _P) / _polynomial(square, _Q)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """sum_i coefficients[i] x^i, by Horner's rule."""
    last = coefficients[-1]
    total = x * last + coefficients[-2]
    for c in reversed(coefficients[:-2]):
        total = total * x + c
    return total
