"""A sharded module's file: written one parameter at a time, the bytes that one process writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import parq_fn as pf
from parq_fn.export import load, save, stream, unpack
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from tests.helpers import sampled
from tests.processes import on_processes

CUTS = {"tensor": pf.per_tensor(), "channel": pf.per_channel(), "block": pf.per_block(7)}


class Net(nn.Module):
    """Uneven rows, a kernel, a vector, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 5, 3)
        self.linear = nn.Linear(14, 7)
        self.head = nn.Linear(7, 3)
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))


def trained(net: Net, adapter: str, cut: str) -> Any:
    prox = pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=3, granularity=CUTS[cut])
    whole = pf.parq_prox(pf.lsbq(0), anneal_start=0, anneal_end=3)
    if adapter == "QuantOptimizer":
        groups = [
            {"params": [net.linear.weight], "quant_bits": 2},
            {"params": [net.head.weight, net.conv.bias, net.conv.weight]},
            {"params": [net.head.bias, net.linear.bias]},
        ]
        optimizer: Any = QuantOptimizer(torch.optim.AdamW(groups, lr=0.1), prox)
    else:
        kinds = {"cut": prox, "whole": whole, "rest": pf.identity()}
        labels = {"linear.weight": "cut", "conv.weight": "whole", "*": "rest"}
        transform = pf.chain(pf.adamw(0.1), pf.partition(kinds, labels))
        optimizer = TransformOptimizer(net.named_parameters(), transform)
    for _ in range(5):
        for p in net.parameters():
            p.grad = torch.sin(p.detach() * 3)
        optimizer.step()
    return optimizer


def write(folder: str) -> None:
    for adapter in ("QuantOptimizer", "TransformOptimizer"):
        for cut in CUTS:
            net = Net()
            fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
            entries = stream(net, trained(net, adapter, cut))
            save(entries, Path(folder) / f"{adapter}-{cut}")
            assert (Path(folder) / f"{adapter}-{cut}").exists()  # on every rank, at once


@pytest.mark.slow
@pytest.mark.parametrize("world", sampled([2, 4], 1))
def test_the_file_is_that_of_one_process_byte_for_byte(world: int, tmp_path: Path) -> None:
    on_processes(write, world, tmp_path, str(tmp_path))
    for adapter in ("QuantOptimizer", "TransformOptimizer"):
        for cut in CUTS:
            net = Net()
            save(stream(net, trained(net, adapter, cut)), tmp_path / "alone")
            one, many = tmp_path / "alone", tmp_path / f"{adapter}-{cut}"
            assert one.read_bytes() == many.read_bytes(), (adapter, cut)
            for name, weight in unpack(load(many)).items():
                assert torch.equal(weight, net.state_dict()[name]), name


def one_alone(folder: str) -> None:
    if dist.get_rank() == 0:  # the others are not needed, and do not come
        net = Net()
        save(stream(net, trained(net, "QuantOptimizer", "channel")), Path(folder) / "alone")
        save(load(Path(folder) / "alone"), Path(folder) / "again")
        assert (Path(folder) / "alone").read_bytes() == (Path(folder) / "again").read_bytes()


@pytest.mark.slow
def test_what_is_not_sharded_is_written_by_one_rank_alone(tmp_path: Path) -> None:
    on_processes(one_alone, 2, tmp_path, str(tmp_path))


def fail(folder: str) -> None:
    net = Net()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    entries = stream(net, trained(net, "QuantOptimizer", "tensor"))
    Path(folder, "file").write_text("")
    with pytest.raises(OSError, match="file"):  # on both ranks, and neither waits
        save(entries, Path(folder) / "file" / "packed")
    early = QuantOptimizer(
        torch.optim.SGD([{"params": [net.linear.weight], "quant_bits": 1}], lr=0.1),
        pf.parq_prox(pf.lsbq(1), anneal_start=0, anneal_end=100),
    )
    net.linear.weight.grad = torch.ones_like(net.linear.weight)
    early.step()
    with pytest.raises(ValueError, match=r"'linear\.weight': [0-9]+ % of its weights"):
        save(stream(net, early), Path(folder) / "early")
    assert not (Path(folder) / "early").exists()


@pytest.mark.slow
def test_what_fails_fails_on_every_rank(tmp_path: Path) -> None:
    on_processes(fail, 2, tmp_path, str(tmp_path))
