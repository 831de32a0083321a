"""Numbers of few bits, from what their patterns stand for: fractions, one number at a time."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction


def minifloats(exponent_bits: int, mantissa_bits: int) -> list[float]:
    """Those not negative that every pattern of bits stands for, by IEEE 754's rule without
    infinities and NaN."""
    bias = 2 ** (exponent_bits - 1) - 1
    found = []
    for e, m in itertools.product(range(2**exponent_bits), range(2**mantissa_bits)):
        fraction = m / 2**mantissa_bits
        found.append(2.0 ** (e - bias) * (1 + fraction) if e else 2.0 ** (1 - bias) * fraction)
    return found


def nearest_number(x: float, mantissa: int, least: int, largest: float) -> float:
    """Of all numbers m 2^e with that many bits, e from `least` on: the nearest, then the even."""
    if x == 0:
        return 0.0
    size = Fraction(abs(x))
    e = max(least, math.frexp(abs(x))[1] - 1) - mantissa
    gap = Fraction(2) ** e
    low = size // gap  # of gaps, a whole number
    rest = size - low * gap
    up = rest > gap / 2 or (rest == gap / 2 and low % 2 == 1)
    return math.copysign(min(float((low + up) * gap), largest), x)


def e8m0(x: float) -> float:
    """The power of two at or below x, of exponent -127 to 127; 0 for 0."""
    return 2.0 ** min(max(math.frexp(x)[1] - 1, -127), 127) if x else 0.0


#: Outermost levels of QuEST for rows of rms 1, by bits; 0 is ternary.
GAUSSIAN = {
    0: 1.2240089519030855,
    1: 0.7978845587140913,
    2: 1.4935346200015913,
    3: 2.051068354131873,
    4: 2.513930578568423,
    5: 2.9160938834961225,
    6: 3.276597282593217,
    7: 3.6010497188221655,
    8: 3.884938678807525,
}
