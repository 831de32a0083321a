"""Least-squares scalar quantization levels of each row: one-dimensional k-means, solved globally.

Everything is a fixed sequence of tensor operations whose sizes depend on shapes alone, so the
kernel runs under ``torch.vmap`` and ``torch.compile(fullgraph=True)``, and no operation mixes rows
or reduces in an order that depends on how many rows there are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.quantizers.reductions import in_order, run_sums, running_sums, summed, total

_CHUNK = 1 << 17  # sorted values per chunk: amortises the calls, stays near the cache
_DOUBLES = 1 << 25  # 256 MB of float64, the bound on one chunk's temporaries
_CANDIDATES = 4096  # least number of candidate cuts of a long row
_LLOYD = 12  # polishing steps of a long row
_RUN = 256  # of a row longer than a chunk, sums are kept before every run of so many values


def least_squares_levels(x: Tensor, num_levels: int, *, exact_up_to: int = 4096) -> Tensor:
    r"""Return, for each row, ``argmin_{q_1 <= ... <= q_k} sum_i min_j (x_i - q_j)^2``.

    ``x`` is ``[r, n]``, finite float32 or float64 with ``n >= 1`` and ``max |x|`` about 1 in each
    row; the result is ``[r, k]`` in ``x.dtype``, ``k = num_levels``, nondecreasing and finite.
    Sums are taken in float64.

    An optimal partition cuts the sorted row into ``k`` runs, each level being its run's mean.
    For ``n <= max(exact_up_to, 4096)`` the cuts are globally optimal, up to float64 rounding
    (about ``1e-15 * n * max|x|^2`` of error). Beyond, they are optimal among ``4096``
    candidate cuts per row and are then polished by Lloyd's iteration on the whole row, which
    keeps the error within 0.5% of the least.

    Ties: of equally good starts of a run the leftmost wins. A run may be empty (as when
    ``n < k``); its level is the next value in sorted order, or the largest when none is left.

    Rows are taken in chunks that keep temporaries within 256 MB, or one row at a time where a
    row alone needs more (beyond about 1.5 million entries); a ``vmap`` multiplies them.
    """
    n = x.shape[1]
    candidates = max(_CANDIDATES, 8 * num_levels)
    exact = n <= max(exact_up_to, candidates)
    per_row = (n + 1) * (num_levels + 64 if exact else 20)
    rows = max(1, min(_CHUNK // n, _DOUBLES // per_row))
    m = n if exact else candidates
    return torch.cat(
        [_solve(x[i : i + rows], num_levels, m) for i in range(0, max(1, x.shape[0]), rows)]
    )


def _solve(x: Tensor, k: int, m: int) -> Tensor:
    values = in_order(x)
    exact, run = m == x.shape[1], 1
    if not exact and x.shape[1] > _CHUNK:
        run = _RUN
    else:
        values = values.double()
    prefix = _prefix(values, run)
    if exact:
        return _means(values, prefix, _best_cuts(prefix.table, k)).to(x.dtype)
    candidates = _candidate_cuts(values, m, run)
    cuts = candidates.gather(1, _best_cuts(_at(prefix, candidates), k))
    return _polish(values, prefix, cuts).to(x.dtype)


class _Prefix(NamedTuple):
    """What the first values of each sorted row [r, n] sum to.

    Values are taken relative to the row's median: far outliers then cost the bulk no digits.
    """

    values: Tensor  # [r, n]
    median: Tensor  # [r, 1], float64
    table: Tensor  # [r, 3, n // run + 1], float64: count, sum and sum of squares before each run
    run: int  # a power of two


def _prefix(values: Tensor, run: int) -> _Prefix:
    n = values.shape[1]
    median = values[:, n // 2 : n // 2 + 1].double()
    sums, squares = (run_sums(values, run, part, median) for part in (_value, _square))
    steps = torch.stack((torch.full_like(sums, run), sums, squares), 1)
    table = torch.nn.functional.pad(running_sums(steps), (1, 0))
    return _Prefix(values, median, table, run)


def _value(x: Tensor, median: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.sub(x, median, out=out)  # which is float64


def _square(x: Tensor, median: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.square(_value(x, median, out), out=out)


def _at(prefix: _Prefix, index: Tensor) -> Tensor:
    """``[r, 3, m]``: count, sum and sum of squares of the first ``index [r, m]`` values."""
    values, median, table, run = prefix
    if run == 1:
        return _pick(table, index)
    whole = index >> (run.bit_length() - 1)  # runs
    within = torch.arange(run, device=index.device)
    begun = (whole * run).unsqueeze(2) + within  # [r, m, run]
    taken = values.gather(1, begun.flatten(1).clamp(max=values.shape[1] - 1)).view_as(begun)
    inside = begun < index.unsqueeze(2)
    y = torch.where(inside, _value(taken, median.unsqueeze(2)), 0.0)
    rest = torch.stack([summed(part) for part in (inside.double(), y, y * y)], 1)
    return _pick(table, whole) + rest


def _pick(table: Tensor, index: Tensor) -> Tensor:
    return table.gather(2, index.unsqueeze(1).expand(-1, 3, -1))


def _spread(end: Tensor, start: Tensor) -> Tensor:
    """Squared error about its mean of the run between two table columns; 0 if not a run.

    Squares are kept (they telescope, so they choose nothing) because the errors, not the gains
    ``sum^2 / count``, are then what accumulates: small next to them, a rounding stays small.
    """
    count, total, square = (end - start).unbind(1)
    return (square - total * total / count.clamp(min=1)).clamp(min=0)


def _best_cuts(table: Tensor, k: int) -> Tensor:
    """``[r, k + 1]``: columns ``0 = c_0 <= ... <= c_k = m`` of least summed ``_spread``.

    Cuts are integers and have no derivative; the levels made from them have theirs.
    """
    cuts: Tensor = _cuts_op(table.detach(), k)
    return cuts


@torch.library.custom_op("parq_fn::best_cuts", mutates_args=())
def _cuts_op(table: Tensor, k: int) -> Tensor:
    """One operator, for a compiler would unroll some 20 k log2(m) steps and take minutes."""
    return _dynamic_program(table, k)


@_cuts_op.register_fake
def _(table: Tensor, k: int) -> Tensor:
    return table.new_empty((table.shape[0], k + 1), dtype=torch.int64)


@_cuts_op.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, int | None], table: Tensor, k: int
) -> tuple[Tensor, int]:
    del info
    batched = table.movedim(in_dims[0] or 0, 0)  # rows know nothing of each other
    cuts = _cuts_op(batched.flatten(0, 1), k)
    return cuts.unflatten(0, batched.shape[:2]), 0


def _dynamic_program(table: Tensor, k: int) -> Tensor:
    m = table.shape[2] - 1
    error = _spread(table, table[:, :, :1])  # of one run over each prefix
    starts = []
    for _ in range(k - 2):
        start = _best_starts(table, error)
        error = error.gather(1, start) + _spread(table, _pick(table, start))
        starts.append(start.int())  # k of them are most of the memory
    cut = torch.full_like(table[:, 0, :1], m, dtype=torch.int64)
    cuts = [cut]
    if k > 1:
        cut = (error + _spread(table[:, :, -1:], table)).argmin(1, keepdim=True)
        cuts.append(cut)
    for start in reversed(starts):
        cut = start.gather(1, cut).long()
        cuts.append(cut)
    cuts.append(torch.zeros_like(cut))
    return torch.cat(cuts[::-1], 1)


def _best_starts(table: Tensor, error: Tensor) -> Tensor:
    """``[r, m + 1]``: for each column ``i``, the leftmost ``argmin_{a <= i} error[a] + w(a, i)``.

    ``w = _spread`` is Monge: for ``a <= b <= i <= j``, ``w(a, i) + w(b, j) <= w(a, j) + w(b, i)``,
    since extending a run over the points from ``i`` to ``j`` costs more the further back it
    starts. Hence the argmin is nondecreasing in ``i``, and divide and conquer applies: the
    argmins of columns already done bracket those of the columns halfway between them.

    One depth of it is one batched step. Consecutive brackets share just an end, so that giving
    each midpoint its bracket less the left end splits the columns: every ``a`` belongs to one
    midpoint, ``owner[a]``, and the left ends are a further candidate per midpoint. A depth thus
    costs ``m + 1`` plus the number of midpoints, whatever the data.

    Candidates ``a > i`` need no mask: their ``w`` clamps to 0 and ``error`` grows with ``a``, so
    they never beat ``a = i``; the final ``minimum`` settles a tie made by rounding.
    """
    m = table.shape[2] - 1
    depth = (m - 1).bit_length()
    column = torch.arange(m + 1, device=table.device)
    # halving stays even on 2^depth >= m points; these cover columns 1..m, some of them twice
    grid = 1 + (torch.arange(1 << depth, device=table.device) * m >> depth)
    owner = torch.zeros_like(error, dtype=torch.int64)
    zero = owner[:, :1]  # columns 0 and 1 start at 0
    known = zero
    for d in reversed(range(depth)):
        middle = grid[1 << d :: 2 << d]
        ends = _pick(table, middle.expand(len(table), -1))  # many times faster than table[middle]
        # nonnegative doubles compare as their bits do, and integers scatter much faster
        at_left = (error.gather(1, known) + _spread(ends, _pick(table, known))).view(torch.int64)
        at = (error + _spread(_pick(ends, owner), table)).view(torch.int64)
        best = at_left.scatter_reduce(1, owner, at, "amin")
        left = known + (m + 1) * (at_left > best)  # out of the running where not the best
        rest = column + (m + 1) * (at > best.gather(1, owner))
        first = torch.minimum(left.scatter_reduce(1, owner, rest, "amin"), middle)
        known = torch.stack((known, first), 2).flatten(1)
        owner = 2 * owner + (column > first.gather(1, owner))
    order = -(-(column[:-1] << depth) // m)
    return torch.cat((zero, known.gather(1, order.expand(len(known), -1))), 1)


def _means(values: Tensor, prefix: _Prefix, cuts: Tensor) -> Tensor:
    """Each run's mean, kept within the run so that rounding cannot unsort the levels."""
    n = values.shape[1]
    low = values.gather(1, cuts[:, :-1].clamp(max=n - 1))
    high = torch.maximum(low, values.gather(1, (cuts[:, 1:] - 1).clamp(min=0)))
    count, total, _ = _at(prefix, cuts).diff(dim=2).unbind(1)
    mean = prefix.median + total / count.clamp(min=1)
    return torch.minimum(torch.maximum(mean, low), high)


def _candidate_cuts(values: Tensor, m: int, run: int = 1) -> Tensor:
    """``[r, m + 1]`` sorted cuts, 0 and ``n`` among them, dense where optimal cuts are dense.

    Optimal cuts have density proportional to (data density)^(1/3), which is what equal steps of
    the summed ``gap^(2/3)`` give: at ``p`` points per unit a gap is ``1/p``, and ``p`` of them make
    ``p^(1/3)``. A gap holds one cut at most, so its share is capped at one step. No step falls
    within a tie, whose gaps are 0.
    """
    n = values.shape[1]
    share = values.detach().diff(dim=1).pow_(2 / 3)
    cap = total(share, torch.abs) / m  # which they are
    for _ in range(2):
        cap = total(share, torch.minimum, cap.to(share.dtype)) / m
    cap = cap.to(share.dtype)
    sums = running_sums(run_sums(share, run, torch.minimum, cap))
    whole = total(share, torch.minimum, cap)
    step = whole * (torch.arange(1, m, device=values.device, dtype=torch.float64) / m)
    cuts = torch.searchsorted(sums, step)  # runs that lie before the step
    if run > 1:
        begun = (cuts * run).unsqueeze(2) + torch.arange(run, device=values.device)
        within = share.gather(1, begun.flatten(1).clamp(max=n - 2)).view_as(begun)
        within = running_sums(torch.minimum(within, cap.unsqueeze(2)).double())
        before = torch.nn.functional.pad(sums, (1, 0)).gather(1, cuts)
        cuts = cuts * run + (within < (step - before).unsqueeze(2)).sum(2)
    cuts = cuts.clamp(max=n - 2) + 1
    return torch.nn.functional.pad(torch.nn.functional.pad(cuts, (1, 0)), (0, 1), value=n)


def _polish(values: Tensor, prefix: _Prefix, cuts: Tensor) -> Tensor:
    """Lloyd's iteration: cut halfway between levels, take means, return the best levels seen."""
    best = _means(values, prefix, cuts)
    levels = best
    least = _total(prefix, cuts)
    for _ in range(_LLOYD):
        halfway = (levels[:, 1:] + levels[:, :-1]) / 2
        inner = torch.searchsorted(values.detach(), halfway.detach().to(values.dtype))
        cuts = torch.cat((cuts[:, :1], inner, cuts[:, -1:]), 1)
        levels = _means(values, prefix, cuts)
        error = _total(prefix, cuts)
        best = torch.where(error < least, levels, best)
        least = torch.minimum(error, least)
    return best


def _total(prefix: _Prefix, cuts: Tensor) -> Tensor:
    ends = _at(prefix, cuts)
    return running_sums(_spread(ends[:, :, 1:], ends[:, :, :-1]))[:, -1:]  # sum's order may vary
