"""Both adapters on sharded and replicated models: what one process gives, bit for bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import parq_fn as pf
from parq_fn import ProxState
from parq_fn.optim import QuantOptimizer
from tests.benchmarks.scale import Counted
from tests.helpers import sampled
from tests.optim.helpers import ADAPTERS, BITS, Net, check_same, quantized, sharded, train, whole
from tests.processes import on_processes

SPAN: dict[str, Any] = {"anneal_start": 1, "anneal_end": 6, "period": 2}


PROXES = {
    "tensor": pf.parq_prox(pf.lsbq(2), **SPAN),
    "channel": pf.parq_prox(pf.lsbq(2), **SPAN, granularity=pf.per_channel()),
    "shrink": pf.parq_prox(pf.uniform(2), **SPAN, granularity=pf.per_channel(), shrink=True),
    "normal_map": pf.hard_prox(pf.lsbq(2, "optimal"), period=1, normal_map=2.0),
    "soft": pf.soft_prox(pf.lloyd_max(2), **SPAN),
    "trusted": pf.parq_prox(pf.lsbq(2), **SPAN, gradient=pf.estimators.trust(0.8)),
    "damped": pf.hard_prox(
        pf.lsbq(2),
        period=2,
        granularity=pf.per_channel(),
        gradient=pf.estimators.damped(0.4),
    ),
}


def same_as_alone(shape: tuple[int, ...], offload: bool, dtypes: tuple[str, ...]) -> None:
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if offload else {}
    for given, adapter, name in sampled(itertools.product(dtypes, ADAPTERS, PROXES), 3):
        dtype = getattr(torch, given)
        alone, net = Net(dtype), sharded(Net(dtype), shape, **policy)
        one, other = (ADAPTERS[adapter](each, PROXES[name]) for each in (alone, net))
        for _ in range(8):
            train(alone, one, 1)
            train(net, other, 1)
        check_same(alone, one, net, other, (adapter, name))
        if name != "shrink":
            levels = whole(other.levels(net.linear.weight)).to(dtype).unsqueeze(0).flatten(0, -2)
            rows = whole(net.linear.weight).reshape(levels.shape[0], -1)
            assert (rows.unsqueeze(-1) == levels.unsqueeze(-2)).any(-1).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "offload", "dtypes"),
    sampled(
        [
            ((2,), False, ("float64", "bfloat16")),
            ((4,), False, ("float64",)),
            ((2, 2), False, ("bfloat16",)),
            ((2,), True, ("float32",)),
        ],
        1,
    ),
)
def test_r17_levels_and_weights_equal_those_of_one_process(
    shape: tuple[int, ...], offload: bool, dtypes: tuple[str, ...], tmp_path: Path
) -> None:
    world = int(torch.tensor(shape).prod())
    on_processes(same_as_alone, world, tmp_path, shape, offload, dtypes)


def other_ways_to_train() -> None:
    for adapter, build in ADAPTERS.items():
        prox = PROXES["channel"]

        # a module frozen in mid-training, and thawed
        alone, net = Net(torch.float64), sharded(Net(torch.float64), (2,))
        one, other = build(alone, prox), build(net, prox)
        for t in range(9):
            for module in (alone, net):
                module.linear.requires_grad_(not 3 <= t < 6)
            train(alone, one, 1)
            train(net, other, 1)
            check_same(alone, one, net, other, ("frozen", adapter, t))

        # averages, and other weights for a while
        alone, net = Net(torch.float64), sharded(Net(torch.float64), (2,))
        one, other = build(alone, prox, 0.7), build(net, prox, 0.7)
        for t in range(7):
            for block in ("rounded", "averaged_weights"):
                with getattr(one, block)(), getattr(other, block)():
                    check_same(alone, one, net, other, (block, adapter, t))
            train(alone, one, 1)
            train(net, other, 1)
            check_same(alone, one, net, other, ("averages", adapter, t))

        # gradients clipped by norm, which sharded runs add up in another order
        alone, net = Net(torch.float64), sharded(Net(torch.float64), (2,))
        one, other = build(alone, prox), build(net, prox)
        for _ in range(8):
            for module, optimizer in ((alone, one), (net, other)):
                optimizer.zero_grad()
                module(torch.ones(2, 2, 6, 6, dtype=torch.float64)).square().sum().backward()
                norm = nn.utils.clip_grad_norm_(module.parameters(), 1e-3)
                assert whole(norm) > 1e-3
                optimizer.step()
            for p, q in zip(alone.parameters(), net.parameters(), strict=True):
                torch.testing.assert_close(whole(q), p, rtol=1e-12, atol=1e-12)

        # built before sharding, its parameters exchanged in the groups as accelerate does
        alone, net = Net(torch.float64), Net(torch.float64)
        one, other = build(alone, prox), build(net, prox)
        names = {id(p): name for name, p in net.named_parameters()}
        order = [[names[id(p)] for p in group["params"]] for group in other.param_groups]
        for group in other.param_groups:
            for i in range(len(group["params"])):
                group["params"][i] = torch.empty(1)
        sharded(net, (2,))
        for group, own in zip(other.param_groups, order, strict=True):
            group["params"] = [net.get_parameter(name) for name in own]
        for t in range(5):
            train(alone, one, 1)
            train(net, other, 1)
            check_same(alone, one, net, other, ("exchanged", adapter, t))

        # replicas with equal batches
        alone, net = Net(torch.float64), nn.parallel.DistributedDataParallel(Net(torch.float64))
        one, other = build(alone, prox), build(net.module, prox)
        for t in range(8):
            train(alone, one, 1)
            train(net, other, 1)
            check_same(alone, one, net, other, ("replicated", adapter, t))


@pytest.mark.rare
def test_r8_freezing_clipping_exchanged_parameters_and_replicas(tmp_path: Path) -> None:
    on_processes(other_ways_to_train, 2, tmp_path)


def functional_loop() -> None:
    with pytest.raises(TypeError, match=r"module 'net' is sharded .* a torch\.optim adapter"):
        pf.functional(nn.ModuleDict({"net": sharded(Net(torch.float64), (1,))}))


@pytest.mark.slow
def test_r21_the_functional_loop_refuses_a_sharded_module(tmp_path: Path) -> None:
    on_processes(functional_loop, 1, tmp_path)


def mixed_precision() -> None:
    """Compute in bfloat16: parameters and latents stay float32, the map is that of one process."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    net = sharded(Net(torch.float32), (2,), mp_policy=policy)
    for name, prox in PROXES.items():
        optimizer = quantized(net, prox)
        for _ in range(8):
            train(net, optimizer, 1)
            for p, link in quantized_of(optimizer):
                entries = optimizer.state[p]
                assert p.dtype == entries["latent"].dtype == torch.float32
                state = ProxState(
                    *(whole(entries[key]) for key in ("count", "slope", "lr_sum", "qparams"))
                )
                latent = whole(entries["latent"])
                assert torch.equal(whole(p), link.weights(state, latent)), name
                if link.due(state):
                    assert torch.equal(state.qparams, link.refit(state, latent).qparams), name


def quantized_of(optimizer: QuantOptimizer) -> list[tuple[Tensor, pf.Prox]]:
    groups = [group for group in optimizer.param_groups if group["quant_bits"] < 16]
    return [(p, optimizer.link(group)) for group in groups for p in group["params"]]


@pytest.mark.rare
def test_mixed_precision_policy(tmp_path: Path) -> None:
    on_processes(mixed_precision, 2, tmp_path)


def core_on_dtensors() -> None:
    """The functional loop with DTensor leaves: every link, beside plain leaves."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    draw = torch.Generator().manual_seed(0)
    params = {
        name: torch.randn(*shape, dtype=torch.float64, generator=draw)
        for name, shape in {"a": (5, 4), "b": (1, 6), "c": (7,), "plain": (3, 2)}.items()
    }
    prox = pf.parq_prox(pf.lsbq(2), **SPAN, granularity=pf.per_channel())
    optimizers = {
        "sgd": pf.sgd(0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        "adam": pf.adam(0.05, amsgrad=True),
        "free": pf.schedule_free(pf.sgd(0.1)),
        "ahead": pf.lookahead(pf.sgd(0.1), 3),
        "noisy": pf.chain(pf.add_noise(0.1), pf.sgd(0.1)),
        "clipped": pf.chain(pf.clip(0.7), pf.sgd(0.1)),
        "lion": pf.averaged(pf.lion(0.05), 0.9),
        "muon": pf.partition({"m": pf.muon(0.1), "rest": pf.sgd(0.1)}, {"c": "rest", "*": "m"}),
        "flips": pf.monitor_flips(pf.chain(pf.sgd(0.1), pf.masked(prox, ["a", "b"]))),
        "torch": pf.conditionally(pf.as_link(torch.optim.Adam, lr=0.1), lambda t: t != 2),
        "clipped_by_norm": pf.chain(pf.clip_by_global_norm(0.5), pf.sgd(0.1)),
    }
    for name, optimizer in optimizers.items():
        transform = pf.chain(optimizer, pf.masked(prox, ["a", "b"]))
        for built in (pf.apply_if_finite(transform), pf.accumulate(transform, 2)):
            runs = []
            for split in (False, True):
                own = dict(params)
                if split:
                    own |= {k: distribute(own[k], mesh) for k in "abc"}
                state, grads = built.init(own), torch.Generator().manual_seed(1)
                for t in range(8):
                    grad = {k: torch.randn(p.shape, generator=grads) for k, p in params.items()}
                    if t == 3:
                        grad["a"][0, 0] = torch.nan if "Finite" in repr(type(state)) else 0.0
                    grad = {k: g.double() for k, g in grad.items()}
                    if split:
                        grad |= {k: distribute(grad[k], mesh) for k in "abc"}
                    updates, state = built.update(grad, state, own)
                    own = pf.apply_updates(own, updates)
                runs.append([built.weights(state, own), pf.levels_of(built, state)])
            for one, other in zip(*map(optree.tree_leaves, runs), strict=True):
                if name == "clipped_by_norm":
                    torch.testing.assert_close(whole(other), one, rtol=1e-12, atol=1e-12)
                else:
                    assert torch.equal(one, whole(other)), name


def distribute(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    return distribute_tensor(tensor, mesh, [Shard(0)])


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.rare)])
def test_law_12_the_functional_core_on_dtensors(world: int, tmp_path: Path) -> None:
    on_processes(core_on_dtensors, world, tmp_path)


def blocks_cut_by_shards() -> None:
    """1-D parameters in blocks that begin on one rank and end on another."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    prox = pf.parq_prox(pf.lsbq(2), **SPAN)
    for length, block in ((10, 5), (14, 7), (4, 2), (2, 1), (12, 12)):
        values = torch.randn(
            length, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
        )
        runs = []
        for split in (False, True):
            module = nn.Module()
            module.weight = nn.Parameter(values.clone())
            if split:
                fully_shard(module, mesh=mesh)
            group = {"params": [module.weight], "quant_bits": 2, "quant_block_size": block}
            optimizer = QuantOptimizer(torch.optim.SGD([group], lr=0.1), prox)
            for _ in range(4):
                module.weight.grad = torch.ones_like(module.weight)
                optimizer.step()
            runs.append([whole(module.weight), whole(optimizer.levels(module.weight))])
        assert all(map(torch.equal, *runs)), (length, block)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.rare)])
def test_r19_blocks_that_shards_cut(world: int, tmp_path: Path) -> None:
    on_processes(blocks_cut_by_shards, world, tmp_path)


def collectives() -> None:
    """What the ranks of a step get, beyond the forward and backward pass."""
    mesh = init_device_mesh("cpu", (2,))
    prox = pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=9, period=3)
    for adapter, build in ADAPTERS.items():
        net = Net(torch.float64)
        fully_shard(net, mesh=mesh)
        optimizer = build(net, prox)
        cut = [p for name, p in net.named_parameters() if name in BITS]
        for t in range(7):
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            with Counted() as counted:
                optimizer.step()
            received: list[Any] = [None] * 2
            dist.all_gather_object(received, counted.received)
            if t % 3:
                assert counted.collectives == 0, (adapter, t)
            else:  # each weight once, where its row is fitted, and the numbers of its row
                numbers = 2 * len(cut) * 2 * 8 + 64
                assert 0 < sum(received) <= sum(p.nbytes for p in cut) + numbers, (adapter, t)


@pytest.mark.slow
def test_a_refit_sends_each_weight_to_one_rank_and_other_steps_send_nothing(
    tmp_path: Path,
) -> None:
    on_processes(collectives, 2, tmp_path)


@pytest.mark.parametrize("granularity", [pf.per_channel(), pf.per_tensor()], ids=str)
def test_a_sharded_step_starts_few_operations_for_each_parameter(granularity: Any) -> None:
    """On one of eight ranks that do not answer. What torch's SGD does is not counted."""
    prox = pf.parq_prox(pf.uniform(2), **SPAN, granularity=granularity)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (8,))
        cut = [DTensor.from_local(torch.randn(8, 96), mesh, [Shard(0)]) for _ in range(60)]
        params = [nn.Parameter(p) for p in cut]
        base = torch.optim.SGD([{"params": params, "quant_bits": 2}], lr=0.0, foreach=True)
        optimizer = QuantOptimizer(base, prox)
        for t in range(6):
            for p in params:
                p.grad = torch.zeros_like(p)
            with Counted() as counted:
                optimizer.step()
            most = 20 if t % 2 else 200
            assert counted.operations <= most * len(params), t
    finally:
        dist.destroy_process_group()
