"""What training of large models costs in communication and memory, without the machines.

    python -m tests.benchmarks.scale
    python -m tests.benchmarks.scale --models 8B --ranks 8 64 --json FILE

The quantized matrices of language models are laid out on so many ranks, as meta tensors on a
process group that sends nothing. One rank of them after another makes the refit and the prox
pass of a step of QuantOptimizer, with `parq_prox(uniform(2), ...)` as it anneals: counted are
collectives, the bytes that they bring, the operations that are dispatched, and the most bytes of
tensors that were made on the way and not yet freed. A row is the mean over the ranks that were
asked (`--sample`), which lie evenly among all. Ranks do not receive alike many pieces of rows, so
where all of them share the work (per tensor), the mean of these bytes is over every rank: that of
what the owners of rows lack of them, dimension of the mesh by dimension.

Ends with an error where a figure misses its limit:

- a step without a fit has no collective;
- refits by channel and by block of weights that are sharded by rows bring 0 bytes;
- refits per tensor bring each rank at most 2/N of the weights' bytes, N the number of ranks;
- qparams take at most their bytes over the product of the dimensions that shard rows, and 1 %;
- a step without a fit dispatches at most 20 operations for each weight, a refit at most 200, where
  a rank has a million elements of a weight or fewer: more take a GPU longer than to start on them,
  and are fitted in pieces for the sake of memory.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import weakref
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import parq_fn as pf
from examples.options import at_least
from parq_fn.foundation.command import Parser, command, output_file
from parq_fn.optim.engine.passes import Job, Pass
from parq_fn.optim.engine.passes import refit as refitted
from parq_fn.transforms.exchange import shared
from parq_fn.transforms.layout import Sharding, part_of
from parq_fn.transforms.lines import Lines, at, lines_of, weights_of_a_line
from parq_fn.transforms.prox_state import rows_of
from parq_fn.transforms.sharded import local
from tests.benchmarks.measure import table

TENSOR = 8  # ranks that hold a layer together
STEP_OPERATIONS, REFIT_OPERATIONS = 20, 200  # the most for each weight
FEW = 10**6  # elements for which it takes a GPU longer to start an operation than to do it
COPIES = 8  # of the weights, where groups of ranks hold them whole


class Matrix(NamedTuple):
    """A weight, and along which dimension tensor parallelism cuts it; None of experts."""

    shape: tuple[int, ...]
    cut: int | None


def llama(layers: int, width: int, heads: int, inner: int) -> list[Matrix]:
    """The matrices of a Llama's blocks, heads of keys and values of 128."""
    kinds = [(width, width), (heads * 128, width), (heads * 128, width), (inner, width)]
    block = [Matrix(shape, 0) for shape in (*kinds, (inner, width))]
    return layers * [*block, Matrix((width, width), 1), Matrix((width, inner), 1)]


def experts() -> list[Matrix]:
    """Qwen3-235B-A22B: 94 blocks, 128 experts each."""
    attention = [((8192, 4096), 0), ((512, 4096), 0), ((512, 4096), 0), ((4096, 8192), 1)]
    block = [Matrix(*one) for one in attention]
    return 94 * [*block, Matrix((128, 3072, 4096), None), Matrix((128, 4096, 1536), None)]


MODELS = {
    "8B": lambda: llama(32, 4096, 8, 14336),
    "70B": lambda: llama(80, 8192, 8, 28672),
    "235B-A22B": experts,
}
GRANULARITIES: dict[str, Any] = {
    "tensor": lambda _: pf.per_tensor(),
    "channel": lambda m: pf.per_channel((0, 1) if m.cut is None else 0),
    "block": lambda _: pf.per_block(32),
}


def placements(layout: str, matrix: Matrix, mesh: Sequence[int]) -> list[Any]:
    """Of a weight on a mesh. Experts that are fewer than ranks are sharded along their rows, and so
    is what tensor parallelism leaves fewer rows of than ranks share: strided placements of torch
    say no uneven shards."""
    few = matrix.cut != 1 and math.prod(mesh) > matrix.shape[0]
    if layout == "FSDP2":
        return [Shard(int(few and matrix.cut is None))]
    if layout == "HSDP":
        return [Replicate(), Shard(int(few and mesh[1] > matrix.shape[0]))]
    if layout == "columns":  # as FSDP2 shards along another dimension
        return [Shard(1)]
    inner = Shard(matrix.cut or 0)
    if few:
        return [Shard(1), inner]
    if inner.dim == 0:
        return [_StridedShard(0, split_factor=mesh[1]), inner]
    return [Shard(0), inner]


LAYOUTS = {
    "FSDP2": lambda ranks: (ranks,),
    "HSDP": lambda ranks: (min(COPIES, ranks // 2), ranks // min(COPIES, ranks // 2)),
    "FSDP2 x TP": lambda ranks: (ranks // min(TENSOR, ranks), min(TENSOR, ranks)),
    "columns": lambda ranks: (ranks,),
}


#: {an operation and the shapes that it is given: shapes of what it gives}
_KNOWN: dict[Any, Any] = {}


def _meta(func: Any, args: Any, kwargs: Any) -> Any:
    """The result on meta tensors. Those of one shape follow from another's: most weights have one
    of few shapes, and torch takes a millisecond to find out what an addition of two of them is."""
    if func.is_view or func._schema.is_mutable or func.namespace != "aten":
        return func(*args, **kwargs)
    flat, spec = torch.utils._pytree.tree_flatten((args, kwargs))
    if not all(x.is_meta for x in flat if isinstance(x, Tensor)):
        return func(*args, **kwargs)
    key = func, spec, tuple(_shape(x) if isinstance(x, Tensor) else (type(x), x) for x in flat)
    if key not in _KNOWN:
        made = func(*args, **kwargs)
        alike = isinstance(made, Tensor) and made.is_meta and type(made) is Tensor
        _KNOWN[key] = _shape(made) if alike and made._base is None else None
        return made
    known = _KNOWN[key]
    if known is None:
        return func(*args, **kwargs)
    size, stride, dtype = known
    return torch.empty_strided(size, stride, dtype=dtype, device="meta")


def _shape(x: Tensor) -> Any:
    return x.size(), x.stride(), x.dtype


class Counted(TorchDispatchMode):
    """Counts operations, what collectives bring, and bytes of tensors that are there at once."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.collectives = self.received = self.now = self.most = 0
        self.pieces = 0  # bytes of what is received, which go from each rank to each
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.collectives += func.__name__ != "wait_tensor.default"
            brought = self._brought(func, args)
            self.received += brought
            self.pieces += brought * func.__name__.startswith("alltoall_base_")
        else:
            self.operations += 1
        result = _meta(func, args, kwargs or {})
        for made in torch.utils._pytree.tree_leaves(result):
            if isinstance(made, Tensor) and not func.is_view:
                self._keep(made)
        return result

    def _keep(self, made: Tensor) -> None:
        storage = made.untyped_storage()
        size, key = storage.nbytes(), storage._cdata
        if key in self._known:  # written to
            return
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

    @staticmethod
    def _brought(func: Any, args: Any) -> int:
        """Bytes that come from other ranks."""
        if func.__name__.startswith("alltoall_base_"):
            into, _, group, parts = args[0], args[1], args[2], args[3]
            own = parts[dist.ProcessGroup.unbox(group).rank()] if parts else 0
            return (into.numel() - own) * into.element_size()
        if func.__name__.startswith("_allgather_base_"):
            return int(args[0].nbytes - args[1].nbytes)
        raise ValueError(f"{func} is none that a fit or a map ought to call")


class Costs(NamedTuple):
    """What one rank does and holds; bytes, and operations for each weight."""

    weights: float  # all of them, float32
    elements: float  # that the rank has of a weight, the mean
    step_collectives: float
    step_operations: float
    collectives: float  # of a refit, as what follows
    received: float
    pieces: float  # of what was received, those of rows
    all_pieces: float  # the same of all ranks together; nan where groups of them share the work
    operations: float
    peak: float
    qparams: float  # held
    shard: float  # what they may take


def on_rank(rank: int, ranks: int, layout: str, matrices: Sequence[Matrix], how: str) -> Costs:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", LAYOUTS[layout](ranks))
        cuts: dict[Any, dict[str, Tensor]] = {}
        for i, matrix in enumerate(matrices):
            where = placements(layout, matrix, mesh.shape)
            params = cuts.setdefault(GRANULARITIES[how](matrix), {})
            params[str(i)] = on_mesh(matrix.shape, mesh, where)
        with torch.no_grad():
            found = [_of_cut(granularity, params) for granularity, params in cuts.items()]
    finally:
        dist.destroy_process_group()
    return _added(found, [len(params) for params in cuts.values()])


def _of_cut(granularity: Any, params: dict[str, Tensor]) -> Costs:
    """Of weights whose rows are cut alike."""
    link = pf.parq_prox(
        pf.uniform(2), anneal_start=0, anneal_end=4, granularity=granularity, period=1
    )
    state = link.init(params)
    for _ in range(3):
        state = link.advance(state, torch.zeros(()))
    latents = [*params.values()]
    weights = [torch.empty_like(local(p)) for p in latents]
    with Counted() as refit:
        found = refitted(link, state, latents, [*state.qparams.values()])
    with Counted() as step:
        parts = [part_of(p, granularity) for p in latents]
        rows = [rows_of(link, *own) for own in zip(found, latents, parts, strict=True)]
        each = zip(latents, rows, parts, weights, strict=True)
        Pass()(link, state, [Job(local(p), q, part.granularity, w) for p, q, part, w in each])
    shard = 0.0
    for p, q in zip(latents, found, strict=True):
        rows = zip(p.device_mesh.shape, q.placements, strict=True)
        shard += q.nbytes / math.prod(n for n, placement in rows if placement.is_shard())
    count = len(params)
    return Costs(
        sum(p.nbytes for p in latents),
        sum(weight.numel() for weight in weights) / count,
        step.collectives,
        step.operations / count,
        refit.collectives,
        refit.received,
        refit.pieces,
        pieces_of_all(params, granularity),
        refit.operations / count,
        refit.most,
        sum(q.to_local().nbytes for q in found),
        shard,
    )


def pieces_of_all(params: dict[str, Tensor], granularity: Any) -> float:
    """Bytes of pieces of rows that all ranks receive together in a refit: of each row what its
    owner's place along a dimension of the mesh does not have of it, for each dimension that cuts
    it. nan where not all ranks share the rows."""
    kinds: dict[Any, list[Lines]] = {}
    for name, p in params.items():
        lines = lines_of(p, local(p), granularity, name)
        if lines.across:
            kinds.setdefault(lines.kind, []).append(lines)
    total = 0
    for leaves in kinds.values():
        mesh, across, sharing = leaves[0].mesh, leaves[0].across, leaves[0].sharing
        sizes = [mesh.size(d) for d in sharing]
        if math.prod(sizes) < mesh.size():
            return math.nan
        for share in itertools.chain.from_iterable(shared(leaves, sizes)):
            leaf = leaves[share.leaf]
            for d in across:
                there = _held(leaf.lies, leaf.dims, across, d, share.owner[sharing.index(d)])
                lacking = math.prod(leaf.shape) - there
                total += share.size * lacking * leaf.mine.element_size()
    return total


@lru_cache(None)
def _held(lies: Any, dims: tuple[int, ...], across: tuple[int, ...], d: int, place: int) -> int:
    """Weights of a line that the ranks at a place along a dimension of the mesh have together."""
    ways = [[place] if i == d else range(lies.mesh[i]) for i in across]
    ranks = (at([0] * len(lies.mesh), across, places) for places in itertools.product(*ways))
    return sum(weights_of_a_line(lies, dims, tuple(rank)) for rank in ranks)


def _added(parts: Sequence[Costs], counts: Sequence[int]) -> Costs:
    """Of all weights: sums, means of what is of a weight, and the largest peak."""
    total = Costs(*map(sum, zip(*parts, strict=True)))
    weighted = {
        key: sum(getattr(one, key) * n for one, n in zip(parts, counts, strict=True)) / sum(counts)
        for key in ("elements", "operations", "step_operations")
    }
    return total._replace(**weighted, peak=max(one.peak for one in parts))


def on_mesh(shape: tuple[int, ...], mesh: DeviceMesh, where: Sequence[Any]) -> Tensor:
    """A weight without values."""
    lies, rank = Sharding(shape, tuple(mesh.shape), tuple(where)), mesh.get_coordinate()
    size = [sum(b - a for a, b in lies.runs(d, rank)) for d in range(len(shape))]
    mine = torch.empty(size, device="meta")
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(mine, mesh, where, shape=torch.Size(shape), stride=stride)


class Row(NamedTuple):
    """The mean over ranks."""

    model: str
    layout: str
    ranks: int
    granularity: str
    costs: Costs

    @property
    def missed(self) -> list[str]:
        """The limits that it does not keep."""
        costs, found = self.costs, []
        if costs.step_collectives:
            found.append(f"a step has {costs.step_collectives:g} collectives")
        by_rows = self.layout in ("FSDP2", "HSDP") and self.granularity != "tensor"
        if by_rows and costs.received:
            found.append(f"a refit brings {costs.received:.3g} bytes, where rows are whole")
        if self.granularity == "tensor" and costs.received > 2 * costs.weights / self.ranks:
            found.append(
                f"a refit brings {costs.received * self.ranks / costs.weights:.3g}/N of the weights"
            )
        few = costs.elements <= FEW
        if few and costs.step_operations > STEP_OPERATIONS:
            found.append(f"a step dispatches {costs.step_operations:.1f} operations a weight")
        if few and costs.operations > REFIT_OPERATIONS:
            found.append(f"a refit dispatches {costs.operations:.1f} operations a weight")
        if costs.qparams > 1.01 * costs.shard:
            found.append(f"qparams take {costs.qparams:.3g} bytes, of {costs.shard:.3g}")
        return found

    @property
    def cells(self) -> list[str]:
        costs = self.costs
        of_weights = costs.received * self.ranks / costs.weights
        return [
            *(self.model, self.layout, str(self.ranks), self.granularity),
            f"{costs.step_collectives:g}",
            f"{costs.step_operations:.1f}",
            f"{costs.collectives:.1f}",
            f"{costs.received / 1e6:.2f}",
            f"{of_weights:.2f}/N",
            f"{costs.operations:.1f}",
            f"{costs.peak / 1e6:.0f}",
            f"{costs.qparams / 1e6:.3f}",
            "; ".join(self.missed) or "met",
        ]


HEADS = [
    *("model", "layout", "ranks", "rows", "step: collectives", "operations a weight"),
    *("refit: collectives", "MB received", "of the weights", "operations a weight", "peak MB"),
    *("qparams MB", "limits"),
]


def asked(ranks: int, sample: int) -> list[int]:
    """Ranks that lie evenly among all."""
    return sorted({i * ranks // sample for i in range(min(sample, ranks))})


def mean(of_ranks: Sequence[Costs], ranks: int) -> Costs:
    """Over those that were asked, and over all ranks where it is known what all receive."""
    found = Costs(*(sum(c) / len(of_ranks) for c in zip(*of_ranks, strict=True)))
    if math.isnan(found.all_pieces):
        return found
    every = found.all_pieces / ranks
    if len(of_ranks) == ranks and every != found.pieces:
        raise AssertionError(f"ranks received {found.pieces} bytes of pieces, {every} by the plan")
    return found._replace(pieces=every, received=found.received - found.pieces + every)


def rows(models: Sequence[str], ranks: Sequence[int], sample: int) -> Iterator[Row]:
    for model in models:
        matrices = MODELS[model]()
        for count in ranks:
            for layout in LAYOUTS:
                for how in GRANULARITIES:
                    of_ranks = [
                        on_rank(rank, count, layout, matrices, how) for rank in asked(count, sample)
                    ]
                    yield Row(model, layout, count, how, mean(of_ranks, count))


def main(argv: list[str] | None = None) -> int:
    parser = Parser("tests.benchmarks.scale", __doc__)
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="which"
    )
    several: Any = {"nargs": "+", "type": at_least(2, int)}
    parser.add_argument("--ranks", **several, default=[8, 64, 1024], help="how many")
    parser.add_argument("--sample", type=at_least(1, int), default=2, help="ranks that are asked")
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args(argv)
    if args.json is not None:
        output_file(args.json)
    found = []
    for row in rows(args.models, args.ranks, args.sample):
        print(" ".join(row.cells), file=sys.stderr, flush=True)
        found.append(row)
    print(table([HEADS, *(row.cells for row in found)]))
    if args.json is not None:
        figures = [{**row._asdict(), "costs": row.costs._asdict()} for row in found]
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    missed = [row for row in found if row.missed]
    print(f"{len(found) - len(missed)} of {len(found)} rows meet their limits")
    return int(bool(missed))


if __name__ == "__main__":
    command(main)
