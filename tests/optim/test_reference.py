"""The published method's trajectories, through QuantOptimizer with the real torch.optim bases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from parq_fn.optim import QuantOptimizer
from tests.reference import TOLERANCE, array, close, of_kind, prox_of

BASES = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9),
    "sgd_nesterov": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.02),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.02),
}


def run(case: dict, tolerance: float, published_soft: bool = False) -> None:
    x, y = array(case, "X"), array(case, "Y")
    weight = nn.Parameter(array(case, "W0"))
    bias = nn.Parameter(torch.zeros(y.shape[1], dtype=y.dtype))
    quantized = {"params": [weight], "quant_bits": case["bits"]}
    quantized["weight_decay"] = 5e-2 if case["base"] == "adamw" else 1e-2
    if case["block"]:
        quantized["quant_block_size"] = case["block"]
    base = BASES[case["base"]]([quantized, {"params": [bias], "weight_decay": 0.0}])
    fraction = case["anneal_wd_frac"]
    optimizer = QuantOptimizer(
        base, prox_of(case, published_soft), anneal_weight_decay=fraction or 0.0
    )
    for t in range(23 if fraction else case["steps"]):  # decay at slope 0 differs on purpose
        optimizer.zero_grad()
        residual = x @ weight.T + bias - y
        (0.5 * residual.square().sum() / len(x)).backward()
        optimizer.step()
        close(weight.detach(), array(case, "W")[t], tolerance)
        close(optimizer.state[weight]["latent"], array(case, "latent")[t], tolerance)
        close(bias.detach(), array(case, "bias")[t], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", of_kind("trajectory"))
def test_trajectory(case: dict) -> None:
    run(case, 1e-8 if case["prox"] == "soft" else TOLERANCE)


@pytest.mark.parametrize(
    "case", [p for p in of_kind("trajectory") if p.values[0]["prox"] == "soft"]
)
def test_soft_trajectory_in_the_published_arithmetic(case: dict) -> None:
    run(case, TOLERANCE, published_soft=True)
