"""A program as users write it, for checkers of types: mypy checks it strictly with the package, and
pyright in tests/test_packaging.py. It is not run.

What is wrong has an ignored error, and one that is not needed is an error itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import parq_fn as pf
from parq_fn import export, schedules
from parq_fn.foundation.traits import PER_LEAF, ProxTraits, QuantizerTraits, ScheduleTraits
from parq_fn.foundation.value import state_class, value
from parq_fn.optim import (
    QuantOptimizer,
    TransformOptimizer,
    load_checkpoint,
    save_checkpoint,
    share_on_levels,
)
from parq_fn.proxmaps import prox_map
from parq_fn.transforms.transformation import NO_RATE

# A torch loop


def train(net: nn.Sequential, x: Tensor, y: Tensor) -> None:
    matrices = [p for p in net.parameters() if p.dim() > 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "quant_bits": 2},
        {"params": [p for p in net.parameters() if p.dim() < 2]},
    ]
    prox = pf.parq_prox(pf.lsbq(2), anneal_start=50, anneal_end=400, granularity=pf.per_channel())
    optimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=1e-2), prox)
    loss = (net(x) - y).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert_type(optimizer.levels(matrices[0]), Tensor)
    assert_type(share_on_levels(optimizer), float)
    save_checkpoint(Path("runs") / "last", net, optimizer, progress={"epoch": 3})
    load_checkpoint("runs/last", net, optimizer)
    packed = export.pack(net, optimizer, snap=True)
    assert_type(packed, dict[str, export.Packed | Tensor])
    export.save(packed, "net.safetensors")
    export.load_into(net, Path("net.safetensors"))


def adapt(net: nn.Module) -> float:
    optimizer = TransformOptimizer(net.named_parameters(), pf.adamw(1e-3))
    TransformOptimizer(net.parameters(), pf.chain(pf.sgd(0.1), pf.hard_prox(pf.uniform(4))))
    TransformOptimizer([{"params": net.parameters(), "lr": 0.1}], pf.sgd(0.1))
    return float(optimizer.param_groups[0]["lr"])


# The functional loop


class Params(NamedTuple):
    """Params of a type of one's own: what is made of them has it too."""

    weight: Tensor
    bias: Tensor


def loss_of(params: Params, x: Tensor) -> Tensor:
    return (x @ params.weight + params.bias).square().sum()


def descend(params: Params, x: Tensor) -> Params:
    prox = pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=5)
    transform = pf.chain(pf.sgd(0.1, momentum=0.9), pf.masked(prox, "weight"))
    state = transform.init(params)
    loss, grads = pf.value_and_grad(loss_of, transform)(params, state, x)
    assert_type(grads, Params)
    updates, state = transform.update(grads, state, params)
    assert_type(updates, Params)
    params = pf.apply_updates(params, updates)
    assert_type(params, Params)
    assert_type(transform.weights(state, params), Params)
    assert_type(pf.read(state, "slope"), Tensor)
    levels: dict[str, Tensor] = pf.levels_of(transform, state)
    print(loss, levels)
    return params


def of_a_module(net: nn.Module) -> dict[str, Tensor]:
    apply, params = pf.functional(net)
    assert_type(params, dict[str, Tensor])
    assert_type(pf.weight_mask(net, exclude="head"), dict[str, bool])
    print(apply(params, torch.ones(1)))
    return pf.adam(1e-3).weights((), params)


# Operators of one's own


@value
class largest(pf.Quantizer):
    """The largest weight of a row, and its negative."""

    share: float = 1.0

    @property
    def num_levels(self) -> int:
        return 2

    def qparams(self, x: Tensor) -> Tensor:
        top = self.share * x.abs().amax(-1, keepdim=True)
        return torch.cat([-top, top], -1)


@value
class signs(pf.Quantizer):
    """What has a property in the base may be a class attribute too."""

    num_levels = 2
    num_qparams = 1
    num_whole = 0
    homogeneous = True
    telling = False
    scales = (True,)
    rows_at_once = 2
    traits = QuantizerTraits(symmetric=True)

    def qparams(self, x: Tensor) -> Tensor:
        return x.abs().mean(-1, keepdim=True)

    def levels(self, qparams: Tensor) -> Tensor:
        return torch.cat([-qparams, qparams], -1)


@value
class twice(pf.Quantizer):
    """And what is computed from another's."""

    quantizer: pf.Quantizer

    @property
    def num_levels(self) -> int:
        return self.quantizer.num_levels

    @property
    def homogeneous(self) -> bool:
        return self.quantizer.homogeneous

    @property
    def traits(self) -> QuantizerTraits:
        return self.quantizer.traits

    def qparams(self, x: Tensor) -> Tensor:
        return 2 * self.quantizer.fit(x)


@value
class halved(schedules.Schedule):
    traits = ScheduleTraits(first=0.5)

    def __call__(self, step: int | Tensor) -> Tensor:
        return torch.full((), 0.5)


@prox_map(ProxTraits(elementwise=True))
def halfway(u: Tensor, levels: Tensor, coefficient: Tensor) -> Tensor:
    return u + coefficient * (pf.proxmaps.hard(u, levels) - u) / 2


@value
class late(pf.Prox):
    begins = 10
    ends = 100
    proxmap = pf.proxmaps.hard
    elementwise = True


@state_class
class Count(NamedTuple):
    updates: Tensor


@value
class counted(pf.Link):
    """Counts updates."""

    traits = PER_LEAF
    rates = NO_RATE
    pulls_back = False

    def init(self, params: Any) -> Count:
        return Count(torch.zeros((), dtype=torch.int64))

    def update(self, updates: Any, state: Count, params: Any, **extra: Any) -> tuple[Any, Count]:
        return updates, Count(state.updates + 1)


def own() -> pf.Transformation:
    assert_type(largest(0.5)(torch.ones(1, 4)), Tensor)
    assert_type(halfway(torch.ones(1, 4), torch.ones(1, 2), 0.5), Tensor)
    assert_type(signs().num_levels + twice(largest()).num_levels, int)
    assert_type(twice(signs()).homogeneous, bool)
    assert_type(twice(signs()).scales, tuple[bool, ...])
    assert_type(counted().rates, tuple[float, float])
    assert_type(twice(signs()).traits, QuantizerTraits)
    rate = schedules.warmup(schedules.cosine(0.1, 0.0, 0, 90), 10)
    assert_type(rate(5), Tensor)
    prox = pf.custom_prox(largest(), halfway, schedules.linear(0.0, 1.0, 0, 100))
    return pf.chain(counted(), pf.sgd(rate), prox)


# Reached after `import parq_fn`

pf.export.load("net.safetensors")
pf.plot.proxmap(pf.proxmaps.hard, pf.lsbq(2)(torch.ones(1, 4)))
pf.display.table(())
pf.testing.check_quantizer(largest())
print(pf.convergence, pf.optim, pf.estimators.inside(), pf.__version__)


# What is wrong


def wrong(net: nn.Module, params: Params, optimizer: QuantOptimizer) -> None:
    pf.lsbq("2")  # type: ignore[arg-type]
    pf.lsbq(2, "best")  # type: ignore[arg-type]
    pf.uniform(2, center="no")  # type: ignore[arg-type]
    pf.hard_prox(pf.lsbq)  # type: ignore[arg-type]
    pf.hard_prox(pf.lsbq(2), granularity=pf.per_channel)  # type: ignore[arg-type]
    pf.hard_prox(pf.lsbq(2), periods=3)  # type: ignore[call-arg]
    pf.parq_prox(pf.lsbq(2), anneal_start=0)  # type: ignore[call-arg]
    pf.sgd("0.1")  # type: ignore[arg-type]
    pf.sgd(None)  # type: ignore[arg-type]
    pf.chain(torch.optim.AdamW)  # type: ignore[arg-type]
    pf.chain(pf.lsbq(2))  # type: ignore[arg-type]
    pf.per_block(32).size = 64  # type: ignore[misc]
    QuantOptimizer(torch.optim.AdamW, pf.hard_prox(pf.lsbq(2)))  # type: ignore[arg-type]
    QuantOptimizer(net.parameters(), pf.hard_prox(pf.lsbq(2)))  # type: ignore[arg-type]
    QuantOptimizer(optimizer, pf.lsbq(2))  # type: ignore[arg-type]
    TransformOptimizer(net, pf.sgd(0.1))  # type: ignore[arg-type]
    TransformOptimizer(net.parameters(), optimizer)  # type: ignore[arg-type]
    optimizer.levels("weight")  # type: ignore[arg-type]
    share_on_levels(net)  # type: ignore[arg-type]
    pf.functional(params)  # type: ignore[arg-type]
    save_checkpoint(net, "last", optimizer)  # type: ignore[arg-type]
    load_checkpoint("last", optimizer, net)  # type: ignore[arg-type]
    export.pack(net, optimizer, None, True)  # type: ignore[call-arg]
    text: str = pf.apply_updates(params, params)  # type: ignore[assignment]
    print(text)


class text_for_number(pf.Quantizer):
    num_levels = "2"  # type: ignore[assignment]
