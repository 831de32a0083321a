"""Quantizers of one's own: what they give is taken, or refused with the quantizer's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.foundation.value import value
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from parq_fn.quantizers import Grid


@value
class mine(pf.Quantizer):
    """Of the largest magnitude: qparams, and of these levels or a grid."""

    of: Callable[[Tensor], Any] = torch.Tensor.clone
    to: Callable[[Tensor], Any] | None = None
    by: tuple[float, float] | None = None
    num_levels: Any = 3

    @property
    def num_qparams(self) -> Any:
        return self.num_levels if self.to is None and self.by is None else 1

    def qparams(self, x: Tensor) -> Any:
        return self.of(x.abs().amax(-1, keepdim=True))

    def levels(self, qparams: Tensor) -> Any:
        return super().levels(qparams) if self.to is None else self.to(qparams)

    def grid(self, qparams: Tensor) -> Grid | None:
        return None if self.by is None else Grid(qparams, *self.by)


def three(top: Tensor) -> Tensor:
    return torch.cat([-top, 0 * top, top], -1)


def turned(top: Tensor) -> Tensor:
    return three(top).flip(-1)


class alike:
    """Not a subclass, and no more than links ask for."""

    num_levels, num_qparams = 3, 1

    def __init__(self, to: Callable[[Tensor], Any]):
        self.to = to

    def __repr__(self) -> str:
        return "alike()"

    def fit(self, rows: Tensor) -> Tensor:
        return rows.float().abs().amax(-1, keepdim=True)

    def levels_in(self, qparams: Tensor, dtype: torch.dtype) -> Any:
        return self.to(qparams).to(dtype)


WEIGHT = torch.tensor([[1.0, -2.0, 0.5, 0.1], [3.0, 0.25, -0.125, 0.375]])


def of_a_loop(quantizer: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    prox = pf.hard_prox(quantizer, period=1, granularity=pf.per_channel())
    transform, params = pf.chain(pf.sgd(0.0), prox), {"w": WEIGHT.to(dtype)}
    _, state = transform.update(params, transform.init(params), params)
    return transform.weights(state, params)["w"].float()


def of_an_optimizer(quantizer: Any, kind: str) -> Tensor:
    prox = pf.hard_prox(quantizer, period=1, granularity=pf.per_channel())
    net = nn.ParameterDict({"w": nn.Parameter(WEIGHT.clone())})
    optimizer: Any = TransformOptimizer(net.named_parameters(), pf.chain(pf.sgd(0.0), prox))
    if kind == "base":
        group = {"params": [net["w"]], "prox": prox}
        optimizer = QuantOptimizer(torch.optim.SGD([group], lr=0.0))
    net["w"].grad = torch.zeros_like(WEIGHT)
    optimizer.step()
    return net["w"].detach()


WAYS: dict[str, Callable[[Any], Tensor]] = {
    "call": lambda q: pf.proxmaps.hard(WEIGHT, q(WEIGHT)),
    "loop": of_a_loop,
    "bfloat16": lambda q: of_a_loop(q, torch.bfloat16),
    "QuantOptimizer": lambda q: of_an_optimizer(q, "base"),
    "TransformOptimizer": lambda q: of_an_optimizer(q, "transform"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "right",
    [
        mine(three),
        mine(turned),
        mine(lambda top: three(top).double()),
        mine(to=three),
        mine(to=lambda top: three(top).double()),
        mine(by=(-1.0, 1.0)),
        mine(lambda top: torch.cat([-top, 0 * top, top, top], -1), num_levels=4),
        alike(three),
    ],
)
def test_levels_of_a_quantizer_of_ones_own_are_taken_in_any_order(right: Any, way: str) -> None:
    if isinstance(right, alike) and way == "call":
        return
    top = WEIGHT.abs().amax(-1, keepdim=True)
    assert torch.equal(WAYS[way](right), pf.proxmaps.hard(WEIGHT, three(top)))


WRONG = {
    r"qparams\(x\) is a list, expected a tensor": mine(lambda top: [1.0, 2.0, 3.0]),
    r"qparams\(x\) is None": mine(lambda top: None),
    r"qparams\(x\) has dtype torch.int32, expected torch.float32": mine(lambda x: three(x).int()),
    r"qparams\(x\) has dtype torch.float16": mine(lambda x: three(x).half()),
    r"qparams\(x\) has shape \(2,\), expected \(2, 3\)": mine(lambda x: x.squeeze(-1)),
    r"qparams\(x\) are not finite in 2 row\(s\) of finite x": mine(lambda x: three(x) / 0),
    r"qparams\(x\) are not finite in 1 row\(s\)": mine(lambda x: three(x) / (x > 1.25)),
    r"levels\(qparams\) is a list, expected a tensor": mine(to=lambda q: [-1.0, 0.0, 1.0]),
    r"levels\(qparams\) has dtype torch.int64": mine(to=lambda q: three(q).long()),
    r"levels\(qparams\) has dtype torch.bfloat16": mine(to=lambda q: three(q).bfloat16()),
    r"levels\(qparams\) has shape \(1, 3\), expected \(2, 3\)": mine(to=lambda q: three(q[:1])),
    r"levels\(qparams\) has shape \(2, 2\), expected \(2, 3\)": mine(to=lambda q: three(q)[:, 1:]),
    r"levels\(qparams\) are not sorted in 2 row\(s\), .* row 0: \[2.0, 0.0, -2.0\]": mine(
        to=turned
    ),
    r"levels\(qparams\) are not sorted in 1 row\(s\), .* row 1: \[3.0, 0.0, -3.0\]": mine(
        to=lambda q: torch.where(q > 2.5, turned(q), three(q))
    ),
    r"levels\(qparams\) are not finite in 1": mine(to=lambda q: three(q) / (q != q.amin())),
    r"levels\(qparams\) are not sorted": mine(lambda top: -top, by=(-1.0, 1.0)),
    r"grid\(qparams\) has 5 levels, .* expected num_levels, 3": mine(by=(-2.0, 2.0)),
    "num_levels must be a whole number, got 3.0": mine(three, num_levels=3.0),
    "num_levels must be 1 or more, got 0": mine(lambda x: x[:, :0], num_levels=0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("message", WRONG)
def test_what_no_map_can_search_is_refused_with_the_name(message: str, way: str) -> None:
    for around in (lambda q: q, lambda q: pf.stored(q, torch.bfloat16)):
        with pytest.raises((TypeError, ValueError), match=rf"mine\(.*{message}"):
            WAYS[way](around(WRONG[message]))


def test_a_quantizer_that_is_only_alike_is_held_to_the_same() -> None:
    for way in ("loop", "bfloat16", "QuantOptimizer", "TransformOptimizer"):
        with pytest.raises(ValueError, match=r"alike\(\): levels\(qparams\) are not sorted"):
            WAYS[way](alike(turned))


def test_rows_that_are_not_finite_are_no_fault_of_the_quantizer() -> None:
    quantizer = mine(lambda x: three(x) / (x > 0))  # 0 / 0 in rows of zeros
    rows = torch.tensor([[1.0, 2.0], [torch.nan, 1.0]])
    assert torch.equal(quantizer.fit(rows)[0], torch.tensor([-2.0, 0.0, 2.0]))
    assert bool(quantizer.fit(rows)[1].isnan().all())
    with pytest.raises(ValueError, match="divided by 0"):
        quantizer.fit(torch.zeros(1, 2))
