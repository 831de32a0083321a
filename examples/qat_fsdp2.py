"""Trains a small transformer on sharded parameters, with quantized matrices.

    torchrun --nproc-per-node 2 -m examples.qat_fsdp2

The text is at hand on every machine: the sources of Python's standard library, byte by byte.
Matrices of the blocks are quantized per output channel, embeddings, norms and the head are not.
AdamW is wrapped after `fully_shard`, and that is all that differs from a plain training script.

Every `--save-every` steps parameters, latents, levels and moments are saved as a distributed
checkpoint; the same command with `--resume`, on as many processes or others, resumes from the
last whole one. On the same number of processes it resumes bit for bit.

    torchrun --nproc-per-node 4 -m examples.qat_fsdp2 --tensor-parallel 2

`--tensor-parallel` processes hold a layer together: the matrices that go into attention and into
the inner layer by their rows, those that come out of them by their columns. Over these, FSDP2
shards the rest of the mesh.
"""

from __future__ import annotations

import argparse
import os
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from tqdm import tqdm

import parq_fn as pq
from examples.options import at_least
from parq_fn.foundation.command import Parser, command, output_folder
from parq_fn.optim import QuantOptimizer, load_checkpoint, save_checkpoint, share_on_levels

# Text, as bytes.


def load_text() -> tuple[Tensor, Tensor]:
    """(training, test) bytes of the standard library's modules, one file in ten for the test."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    if not files:
        raise FileNotFoundError("this Python keeps no sources of its standard library")
    parts = [bytearray(file.read_bytes()) for file in files]
    both = (b"".join(p for i, p in enumerate(parts) if (i % 10 == 0) == test) for test in (0, 1))
    train, test = (torch.frombuffer(bytearray(b), dtype=torch.uint8) for b in both)
    return train, test


def batch(text: Tensor, size: int, context: int, generator: torch.Generator) -> Tensor:
    """[size, context + 1] bytes from places drawn at random."""
    starts = torch.randint(len(text) - context, (size,), generator=generator)
    return text[starts[:, None] + torch.arange(context + 1)].long()


# The transformer.


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, t, width = x.shape  # a head's q, k and v lie together, and heads on any rank
        own = self.qkv(self.norm1(x)).view(n, t, -1, 3, width // self.heads)
        q, k, v = own.permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).flatten(0, 1))  # [places, 256], no view


def loss_of(net: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross entropy of the next byte, in nats."""
    return F.cross_entropy(net(tokens[:, :-1]), tokens[:, 1:].flatten())


# Quantization and sharding.


def shard(net: Transformer, mesh: DeviceMesh) -> None:
    """mesh: of the dimensions "data" and "tensor", or "data" alone."""
    names = mesh.mesh_dim_names or ()
    for block in net.blocks:
        if "tensor" in names:
            columns, rows = ColwiseParallel(), RowwiseParallel()
            plan = {"qkv": columns, "out": rows, "up": columns, "down": rows}
            parallelize_module(block, mesh["tensor"], plan)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(net, mesh=mesh["data"])


def clip(net: nn.Module, most: float) -> None:
    """Scales all gradients so that their norm is at most that, those on meshes of other shapes
    too."""
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    parts: dict[Any, list[Tensor]] = {}
    for grad in grads:
        parts.setdefault(getattr(grad, "device_mesh", None), []).append(grad)
    norms = [nn.utils.get_total_norm(own) for own in parts.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole))
    for own in parts.values():
        params = [p for p in net.parameters() if any(p.grad is grad for grad in own)]
        nn.utils.clip_grads_with_norm_(params, most, total)


def wrap(net: nn.Module, args: argparse.Namespace) -> QuantOptimizer:
    """AdamW with the matrices of the blocks quantized."""
    mask = pq.weight_mask(net, exclude="head")
    named = list(net.named_parameters())
    groups = [
        {"params": [(n, p) for n, p in named if mask[n]], "quant_bits": args.quant_bits},
        {"params": [(n, p) for n, p in named if not mask[n]]},
    ]
    rates: dict[str, Any] = {"lr": args.lr, "betas": (0.9, 0.95), "weight_decay": 0.01}
    base = torch.optim.AdamW(groups, **rates, foreach=False)  # parameters of several meshes
    prox = pq.parq_prox(
        pq.lsbq(2),
        anneal_start=args.steps // 5,
        anneal_end=4 * args.steps // 5,
        granularity=pq.per_channel(),
    )
    return QuantOptimizer(base, prox)


# Checkpoints: a folder a step, whole once it has its name.


def resume(net: nn.Module, optimizer: QuantOptimizer, folder: Path) -> int:
    """Loads the last whole checkpoint; the number of steps it was made after, 0 for none."""
    whole = sorted(folder.glob("step-*"))
    if dist.get_rank() == 0:
        print(f"resuming from {whole[-1]}" if whole else f"no checkpoint in {folder}")
    if not whole:
        return 0
    load_checkpoint(whole[-1], net, optimizer)
    return int(whole[-1].name.removeprefix("step-"))


# The command line.


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    about = """Trains a small transformer, sharded and quantized, on Python's own sources.

    torchrun --nproc-per-node 2 -m examples.qat_fsdp2"""
    parser = Parser("examples.qat_fsdp2", about)

    def flag(name: str, default: Any, text: str, **options: Any) -> None:
        parser.add_argument(name, default=default, help=f"{text} (default: {default})", **options)

    count, whole = {"type": at_least(1, int)}, {"type": at_least(0, int)}
    flag("--quant-bits", 2, "bits of a weight, 0 to 8; 0 is ternary", type=int, choices=range(9))
    flag("--steps", 300, "steps of the whole training", type=at_least(5, int))
    flag("--batch-size", 16, "sequences of a process and step", **count)
    flag("--context", 64, "bytes of a sequence", **count)
    flag("--layers", 2, "blocks of the transformer", **count)
    flag("--width", 64, "features of a byte, a multiple of 16", type=at_least(16, int))
    flag("--lr", 3e-3, "learning rate of AdamW", type=at_least(0))
    flag("--seed", 0, "of the start and the batches", **whole)
    flag("--save-dir", Path("runs/qat_fsdp2"), "folder of the checkpoints", type=Path)
    flag("--save-every", 100, "steps between checkpoints", **count)
    flag("--tensor-parallel", 1, "processes that hold a layer together", **count)
    parser.add_argument("--resume", action="store_true", help="resume from the last checkpoint")
    parser.add_argument("--stop-after", type=at_least(0, int), help="end after so many steps")
    args = parser.parse_args(argv)
    if args.width % 16:
        parser.error(f"--width must be a multiple of 16, got {args.width}")
    if "RANK" not in os.environ:
        parser.error("start it by torchrun --nproc-per-node 2 -m examples.qat_fsdp2")
    world, heads = int(os.environ["WORLD_SIZE"]), args.width // 16
    if world % args.tensor_parallel or heads % args.tensor_parallel:
        parser.error(
            f"--tensor-parallel {args.tensor_parallel} has to divide the {world} processes and the "
            f"{heads} heads of --width {args.width}"
        )
    output_folder(args.save_dir)
    return args


def main(argv: Sequence[str] | None = None) -> float:
    """Trains, saves and prints; the test loss in bits a byte."""
    args = parse(argv)
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if gpu else "gloo")
    device = "cuda" if gpu else "cpu"
    first = dist.get_rank() == 0
    torch.manual_seed(args.seed)
    net = Transformer(args.layers, args.width, args.width // 16, args.context).to(device)
    shape, names = (dist.get_world_size() // args.tensor_parallel,), ("data",)
    if args.tensor_parallel > 1:
        shape, names = (*shape, args.tensor_parallel), (*names, "tensor")
    mesh = init_device_mesh(device, shape, mesh_dim_names=names)
    shard(net, mesh)
    part = mesh["data"].get_local_rank()  # ranks that hold a layer together have one batch
    optimizer = wrap(net, args)
    train, test = load_text()

    begin = time.perf_counter()
    done = resume(net, optimizer, args.save_dir) if args.resume else 0
    last = args.steps if args.stop_after is None else min(args.steps, args.stop_after)
    with tqdm(range(done + 1, last + 1), "training", disable=None if first else True) as progress:
        for step in progress:
            own = torch.Generator().manual_seed((args.seed * 2**20 + step) * 2**12 + part)
            tokens = batch(train, args.batch_size, args.context, own).to(device)
            optimizer.zero_grad()
            loss = loss_of(net, tokens)
            loss.backward()
            clip(net, 1.0)
            optimizer.step()
            if step % args.save_every == 0 or step == last:
                save_checkpoint(args.save_dir / f"step-{step:06d}", net, optimizer)
            if step % 10 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")

    with torch.no_grad():
        same = torch.Generator().manual_seed(args.seed)
        tokens = batch(test, 64, args.context, same).to(device)
        bits = loss_of(net, tokens).item() / torch.log(torch.tensor(2.0)).item()
    on = share_on_levels(optimizer)
    if first:
        slope = optimizer.param_groups[0]["inverse_slope"]
        print(
            f"step {last}, {dist.get_world_size()} processes: test {bits:.4f} bits a byte, "
            f"{args.quant_bits} bits a weight, inverse slope {slope:.4f}, on levels {on:.4f}, "
            f"{time.perf_counter() - begin:.0f} s"
        )
    dist.destroy_process_group()
    return bits


def run() -> None:
    """The program: of several processes, which end at once."""
    main()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that unwinds while they end


if __name__ == "__main__":
    command(run)
