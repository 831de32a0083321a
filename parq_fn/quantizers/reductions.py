"""What quantizers ask of whole rows: sums, largest magnitudes, their order.

A row may be a weight of millions, and tensors of its size cost more to allocate than their
elements to compute. So elementwise functions are given, and applied to a piece of the rows at a
time that stays in the cache, all results in the memory of the first; a compiler, which does as
much by itself, gets all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from parq_fn.foundation.scalar import is_plain

#: f(x, *of_row, out=None): of elements and of tensors [r, 1], the same for all elements of a row;
#: the result lies in `out` where it is given, as that of torch.abs, else in memory of its own.
Elementwise = Callable[..., Tensor]

_PIECE = 1 << 18  # elements of a piece
_PIECE_THERE = 1 << 24  # on a device that has no such cache, but not memory without end
_RUN = 1024  # elements that are summed in the dtype of the rows, before sums go on in float64
_SCANNED = 64  # elements whose running sums are taken at once


def pieces(x: Tensor, dim: int, least: int = 1) -> tuple[Tensor, ...]:
    """x cut along a dimension into pieces of some _PIECE elements, or of `least` along it; whole
    under a compiler."""
    size = _PIECE if x.device.type == "cpu" else _PIECE_THERE
    if torch.compiler.is_compiling() or x.numel() <= size:
        return (x,)
    return torch.split(x, max(least, size * x.shape[dim] // x.numel()), dim)


def of_pieces(x: Tensor, dim: int, f: Elementwise, *of_row: Tensor) -> Iterator[Tensor]:
    """f of each piece. A result is good until the next is made, which may take its memory."""
    first, *rest = pieces(x, dim)
    made = f(first, *of_row)
    yield made
    own = bool(rest) and all(map(is_plain, (x, *of_row)))
    for piece in rest:
        room = made.narrow(dim, 0, piece.shape[dim]) if own else None
        yield f(piece, *of_row, out=room)


def _own_order(x: Tensor) -> bool:
    """Whether torch's sums over x are to be taken: those of a GPU part a row by how many rows there
    are, and then a row's levels would depend on what it is fitted with. A compiler has its own, and
    for a tracer whose sizes are symbols there are no halves."""
    traced = torch.compiler.is_compiling() or isinstance(x.shape[-1], torch.SymInt)
    return x.device.type == "cpu" or traced


def summed(x: Tensor) -> Tensor:
    """[..., n] -> [...]: the sum of each row, in an order that depends on n alone."""
    if _own_order(x):
        return x.sum(-1)
    n = x.shape[-1]
    size = 1 << (n - 1).bit_length() if n else 1
    if size > n:
        x = torch.nn.functional.pad(x, (0, size - n))
    while size > 1:
        size >>= 1
        x = x[..., :size] + x[..., size:]
    return x.squeeze(-1)


def running_sums(x: Tensor) -> Tensor:
    """[..., n] -> [..., n]: the sum of each row up to each element, in an order that depends on
    n alone."""
    if _own_order(x):
        return x.cumsum(-1)
    n = x.shape[-1]
    if n > _SCANNED:
        runs = torch.nn.functional.pad(x, (0, -n % _SCANNED))
        within = running_sums(runs.reshape(*x.shape[:-1], -1, _SCANNED))
        before = torch.nn.functional.pad(running_sums(within[..., -1])[..., :-1], (1, 0))
        return (within + before.unsqueeze(-1)).flatten(-2)[..., :n].contiguous()  # as cumsum's
    step = 1
    while step < n:  # each is the sum of the last `step` up to it
        x = torch.cat([x[..., :step], x[..., step:] + x[..., :-step]], -1)
        step *= 2
    return x


def run_sums(x: Tensor, run: int, f: Elementwise, *of_row: Tensor) -> Tensor:
    """[r, n // run] float64: the sums of f(x, ...) over runs of a row, what is left over aside."""
    count = x.shape[1] // run
    runs = x[:, : count * run].reshape(x.shape[0], count, run)
    own = [t.unsqueeze(-1) for t in of_row]
    return torch.cat([summed(y).double() for y in of_pieces(runs, 1, f, *own)], 1)


def total(x: Tensor, f: Elementwise, *of_row: Tensor) -> Tensor:
    """[r, 1] float64: the sum of f(x, ...) over each row, in an order that depends on n alone."""
    n = x.shape[1]
    parts = [summed(run_sums(x, _RUN, f, *of_row))] if n >= _RUN else []
    if n % _RUN or not parts:
        parts.append(summed(f(x[:, n // _RUN * _RUN :], *of_row)).double())
    return sum(parts[1:], parts[0]).unsqueeze(-1)


def itself(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x, for which no memory is needed."""
    del out
    return x


def mean(x: Tensor, f: Elementwise, *of_row: Tensor) -> Tensor:
    """[r, 1]: the mean of f(x, ...) over each row."""
    return (total(x, f, *of_row) / x.shape[1]).to(x.dtype)


def largest(x: Tensor) -> Tensor:
    """[r, 1]: max |x| of each row; NaN where the row holds one."""
    if is_plain(x) and x.shape[1]:  # two ways through memory that is read alone
        low, high = x.aminmax() if len(x) == 1 else (x.amin(-1), x.amax(-1))
        return torch.maximum(high, -low).abs().view(-1, 1)  # of -0.0 too
    tops = [y.amax(-1, keepdim=True) for y in of_pieces(x, 1, torch.abs)]
    return tops[0] if len(tops) == 1 else torch.cat(tops, 1).amax(-1, keepdim=True)


def mean_and_largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean |x|, max |x|) of each row, [r, 1] each, where it can be of one way through memory."""
    if not is_plain(x):  # whose derivative goes to equal weights in equal parts
        return mean(x, torch.abs), largest(x)
    tops: list[Tensor] = []

    def seen(x: Tensor, out: Tensor | None = None) -> Tensor:
        y = torch.abs(x, out=out)
        if y.shape[1:].numel():
            tops.append(y.flatten(1).amax(-1, keepdim=True))
        return y

    found = mean(x, seen)
    return found, tops[0] if len(tops) == 1 else torch.cat(tops, 1).amax(-1, keepdim=True)


def in_order(x: Tensor) -> Tensor:
    """Each row sorted."""
    if is_plain(x) and x.dtype in (torch.float32, torch.float64):
        # many times faster than torch's: numpy sorts whole vectors of the processor's
        return torch.from_numpy(np.sort(x.numpy(), axis=-1))
    return x.sort(-1).values


NETWORK = 8  # columns up to which comparisons are known before, and so of whole columns


def sorted_columns(x: Tensor) -> Tensor:
    """Each row [r, m] sorted, of few columns by minima and maxima of two of them: cheap in a
    compiler's loop, and where rows are short. A NaN may come to stand in several places."""
    if x.shape[-1] > NETWORK:
        return in_order(x)
    return beside(in_turn(list(torch.split(x, 1, -1))))


def in_turn(columns: list[Tensor]) -> list[Tensor]:
    """Columns [r, 1], sorted."""
    columns = [*columns]
    for i, j in exchanges(len(columns)):
        one, other = columns[i], columns[j]
        if torch.compiler.is_compiling():  # one comparison, where minima also look for NaN
            right = one <= other
            low, high = torch.where(right, one, other), torch.where(right, other, one)
        else:
            low, high = torch.minimum(one, other), torch.maximum(one, other)
        columns[i], columns[j] = low, high
    return columns


def beside(columns: list[Tensor]) -> Tensor:
    """Columns [r, 1] as one table [r, m]: chosen by place under a compiler, which makes all of it
    in one loop then, and of what is concatenated a column at a time in loops of their own."""
    if not torch.compiler.is_compiling():
        return torch.cat(columns, -1)
    first, *others = columns
    place = torch.arange(len(columns), device=first.device)
    for i, column in enumerate(others, 1):
        first = torch.where(place < i, first, column)
    return first


def exchanges(m: int) -> Iterator[tuple[int, int]]:
    """Pairs i < j of m places; whatever stands there is sorted once each pair in turn is.

    Source: Batcher's odd-even merge sort, for any m, as Knuth's algorithm 5.2.2M has it.
    """
    top = 1 << max(m - 1, 0).bit_length() >> 1
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            for i in range(m - d):
                if i & p == r:
                    yield i, i + d
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
