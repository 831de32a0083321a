"""Packed layers against float32: what they hold in memory, and the time of a forward pass.

python -m tests.benchmarks.packed [--width 1024] [--layers 4] [--repeats 9]
"""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import parq_fn as pf
from examples.options import at_least
from parq_fn.export import pack_weight, quantized, save
from parq_fn.foundation.command import Parser, command
from tests.benchmarks.measure import ratio, seconds, table

QUANTIZERS = {
    "1 bit": pf.lsbq(1),
    "ternary": pf.lsbq(0),
    "2 bits": pf.lsbq(2),
    "4 bits": pf.lsbq(4),
}


def network(width: int, layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    made: list[nn.Module] = []
    for _ in range(layers):
        made += [nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)]
    return nn.Sequential(*made).eval()


def held(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def on_levels(net: nn.Module, quantizer: pf.Quantizer, file: Path) -> nn.Module:
    """The network on its levels, and its packed file."""
    packed: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() > 1:
                levels = quantizer(p)
                p.copy_(pf.proxmaps.hard(p, levels))
                packed[name] = pack_weight(p, levels, name=name)
            else:
                packed[name] = p.detach()
    save(packed, file)
    return net


def main() -> None:
    about, _ = __doc__.split("\n", 1)
    parser = Parser("tests.benchmarks.packed", about)
    whole = at_least(1, int)
    text = "of a block, whose inner width is four times that (default: 1024)"
    parser.add_argument("--width", type=whole, default=1024, help=text)
    parser.add_argument("--layers", type=whole, default=4, help="blocks (default: 4)")
    parser.add_argument("--repeats", type=whole, default=9, help="of each (default: 9)")
    args = parser.parse_args()
    head = ["weights", "batch", "memory", "eager", "compiled"]
    rows = [head]
    plain = network(args.width, args.layers)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, quantizer in QUANTIZERS.items():
            file = Path(folder) / "packed"
            dense = on_levels(copy.deepcopy(plain), quantizer, file)
            packed = quantized(copy.deepcopy(plain), file)
            for batch in (1, 64):
                x = torch.randn(batch, args.width)
                assert torch.equal(packed(x), dense(x))
                torch.compiler.reset()
                fused, whole = torch.compile(packed), torch.compile(dense)
                torch.testing.assert_close(fused(x), whole(x), rtol=1e-3, atol=1e-3)
                cells = []
                for one, other in ((packed, dense), (fused, whole)):
                    times = [seconds(partial(m, x), args.repeats) for m in (one, other)]
                    cells.append("{:.2f} +- {:.2f}".format(*ratio(*times)))
                share = held(packed) / held(dense)
                rows.append([name, str(batch), f"{100 * share:.1f} %", *cells])
                print(table([head, rows[-1]]), flush=True)
    print(
        f"\nratios to float32; {args.layers} blocks of width {args.width}, {args.repeats} repeats"
    )
    print(table(rows))


if __name__ == "__main__":
    command(main)
