"""One process or several: where they run, how a network lies on them, what they tell each other."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from parq_fn.foundation.command import UserError, tell

Made = TypeVar("Made")

MODES = ("none", "ddp", "fsdp2")
# what torchrun tells a process
TOLD = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class World(NamedTuple):
    """This process and the others."""

    mode: str  # of MODES
    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """The sums over all processes, in float64."""
        sums = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(sums)
        return sums.tolist()

    def any(self, here: bool) -> bool:
        """Whether it holds on any process."""
        return self.total(float(here))[0] > 0

    def in_turn(self, make: Callable[[], Made]) -> Made:
        """What the first process makes, who may download for all, and then the others. Its
        UserError is everyone's."""
        made, problem = None, None
        if self.first:
            try:
                made = make()
            except UserError as met:
                problem = met
        if self.any(problem is not None):
            raise problem or UserError("")
        if made is None:
            try:
                return make()
            except UserError as met:
                raise UserError(str(met), here=True) from None
        return made


@contextmanager
def world_of(mode: str | None, program: str) -> Iterator[World]:
    """Joins the processes that torchrun started; None is ddp where it started any, else none.

    Of several processes none gets out of it: all end by `leave`. Raises UserError where mode and
    processes do not fit.
    """
    launched = "WORLD_SIZE" in os.environ
    absent = [name for name in TOLD if name not in os.environ]
    if launched and absent:
        raise UserError(f"WORLD_SIZE is set and {', '.join(absent)} are not; start by torchrun")
    size = int(os.environ["WORLD_SIZE"]) if launched else 1
    mode = mode or ("ddp" if launched else "none")
    if mode != "none" and not launched:
        raise UserError(
            f"--parallel {mode} takes its processes from torchrun: torchrun --nproc-per-node 2 -m "
            f"examples.{program} --parallel {mode} ..."
        )
    if mode == "none" and size > 1:
        raise UserError(f"torchrun started {size} processes; pass --parallel ddp or fsdp2")
    gpu = torch.cuda.is_available()
    local = int(os.environ["LOCAL_RANK"]) if launched else 0
    if gpu and local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} of this machine has no GPU, of which it has "
            f"{torch.cuda.device_count()}; start as many processes",
            here=True,
        )
    device = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    elif launched:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    if mode == "none":
        yield World(mode, 0, 1, device)
        return
    # what is told on the host goes by gloo, and waits for no device
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    try:
        yield World(mode, dist.get_rank(), dist.get_world_size(), device)
    except Exception as error:
        if size == 1:
            raise
        if "gloo" in str(error) or isinstance(error, dist.DistError):
            tell(f"process {dist.get_rank()} has lost another, which says why", here=True)
        else:
            traceback.print_exc()
        leave(1)
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends one of several processes at once: gloo's threads may abort one that unwinds, or never
    let it end. Its loader's workers go with it, whatever they are at."""
    for child in multiprocessing.active_children():
        child.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def status_of(mode: str | None, program: str, work: Callable[[World], int]) -> int:
    """The status that a program ends with, of `work` on the processes that torchrun started: its
    own, or 2 for what the user can put right."""
    try:
        with world_of(mode, program) as world, quiet():
            ended = leave if world.size > 1 else int
            try:
                status = work(world)
                world.any(False)  # all are done, and nothing of them is gone
                return ended(status)
            except UserError as problem:
                tell(problem, problem.here)
                return ended(2)
            except OSError as error:  # it names the file
                tell(UserError(f"{type(error).__name__}: {error}"), True)
                return ended(2)
    except UserError as problem:
        tell(problem, problem.here)
        return 2


def spread(net: nn.Module, blocks: type | tuple[type, ...], world: World) -> nn.Module:
    """The network to be called, on the device; its parameters stay those of `net`.

    ddp: every process has all of it, alone where nothing is trained; fsdp2: parameters are sharded,
    a block at a time.
    """
    net.to(world.device)
    if world.mode == "ddp" and any(p.requires_grad for p in net.parameters()):
        ids = [world.device.index] if world.device.type == "cuda" else None
        return DistributedDataParallel(net, device_ids=ids)
    if world.mode == "fsdp2":
        mesh = init_device_mesh(world.device.type, (world.size,))
        for module in list(net.modules()):
            if isinstance(module, blocks):
                fully_shard(module, mesh=mesh)
        fully_shard(net, mesh=mesh)
    return net


def agree_on_buffers(net: nn.Module, world: World) -> None:
    """Running statistics become the first process's: each has those of its own images."""
    if world.size > 1:
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


def reshard(net: nn.Module) -> None:
    """Parameters that a forward pass gathered become sharded again, as the optimizer has them."""
    for module in net.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter, on every process."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's words on what it does by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch")
        yield
