"""Ranks that do not do the same, end, or hold NaN: errors and a log that name the parameter."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import parq_fn as pf
from parq_fn.optim import (
    QuantOptimizer,
    TransformOptimizer,
    checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from parq_fn.transforms import exchange, layout
from parq_fn.transforms.collective import RanksError
from tests.helpers import copies
from tests.optim.helpers import begin, check_same, train, whole
from tests.processes import on_processes

SHAPES = {"one": (12, 8), "two": (8, 12)}
LINK = pf.hard_prox(pf.lsbq(2), period=2)
SECONDS = 2.0  # until a collective is given up


def mesh_of(ranks: list[int], seconds: float = 30.0) -> Any:
    """A mesh of a process group of its own, which every rank makes; None on other ranks."""
    group = dist.new_group(ranks, timeout=timedelta(seconds=seconds))
    return DeviceMesh.from_group(group, "cpu") if dist.get_rank() in ranks else None


def on_mesh(mesh: DeviceMesh, *names: str, placed: Any = None) -> dict[str, nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    given = {name: torch.randn(SHAPES[name], generator=draw) for name in names or SHAPES}
    return {
        n: nn.Parameter(distribute_tensor(p, mesh, placed or [Shard(0)])) for n, p in given.items()
    }


def by_base(params: dict[str, nn.Parameter], link: pf.Prox) -> Any:
    groups = [{"params": [*params.items()], "prox": link}]
    return QuantOptimizer(torch.optim.SGD(groups, lr=0.125), None)


def by_tree(params: dict[str, nn.Parameter], link: pf.Prox) -> Any:
    return TransformOptimizer([*params.items()], pf.chain(pf.sgd(0.125), link))


ADAPTERS: dict[str, Callable[..., Any]] = {"QuantOptimizer": by_base, "TransformOptimizer": by_tree}


def step(params: dict[str, nn.Parameter], optimizer: Any) -> None:
    for p in params.values():
        p.grad = torch.sin(optimizer.state[p].get("latent", p).detach())
    optimizer.step()


def state_of(params: dict[str, nn.Parameter], optimizer: Any, moved: bool) -> list[Tensor]:
    """Copies of this rank's part of all that a step may change; without what it has moved."""
    entries = [optimizer.state[p] for p in params.values()]
    kept = {"count", "qparams", "slope", "lr_sum", "1.count", "1.qparams"}
    tensors = [one[key] for one in entries for key in one if not moved or key in kept]
    tensors += [] if moved else [*params.values()]
    return copies([getattr(got, "_local_tensor", got) for got in tensors])


# One rank freezes a parameter alone


def frozen_alone() -> None:
    mesh, rank = mesh_of([0, 1]), dist.get_rank()
    for adapter, build in ADAPTERS.items():
        params = on_mesh(mesh)
        optimizer, half = build(params, LINK), adapter == "QuantOptimizer"
        for _ in range(2):
            step(params, optimizer)
        params["one"].requires_grad_(rank == 0)
        before = state_of(params, optimizer, moved=half)
        alike = r"on ranks \[0\], not on ranks \[1\]"
        there = alike if half else r"on ranks \[0\] \(.*\), on ranks \[1\] \(.*, frozen\)"
        said = "Half of the step is done" if half else "All is as before the step"
        with pytest.raises(RanksError, match=rf"'one' {there}.* {said}"):
            step(params, optimizer)
        assert all(map(torch.equal, before, state_of(params, optimizer, moved=half))), adapter
        params["one"].requires_grad_(True)
        for _ in range(3):  # what they sent before was for nobody
            step(params, optimizer)
        for p in params.values():
            assert whole(p).unique().numel() <= 4, adapter
            levels = whole(optimizer.levels(p))
            every = [torch.empty_like(levels) for _ in range(2)]
            dist.all_gather(every, levels)
            assert torch.equal(*every), adapter

    # in the functional loop: another mask
    params = {name: p.detach() for name, p in on_mesh(mesh).items()}
    transform = pf.masked(pf.hard_prox(pf.uniform(2)), ["one", "two"] if rank else "one")
    grads = {name: torch.zeros_like(p) for name, p in params.items()}
    with pytest.raises(RanksError, match=r"hard_prox: .*'two' on ranks \[1\], not on ranks \[0\]"):
        transform.update(grads, transform.init(params), params)


@pytest.mark.slow
def test_a_parameter_that_one_rank_froze_alone_is_named_on_all_that_wait(tmp_path: Path) -> None:
    on_processes(frozen_alone, 2, tmp_path, apart=True)


def nothing_else_to_fit() -> None:
    """The second rank sends nothing."""
    rank, link = dist.get_rank(), pf.hard_prox(pf.lsbq(2))
    dist.barrier()
    mesh = mesh_of([0, 1], SECONDS)
    params = {"one": nn.Parameter(DTensor.from_local(torch.randn(6, 8), mesh, [Shard(0)]))}
    optimizer = by_base(params, link)
    params["one"].requires_grad_(rank == 0)
    began = time.monotonic()
    if rank:
        step(params, optimizer)
        time.sleep(SECONDS + 1)  # or its end would be what the first notices
        return
    waited = r"rank 0 waited for the ranks \[0, 1\] to fit or learn the levels of 'one'.*imed"
    with pytest.raises(RanksError, match=waited):
        step(params, optimizer)
    assert time.monotonic() - began < SECONDS + 10


@pytest.mark.slow
def test_a_rank_that_waits_for_one_with_nothing_to_fit_says_for_which_parameter(
    tmp_path: Path,
) -> None:
    on_processes(nothing_else_to_fit, 2, tmp_path, apart=True)


def frozen_alone_on_a_grid() -> None:
    """The first rank is in no group with the last, which freezes one."""
    mesh, rank = init_device_mesh("cpu", (2, 2)), dist.get_rank()
    for cut, build in ((pf.per_tensor(), by_base), (pf.per_channel(), by_tree)):
        params = on_mesh(mesh, placed=[Shard(0), Shard(1)])
        optimizer = build(params, pf.hard_prox(pf.lsbq(2), granularity=cut))
        params["two"].requires_grad_(rank != 3)
        with pytest.raises(RanksError, match=r"'two' on ranks \[0, 1, 2\].*(Half|1 of 2 param)"):
            step(params, optimizer)


@pytest.mark.slow
def test_ranks_that_share_no_group_with_the_one_that_froze_a_parameter_name_it_too(
    tmp_path: Path,
) -> None:
    on_processes(frozen_alone_on_a_grid, 4, tmp_path, apart=True)


def some_rows_learn() -> None:
    """On the first rank all, on the second one all but zeros, which fits alone can change."""
    rank, split = dist.get_rank(), init_device_mesh("cpu", (2,))
    learn = pf.learn(pf.sgd(0.01))
    link = pf.hard_prox(pf.nvfp4(), period=1, learn=learn, granularity=pf.per_block(4))
    for build in ADAPTERS.values():
        given = on_mesh(split, "one")["one"].detach()
        given.to_local()[0] *= 1 - rank
        runs = {"one": nn.Parameter(whole(given))}, {"one": nn.Parameter(given)}
        for params in runs:
            optimizer = build(params, link)
            for _ in range(3):
                step(params, optimizer)
        assert torch.equal(runs[0]["one"], whole(runs[1]["one"]))


@pytest.mark.slow
def test_ranks_whose_rows_all_learn_come_to_fits_that_ask_all_ranks(tmp_path: Path) -> None:
    on_processes(some_rows_learn, 2, tmp_path, apart=True)


# A rank ends


def ends_in_a_step() -> None:
    """Each rank but the first in a step that it makes with the first: in a fit, or as it learns."""
    rank = dist.get_rank()
    learn = replace(LINK, learn=pf.learn(pf.sgd(0.01)))
    cases = [*itertools.product(ADAPTERS, (LINK, learn))]
    meshes = [mesh_of([0, other]) for other in range(1, 5)]
    for (adapter, link), mesh in zip(cases, meshes, strict=True):
        if mesh is None:
            continue
        params, half = on_mesh(mesh), adapter == "QuantOptimizer" and link is LINK
        optimizer = ADAPTERS[adapter](params, link)
        if link is learn:
            step(params, optimizer)
        if rank:
            exchange.to_each = layout.summed = lambda *_: os._exit(0)  # type: ignore[assignment]
        before = state_of(params, optimizer, moved=half)
        said = "Half of the step is done" if half else ""
        with pytest.raises(RanksError, match=rf"the levels of 'one'.* has ended, .*{said}"):
            step(params, optimizer)
        assert all(map(torch.equal, before, state_of(params, optimizer, moved=half))), adapter
        optimizer.state_dict()


@pytest.mark.slow
def test_a_rank_that_ends_in_a_step_is_an_error_that_names_the_parameter(tmp_path: Path) -> None:
    on_processes(ends_in_a_step, 5, tmp_path, apart=True)


def ends_in_a_save(folder: str, who: int, when: str) -> None:
    last = Path(folder) / "last"
    net, optimizer = begin("QuantOptimizer", "float32", split=True)
    train(net, optimizer, 1)
    save_checkpoint(last, net, optimizer)
    train(net, optimizer, 1)
    if dist.get_rank() == who:
        setattr(checkpoint, when, lambda *_: os._exit(0))
    with pytest.raises(RuntimeError, match=r"last was not saved by all ranks: .* whole"):
        save_checkpoint(last, net, optimizer)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or unini")
@pytest.mark.parametrize(("who", "when"), [(1, "Writer"), (0, "digests_of"), (0, "take_place")])
def test_a_rank_that_ends_in_a_save_leaves_the_old_checkpoint(
    who: int, when: str, tmp_path: Path
) -> None:
    on_processes(ends_in_a_save, 2, tmp_path, str(tmp_path), who, when, apart=True)
    net, optimizer = begin("QuantOptimizer", "float32", split=False)
    load_checkpoint(tmp_path / "last", net, optimizer)
    alone, one = begin("QuantOptimizer", "float32", split=False)
    train(alone, one, 1)
    check_same(alone, one, net, optimizer, (who, when))
    save_checkpoint(tmp_path / "last", net, optimizer)
    assert [path.name for path in tmp_path.glob("*last*")] == ["last"]


# One rank holds NaN


class Log(logging.Handler):
    """What is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        logging.getLogger("parq_fn").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def nan_on_one() -> None:
    mesh, rank, log = mesh_of([0, 1]), dist.get_rank(), Log()
    for build in ADAPTERS.values():
        for granularity in (pf.per_tensor(), pf.per_channel()):
            params = on_mesh(mesh)
            link = pf.hard_prox(pf.lsbq(2), granularity=granularity, period=2)
            optimizer = build(params, link)
            step(params, optimizer)
            levels = [whole(optimizer.levels(p)) for p in params.values()]
            assert not log.lines
            for p in params.values():
                p.grad = torch.zeros_like(p)
            if rank:
                params["two"].grad.to_local()[0, :3] = torch.nan
            optimizer.step()  # which fits nothing
            assert not log.lines
            optimizer.step()
            if granularity == pf.per_tensor() or rank:
                (line,) = log.lines
                assert "update 3: latents are NaN or infinite: 'two' (3 on rank 1); 1 of" in line
            for p, old in zip(params.values(), levels, strict=True):
                if p is params["two"]:
                    same = (whole(optimizer.levels(p)) == old).all(-1)
                    assert same[..., 4 if granularity == pf.per_channel() else ...].all()
            log.lines.clear()


@pytest.mark.slow
def test_nan_of_one_rank_is_named_in_the_log_of_all_that_share_its_rows(tmp_path: Path) -> None:
    on_processes(nan_on_one, 2, tmp_path)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("granularity", [pf.per_tensor(), pf.per_channel()])
@pytest.mark.parametrize(
    ("fitted", "said"), [(1, "keep their qparams"), (0, "have NaN for levels")]
)
def test_latents_that_are_nan_at_a_refit_are_named_in_the_log(
    adapter: str,
    granularity: pf.Granularity,
    fitted: int,
    said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    params = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    link = pf.hard_prox(pf.lsbq(2), granularity=granularity, period=2)
    optimizer = ADAPTERS[adapter](params, link)
    for _ in range(fitted):
        step(params, optimizer)
    for p in params.values():
        p.grad = torch.zeros_like(p)
    params["one"].grad[0, :3] = torch.inf
    for _ in range(fitted + 1):
        optimizer.step()
    (line,) = [record.getMessage() for record in caplog.records]
    at = f"hard_prox, update {2 * fitted + 1}: latents are NaN or infinite"
    assert line.startswith(f"{at}: 'one' (3); 1 of the rows here {said}")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_weights_that_are_lent_before_any_fit_name_latents_that_are_nan(
    adapter: str, caplog: pytest.LogCaptureFixture
) -> None:
    params = {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}
    optimizer = ADAPTERS[adapter](params, LINK)
    optimizer.state[params["two"]]["latent"][0, :2] = torch.nan
    with optimizer.rounded():
        lines = [record.getMessage() for record in caplog.records]
    assert any("hard_prox, update 1: latents are NaN or infinite: 'two' (2)" in x for x in lines)
