"""The lines of a sharded weight, of which ranks have pieces, and how pieces make whole ones.

A line is all rows of a weight along the dimensions that a row runs over. Of blocks that is the run
that they are cut from, else it is a row.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor

from parq_fn.quantizers.granularity import Granularity, per_block
from parq_fn.transforms.layout import Runs, Sharding, layout_of, sharded_along, sharding_of


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
    name: str = ""  # the weight's, for errors

    @property
    def rows(self) -> int:
        """How many rows a line has."""
        return math.prod(self.shape) // self.size if self.size else 1

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
        return found.reshape(*self.kept, self.rows, m).movedim(-2, self.place)


def lines_of(weight: Any, latent: Tensor, granularity: Granularity, name: str) -> Lines:
    """The lines of a sharded weight of that name.

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
        name,
    )
    expected = tuple(sum(b - a for a, b in runs) for runs in found.runs(rank))
    if tuple(own.shape[1:]) != expected or any(found.is_uneven(d) for d in along):
        raise ValueError(
            f"parameter {name!r} of shape {shape} is placed as {placements} on a mesh "
            f"{tuple(mesh.shape)}, which does not divide its dimensions {tuple(along)}: FSDP2 over "
            "tensor parallelism shards these otherwise than torch's placements say, so that rows "
            "cannot be put together; take sizes that the mesh divides, or rows that ranks have "
            "whole, such as those of per_channel()"
        )
    return found


class Pieces(NamedTuple):
    """A share's lines as they came."""

    each: dict[tuple[int, ...], Tensor]  # of the rank at these places along `across`, flat
    #: all of these, [ranks along the last of `across`, weights], where each has sent as many
    together: Tensor | None


def put_together(into: Tensor, leaf: Lines, pieces: Pieces) -> None:
    """Writes pieces of lines to their places in the whole ones."""
    order = _order(leaf.lies, leaf.dims, leaf.across)
    if pieces.together is None or order is None:
        rank = leaf.mesh.get_coordinate()
        for places, piece in pieces.each.items():
            _put(into, piece, leaf.runs(at(rank, leaf.across, places)))
        return
    # what came lies by the last of `across`, those before it, lines and the dimensions of a piece
    ways = [leaf.mesh.size(d) for d in leaf.across]
    count, last = len(ways), len(ways) - 1
    lies = [0 if k == last else k + 1 for k in range(count)]
    came, sizes, by_line = [len(into)], [len(into)], [count]
    for d, own in enumerate(order):
        length = leaf.shape[d] // math.prod(ways[k] for k in own)
        came.append(length)
        sizes += [*(ways[k] for k in own), length]
        by_line += [*(lies[k] for k in own), count + 1 + d]
    found = pieces.together.reshape(ways[last], *ways[:last], *came)
    into.view(sizes).copy_(found.permute(by_line))


@lru_cache(maxsize=1 << 14)
def weights_of_a_line(lies: Sharding, dims: tuple[int, ...], rank: tuple[int, ...]) -> int:
    """How many weights of each line the rank at that coordinate has."""
    return math.prod(sum(b - a for a, b in lies.runs(d, rank)) for d in dims)


@lru_cache(maxsize=1024)
def _order(
    lies: Sharding, dims: tuple[int, ...], across: tuple[int, ...]
) -> tuple[tuple[int, ...], ...] | None:
    """Which of `across` cut each of the dimensions of a line, those of longer steps first; None
    where some rank's piece is none of equal runs, one a rank, that lie as these ranks do."""
    ways = [lies.mesh[d] for d in across]
    runs: dict[tuple[int, ...], list[Runs]] = {}
    for places in itertools.product(*map(range, ways)):
        rank = at([0] * len(lies.mesh), across, places)
        runs[places] = [lies.runs(d, rank) for d in dims]
    found = []
    for n, d in enumerate(dims):
        cut = [k for k, i in enumerate(across) if sharded_along(lies.placements[i]) == d]
        count = math.prod(ways[k] for k in cut)
        length, rest = divmod(lies.shape[d], count)
        if rest or any(len(own[n]) != 1 for own in runs.values()):
            return None
        ones = {k: tuple(int(j == k) for j in range(len(ways))) for k in cut if ways[k] > 1}
        steps = {k: runs[one][n][0][0] for k, one in ones.items()}
        order = sorted(cut, key=lambda k: -steps.get(k, 0))
        for places, own in runs.items():
            place = 0
            for k in order:
                place = place * ways[k] + places[k]
            if own[n][0] != (place * length, (place + 1) * length):
                return None
        found.append(tuple(order))
    return tuple(found)


def at(rank: Sequence[int], across: Sequence[int], places: Sequence[int]) -> list[int]:
    """The coordinate of the rank at other places along some dimensions of the mesh."""
    found = list(rank)
    for d, place in zip(across, places, strict=True):
        found[d] = place
    return found


def _put(whole: Tensor, piece: Tensor, runs: Sequence[Runs]) -> None:
    """Writes a rank's piece of lines, flat, to its places in them."""
    sizes = [sum(b - a for a, b in own) for own in runs]
    piece = piece.view(len(whole), *sizes)
    ends = [list(itertools.accumulate((b - a for a, b in own), initial=0)) for own in runs]
    for places in itertools.product(*(range(len(own)) for own in runs)):
        there = [slice(None), *(slice(*own[i]) for own, i in zip(runs, places, strict=True))]
        here = [slice(None), *(slice(e[i], e[i + 1]) for e, i in zip(ends, places, strict=True))]
        whole[tuple(there)] = piece[tuple(here)]
