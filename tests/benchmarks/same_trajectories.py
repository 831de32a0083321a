"""Whether trajectories have the weights that another checkout of this package gives, bit for bit.

    python -m tests.benchmarks.same_trajectories OTHER [--compile]

OTHER is the root of the other checkout (`git worktree add OTHER COMMIT`). Each checkout trains in a
process of its own, by the functional loop and by `QuantOptimizer`, quantizers x granularities x
dtypes x maps; the weights of every step are compared. The sign of a zero does not count. Exits
with 1 where trajectories differ, and names them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

STEPS, SHAPES = 8, {"matrix": (6, 16), "vector": (16,)}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SPAN = {"anneal_start": 2, "anneal_end": 6}


def quantizers(pf: Any) -> list[Any]:
    """Those whose formulas are the same in every version."""
    plain = [pf.uniform(1), pf.uniform(2), pf.uniform(4), pf.uniform(8), pf.uniform(3, "max")]
    plain += [pf.max_uniform(2), pf.max_uniform(4), pf.ternary_uniform()]
    plain += [pf.asymmetric(1), pf.asymmetric(3)]
    plain += [pf.lsbq(bits) for bits in (0, 1, 2, 3, 4, 6)]
    plain += [pf.lsbq(bits, "optimal") for bits in (0, 2)]
    plain += [pf.lsbq(bits, "alternating") for bits in (0, 3)]
    plain += [pf.lloyd_max(2), pf.lloyd_max(2, symmetric=False)]
    centered = [pf.uniform(2, center=True), pf.max_uniform(3, center=True)]
    return [*plain, *centered, pf.ternary_uniform(center=True), pf.lsbq(2, center=True)]


def links(pf: Any, quantizer: Any, granularity: Any) -> dict[str, Any]:
    own = {"granularity": granularity, "period": 2, "warmup": 1}
    return {
        "hard": pf.hard_prox(quantizer, **own),
        "parq": pf.parq_prox(quantizer, **own, **SPAN),
        "parq, shrink": pf.parq_prox(quantizer, **own, **SPAN, shrink=True),
        "soft": pf.soft_prox(quantizer, **own, **SPAN),
        "binary_relax": pf.binary_relax_prox(quantizer, **own, **SPAN),
        "proxquant": pf.proxquant_prox(quantizer, **own, **SPAN, strength=0.2),
    }


def drawn(dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """The first weights, and the gradients of each step."""
    generator = torch.Generator().manual_seed(0)

    def tree() -> dict[str, Tensor]:
        made = {n: torch.randn(s, generator=generator).double() for n, s in SHAPES.items()}
        return {name: x.to(dtype) for name, x in made.items()}

    return [tree() for _ in range(STEPS + 1)]


def functional(pf: Any, link: Any, dtype: torch.dtype) -> Iterator[Tensor]:
    transform = pf.chain(pf.sgd(0.3), link)
    params, *grads = drawn(dtype)
    state = transform.init(params)
    for grad in grads:
        updates, state = transform.update(grad, state, params, learning_rate=0.3)
        params = pf.apply_updates(params, updates)
        yield from transform.weights(state, params).values()


def adapted(pf: Any, link: Any, dtype: torch.dtype, compiled: bool) -> Iterator[Tensor]:
    from parq_fn.optim import QuantOptimizer

    first, *grads = drawn(dtype)
    params = {name: torch.nn.Parameter(x) for name, x in first.items()}
    bits = getattr(link.quantizer, "bits", 0)
    own = {"params": list(params.values()), "quant_bits": bits}
    optimizer = QuantOptimizer(torch.optim.SGD([own], lr=0.3), link, compile=compiled)
    for grad in grads:
        for name, p in params.items():
            p.grad = grad[name]
        optimizer.step()
        yield from (p.detach().clone() for p in params.values())


def trajectories(compiled: bool) -> dict[str, list[Tensor]]:
    import parq_fn as pf

    cuts = [pf.per_tensor(), pf.per_channel(), pf.per_block(4)]
    found = {}
    for quantizer in quantizers(pf):
        for cut in cuts:
            for name, link in links(pf, quantizer, cut).items():
                for dtype in DTYPES:
                    key = f"{quantizer!r}, {cut!r}, {dtype}, {name}"
                    if not compiled:
                        found[f"functional, {key}"] = list(functional(pf, link, dtype))
                    found[f"QuantOptimizer, {key}"] = list(adapted(pf, link, dtype, compiled))
    return found


def dumped(root: Path, compiled: bool) -> dict[str, list[Tensor]]:
    """The trajectories of a checkout, from a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trajectories.pt"
        child = [sys.executable, __file__, str(root), str(file), *["--compile"] * compiled]
        subprocess.run(child, check=True, env={**os.environ, "PYTHONPATH": str(root)})
        found: dict[str, list[Tensor]] = torch.load(file)
        return found


def dump(root: str, file: str, *compiled: str) -> None:
    """What the process of a checkout does, of whose package no more is known than its operators."""
    import parq_fn

    assert Path(parq_fn.__file__).is_relative_to(root), parq_fn.__file__
    torch.save(trajectories(bool(compiled)), file)


def main() -> int:
    from parq_fn.foundation.command import Parser

    parser = Parser("tests.benchmarks.same_trajectories", __doc__)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--compile", action="store_true", help="with compile=True")
    args = parser.parse_args()
    own = dumped(Path(__file__).resolve().parents[2], args.compile)
    other = dumped(args.other.resolve(), args.compile)
    assert own.keys() == other.keys()
    differ = [key for key, weights in own.items() if not all(map(torch.equal, weights, other[key]))]
    for key in differ:
        print(f"differs: {key}")
    print(f"{len(own) - len(differ)} of {len(own)} trajectories are bit-equal")
    return 1 if differ else 0


if __name__ == "__main__" and not __package__:
    dump(*sys.argv[1:])
elif __name__ == "__main__":
    from parq_fn.foundation.command import command

    command(main)
