"""The prox pass of a step: latents in, weights out, of many parameters at once.

It reads and writes memory and computes little, so that its cost is how often it goes through
memory and how many operations it starts. `plain` is what it does, a parameter at a time with
tensors of the parameter's size in between. `Pass` gives the same, bit for bit but for the sign of a
zero:

- a large parameter a piece at a time, so that what lies in between stays in the cache, or with
  `compile` in one loop that reads the latent and writes the weight; on a CPU two parameters of one
  shape in one loop, or both halves of a very large one, for what is read from memory in two places
  is waited for less long, and on a GPU rows of a length and number that the compiler knows
  something of;
- small parameters together, copied into the rows of one buffer that is mapped whole; `refit`
  fits their levels together too.

A compiled program is made for a map, a number of levels and dtypes, and serves rows of any number
and length, but for very large parameters on a GPU, where it serves one length; steps, learning
rates and coefficients are tensors to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.formulas import Formula
from parq_fn.granularity import Granularity, per_channel
from parq_fn.levels import MANY, bounds, prepare
from parq_fn.optim.state import chunks
from parq_fn.prox import Prox, ProxState, shrunk
from parq_fn.scalar import concrete, to_device
from parq_fn.sharded import gathered

_PIECE = 1 << 17  # elements that are mapped at a time
_WIDTH = 1 << 10  # of the rows that a long row is cut into
_LONG = 1 << 10  # of a row from which on its bounds are computed once, not for every weight
_LARGE = 1 << 20  # of a latent from which on a program is told more of its shape
_GROUP = 1 << 12  # of whose multiples a loop on a GPU needs no mask
_SMALL = 1 << 12  # elements of a parameter that is mapped with others
_TOGETHER = 1 << 16  # elements of those mapped at once


class Job(NamedTuple):
    """A parameter, or what a rank holds of it."""

    latent: Tensor
    levels: Tensor  # [r, k], of its rows
    granularity: Granularity
    weight: Tensor  # of the latent's shape; written to


def plain(link: Prox, state: ProxState, jobs: Sequence[Job]) -> None:
    """weight <- link.weights(state, latent), for each of the jobs."""
    for latent, levels, granularity, weight in jobs:
        own = dataclasses.replace(link, granularity=granularity)
        weight.copy_(own.weights(state._replace(levels=[levels]), [latent])[0])


def refit(
    link: Prox, state: ProxState, latents: Sequence[Tensor], levels: Sequence[Tensor]
) -> list[Tensor]:
    """link.refit of each latent, bit for bit: of small ones with rows of one length together."""
    found: dict[int, Tensor] = {}
    small: dict[Any, dict[int, Tensor]] = {}
    for i, (latent, old) in enumerate(zip(latents, levels, strict=True)):
        if 0 < latent.numel() <= _SMALL:
            rows = link.granularity.rows(gathered(latent))
            small.setdefault((rows.shape[1], rows.dtype, old.dtype, old.device), {})[i] = rows
        else:
            found[i] = link.refit(state._replace(levels=[old]), [latent]).levels[0]
    of_rows = dataclasses.replace(link, granularity=per_channel())
    for together in small.values():
        for chunk in chunks({i: rows.numel() for i, rows in together.items()}, _TOGETHER):
            own = state._replace(levels=[torch.cat([levels[i] for i in chunk])])
            new = of_rows.refit(own, [torch.cat([together[i] for i in chunk])]).levels[0]
            parts = torch.split(new, [len(together[i]) for i in chunk])
            found.update(zip(chunk, (part.clone() for part in parts), strict=True))
    return [found[i] for i in range(len(latents))]


class _Part(NamedTuple):
    """Rows that are mapped at once, or m groups of g rows each: [m, g, ...] for [r, ...]."""

    latent: Tensor  # [r, n]
    levels: Tensor  # [r, k]
    weight: Tensor  # [r, n]
    bound: Tensor | None = None  # `levels.bounds(levels)`, [r, k - 1]

    @property
    def kind(self) -> tuple[Any, ...]:
        """What rows that are mapped together have in common."""
        tensors = self.latent, self.levels, self.weight
        return self.latent.device, self.levels.shape[1], *(t.dtype for t in tensors)


class _Map(NamedTuple):
    """What maps the rows of one latent's and levels' dtypes, on one device."""

    formula: Formula
    scalars: tuple[Tensor, ...]  # [] each, what `formula.weight` takes
    divisor: Tensor | None  # []
    dtype: torch.dtype  # that is computed in


class _Maps:
    """The `_Map`s of a link at a state, each made once."""

    def __init__(self, link: Prox, state: ProxState):
        self.link = link
        self._state = state
        self._found: dict[Any, _Map] = {}

    def of(self, part: _Part) -> _Map:
        latent, levels, *_ = part
        key = latent.dtype, levels.dtype, latent.device
        if key not in self._found:
            dtype = torch.promote_types(torch.promote_types(*key[:2]), torch.float32)
            coefficient = self._state.slope
            formula = self.link.formula(float(coefficient.to(dtype)))
            if formula.prepared:
                coefficient = to_device(coefficient, latent).to(dtype)
            divisor = self.link.divisor(self._state)
            self._found[key] = _Map(formula, formula.scalars(coefficient), divisor, dtype)
        return self._found[key]


class Pass:
    """`plain`, faster. What it keeps from call to call are compiled programs.

    compile: with torch.compile.
    """

    def __init__(self, *, compile: bool = False):
        self.compile = compile
        self._programs: dict[Any, Callable[..., None]] = {}

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
            self._map(_Maps(link, state), jobs)

    def _map(self, maps: _Maps, jobs: Sequence[Job]) -> None:
        all_rows = [_rows_of(job, contiguous=self.compile) for job in jobs]
        wholes: list[_Part] = []
        small: dict[Any, list[_Part]] = {}
        for rows in all_rows:
            if rows.latent.numel() <= _SMALL and maps.link.elementwise:
                width = 1 << (rows.latent.shape[1] - 1).bit_length()
                small.setdefault((width, *rows.kind), []).append(rows)
            else:
                wholes.append(rows)
        self._run(maps, wholes)
        for (width, *_), alike in small.items():
            sizes = {i: rows.latent.shape[0] * width for i, rows in enumerate(alike)}
            for chunk in chunks(sizes, _TOGETHER):
                self._run_together(maps, [alike[i] for i in chunk], width)
        for rows, (*_, granularity, weight) in zip(all_rows, jobs, strict=True):
            if rows.weight.data_ptr() != weight.data_ptr():
                weight.copy_(granularity.restore(rows.weight, weight))

    def _run_together(self, maps: _Maps, alike: list[_Part], width: int) -> None:
        """Rows of that many elements or less as the rows of one buffer."""
        if len(alike) == 1:
            self._run(maps, alike)
            return
        shapes = [rows.latent.shape for rows in alike]
        size = sum(r for r, _ in shapes), width
        latent = alike[0].latent.new_zeros(size)
        weight = alike[0].weight.new_empty(size)
        torch._foreach_copy_(_cut(latent, shapes), [rows.latent for rows in alike])
        self._run(maps, [_Part(latent, torch.cat([rows.levels for rows in alike]), weight)])
        torch._foreach_copy_([rows.weight for rows in alike], _cut(weight, shapes))

    def _run(self, maps: _Maps, wholes: list[_Part]) -> None:
        cut = maps.link.elementwise  # whether a row may be
        if not self.compile:
            for whole in wholes:
                formula, scalars, divisor, _ = maps.of(whole)
                for piece in _pieces(whole) if cut else [whole]:
                    _write(formula, piece, scalars, divisor)
            return
        calls, left = _calls(_with_bounds(maps, wholes), cut=cut)
        # All are made before the first is run. In turns, each kind of work would find its own code
        # gone from the processor's cache, and take twice as long.
        hows = [maps.of(parts[0]) for parts in calls]
        programs = [self._program(how, parts) for how, parts in zip(hows, calls, strict=True)]
        for program, parts, how in zip(programs, calls, hows, strict=True):
            program(parts, how.scalars, how.divisor)
        for part in left:
            formula, scalars, divisor, _ = maps.of(part)
            _write(formula, part, scalars, divisor)

    def _program(self, how: _Map, parts: list[_Part]) -> Callable[..., None]:
        formula = how.formula
        latent, levels, weight, bound = parts[0]
        k, device = levels.shape[-1], latent.device.type
        dtypes = latent.dtype, levels.dtype, weight.dtype
        grouped = latent.dim() > 2
        shape = latent.shape[1:] if grouped else tuple(size in (1, k) for size in latent.shape)
        kind = len(parts), shape, k, dtypes, device, bound is None, how.divisor is None
        key = _identity(formula.weight), kind
        if key not in self._programs:
            cells_from = formula.cells_from
            if cells_from is None and bound is None:
                cells_from = MANY  # from there on a cell is searched for the nearest level, too
            narrow = cells_from is not None and k >= cells_from
            options = _options(device, two=len(parts) > 1, narrow=narrow)
            self._programs[key] = _compiled(formula, options)
        return self._programs[key]


def _rows_of(job: Job, *, contiguous: bool) -> _Part:
    """A job's rows, which share the memory of its weight, or are to be copied back to it.

    contiguous: where other rows are copied, for a compiler makes a program for each order of memory
    and stops at eight.
    """
    latent, weight = job.granularity.rows(job.latent), job.granularity.rows(job.weight)
    copied = weight.data_ptr() != job.weight.data_ptr()
    if copied or (contiguous and not weight.is_contiguous()):
        weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if contiguous:
        return _Part(latent.contiguous(), job.levels.contiguous(), weight)
    return _Part(latent, job.levels, weight)


def _cut(buffer: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The rows of a buffer, as parts of these shapes."""
    parts = torch.split(buffer, [r for r, _ in shapes])
    return [part[:, :n] for part, (_, n) in zip(parts, shapes, strict=True)]


def _pieces(whole: _Part) -> Iterator[_Part]:
    """Pieces of rows that fit into a processor's cache."""
    latent, levels, weight, _ = whole
    r, n = latent.shape
    if latent.device.type != "cpu" or r * n <= _WIDTH:
        yield whole
    elif r == 1 or n > _PIECE:
        end = n // _WIDTH * _WIDTH
        for i in range(r):
            for a in range(0, end, _PIECE):
                part = slice(a, min(a + _PIECE, end))
                tall = latent[i, part].view(-1, _WIDTH), weight[i, part].view(-1, _WIDTH)
                yield _Part(tall[0], levels[i : i + 1].expand(len(tall[0]), -1), tall[1])
            if end < n:
                row = slice(i, i + 1)
                yield _Part(latent[row, end:], levels[row], weight[row, end:])
    else:
        step = max(1, _PIECE // n)
        for a in range(0, r, step):
            yield _in_rows(whole, slice(a, a + step))


def _with_bounds(maps: _Maps, wholes: list[_Part]) -> list[_Part]:
    """The same, with their bounds where a program would compute them for every weight; those of
    all together, for one at a time they cost as much as a call of a program."""
    found: dict[Any, dict[int, Tensor]] = {}
    for i, whole in enumerate(wholes):
        formula, *_, dtype = maps.of(whole)
        long = whole.latent.shape[1] >= _LONG and whole.latent.device.type == "cpu"
        if formula.prepared and formula.cells_from is None and long:  # a GPU has time for them
            found.setdefault((dtype, whole.kind), {})[i] = whole.levels
    wholes = list(wholes)
    for (dtype, _), levels in found.items():
        bound = bounds(torch.cat([*levels.values()]).to(dtype))
        own = torch.split(bound, [len(rows) for rows in levels.values()])
        for i, part in zip(levels, own, strict=True):
            wholes[i] = wholes[i]._replace(bound=part)
    return wholes


def _calls(wholes: list[_Part], *, cut: bool) -> tuple[list[list[_Part]], list[_Part]]:
    """What programs are called with, parts of one shape each, and what is too small for a program.

    cut: whether a row may be.
    """
    calls, left = [], []
    todo = _pairs(wholes)
    while todo:
        parts, rest = todo.pop(), None
        if cut and len(parts) == 1 and parts[0].latent.numel() >= _LARGE:
            parts, rest = _split(*parts)
        calls.append([_by_itself(part) for part in parts])
        if rest is not None:
            small = rest.latent.numel() <= _PIECE  # a row or an element
            left.append(rest) if small else todo.append([rest])
    return calls, left


def _pairs(wholes: list[_Part]) -> list[list[_Part]]:
    """Twos of one shape on a CPU, as far as there are, and the others alone."""
    pairs: list[list[_Part]] = []
    alone: dict[Any, list[_Part]] = {}
    for whole in wholes:
        key = whole.kind, whole.latent.shape
        if key in alone:
            alone.pop(key).append(whole)
            continue
        pairs.append([whole])
        if whole.latent.device.type == "cpu":
            alone[key] = pairs[-1]
    return pairs


def _split(whole: _Part) -> tuple[list[_Part], _Part | None]:
    """Parts of a large one of which a compiler makes a faster loop, and what they leave."""
    return _halved(whole) if whole.latent.device.type == "cpu" else _grouped(whole)


def _halved(whole: _Part) -> tuple[list[_Part], _Part | None]:
    """Two parts of one shape, of half of the rows or half of the only row each, and the row or
    element that is left over, if any. Of two elements or more."""
    r, n = whole.latent.shape
    rest = None
    if r == 1:
        half = n // 2
        if n % 2:
            rest = _in_columns(whole, slice(n - 1, n))
            whole = _in_columns(whole, slice(0, n - 1))
        # levels of their own memory, as those of two rows are: else a program of its own
        whole = _Part(
            whole.latent.view(2, half),
            whole.levels.repeat(2, 1),
            whole.weight.view(2, half),
            None if whole.bound is None else whole.bound.repeat(2, 1),
        )
    elif r % 2:
        whole, rest = _in_rows(whole, slice(0, r - 1)), _in_rows(whole, slice(r - 1, r))
    halves = zip(*([x, x] if x is None else x.chunk(2) for x in whole), strict=True)
    return [_Part._make(half) for half in halves], rest


def _grouped(whole: _Part) -> tuple[list[_Part], _Part | None]:
    """Groups [m, g, n] of rows, of a multiple of _GROUP elements each, and what is left over, if
    anything; the whole, where there is no group.

    A compiler is to know g and n. An element's row is then its place over a number, and what
    neighbours have in common, levels and whether they lie in the tensor, is read once for them.
    """
    r, n = whole.latent.shape
    g = 1 if r == 1 else _GROUP // math.gcd(n, _GROUP)
    if r < g or r * n < _GROUP:
        return [whole], None
    rest = None
    if r == 1:
        r, n = n // _GROUP, _GROUP
        if whole.latent.numel() % _GROUP:
            rest = _in_columns(whole, slice(r * n, None))
            whole = _in_columns(whole, slice(0, r * n))
        whole = _Part(
            whole.latent.view(r, n),
            whole.levels.expand(r, -1),
            whole.weight.view(r, n),
            None if whole.bound is None else whole.bound.expand(r, -1),
        )
    elif r % g:
        used = r // g * g
        whole, rest = _in_rows(whole, slice(0, used)), _in_rows(whole, slice(used, r))
    groups = (x if x is None else x.view(r // g, g, x.shape[1]) for x in whole)
    return [_Part._make(groups)], rest


def _by_itself(part: _Part) -> _Part:
    """The part as a compiler is to see it: without what it is a view of, for each kind of which it
    would make a program, and stop at eight; with known sizes of groups."""
    found = _Part._make(x if x is None else x.detach() for x in part)
    for x in found:
        if x is not None and x.dim() > 2:
            torch._dynamo.mark_static(x, [1, 2])
    return found


def _flat(groups: Tensor) -> Tensor:
    """[m, g, n] as [m g, n], a view."""
    m, g, n = groups.shape
    return groups.view(m * g, n)


def _in_rows(part: _Part, s: slice) -> _Part:
    return _Part._make(x if x is None else x[s] for x in part)


def _in_columns(part: _Part, s: slice) -> _Part:
    return part._replace(latent=part.latent[:, s], weight=part.weight[:, s])


def _write(
    formula: Formula, part: _Part, scalars: tuple[Tensor, ...], divisor: Tensor | None
) -> None:
    u, levels = shrunk(part.latent, divisor), part.levels
    if formula.prepared:
        u, levels = prepare(u, levels)
    part.weight.copy_(formula.weight(u, levels, part.bound, *scalars))


def _compiled(formula: Formula, options: dict[str, Any]) -> Callable[..., None]:
    """A program for `_write` of one part, or of two of one shape."""

    def run(parts: list[_Part], scalars: tuple[Tensor, ...], divisor: Tensor | None) -> None:
        for part in parts:
            assert part.latent.shape == parts[0].latent.shape  # known to a compiler: one loop
            if part.latent.dim() > 2:
                part = _Part._make(x if x is None else _flat(x) for x in part)
            _write(formula, part, scalars, divisor)

    # a code object of its own, for a compiler counts the programs of each and stops at eight
    own: Any = FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
    program: Callable[..., None] = torch.compile(own, fullgraph=True, dynamic=True, options=options)
    return program


def _options(device: str, *, two: bool, narrow: bool) -> dict[str, Any]:
    """Of a compiler, for a device's type. two: parts are mapped at a time; narrow: where a search
    comes before a calculation."""
    if device != "cpu":
        # each operation rounded by itself, quotients too, and subnormal numbers kept
        return {
            "emulate_precision_casts": True,
            "eager_numerics.division_rounding": True,
            "eager_numerics.disable_ftz": True,
        }
    options: dict[str, Any] = {}
    if two:  # one loop, though they share no memory
        options |= {"aggressive_fusion": True, "score_fusion_memory_threshold": 0}
    if narrow and torch.backends.cpu.get_cpu_capability() == "AVX512":
        # With vectors of 512 bits a comparison becomes a vector in a register that some processors
        # wait for, so that the whole way of one weight is gone before the next one's begins.
        options["cpp.simdlen"] = 256
    return options


def _identity(weight: Any) -> Any:
    """A key for a map, which its program keeps alive; of a link's method, for that link."""
    owner = getattr(weight, "__self__", None)
    return id(weight) if owner is None else (id(weight.__func__), id(owner))
