"""The prox pass of a step: latents in, weights out, of many parameters at once.

It reads and writes memory and computes little, so that its cost is how often it goes through
memory and how many operations it starts. `plain` is what it does, a parameter at a time with
tensors of the parameter's size in between. `Pass` gives the same, bit for bit but for the sign of a
zero:

- a large parameter a piece at a time, so that what lies in between stays in the cache, or with
  `compile` in one loop that reads the latent and writes the weight (`programs`);
- small parameters together, copied into the rows of one buffer that is mapped whole; `refit`
  fits their qparams together too, and on a GPU those of larger ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.foundation.scalar import concrete, is_plain
from parq_fn.foundation.torch_private import copy_each, in_dispatch_mode
from parq_fn.optim.engine.chunks import chunks
from parq_fn.optim.engine.programs import Programs
from parq_fn.optim.engine.rows import (
    AT_ONCE,
    Maps,
    Rows,
    Spare,
    in_columns,
    of_a_kind,
    of_other_rows,
    some_rows,
    with_even,
)
from parq_fn.quantizers.granularity import Granularity, per_channel
from parq_fn.transforms.layout import across, local_row_shape, to_rows
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.prox_state import ProxState, in_rows
from parq_fn.transforms.sharded import local

_PIECE = 1 << 18  # elements that are mapped at a time
_WIDTH = 1 << 10  # of the rows that a long row is cut into
_FEW_LEVELS = 8  # times as many weights as levels in a row: levels are made for all at once
_WIDE = 1 << 10  # of a row from which on only rows of one length are mapped with others


class Together(NamedTuple):
    """Which parameters are fitted or mapped with others."""

    small: int  # the most elements of one
    at_once: int  # of all that are


_ON_CPU = Together(1 << 12, 1 << 16)
# where an operation takes longer to start than to go through such a parameter
_FITTED_THERE, _MAPPED_THERE = Together(1 << 22, 1 << 24), Together(1 << 20, 1 << 22)


class Job(NamedTuple):
    """A parameter, or what a rank holds of it."""

    latent: Tensor
    qparams: Tensor  # [r, m], of its rows
    granularity: Granularity
    weight: Tensor  # of the latent's shape; written to


def plain(link: Prox, state: ProxState, jobs: Sequence[Job]) -> None:
    """weight <- link.weights(state, latent), for each of the jobs."""
    for latent, qparams, granularity, weight in jobs:
        own = dataclasses.replace(link, granularity=granularity)
        shape = *granularity.row_shape(latent), qparams.shape[-1]
        of_rows = state._replace(qparams=[qparams.reshape(shape)])
        weight.copy_(own.weights(of_rows, [latent], dtype=weight.dtype)[0])


def refit(
    link: Prox,
    state: ProxState,
    latents: Sequence[Tensor],
    qparams: Sequence[Tensor],
    learns: Tensor | None = None,
    names: Sequence[str] = (),
) -> list[Tensor]:
    """link.refit of each latent, bit for bit: of small ones with rows of one length together, but
    for quantizers to which all rows of a tensor are one whole.

    names: of the parameters, by default their places.
    """
    names = names or [str(i) for i in range(len(latents))]
    found: dict[int, Tensor] = {}
    large: list[int] = []
    alone = bool(getattr(link.quantizer, "num_whole", 0))
    small: dict[Any, dict[int, Tensor]] = {}
    for i, (latent, old) in enumerate(zip(latents, qparams, strict=True)):
        mine = local(latent)
        most = (_ON_CPU if _on_cpu(mine) else _FITTED_THERE).small
        if not alone and 0 < mine.numel() <= most and not across(latent, link.granularity):
            rows = link.granularity.rows(mine)
            kind = rows.shape[1], rows.dtype, old.shape[-1], old.dtype, old.device
            small.setdefault(kind, {})[i] = rows
        else:
            large.append(i)
    own = state._replace(qparams={names[i]: qparams[i] for i in large})
    fitted = link.refit(own, {names[i]: latents[i] for i in large}, learns).qparams
    found.update((i, fitted[names[i]]) for i in large)
    of_rows = dataclasses.replace(link, granularity=per_channel())
    for together in small.values():
        sizes = {i: rows.numel() for i, rows in together.items()}
        where = _ON_CPU if _on_cpu(next(iter(together.values()))) else _FITTED_THERE
        for chunk in chunks(sizes, where.at_once):
            known = [in_rows(local(qparams[i])) for i in chunk]
            own = state._replace(qparams=[torch.cat(known)])
            whole = torch.cat([together[i] for i in chunk])
            parts = [(names[i], len(together[i])) for i in chunk]
            new = of_rows.refit(own, [whole], learns, parts=parts).qparams[0]
            for i, part in zip(chunk, torch.split(new, [n for _, n in parts]), strict=True):
                shape = local_row_shape(latents[i], link.granularity)
                own_part = part.reshape(*shape, part.shape[-1]).clone()
                found[i] = to_rows(own_part, latents[i], link.granularity)
    return [found[i] for i in range(len(latents))]


class Pass:
    """`plain`, faster. What it keeps from call to call are compiled programs.

    compile: with torch.compile, but where a dispatch mode is active.
    """

    def __init__(self, *, compile: bool = False):
        self.compile = compile
        self._programs = Programs()

    def __call__(self, link: Prox, state: ProxState, jobs: Sequence[Job]) -> None:
        """weight <- link.weights(state, latent), for each of the jobs."""
        jobs = [job for job in jobs if job.weight.numel()]
        active = concrete(link.active(state))
        if active is None:  # a count on a device, which is not waited for
            plain(link, state, jobs)
        elif not active:
            for job in jobs:
                job.weight.copy_(job.latent)
        else:
            self._map(Maps(link, state), jobs)

    def _map(self, maps: Maps, jobs: Sequence[Job]) -> None:
        # a mode that counts operations, as CommDebugMode does, keeps programs from being compiled
        compiled = self.compile and not in_dispatch_mode()
        all_rows = [_rows_of(job, contiguous=compiled) for job in jobs]
        wholes: list[Rows] = []
        small: dict[Any, list[Rows]] = {}
        for rows in all_rows:
            if rows.latent.numel() <= _mapped(rows).small and maps.link.elementwise:
                n = rows.latent.shape[1]
                width = n if n >= _WIDE else 1 << (n - 1).bit_length()
                small.setdefault((width, *rows.kind), []).append(rows)
            else:
                wholes.append(rows)
        self._run(maps, wholes, compiled)
        for (width, *_), alike in small.items():
            sizes = {i: rows.latent.shape[0] * width for i, rows in enumerate(alike)}
            for chunk in chunks(sizes, _mapped(alike[0]).at_once):
                self._run_together(maps, [alike[i] for i in chunk], width, compiled)
        for rows, (*_, granularity, weight) in zip(all_rows, jobs, strict=True):
            if rows.weight.data_ptr() != weight.data_ptr():
                weight.copy_(granularity.restore(rows.weight, weight))

    def _run_together(self, maps: Maps, alike: list[Rows], width: int, compiled: bool) -> None:
        """Rows of that many elements or less as the rows of one buffer."""
        if len(alike) == 1:
            self._run(maps, alike, compiled)
            return
        shapes = [rows.latent.shape for rows in alike]
        size = sum(r for r, _ in shapes), width
        latent = alike[0].latent.new_zeros(size)
        weight = alike[0].weight.new_empty(size)
        copy_each(_cut(latent, shapes), [rows.latent for rows in alike])
        whole = Rows(latent, torch.cat([rows.table for rows in alike]), weight)
        self._run(maps, [whole], compiled)
        copy_each([rows.weight for rows in alike], _cut(weight, shapes))

    def _run(self, maps: Maps, wholes: list[Rows], compiled: bool) -> None:
        if compiled:
            self._programs(maps, wholes)
            return
        wholes = with_even(maps, wholes)
        spare = _spare([whole for whole in wholes if whole.even is not None])
        few = [whole for whole in wholes if _has_few_levels(maps, whole)]
        for places in of_a_kind(few):
            for chunk in chunks({i: len(few[i].table) for i in places}, AT_ONCE):
                parts = [few[i] for i in chunk]
                _write(maps, maps.of(parts[0]).with_levels(parts), spare)
        _write(maps, [whole for whole in wholes if not _has_few_levels(maps, whole)], spare)


def _has_few_levels(maps: Maps, whole: Rows) -> bool:
    """Whether levels are made for all of its rows at once; else they are as many as weights, and
    made for each piece."""
    (r, n), k = whole.latent.shape, maps.link.quantizer.num_levels
    return whole.even is None and (r == 1 or n > _PIECE or n >= _FEW_LEVELS * k)


def _write(maps: Maps, wholes: Sequence[Rows], spare: Spare | None) -> None:
    for whole in wholes:
        how = maps.of(whole)
        for piece in _pieces(whole) if maps.link.elementwise else [whole]:
            how.write(piece, spare)


def _spare(wholes: Sequence[Rows]) -> Spare | None:
    """Memory for the largest piece of rows with even levels, of the first one's dtype; None where
    there are none, others look on, or the device has no cache to keep it in."""
    if not wholes or not is_plain(first := wholes[0].weight.detach()):
        return None
    return Spare(first, min(_PIECE, max(whole.latent.numel() for whole in wholes)))


def _mapped(rows: Rows) -> Together:
    return _ON_CPU if _on_cpu(rows.latent) else _MAPPED_THERE


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _rows_of(job: Job, *, contiguous: bool) -> Rows:
    """A job's rows, which share the memory of its weight, or are to be copied back to it.

    contiguous: where other rows are copied, for a compiler makes a program for each order of memory
    and stops at eight.
    """
    latent, weight = job.granularity.rows(job.latent), job.granularity.rows(job.weight)
    copied = weight.data_ptr() != job.weight.data_ptr()
    if copied or (contiguous and not weight.is_contiguous()):
        weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if contiguous:
        return Rows(latent.contiguous(), job.qparams.contiguous(), weight)
    return Rows(latent, job.qparams, weight)


def _cut(buffer: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The rows of a buffer, as parts of these shapes."""
    parts = torch.split(buffer, [r for r, _ in shapes])
    width = buffer.shape[1]
    each = zip(parts, shapes, strict=True)
    return [part if n == width else part[:, :n] for part, (_, n) in each]


def _pieces(whole: Rows) -> Iterator[Rows]:
    """Pieces of rows that fit into a processor's cache."""
    latent, weight = whole.latent, whole.weight
    r, n = latent.shape
    if not _on_cpu(latent) or r * n <= _WIDTH:
        yield whole
    elif r == 1 or n > _PIECE:
        assert whole.levels is not None or whole.even is not None  # else made for every piece
        end = n // _WIDTH * _WIDTH
        for i in range(r):
            row = some_rows(whole, slice(i, i + 1))
            tall = (x[i, :end].view(-1, _WIDTH) for x in (latent, weight))
            for pair in zip(*(torch.split(x, _PIECE // _WIDTH) for x in tall), strict=True):
                yield of_other_rows(row, *pair)
            if end < n:
                yield in_columns(row, slice(end, n))
    else:
        step = max(1, _PIECE // n)
        for a in range(0, r, step):
            yield some_rows(whole, slice(a, a + step))
