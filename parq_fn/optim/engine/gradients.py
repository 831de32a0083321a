"""Gradients of qparams of many weights: `of_rows`, a piece at a time or compiled.

They are sums over the weights of a row. Like the prox pass they read memory and compute little, so
pieces that fit into a processor's cache are summed one after another, or with `compile` a loop
reads latents and gradients once. Sums of long rows are taken in parts, whose sums are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from parq_fn.foundation.torch_private import compiled, compiler_options, in_dispatch_mode
from parq_fn.proxmaps.even import Even
from parq_fn.quantizers import Quantizer
from parq_fn.transforms.qparams_gradient import (
    Kind,
    Tables,
    derivatives_of,
    of_rows,
    of_sums,
    sums,
    tables,
)

_PIECE = 1 << 18  # elements that are summed at a time
_COMPILED_PIECE = 1 << 24  # in a compiled loop, for which tables of all rows are made
_WIDTH = 1 << 10  # of the parts of a long row in a compiled loop
_SMALL = 1 << 14  # elements for which a program takes longer to call


class RowGradients:
    """`qparams_gradient.of_rows`, faster. What it keeps from call to call are compiled programs.

    compile: with torch.compile, but where a dispatch mode is active.
    """

    def __init__(self, *, compile: bool):
        self.compile = compile
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self,
        kind: Kind,
        proxmap: Any,
        quantizer: Quantizer,
        u: Tensor,
        grads: Tensor,
        qparams: Tensor,
        like: torch.dtype,
        s: Tensor,
    ) -> Tensor:
        """dL/dqparams [r, m] of rows u and grads [r, n], r and n above 0."""
        if kind == "map" and derivatives_of(proxmap) is None:  # rows are to be whole
            return of_rows(kind, proxmap, quantizer, u, grads, qparams, like, s)
        (r, n), cut = u.shape, self.compile and not in_dispatch_mode() and u.numel() > _SMALL
        step = max(1, (_COMPILED_PIECE if cut else _PIECE) // n)
        found = []
        for a in range(0, r, step):
            some = slice(a, a + step)
            of = tables(quantizer, qparams[some], like)
            add = self._compiled if cut else _in_pieces
            total = add(kind, proxmap, u[some], grads[some], of, s)
            found.append(of_sums(kind, proxmap, quantizer, qparams[some], of, total))
        return torch.cat(found)

    def _compiled(
        self, kind: Kind, proxmap: Any, u: Tensor, grads: Tensor, of: Tables, s: Tensor
    ) -> Tensor:
        (r, n), parts = u.shape, max(u.shape[1] // _WIDTH, 1)
        width = _WIDTH if n > _WIDTH else n
        end = parts * width
        own = of.of(lambda x: _of_parts(x, parts)) if parts > 1 else of
        pair = (x[:, :end].reshape(r * parts, width) for x in (u, grads))
        total = self._program(kind, proxmap, own)(*pair, own, s)
        total = total.view(r, parts, -1).sum(1)
        if end < n:
            total = total + _in_pieces(kind, proxmap, u[:, end:], grads[:, end:], of, s)
        return total

    def _program(self, kind: Kind, proxmap: Any, of: Tables) -> Callable[..., Tensor]:
        levels = of.levels
        even = (
            (levels.num_levels, levels.dtype, isinstance(levels.first, Tensor))
            if isinstance(levels, Even)
            else levels.shape[-1]
        )
        key = kind, id(proxmap), even, of.codes is None, of.scale is None
        if key not in self._programs:

            def run(u: Tensor, grads: Tensor, of: Tables, s: Tensor) -> Tensor:
                return sums(kind, proxmap, u, grads, of, s)

            options = compiler_options(u_device(of), two=False, narrow=False)
            self._programs[key] = compiled(run, options)
        return self._programs[key]


def u_device(of: Tables) -> str:
    """The type of the device that the tables are on."""
    table = of.levels.step if isinstance(of.levels, Even) else of.levels
    return table.device.type


def _of_parts(table: Any, parts: int) -> Any:
    """A table of the parts of rows."""
    if isinstance(table, Even):
        first = table.first
        return table._replace(
            step=_of_parts(table.step, parts),
            inverse=_of_parts(table.inverse, parts),
            first=_of_parts(first, parts) if isinstance(first, Tensor) else first,
        )
    return table.repeat_interleave(parts, 0)


def _in_pieces(kind: Kind, proxmap: Any, u: Tensor, grads: Tensor, of: Tables, s: Tensor) -> Tensor:
    total: Tensor | None = None
    for a, b in _columns(u.shape[1], _PIECE // len(u)):  # rows are fewer, see __call__
        part = sums(kind, proxmap, u[:, a:b], grads[:, a:b], of, s)
        total = part if total is None else total + part
    assert total is not None
    return total


def _columns(n: int, step: int) -> Iterator[tuple[int, int]]:
    for a in range(0, n, step):
        yield a, min(a + step, n)
