"""Codes: small whole numbers, bit-packed into bytes.

b bits a code are one stream of bits, the first code in the lowest: 8 / b codes to the byte for
b = 1, 2, 4 and 8, 8 codes to b bytes for the others. Three levels take trits, 5 to the byte,
the first counting least: 3^5 = 243 <= 256.
"""

from __future__ import annotations

import torch
from torch import Tensor

TRITS = 5
#: [256, 5]: the trits of every byte.
_TRITS_OF = torch.tensor(
    [[byte // 3**i % 3 for i in range(TRITS)] for byte in range(256)], dtype=torch.uint8
)


def width(levels: int) -> int:
    """Bits of a code for so many levels; 0 for 3, which take trits, and for 1, which take none.

    >>> [width(levels) for levels in (1, 2, 3, 4, 7, 256)]
    [0, 1, 0, 2, 3, 8]
    """
    return 0 if levels == 3 else (levels - 1).bit_length()


def num_bytes(count: int, levels: int) -> int:
    """Bytes that so many codes take.

    >>> num_bytes(10, 3), num_bytes(10, 4), num_bytes(10, 8), num_bytes(10, 1)
    (2, 3, 4, 0)
    """
    if levels == 3:
        return -(-count // TRITS)
    return -(-count * width(levels) // 8)


def fill_bytes(count: int, levels: int) -> bool:
    """Whether so many codes fill their bytes, so that those of rows lie in bytes of their own.

    >>> fill_bytes(10, 3), fill_bytes(8, 3), fill_bytes(4, 4)
    (True, False, True)
    """
    return count % TRITS == 0 if levels == 3 else count * width(levels) % 8 == 0


def encode(codes: Tensor, levels: int) -> Tensor:
    """Codes [n] in 0 .. levels - 1, whole, as bytes [num_bytes(n, levels)], uint8.

    >>> encode(torch.tensor([1, 0, 3, 2, 1]), 4)
    tensor([177,   1], dtype=torch.uint8)
    """
    count = len(codes)
    if levels == 3:
        rows = _filled(codes, TRITS)
        return (rows * _powers(3, codes)).sum(-1).to(torch.uint8)
    bits = width(levels)
    if not bits:
        return codes.new_zeros(0, dtype=torch.uint8)
    rows = _filled(codes, 8)
    flat = (rows.unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1
    packed = flat.reshape(-1, 8) * _powers(2, codes, 8)
    return packed.sum(-1).to(torch.uint8)[: num_bytes(count, levels)]


def decode(packed: Tensor, count: int, levels: int) -> Tensor:
    """The codes [..., count], uint8, of bytes [..., num_bytes(count, levels)] that `encode` made.

    >>> decode(torch.tensor([177, 1], dtype=torch.uint8), 5, 4)
    tensor([1, 0, 3, 2, 1], dtype=torch.uint8)
    """
    bits, data = width(levels), packed.unsqueeze(-1)
    whole, device = packed.shape[:-1], packed.device
    if not bits and levels != 3:
        return packed.new_zeros((*whole, count))
    if levels == 3:
        codes = _TRITS_OF.to(device)[packed.to(torch.int64)]
    elif 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
        codes = (data >> shifts) & (2**bits - 1)
    else:
        shifts = torch.arange(8, dtype=torch.uint8, device=device)
        flat = ((data >> shifts) & 1).flatten(-2)[..., : count * bits]
        return (flat.reshape(*whole, count, bits) << shifts[:bits]).sum(-1, dtype=torch.uint8)
    return codes.flatten(-2)[..., :count]


def highest_code(packed: Tensor, count: int, levels: int) -> int:
    """The largest of the codes that bytes hold, -1 of none; what `encode` made is below `levels`.

    >>> highest_code(encode(torch.tensor([1, 0, 2]), 3), 3, 3)
    2
    """
    if not count:
        return -1
    bits = width(levels)
    if levels == 2**bits:
        return levels - 1  # whatever the bytes are
    if levels == 3:
        return 3 if bool((packed >= 3**TRITS).any()) else int(decode(packed, count, 3).max())
    return int(decode(packed, count, levels).max())


def _filled(codes: Tensor, size: int) -> Tensor:
    """The codes as rows of a size, zeros behind the last."""
    missing = -len(codes) % size
    return torch.nn.functional.pad(codes.to(torch.int64), (0, missing)).reshape(-1, size)


def _powers(base: int, like: Tensor, count: int = TRITS) -> Tensor:
    return base ** torch.arange(count, device=like.device)
