"""The 415 numeric cases of the published method, through the public API, to 1e-9 in float64.

The cases' soft map divides by the cell's width plus 1e-12; its exact formula differs from that
by up to 1.2e-10, which one AdamW trajectory amplifies to 1.6e-9. The test of soft trajectories
runs both: the published arithmetic to 1e-9, the exact one to 1e-8.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import parq_fn as pf
from parq_fn import schedules
from parq_fn.foundation.value import value
from tests.reference import CASES, QUANTIZERS, TOLERANCE, array, close, link, of_kind, prox_of


def test_there_are_415() -> None:
    assert len(CASES) == 415


@pytest.mark.parametrize("case", of_kind("quantizer"))
def test_quantizer(case: dict) -> None:
    cut = pf.per_channel() if case["granularity"] == "channel" else pf.per_tensor()
    quantizer = QUANTIZERS[case["name"]](case["bits"], case["center"])
    close(quantizer(cut.rows(array(case, "w"))), array(case, "levels"))


@pytest.mark.parametrize("case", of_kind("inverse_slope"))
def test_inverse_slope(case: dict) -> None:
    schedule = pf.inverse_slope(
        case["anneal_start"], case["anneal_end"], case["steepness"], case["center"]
    )
    close(schedule(array(case, "step")), array(case, "value"))


@value
class free(pf.Quantizer):
    """So many levels, which are their own qparams."""

    count: int

    @property
    def num_levels(self) -> int:
        return self.count


@pytest.mark.parametrize("case", of_kind("proxmap"))
def test_proxmap(case: dict) -> None:
    """A link's state is made by hand, so that its step and levels are the case's."""
    u, levels = array(case, "u"), array(case, "levels")
    case = case | {"prox": case["name"]}
    ours = link(case, free(levels.shape[1]), granularity=pf.per_channel())
    step = torch.tensor(case["step"])
    zero = torch.zeros((), dtype=torch.float64)
    state = pf.ProxState(step + 1, ours.coefficient(step), zero, {"w": levels})
    w = ours.weights(state, {"w": u})["w"]
    middle = (levels[:, 1:] + levels[:, :-1]) / 2
    tie = (u[:, :, None] - middle[:, None]).abs().amin(-1) < 1e-12
    close(torch.where(tie, 0.0, w), torch.where(tie, 0.0, array(case, "w")))


def run(case: dict, published_soft: bool) -> None:
    tolerance = 1e-8 if case["prox"] == "soft" and not published_soft else TOLERANCE
    rate = 0.05 if case["base"].startswith("sgd") else 0.02
    decay = 5e-2 if case["base"] == "adamw" else 1e-2
    fraction = case["anneal_wd_frac"]
    if fraction:
        slope = pf.inverse_slope(case["anneal_start"], case["anneal_end"], case["steepness"])
        decay = schedules.anneal_decay(decay, slope, fraction)
    base = {
        "sgd": lambda wd: pf.sgd(rate, momentum=0.9, weight_decay=wd),
        "sgd_nesterov": lambda wd: pf.sgd(rate, momentum=0.9, nesterov=True, weight_decay=wd),
        "adam": lambda wd: pf.adam(rate, weight_decay=wd),
        "adamw": lambda wd: pf.adamw(rate, weight_decay=wd),
    }[case["base"]]
    prox = prox_of(case, published_soft, learning_rate=rate)
    transform = pf.chain(
        pf.partition({"W": base(decay), "bias": base(0.0)}, {"W": "W", "bias": "bias"}),
        pf.masked(prox, "W"),
    )
    x, y = array(case, "X"), array(case, "Y")

    def loss(weights: dict[str, Tensor]) -> Tensor:
        residual = x @ weights["W"].T + weights["bias"] - y
        return 0.5 * residual.square().sum() / len(x)

    params = {"W": array(case, "W0"), "bias": torch.zeros(y.shape[1], dtype=y.dtype)}
    state = transform.init(params)
    step = pf.value_and_grad(loss, transform)
    for t in range(23 if fraction else case["steps"]):  # decay at slope 0 differs on purpose
        _, grads = step(params, state)
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        weights = transform.weights(state, params)
        close(weights["W"], array(case, "W")[t], tolerance)
        close(params["W"], array(case, "latent")[t], tolerance)
        close(weights["bias"], array(case, "bias")[t], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", of_kind("trajectory"))
def test_trajectory(case: dict) -> None:
    run(case, published_soft=False)


@pytest.mark.parametrize(
    "case", [p for p in of_kind("trajectory") if p.values[0]["prox"] == "soft"]
)
def test_soft_trajectory_in_the_published_arithmetic(case: dict) -> None:
    run(case, published_soft=True)
