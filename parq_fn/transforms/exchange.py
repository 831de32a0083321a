"""Rows that ranks have pieces of: each is fitted whole by one rank, which sends the numbers back.

Along the dimensions of the mesh that cut rows (`Layout.across`), and along those that replicate
the weight, ranks hold pieces of the same rows. These ranks share the work: each row has one owner
among them, which gets its pieces, one dimension of the mesh after another, fits the row and sends
the numbers to the others. Owners are chosen by what each has to do already, and by what all ranks
know: shapes and placements. So a weight is received once for each dimension that cuts it, by some
rank, and no rank has more of it at a time than the largest weight.

What is unit here is a line: all rows of a weight along the dimensions that a row runs over. Of
blocks that is the run that they are cut from, else it is a row.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parq_fn.quantizers.granularity import Granularity, per_block
from parq_fn.transforms.layout import Runs, Sharding, layout_of, sharding_of


class Lines(NamedTuple):
    """The lines of a sharded weight that this rank has pieces of."""

    mine: Tensor  # [lines, ...]: its pieces, by the dimensions that a line runs over
    shape: tuple[int, ...]  # of a whole line
    dims: tuple[int, ...]  # the weight's own that these are
    size: int  # weights of a row
    kept: tuple[int, ...]  # how many indices choose the line, by dimension
    place: int  # where among these dimensions that of a line's rows belongs; none if it has one row
    mesh: Any
    lies: Sharding  # of the weight
    across: tuple[int, ...]  # of the mesh: those that cut lines
    sharing: tuple[int, ...]  # these and those that replicate them

    @property
    def rows(self) -> int:
        """How many rows a line has."""
        return math.prod(self.shape) // self.size

    @property
    def kind(self) -> tuple[Any, ...]:
        """What lines that are sent together have in common."""
        return self.mesh, self.across, self.sharing, self.mine.dtype, self.mine.device

    def runs(self, rank: Sequence[int]) -> list[Runs]:
        """Which indices of each dimension of a line the rank at that coordinate has."""
        return [self.lies.runs(d, rank) for d in self.dims]

    def is_uneven(self, d: int) -> bool:
        """Whether strided placements cut the weight's dimension d into pieces of several sizes."""
        cuts = self.lies.cuts(d, self.mesh.get_coordinate())
        strided, ranks = any(cut.factor > 1 for cut in cuts), math.prod(cut.ranks for cut in cuts)
        return strided and self.lies.shape[d] % ranks > 0

    def in_rows(self, found: Tensor) -> Tensor:
        """[lines, rows of each, m] as [..., m], by the dimensions of this rank's rows."""
        m = found.shape[-1]
        if self.place < 0:
            return found.reshape(*self.kept, m)
        return found.reshape(*self.kept, -1, m).movedim(-2, self.place)


class Share(NamedTuple):
    """Lines of a weight that one rank fits."""

    leaf: int
    lines: slice
    owner: tuple[int, ...]  # coordinate, along the dimensions that share

    @property
    def size(self) -> int:
        """How many lines."""
        return int(self.lines.stop - self.lines.start)


def lines_of(weight: Any, latent: Tensor, granularity: Granularity) -> Lines:
    """The lines of a sharded weight.

    latent: this rank's part of what is fitted to.
    Raises ValueError for a part that is not of the shape that the placements say.
    """
    layout, rank = layout_of(weight, granularity), weight.device_mesh.get_coordinate()
    shape, dims = tuple(weight.shape), granularity.row_dims(weight)
    chosen = [d for d in dims if d is not None]
    along: Sequence[int] = [d for d in range(weight.dim()) if d not in chosen]
    if isinstance(granularity, per_block):
        along = granularity.dims(weight)
    mesh, placements = weight.device_mesh, weight.placements
    count = math.prod(latent.shape[d] for d in chosen)
    own = latent.permute(*chosen, *along).reshape(count, *(latent.shape[d] for d in along))
    sharing = tuple(
        i
        for i, p in enumerate(placements)
        if mesh.size(i) > 1 and (i in layout.across or p.is_replicate())
    )
    found = Lines(
        own,
        tuple(shape[d] for d in along),
        tuple(along),
        granularity.shape(weight)[1],
        tuple(latent.shape[d] for d in chosen),
        dims.index(None) if None in dims else -1,
        mesh,
        sharding_of(weight),
        layout.across,
        sharing,
    )
    expected = tuple(sum(b - a for a, b in runs) for runs in found.runs(rank))
    if tuple(own.shape[1:]) != expected or any(found.is_uneven(d) for d in along):
        raise ValueError(
            f"a weight of shape {shape} is placed as {placements} on a mesh {tuple(mesh.shape)}, "
            f"which does not divide its dimensions {tuple(along)}: FSDP2 over tensor parallelism "
            "shards these otherwise than torch's placements say, so that rows cannot be put "
            "together; take sizes that the mesh divides, or rows that ranks have whole, such as "
            "those of per_channel()"
        )
    return found


def extremes_of(lines: Lines) -> Tensor:
    """[lines, 2]: the least and the largest weight of each whole line, on every rank."""
    flat = lines.mine.flatten(1)
    if flat.shape[1]:
        ends = torch.stack([flat.amin(1), flat.amax(1)], -1)
    else:
        ends = flat.new_tensor([torch.inf, -torch.inf]).expand(len(flat), 2)
    for d in lines.across if ends.numel() else ():
        every = _from_all(ends.contiguous(), lines.mesh.get_group(d), lines.mesh.size(d))
        ends = torch.stack([every[..., 0].amin(0), every[..., 1].amax(0)], -1)
    return ends


def fitted_whole(leaves: Sequence[Lines], fit: Callable[[Tensor], Tensor], m: int) -> list[Tensor]:
    """[..., m] of the rows that this rank has pieces of, for each of the leaves, as `fit` gives
    [r, m] for whole rows [r, n]. Every rank of the meshes calls it."""
    found: dict[int, Tensor] = {}
    kinds: dict[Any, list[int]] = {}
    for i, leaf in enumerate(leaves):
        kinds.setdefault(leaf.kind, []).append(i)
    for places in kinds.values():
        some = [leaves[i] for i in places]
        found.update(zip(places, _of_a_kind(some, fit, m), strict=True))
    return [found[i] for i in range(len(leaves))]


def _of_a_kind(
    leaves: Sequence[Lines], fit: Callable[[Tensor], Tensor], m: int
) -> Iterator[Tensor]:
    mesh, sharing = leaves[0].mesh, leaves[0].sharing
    sizes = [mesh.size(d) for d in sharing]
    here = tuple(mesh.get_local_rank(d) for d in sharing)
    mine: list[Tensor] = []
    every: list[Share] = []
    for shares in shared(leaves, sizes):
        every += shares
        for share, whole in _received(leaves, shares, here):
            leaf = leaves[share.leaf]
            mine.append(fit(whole.reshape(share.size * leaf.rows, leaf.size)).flatten())
    lengths: dict[tuple[int, ...], int] = {}
    for share in every:
        length = share.size * leaves[share.leaf].rows * m
        lengths[share.owner] = lengths.get(share.owner, 0) + length
    dtype = torch.promote_types(leaves[0].mine.dtype, torch.float32)
    own = leaves[0].mine.new_zeros(max(lengths.values(), default=0), dtype=dtype)
    if mine:
        together = torch.cat(mine)
        own[: len(together)] = together
    for d in sharing if own.numel() else ():
        own = _from_all(own, mesh.get_group(d), mesh.size(d))
    parts: list[list[Tensor]] = [[] for _ in leaves]
    starts = dict.fromkeys(lengths, 0)
    for share in every:
        start, rows = starts[share.owner], share.size * leaves[share.leaf].rows
        starts[share.owner] = start + rows * m
        sent = own[share.owner[::-1]][start : start + rows * m]
        parts[share.leaf].append(sent.view(share.size, -1, m))
    for leaf, part in zip(leaves, parts, strict=True):
        empty = own.new_zeros(0, leaf.rows, m)
        yield leaf.in_rows(torch.cat([empty, *part]))


def largest_of_all(mine: Tensor, weight: Any) -> Tensor:
    """The largest over all ranks that a weight lies on, element by element."""
    mesh = weight.device_mesh
    for d in range(mesh.ndim):
        if mesh.size(d) > 1:
            mine = _from_all(mine, mesh.get_group(d), mesh.size(d)).amax(0)
    return mine


def _from_all(mine: Tensor, group: Any, size: int) -> Tensor:
    """[ranks, ...]: that of each rank of a group."""
    found = mine.new_empty((size, *mine.shape))
    dist.all_gather_single(found.view(-1), mine.reshape(-1), group=group)
    return found


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
) -> Iterator[tuple[Share, Tensor]]:
    """(share, its whole lines) of those that this rank is to fit."""
    first = leaves[0]
    mesh, across, sharing = first.mesh, first.across, first.sharing
    cutting = [sharing.index(d) for d in across]
    rank = list(mesh.get_coordinate())

    def is_mine(share: Share, known: Sequence[int]) -> bool:
        return all(share.owner[k] == here[k] for k in known)

    copies = [k for k in range(len(sharing)) if k not in cutting]
    # pieces on their way: of a share, from the rank at these places along `across`
    start = tuple(here[k] for k in cutting)
    sent: dict[tuple[int, tuple[int, ...]], Tensor] = {
        (i, start): leaves[share.leaf].mine[share.lines].flatten()
        for i, share in enumerate(shares)
        if is_mine(share, copies)
    }
    for step, k in enumerate(cutting):
        known, size = copies + cutting[:step], mesh.size(sharing[k])
        out: list[list[Tensor]] = [[] for _ in range(size)]
        for (i, _), piece in sorted(sent.items(), key=lambda item: item[0]):
            out[shares[i].owner[k]].append(piece)
        ways = [range(mesh.size(sharing[j])) for j in cutting[:step]]
        wanted = [i for i, share in enumerate(shares) if is_mine(share, [*known, k])]
        before = list(itertools.product(*ways))
        coming = [
            [(i, (*b, source, *start[step + 1 :])) for i in wanted for b in before]
            for source in range(size)
        ]
        lengths = {
            key: _length(leaves[shares[key[0]].leaf], shares[key[0]], rank, across, key[1])
            for keys in coming
            for key in keys
        }
        got = _exchanged(
            first.mine, out, [sum(map(lengths.__getitem__, keys)) for keys in coming], mesh,
            sharing[k],
        )  # fmt: skip
        flat = [key for keys in coming for key in keys]
        sent = dict(zip(flat, torch.split(got, [lengths[key] for key in flat]), strict=True))
    for i, share in enumerate(shares):
        if not is_mine(share, range(len(sharing))):
            continue
        leaf = leaves[share.leaf]
        whole = leaf.mine.new_empty(share.size, *leaf.shape)
        for key, piece in sent.items():
            if key[0] == i:
                _put(whole, piece, leaf.runs(_at(rank, across, key[1])))
        yield share, whole


def _at(rank: Sequence[int], across: Sequence[int], places: Sequence[int]) -> list[int]:
    """The coordinate of the rank at other places along some dimensions of the mesh."""
    found = list(rank)
    for d, place in zip(across, places, strict=True):
        found[d] = place
    return found


def _length(
    leaf: Lines, share: Share, rank: Sequence[int], across: Sequence[int], places: Sequence[int]
) -> int:
    """Weights of a share's lines that the rank at these places has."""
    runs = leaf.runs(_at(rank, across, places))
    return share.size * math.prod(sum(b - a for a, b in own) for own in runs)


def _exchanged(
    like: Tensor, out: list[list[Tensor]], lengths: list[int], mesh: Any, d: int
) -> Tensor:
    """What all ranks along a dimension of the mesh send to this one, who sends them `out`."""
    flat = torch.cat([like.new_zeros(0), *(piece for pieces in out for piece in pieces)])
    got = like.new_empty(sum(lengths))
    splits = [sum(map(len, pieces)) for pieces in out]
    dist.all_to_all_single(got, flat, lengths, splits, group=mesh.get_group(d))
    return got


def _put(whole: Tensor, piece: Tensor, runs: Sequence[Runs]) -> None:
    """Writes a rank's piece of lines, flat, to its places in them."""
    sizes = [sum(b - a for a, b in own) for own in runs]
    piece = piece.view(len(whole), *sizes)
    ends = [list(itertools.accumulate((b - a for a, b in own), initial=0)) for own in runs]
    for places in itertools.product(*(range(len(own)) for own in runs)):
        there = [slice(None), *(slice(*own[i]) for own, i in zip(runs, places, strict=True))]
        here = [slice(None), *(slice(e[i], e[i + 1]) for e, i in zip(ends, places, strict=True))]
        whole[tuple(there)] = piece[tuple(here)]
