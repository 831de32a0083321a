"""The numeric cases of the published method, and the links and quantizers that they name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import parq_fn as pf

DATA = np.load(Path(__file__).parent / "data" / "reference_cases.npz")
CASES = json.loads(str(DATA["cases.json"]))
TOLERANCE = 1e-9

QUANTIZERS = {
    "uniform_mean": lambda bits, center: pf.uniform(bits, "mean", center=center),
    "uniform_max": lambda bits, center: pf.uniform(bits, "max", center=center),
    "max_uniform": lambda bits, center: pf.max_uniform(bits, center=center),
    "ternary_uniform": lambda bits, center: pf.ternary_uniform(center=center),
    "lsbq_greedy": lambda bits, center: pf.lsbq(bits, center=center),
    "lsbq_ternary_simple": lambda bits, center: pf.lsbq(0, center=center),
    "lsbq_optimal": lambda bits, center: pf.lsbq(bits, "optimal", center=center),
}


def of_kind(kind: str) -> list[pytest.param]:
    return [pytest.param(c, id=str(c["id"])) for c in CASES if c["kind"] == kind]


def array(case: dict, name: str) -> Tensor:
    return torch.from_numpy(DATA[f"{case['id']}/{name}"])


def close(ours: Tensor, theirs: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def soft_as_published(u: Tensor, levels: Tensor, temperature: Tensor) -> Tensor:
    above = torch.searchsorted(levels, u)
    lo = levels.gather(-1, (above - 1).clamp(min=0))
    hi = levels.gather(-1, above.clamp(max=levels.shape[-1] - 1))
    x = (u - lo) / (hi - lo + 1e-12)
    share = (torch.sigmoid(temperature * (x - 0.5)) - 0.5) / (torch.sigmoid(temperature / 2) - 0.5)
    relaxed = (lo + hi) / 2 + (hi - lo) / 2 * share
    return torch.where(temperature.isinf() | (hi == lo), pf.proxmaps.hard(u, levels), relaxed)


def link(case: dict, quantizer: pf.Quantizer, published_soft: bool = False, **options):
    window = {"anneal_start": case["anneal_start"], "anneal_end": case["anneal_end"]}
    if case["prox"] == "hard":
        return pf.hard_prox(quantizer, **options)
    if case["prox"] == "parq":
        return pf.parq_prox(quantizer, steepness=case["steepness"], **window, **options)
    if case["prox"] == "binary_relax":
        return pf.binary_relax_prox(quantizer, **window, **options)
    soft = pf.soft_prox(quantizer, **window, **options)
    if not published_soft:
        return soft
    return pf.custom_prox(
        quantizer, soft_as_published, soft.coefficient, start=soft.begins, **options
    )


def prox_of(case: dict, published_soft: bool = False, **options) -> pf.Prox:
    """The prox link of a trajectory."""
    cut = pf.per_channel() if case["per_channel"] else pf.per_tensor()
    return link(
        case,
        QUANTIZERS[case["quantizer"]](case["bits"], False),
        published_soft,
        granularity=pf.per_block(case["block"]) if case["block"] else cut,
        period=case["period"],
        warmup=case["warmup"],
        shrink=case["shrink"],
        normal_map=case["nm_gamma"] or None,
        **options,
    )
