"""Rows that ranks have pieces of: each is fitted whole by one rank, which sends the numbers back.

Along the dimensions of the mesh that cut rows (`Layout.across`), and along those that replicate
the weight, ranks hold pieces of the same rows. These ranks share the work: each row has one owner
among them, which gets its pieces, one dimension of the mesh after another, fits the row and sends
the numbers to the others. Owners are chosen by what each has to do already, and by what all ranks
know: shapes and placements. So a weight is received once for each dimension that cuts it, by some
rank, and no rank has more of it at a time than the largest weight.

What is sent and fitted at once are whole lines (`parq_fn.transforms.lines`).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from parq_fn.transforms.collective import from_all, to_each
from parq_fn.transforms.lines import Lines, Pieces, at, put_together, weights_of_a_line


class Share(NamedTuple):
    """Lines of a weight that one rank fits."""

    leaf: int
    lines: slice
    owner: tuple[int, ...]  # coordinate, along the dimensions that share

    @property
    def size(self) -> int:
        """How many lines."""
        return int(self.lines.stop - self.lines.start)


def extremes_of(lines: Lines) -> Tensor:
    """[lines, 2]: the least and the largest weight of each whole line, on every rank."""
    flat = lines.mine.flatten(1)
    if flat.shape[1]:
        ends = torch.stack([flat.amin(1), flat.amax(1)], -1)
    else:
        ends = flat.new_tensor([torch.inf, -torch.inf]).expand(len(flat), 2)
    for d in lines.across if ends.numel() else ():
        every = from_all(ends.contiguous(), lines.mesh, d, [lines.name])
        ends = torch.stack([every[..., 0].amin(0), every[..., 1].amax(0)], -1)
    return ends


def fitted_whole(
    leaves: Sequence[Lines], fit: Callable[[Tensor], Tensor], m: int, *, together: bool
) -> list[Tensor]:
    """[..., m] of the rows that this rank has pieces of, for each of the leaves, as `fit` gives
    [r, m] for whole rows [r, n]. Every rank of the meshes calls it.

    together: whether rows of several leaves are given to `fit` at once.
    """
    found: dict[int, Tensor] = {}
    kinds: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        kinds.setdefault(leaf.kind, []).append(i)
    for places in kinds.values():
        some = [leaves[i] for i in places]
        found.update(zip(places, _of_a_kind(some, fit, m, together), strict=True))
    return [found[i] for i in range(len(leaves))]


def _of_a_kind(
    leaves: Sequence[Lines], fit: Callable[[Tensor], Tensor], m: int, together: bool
) -> list[Tensor]:
    mesh, sharing = leaves[0].mesh, leaves[0].sharing
    sizes = [mesh.size(d) for d in sharing]
    here = tuple(mesh.get_local_rank(d) for d in sharing)
    mine: list[Tensor] = []
    every: list[Share] = []
    for shares in shared(leaves, sizes):
        every += shares
        mine += _fitted_here(leaves, shares, here, fit, together)
    lengths = [share.size * leaves[share.leaf].rows * m for share in every]
    sent: dict[tuple[int, ...], list[int]] = {}  # of each owner, shares in turn
    for i, share in enumerate(every):
        sent.setdefault(share.owner, []).append(i)
    longest = max((sum(lengths[i] for i in one) for one in sent.values()), default=0)
    dtype = torch.promote_types(leaves[0].mine.dtype, torch.float32)
    own = leaves[0].mine.new_zeros(longest, dtype=dtype)
    if mine:
        flat = torch.cat([found.flatten() for found in mine])
        own[: len(flat)] = flat
    for d in sharing if longest else ():
        own = from_all(own, mesh, d, [leaf.name for leaf in leaves])
    # of one owner after another what its shares have, and what fills it up
    order: list[int] = []
    cuts: list[int] = []
    for place in itertools.product(*(range(size) for size in sizes[::-1])):
        places = sent.get(place[::-1], [])
        order += [*places, -1]
        used = [lengths[i] for i in places]
        cuts += [*used, longest - sum(used)]
    came = dict(zip(order, torch.split(own.flatten(), cuts), strict=True))
    parts: list[list[Tensor]] = [[own.new_zeros(0)] for _ in leaves]
    for i, share in enumerate(every):
        parts[share.leaf].append(came[i])
    return [
        leaf.in_rows(torch.cat(part).view(len(leaf.mine), leaf.rows, m))
        for leaf, part in zip(leaves, parts, strict=True)
    ]


def _fitted_here(
    leaves: Sequence[Lines],
    shares: Sequence[Share],
    here: tuple[int, ...],
    fit: Callable[[Tensor], Tensor],
    together: bool,
) -> list[Tensor]:
    """[r, m] of the rows of each of the shares that this rank fits."""
    received = _received(leaves, shares, here)
    alike: dict[Any, list[int]] = {}
    for i in received:
        leaf = leaves[shares[i].leaf]
        alike.setdefault((leaf.shape, leaf.size) if together else i, []).append(i)
    found: dict[int, Tensor] = {}
    for places in alike.values():
        leaf, sizes = leaves[shares[places[0]].leaf], [shares[i].size for i in places]
        whole = leaf.mine.new_empty(sum(sizes), *leaf.shape)
        for i, into in zip(places, torch.split(whole, sizes), strict=True):
            put_together(into, leaves[shares[i].leaf], received.pop(i))
        rows = fit(whole.view(len(whole) * leaf.rows, leaf.size))
        found.update(
            zip(places, torch.split(rows, [size * leaf.rows for size in sizes]), strict=True)
        )
    return [found[i] for i in sorted(found)]


def largest_of_all(mine: Tensor, weight: Any, name: str) -> Tensor:
    """The largest over all ranks that a weight of that name lies on, element by element."""
    mesh = weight.device_mesh
    for d in range(mesh.ndim):
        if mesh.size(d) > 1:
            mine = from_all(mine, mesh, d, [name]).amax(0)
    return mine


def shared(leaves: Sequence[Lines], sizes: Sequence[int]) -> Iterator[list[Share]]:
    """Which rank fits which lines, in turns: in one turn no rank gets more weights than the largest
    leaf of this rank has. Runs of a leaf's lines, of about as many each, go to those who have
    least.

    sizes: of the dimensions of the mesh that share.
    """
    owners = list(itertools.product(*map(range, sizes)))
    numels = [len(leaf.mine) * math.prod(leaf.shape) for leaf in leaves]
    bound = max(numels, default=0)
    loads = [(0, i) for i in range(len(owners))]
    turn: list[Share] = []
    for leaf, one in enumerate(leaves):
        count, length = len(one.mine), math.prod(one.shape)
        step = -(-count // len(owners)) or 1
        runs = [slice(a, min(a + step, count)) for a in range(0, count, step)]
        least = heapq.nsmallest(len(runs), loads)
        if turn and least and least[-1][0] + step * length > bound:
            yield turn
            turn, loads = [], [(0, i) for i in range(len(owners))]
        for lines in runs:
            load, i = heapq.heappop(loads)
            heapq.heappush(loads, (load + (lines.stop - lines.start) * length, i))
            turn.append(Share(leaf, lines, owners[i]))
    if turn:
        yield turn


def _received(
    leaves: Sequence[Lines], shares: Sequence[Share], here: tuple[int, ...]
) -> dict[int, Pieces]:
    """The shares that this rank is to fit, by their places among all."""
    first = leaves[0]
    mesh, across, sharing = first.mesh, first.across, first.sharing
    cutting = [sharing.index(d) for d in across]
    rank = list(mesh.get_coordinate())

    def is_mine(share: Share, known: Sequence[int]) -> bool:
        return all(share.owner[k] == here[k] for k in known)

    copies = [k for k in range(len(sharing)) if k not in cutting]
    # pieces on their way: of a share, from the rank at these places along `across`
    start = tuple(here[k] for k in cutting)
    own = enumerate(_cut_apart(leaves, shares))
    sent = {(i, start): piece for i, piece in own if is_mine(shares[i], copies)}
    for step, k in enumerate(cutting):
        known, size = copies + cutting[:step], mesh.size(sharing[k])
        out: list[list[Tensor]] = [[] for _ in range(size)]
        for (i, _), piece in sorted(sent.items(), key=lambda item: item[0]):
            out[shares[i].owner[k]].append(piece)
        ways = [range(mesh.size(sharing[j])) for j in cutting[:step]]
        wanted = [i for i, share in enumerate(shares) if is_mine(share, [*known, k])]
        before = list(itertools.product(*ways))
        coming = [
            {
                (i, places): _length(leaves[shares[i].leaf], shares[i], rank, across, places)
                for i in wanted
                for places in ((*b, source, *start[step + 1 :]) for b in before)
            }
            for source in range(size)
        ]
        lengths = [list(one.values()) for one in coming]
        names = [leaves[i].name for i in sorted({share.leaf for share in shares})]
        got = to_each(first.mine, out, list(map(sum, lengths)), mesh, sharing[k], names)
        cuts = [length for one in lengths for length in one]
        sent = dict(
            zip((key for one in coming for key in one), torch.split(got, cuts), strict=True)
        )
    found = {i: Pieces({}, None) for i in wanted}
    if all(one == lengths[0] for one in lengths):
        columns = itertools.groupby(coming[0].items(), lambda item: item[0][0])
        widths = [sum(length for _, length in one) for _, one in columns]
        whole = got.view(size, sum(widths))
        found = {
            i: Pieces({}, column)
            for i, column in zip(wanted, torch.split(whole, widths, 1), strict=True)
        }
    for (i, places), piece in sent.items():
        found[i].each[places] = piece
    return found


def _cut_apart(leaves: Sequence[Lines], shares: Sequence[Share]) -> Iterator[Tensor]:
    """This rank's pieces of each of the shares, flat; of a leaf there are all or none."""
    for leaf, own in itertools.groupby(shares, lambda share: share.leaf):
        mine = leaves[leaf].mine
        width = math.prod(mine.shape[1:])
        yield from torch.split(mine.reshape(-1), [share.size * width for share in own])


def _length(
    leaf: Lines, share: Share, rank: Sequence[int], across: Sequence[int], places: Sequence[int]
) -> int:
    """Weights of a share's lines that the rank at these places has."""
    coordinate = tuple(at(rank, across, places))
    return share.size * weights_of_a_line(leaf.lies, leaf.dims, coordinate)
