"""What ranks tell each other about a refit besides weights and qparams.

Before anything is sent they compare what each is to refit (`check_alike`): 8 bytes of each rank
along every dimension of the mesh. A rank that froze a parameter alone would else not come to a
collective that the others wait in, or come to that of another parameter. Where no row is cut
nothing is sent, and nothing compared.

After it they tell each other which of them hold NaN, where one did (`log_not_finite`).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from parq_fn.foundation.scalar import concrete
from parq_fn.foundation.tree import PyTree, names_of, tree_leaves
from parq_fn.transforms.collective import RanksError, from_all, not_come
from parq_fn.transforms.layout import across
from parq_fn.transforms.lines import Lines, lines_of
from parq_fn.transforms.prox_state import ProxState
from parq_fn.transforms.sharded import is_dtensor, local
from parq_fn.transforms.transformation import name_of

if TYPE_CHECKING:
    from parq_fn.transforms.prox_link import Prox

_LOG = logging.getLogger("parq_fn")

#: {leaf: what a rank is to do with it}.
Told = dict[str, str]


# Whether ranks do the same


def check_alike(link: Prox, state: ProxState, latents: PyTree, frozen: Collection[str]) -> None:
    """Raises RanksError, on every rank of a mesh, unless all are to refit the same leaves on it.

    Compared are leaves of which a refit sends anything: those with rows that ranks have pieces of,
    and all of a quantizer that asks all ranks for a number.
    frozen: names of leaves whose new qparams the caller does not take.
    """
    if torch.compiler.is_compiling():
        return
    leaves = tree_leaves(latents)
    asks = bool(getattr(link.quantizer, "num_whole", 0))
    sent = [is_dtensor(leaf) and (asks or bool(across(leaf, link.granularity))) for leaf in leaves]
    if not any(sent):
        return
    step = concrete(state.count)
    by_mesh: dict[Any, Told] = {}
    some: dict[Any, Any] = {}
    for name, leaf in itertools.compress(zip(names_of(latents), leaves, strict=True), sent):
        shape, numbers = tuple(leaf.shape), link.quantizer.num_qparams
        told = f"{shape} of {leaf.dtype} placed as {leaf.placements}, {numbers} numbers a row"
        told += "" if step is None else f", at update {step}"
        by_mesh.setdefault(leaf.device_mesh, {})[name] = told + ", frozen" * (name in frozen)
        some.setdefault(leaf.device_mesh, local(leaf))
    for mesh, told_of in by_mesh.items():
        _check_told(name_of(link), mesh, told_of, some[mesh].device)


def _check_told(who: str, mesh: Any, told: Told, device: torch.device) -> None:
    """Each dimension of the mesh hands on to the next whether ranks along it are alike, so that
    all ranks of the mesh raise, or none."""
    names = list(told)
    text = repr(told).encode()
    digest = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big") + 1
    mine = torch.full((), digest, dtype=torch.int64, device=device)  # 0 where ranks differ
    dims = [d for d in range(mesh.ndim) if mesh.size(d) > 1]
    for d in dims:
        every = from_all(mine, mesh, d, names)
        mine = torch.where((every == mine).all(), mine, 0)
    if _read(mine) != [0]:
        return
    by_rank = {dist.get_rank(): told}
    for d in dims:
        group = mesh.get_group(d)
        found: list[Any] = [None] * mesh.size(d)
        try:
            dist.all_gather_object(found, by_rank, group=group)
        except RuntimeError as error:
            raise not_come(names, group, error) from error
        by_rank = {rank: one for part in found for rank, one in part.items()}
    raise RanksError(
        f"{who}: ranks are to refit different parameters together: {_difference(by_rank)}. Freeze "
        "and thaw parameters on all ranks alike, and give all the same ones. Nothing was fitted, "
        "qparams are as before"
    )


def _difference(by_rank: Mapping[int, Told]) -> str:
    found = []
    for name in sorted({name for told in by_rank.values() for name in told}):
        ranks: dict[str | None, list[int]] = {}
        for rank in sorted(by_rank):
            ranks.setdefault(by_rank[rank].get(name), []).append(rank)
        if len(ranks) > 1:
            missing = ranks.pop(None, [])
            unlike = len(ranks) > 1
            own = [f"on ranks {on}" + unlike * f" ({told})" for told, on in ranks.items()]
            own += [f"not on ranks {missing}"] if missing else []
            found.append(f"{name!r} {', '.join(own)}")
    return "; ".join(found) or "in another order"


def _read(tensor: Tensor) -> list[Any] | None:
    """The values, which a device is waited for; None where there are none to be had."""
    if tensor.is_meta or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    try:
        values: list[Any] = tensor.reshape(-1).tolist()
    except RuntimeError:  # batched by vmap, or fake
        return None
    return values


# Which of them hold NaN


def finite(found: Mapping[int, Tensor], leaves: Sequence[Tensor]) -> dict[int, bool | None]:
    """Whether all of what was fitted to a leaf, by its place, is finite; None where that cannot be
    read, or where a device would have to be waited for and the leaf is not sharded."""
    sums = {i: fitted.sum().isfinite() for i, fitted in found.items()}
    known: dict[int, bool | None] = {i: concrete(flag) for i, flag in sums.items()}
    unread = [i for i, value in known.items() if value is None and is_dtensor(leaves[i])]
    if unread and not torch.compiler.is_compiling():
        values = _read(torch.stack([sums[i] for i in unread]))
        known.update(zip(unread, values or [None] * len(unread), strict=True))
    return known


def log_not_finite(
    link: Prox,
    state: ProxState,
    latents: PyTree,
    found: Mapping[int, Tensor],
    parts: Sequence[tuple[str, int]] = (),
) -> None:
    """A warning in the log "parq_fn" that names leaves with latents that are NaN or infinite, how
    many of them each rank has, and how many rows are not fitted.

    found: what was fitted to these leaves, by their places; all ranks that have pieces of a row
    find the same.
    parts: (name, rows) of parameters whose rows, one after another, are those of the only leaf.
    """
    leaves, names = tree_leaves(latents), names_of(latents)
    many = dist.is_available() and dist.is_initialized()
    here = dist.get_rank() if many else None
    counts: dict[str, dict[int | None, int]] = {}
    kinds: dict[Any, list[Lines]] = {}
    for i in found:
        bad = ~local(leaves[i]).isfinite()
        if parts:
            each = torch.split(bad.flatten(1).sum(1), [rows for _, rows in parts])
            own = {name: int(n.sum()) for (name, _), n in zip(parts, each, strict=True)}
            counts |= {name: {here: n} for name, n in own.items() if n}
        else:
            counts[names[i]] = {here: int(bad.sum())}
        if across(leaves[i], link.granularity):
            lines = lines_of(leaves[i], local(leaves[i]), link.granularity, names[i])
            kinds.setdefault(lines.kind, []).append(lines)
    for alike in kinds.values():
        of_all = _counts_of_all(alike, [counts[lines.name][here] for lines in alike])
        counts.update(zip((lines.name for lines in alike), of_all, strict=True))
    rows = sum(int((~fitted.isfinite()).any(-1).sum()) for fitted in found.values())
    said = [f"{name!r} ({_on_ranks(of_ranks)})" for name, of_ranks in counts.items()]
    first = int(state.count) - 1 == link.warmup
    _LOG.warning(
        "%s, update %d: latents are NaN or infinite: %s; %d of the rows here %s",
        name_of(link),
        int(state.count),
        ", ".join(said),
        rows,
        "have NaN for levels until a fit finds them finite" if first else "keep their qparams",
    )


def _counts_of_all(alike: Sequence[Lines], mine: list[int]) -> list[dict[int | None, int]]:
    """{rank: its count} for each leaf, of the ranks that share its lines."""
    mesh, sharing = alike[0].mesh, alike[0].sharing
    counts = torch.tensor(mine, dtype=torch.int64, device=alike[0].mine.device)
    for d in sharing:
        counts = from_all(counts, mesh, d, [lines.name for lines in alike])
    by_rank: list[dict[int | None, int]] = [{} for _ in alike]
    for places in itertools.product(*(range(mesh.size(d)) for d in sharing)):
        coordinate = list(mesh.get_coordinate())
        for d, place in zip(sharing, places, strict=True):
            coordinate[d] = place
        rank = int(mesh.mesh[tuple(coordinate)])
        for own, count in zip(by_rank, counts[places[::-1]].tolist(), strict=True):
            own[rank] = count
    return by_rank


def _on_ranks(counts: Mapping[int | None, int]) -> str:
    """How many on which rank."""
    some = [f"{n}" if rank is None else f"{n} on rank {rank}" for rank, n in counts.items() if n]
    return ", ".join(some) or "on other ranks"
