"""Layers that multiply with the codes of their weights, against float32: linear layers of a Llama
of a billion weights, in batches of 1 to 64 inputs, on one thread and on all.

A layer is called after others of its shape, a hundred megabytes of them in float32, as in a model,
whose weights are in no cache when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.export import pack_weight, product, quantized
from tests.benchmarks.measure import interleaved, ratio
from tests.benchmarks.report import Found

#: Quantizers, and what a layer of theirs may take of float32's time for one input.
QUANTIZERS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "1 bit": (pf.lsbq(1), 0.55),
    "ternary": (pf.lsbq(0), 0.40),
    "2 bits, even": (pf.uniform(2), 0.40),
    "2 bits, even, blocks of 64": (pf.uniform(2), 0.40),
    "2 bits, even, blocks of 32": (pf.uniform(2), 0.85),
    "2 bits, lsbq": (pf.lsbq(2), 0.80),
    "2 bits, any levels": (
        lambda rows: rows.sort(-1).values[:, :: rows.shape[1] // 4][:, :4],
        0.85,
    ),
    "4 bits, even": (pf.uniform(4), 0.40),
}
#: What it may take of float32's time for more inputs.
BATCHES = {2: 0.95, 4: 0.95, 64: 1.25}
SHAPES = [(2048, 2048), (512, 2048), (8192, 2048), (2048, 8192)]  # outputs, inputs
_COLD = 100 << 20  # bytes of layers of one shape


def layers(name: str, shape: tuple[int, int], count: int) -> tuple[list[Any], list[Any]]:
    """(dense, packed) layers with the same weights."""
    outputs, inputs = shape
    quantizer, _ = QUANTIZERS[name]
    _, _, block = name.partition("blocks of ")
    rows = (-1, int(block)) if block else shape
    weight = torch.randn(shape)
    levels = quantizer(weight.reshape(rows))
    on_levels = pf.proxmaps.hard(weight.reshape(rows), levels).reshape(shape)
    entry = {"weight": pack_weight(on_levels, levels)}
    dense, packed = [], []
    for _ in range(count):
        dense.append(nn.Linear(inputs, outputs, bias=False))
        dense[-1].weight = nn.Parameter(on_levels.clone())
        packed.append(quantized(nn.Linear(inputs, outputs, bias=False), entry))
        packed[-1].codes, packed[-1].levels = packed[-1].codes.clone(), packed[-1].levels.clone()
    return dense, packed


def held(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def run(size: str, repeats: int) -> Iterator[Found]:
    """The time of a packed layer over that of the dense one, and its bytes over the dense one's."""
    shapes = [(128, 512)] if size == "tiny" else SHAPES
    if size == "tiny":  # nothing is compiled
        with mock.patch.multiple(
            product, compiled=lambda formula, options, dynamic: formula, _PROGRAMS={}
        ):
            yield from _all(shapes, (1,), 1, repeats)
        return
    yield from _all(shapes, sorted({1, torch.get_num_threads()}), _COLD, repeats)


def _all(
    shapes: list[tuple[int, int]], threads: Sequence[int], least: int, repeats: int
) -> Iterator[Found]:
    """least: bytes of dense layers of a shape."""
    before = torch.get_num_threads()
    for name, (_, limit) in QUANTIZERS.items():
        for shape in shapes:
            copies = -(-least // (4 * shape[0] * shape[1]))
            dense, packed = layers(name, shape, copies)
            case = f"{name}, {shape[0]} x {shape[1]}"
            yield Found("packed", case, "bytes over float32", held(packed[0]) / held(dense[0]))
            try:
                for number in threads:
                    torch.set_num_threads(number)
                    for batch, most in {1: limit, **BATCHES}.items():
                        value, spread = _time(dense, packed, batch, repeats)
                        what = f"batch {batch}, {number} thread{'s' * (number > 1)}, of float32's"
                        yield Found("packed", case, what, value, spread, most)
            finally:
                torch.set_num_threads(before)


def _time(dense: list[Any], packed: list[Any], batch: int, repeats: int) -> tuple[float, float]:
    x = torch.randn(batch, dense[0].in_features)

    def work(chosen: list[Any]) -> Callable[[], None]:
        def all_of_them() -> None:
            with torch.no_grad():
                for layer in chosen:
                    layer(x)

        return all_of_them

    with torch.no_grad():
        torch.testing.assert_close(packed[0](x), dense[0](x), rtol=1e-3, atol=1e-3)
    times = interleaved({"dense": work(dense), "packed": work(packed)}, max(repeats, 5))
    return ratio(times["packed"], times["dense"])
