"""Weights on meshes of any shape: levels and weights are those of one process, bit for bit."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import parq_fn as pf
from parq_fn.optim import (
    QuantOptimizer,
    TransformOptimizer,
    load_checkpoint,
    save_checkpoint,
)
from tests.helpers import every_case, sampled
from tests.optim.helpers import whole
from tests.processes import on_processes

RATE = 0.125  # a product with which is exact, however steps are written
SPAN: dict[str, Any] = {"anneal_start": 1, "anneal_end": 4, "period": 2}
SHAPES = {"one": (12, 8), "two": (8, 12), "experts": (4, 4, 8), "uneven": (5, 6), "vector": (7,)}

#: {name: (shape of the mesh, placements of a weight)}
LAYOUTS: dict[str, Any] = {
    "FSDP2": ((4,), [Shard(0)]),
    "HSDP": ((2, 2), [Replicate(), Shard(0)]),
    "rowwise": ((4,), [Shard(1)]),
    "two": ((2, 2), [Shard(0), Shard(1)]),
    "upright": ((2, 2), [Shard(1), Shard(0)]),
    "twice": ((2, 2), [Shard(0), Shard(0)]),
    "replicated": ((2, 2), [Shard(1), Replicate()]),
    "last": ((2, 2), [Replicate(), Shard(-1)]),
}
CUTS: dict[str, pf.Granularity] = {
    "tensor": pf.per_tensor(),
    "channel": pf.per_channel(),
    "columns": pf.per_channel(-1),
    "block": pf.per_block(2),
    "upright": pf.per_block(4, along=0),
}
QUANTIZERS = {"lsbq": pf.lsbq(2), "uniform": pf.uniform(2), "max": pf.integer(3)}


def by_base(params: Any, link: pf.Prox, **options: Any) -> QuantOptimizer:
    groups = [{"params": [*params.items()], "prox": link}]
    return QuantOptimizer(torch.optim.SGD(groups, lr=RATE), **options)


def by_tree(params: Any, link: pf.Prox) -> TransformOptimizer:
    return TransformOptimizer([*params.items()], pf.chain(pf.sgd(RATE), link))


ADAPTERS: dict[str, Any] = {
    "QuantOptimizer": by_base,
    "compiled": lambda params, link: by_base(params, link, compile=True),
    "TransformOptimizer": by_tree,
}


def weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def on_mesh(params: dict[str, Tensor], layout: str) -> dict[str, nn.Parameter]:
    shape, placements = LAYOUTS[layout]
    mesh, found = init_device_mesh("cpu", shape), {}
    for name, p in params.items():
        own = [Shard(q.dim % p.dim()) if isinstance(q, Shard) else q for q in placements]
        found[name] = nn.Parameter(distribute_tensor(p, mesh, own))
    return found


def trained(optimizer: Any, params: dict[str, nn.Parameter], steps: int) -> None:
    """Steps whose gradients are the sines of the latents, which no weight enters."""
    for _ in range(steps):
        for p in params.values():
            entries = optimizer.state[p]
            latent = entries.get("latent", p)
            p.grad = torch.sin(latent.detach())
        optimizer.step()


def able(cut: str, name: str) -> bool:
    """Whether a weight can be cut so."""
    try:
        CUTS[cut].shape(torch.empty(SHAPES[name]))
    except ValueError:
        return False
    return True


def as_traced() -> None:
    """Compiled functions run as they are in this process, unless all cases are asked for: that
    they give the same is tested elsewhere."""
    if not every_case():
        torch.compile = lambda function, **_: function  # type: ignore[assignment]


def as_one_process(cases: list[tuple[str, str, str, str]]) -> None:
    as_traced()
    for layout, cut, quantizer, adapter in cases:
        link = pf.parq_prox(QUANTIZERS[quantizer], **SPAN, granularity=CUTS[cut])
        given = {name: p for name, p in weights().items() if able(cut, name)}
        alone = {name: nn.Parameter(p.clone()) for name, p in given.items()}
        split = on_mesh(given, layout)
        one, other = (ADAPTERS[adapter](params, link) for params in (alone, split))
        for steps in (1, 2, 3):
            trained(one, alone, steps)
            trained(other, split, steps)
            for name, p in alone.items():
                at = layout, cut, quantizer, adapter, name, steps
                assert torch.equal(whole(split[name]), p), at
                assert torch.equal(whole(other.levels(split[name])), one.levels(p)), at


@pytest.mark.slow
def test_every_layout_gives_the_weights_of_one_process(tmp_path: Path) -> None:
    cases = sampled(itertools.product(LAYOUTS, CUTS, QUANTIZERS, ADAPTERS), 9)
    on_processes(as_one_process, 4, tmp_path, cases)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(8, 12, bias=False)
        self.two = nn.Linear(12, 8, bias=False)


def tensor_parallel() -> None:
    """FSDP2 over tensor parallelism, as torch makes it."""
    as_traced()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"one": ColwiseParallel(), "two": RowwiseParallel()}
    cases = itertools.product(CUTS.items(), ADAPTERS.items())
    for (cut, granularity), (adapter, build) in sampled(cases, 6):
        link = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=granularity)
        alone, net = Two(), Two()
        parallelize_module(net, mesh["tensor"], plan)
        fully_shard(net, mesh=mesh["data"])
        params, split = (dict(each.named_parameters()) for each in (alone, net))
        one, other = build(params, link), build(split, link)
        for _ in range(4):
            trained(one, params, 1)
            trained(other, split, 1)
            for name, p in params.items():
                assert torch.equal(whole(split[name]), p), (cut, adapter, name)
                assert torch.equal(whole(other.levels(split[name])), one.levels(p)), (cut, adapter)


def uneven() -> None:
    """Rows that torch itself cannot put together: an error on every rank, and none waits."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for rows, quantizer in itertools.product((9, 10), (pf.lsbq(2), pf.integer(2))):
        net = nn.Sequential(nn.Linear(8, rows, bias=False))
        parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel()})
        fully_shard(net, mesh=mesh["data"])
        optimizer = by_base(dict(net.named_parameters()), pf.hard_prox(quantizer, period=1))
        net[0].weight.grad = torch.ones_like(net[0].weight)
        with pytest.raises(ValueError, match="take sizes that the mesh divides"):
            optimizer.step()


@pytest.mark.slow
def test_rows_that_torch_cannot_put_together_are_refused_on_every_rank(tmp_path: Path) -> None:
    on_processes(uneven, 4, tmp_path)


@pytest.mark.slow
def test_fsdp2_over_tensor_parallelism_gives_the_weights_of_one_process(tmp_path: Path) -> None:
    on_processes(tensor_parallel, 4, tmp_path)


def resumed_elsewhere(folder: str, pairs: list[tuple[str, str, str, str]]) -> None:
    """A checkpoint of one layout goes on in another."""
    for i, (first, second, cut, adapter) in enumerate(pairs):
        link = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=CUTS[cut])
        given = {name: p for name, p in weights().items() if able(cut, name)}
        alone = nn.ParameterDict({name: nn.Parameter(p.clone()) for name, p in given.items()})
        one, build = ADAPTERS[adapter](alone, link), ADAPTERS[adapter]
        nets = [nn.ParameterDict(on_mesh(given, layout)) for layout in (first, second)]
        before, after = (build(net, link) for net in nets)
        for optimizer, net, steps in ((one, alone, 3), (before, nets[0], 3)):
            trained(optimizer, dict(net), steps)
        save_checkpoint(f"{folder}/{i}", nets[0], before)
        load_checkpoint(f"{folder}/{i}", nets[1], after)
        for steps in (0, 2):
            trained(one, dict(alone), steps)
            trained(after, dict(nets[1]), steps)
            for name, p in alone.items():
                at = first, second, cut, adapter, name, steps
                assert torch.equal(whole(nets[1][name]), p), at
                assert torch.equal(whole(after.levels(nets[1][name])), one.levels(p)), at


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_any_layout(tmp_path: Path) -> None:
    adapters = ["QuantOptimizer", "TransformOptimizer"]
    pairs = sampled(itertools.product(LAYOUTS, LAYOUTS, CUTS, adapters), 2)
    on_processes(resumed_elsewhere, 4, tmp_path, str(tmp_path), pairs)


def qparams_are_placed_as_rows() -> None:
    expected = {
        ("FSDP2", "channel"): (Shard(0),),
        ("FSDP2", "tensor"): (Replicate(),),
        ("FSDP2", "block"): (Shard(0),),
        ("rowwise", "channel"): (Replicate(),),
        ("rowwise", "block"): (Shard(1),),
        ("rowwise", "columns"): (Shard(0),),
        ("two", "block"): (Shard(0), Shard(1)),
        ("two", "channel"): (Shard(0), Replicate()),
    }
    for (layout, cut), placements in expected.items():
        params = {"w": on_mesh({"w": torch.randn(8, 16)}, layout)["w"].detach()}
        state = pf.hard_prox(pf.lsbq(2), granularity=CUTS[cut]).init(params)
        qparams: Any = state.qparams["w"]
        assert qparams.placements == placements, (layout, cut)
        assert qparams.shape == (*CUTS[cut].row_shape(params["w"]), 2)


def rows_that_ranks_have_whole_need_no_collective() -> None:
    for layout, cut in (("FSDP2", "channel"), ("FSDP2", "block"), ("rowwise", "block")):
        params = on_mesh({"w": torch.randn(8, 16)}, layout)
        optimizer = by_base(params, pf.hard_prox(pf.lsbq(2), granularity=CUTS[cut], period=1))
        params["w"].grad = torch.ones_like(params["w"])
        optimizer.step()
        with CommDebugMode() as mode:
            optimizer.step()
        assert mode.get_total_counts() == 0, (layout, cut, mode.get_comm_counts())
    for p in on_mesh({"w": torch.randn(8, 16)}, "FSDP2").values():
        assert isinstance(p, DTensor)


def states_of_before_load() -> None:
    """Versions that kept qparams whole on every rank saved them so."""
    learn = pf.learn(pf.sgd(0.01, momentum=0.9))
    for layout, adapter in (("FSDP2", "QuantOptimizer"), ("two", "TransformOptimizer")):
        for granularity in (pf.per_channel(), pf.per_tensor()):
            link = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=granularity, learn=learn)
            params, others = (on_mesh({"w": weights()["one"]}, layout) for _ in range(2))
            before, after = (ADAPTERS[adapter](own, link) for own in (params, others))
            trained(before, params, 3)
            saved = before.state_dict()
            for entries in saved["state"].values():
                rows = [
                    key for key in entries if {"qparams", "learn", "learned"} & {*key.split(".")}
                ]
                entries.update({key: whole(entries[key]) for key in rows})
            after.load_state_dict(saved)
            for optimizer, own in ((before, params), (after, others)):
                trained(optimizer, own, 2)
            assert torch.equal(whole(params["w"]), whole(others["w"])), (layout, granularity)


def copies_go_on() -> None:
    """A deep copy, and a state dict on each rank, go on as the optimizer does."""
    link = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=pf.per_channel())
    for adapter in ("QuantOptimizer", "TransformOptimizer"):
        params = on_mesh({"w": weights()["one"]}, "upright")
        optimizer = ADAPTERS[adapter](params, link)
        trained(optimizer, params, 2)
        copied, net = copy.deepcopy((optimizer, params))
        for one, own in ((optimizer, params), (copied, net)):
            trained(one, own, 3)
        assert torch.equal(whole(net["w"]), whole(params["w"])), adapter


def other_dtypes_and_quantizers() -> None:
    quantizers = [pf.nvfp4(), pf.mxfp4(), pf.asymmetric(2), pf.lsbq(2, "optimal")]
    for layout, quantizer in itertools.product(("rowwise", "two", "HSDP"), quantizers):
        link = pf.hard_prox(quantizer, period=1, granularity=pf.per_block(4))
        given = {"w": weights()["one"].bfloat16()}
        alone, split = {"w": nn.Parameter(given["w"].clone())}, on_mesh(given, layout)
        for optimizer, own in ((by_base(alone, link), alone), (by_base(split, link), split)):
            for _ in range(3):
                own["w"].grad = torch.ones_like(own["w"])
                optimizer.step()
        assert torch.equal(whole(split["w"]), alone["w"]), (layout, quantizer)


def gradients_placed_otherwise() -> None:
    """torch places gradients of hand-sharded weights as it likes."""
    learn = pf.learn(pf.sgd(0.01))
    links = [
        pf.parq_prox(pf.uniform(2), **SPAN, learn=learn, granularity=pf.per_channel()),
        pf.hard_prox(pf.uniform(2), gradient=pf.estimators.inside(), period=1),
    ]
    for link, adapter in itertools.product(links, ("QuantOptimizer", "TransformOptimizer")):
        for layout, placement in (("FSDP2", Shard(1)), ("rowwise", Shard(0)), ("rowwise", None)):
            runs = [on_mesh({"w": weights()["one"]}, layout) for _ in range(2)]
            for params, moved in zip(runs, (False, True), strict=True):
                optimizer = ADAPTERS[adapter](params, link)
                for step in range(4):
                    p: Any = params["w"]
                    whole_grad = torch.sin(torch.arange(p.numel()) + step).reshape(p.shape)
                    own = [placement or Replicate()] if moved else p.placements
                    p.grad = None
                    p.grad = distribute_tensor(whole_grad, p.device_mesh, own)
                    optimizer.step()
            one, two = (whole(params["w"]) for params in runs)
            assert torch.equal(one, two), (link, adapter, layout)


def placements_and_collectives() -> None:
    qparams_are_placed_as_rows()
    rows_that_ranks_have_whole_need_no_collective()
    states_of_before_load()
    copies_go_on()
    other_dtypes_and_quantizers()
    gradients_placed_otherwise()


@pytest.mark.slow
def test_qparams_lie_where_rows_do_and_whole_rows_are_fitted_there(tmp_path: Path) -> None:
    on_processes(placements_and_collectives, 4, tmp_path)
