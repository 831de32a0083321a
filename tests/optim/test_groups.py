"""Parameter groups: what their keys may be, added ones, what is shared within one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from parq_fn.optim.groups import link_of
from tests.optim.adapters import ADAPTERS, LATE, SOON, ones_for, parameters, quantized, transformed


def test_a_base_that_was_loaded_by_itself_raises() -> None:
    (a,) = parameters(1)
    optimizer = quantized([a])
    optimizer.base.load_state_dict(optimizer.base.state_dict())
    ones_for(a)
    with pytest.raises(ValueError, match="new param_groups; load a state through the QuantOpt"):
        optimizer.step()


def test_reordered_parameters_are_followed_and_groups_added_to_the_base_raise() -> None:
    a, b, c = parameters(3)
    optimizer = quantized([a, b], LATE)
    ones_for(a, b)
    optimizer.step()
    entries = optimizer.state[a], optimizer.state[b]
    optimizer.param_groups[0]["params"].reverse()
    ones_for(a, b)
    optimizer.step()
    assert optimizer.state[a]["latent"] is entries[0]["latent"]
    assert int(optimizer.state[b]["updates"]) == 2
    optimizer.base.add_param_group({"params": [c]})
    with pytest.raises(ValueError, match="had 1 groups and has 2; add groups with its own"):
        optimizer.step()


def test_parameters_of_one_name_in_two_groups_are_refused() -> None:
    a, b = parameters()
    groups = [{"params": [("weight", a)]}, {"params": [("weight", b)]}]
    with pytest.raises(ValueError, match="two parameters are named 'weight'"):
        TransformOptimizer(groups, pf.sgd(0.0))


def test_a_group_added_to_prox_links_in_mid_training_is_refused() -> None:
    a, b = parameters()
    optimizer = transformed([a], pf.hard_prox(pf.lsbq(2), period=10))
    ones_for(a)
    optimizer.step()
    with pytest.raises(ValueError, match="have taken steps, and a parameter added now"):
        optimizer.add_param_group({"params": [("b", b)]})
    optimizer.step()
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_exchange_that_would_lose_trained_state_is_refused(adapter: str) -> None:
    a, b = parameters()
    optimizer = ADAPTERS[adapter]([a])
    optimizer.param_groups[0]["params"][0] = nn.Parameter(b.detach()[:2])
    ones_for(optimizer.param_groups[0]["params"][0])
    optimizer.step()  # nothing to lose
    optimizer.param_groups[0]["params"][0] = b
    label = {"QuantOptimizer": "0 of group 0", "TransformOptimizer": "p0"}[adapter]
    wanted = rf"parameter '{label}' was exchanged for a Parameter of shape .* after it was tr"
    with pytest.raises(ValueError, match=wanted):
        optimizer.step()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_parameters_that_are_not_exchanged_one_for_one_in_their_groups_are_refused(
    adapter: str,
) -> None:
    a, b = parameters()
    if adapter == "QuantOptimizer":
        optimizer: Any = quantized([a])
        optimizer.add_param_group({"params": [b], "quant_bits": 2})
    else:
        groups = [{"params": [("a", a)]}, {"params": [("b", b)]}]
        optimizer = TransformOptimizer(groups, pf.sgd(0.1))
    first, second = (group["params"] for group in optimizer.param_groups)
    first[0], second[0] = b, nn.Parameter(torch.ones(4, 4))
    with pytest.raises(ValueError, match=r"group 0 lacks \['.*'\] and has 0 new parameters; exch"):
        optimizer.step()
    first[0] = second[0]
    with pytest.raises(ValueError, match=r"group 0 lacks \['.*'\] and has 1 new parameters; exch"):
        optimizer.step()
    both = ADAPTERS[adapter]([a, b, nn.Parameter(torch.ones(4, 4))])
    both.param_groups[0]["params"][:2] = [nn.Parameter(torch.ones(4, 4))] * 2
    with pytest.raises(ValueError, match=r"lacks \['.*', '.*'\] and has 2 new parameters; exch"):
        both.step()


def test_a_rate_of_one_group_stands_in_for_it_alone() -> None:
    a, b = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    transform = pf.partition({"x": pf.sgd(0.1), "y": pf.sgd(0.01)}, {"a": "x", "b": "y"})
    groups = [{"params": [("a", a)], "lr": 5.0}, {"params": [("b", b)]}]
    optimizer = TransformOptimizer(groups, transform)
    ones_for(a, b)
    optimizer.step()
    assert torch.equal(a, torch.full((2,), -5.0))
    assert torch.equal(b, torch.full((2,), -0.01))


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"quant_per_channel": True}, r"group 0 has quant_per_channel; expected quant_bits, "),
        ({"quant_bits": "2"}, r"quant_bits='2', expected a whole number in 0\.\.8"),
        ({"quant_bits": 9}, r"quant_bits=9, expected"),
        ({"quant_block_size": 0}, r"quant_block_size=0, expected 1 or more"),
    ],
)
def test_group_keys_that_mean_nothing_are_refused(group: dict[str, Any], message: str) -> None:
    base = torch.optim.SGD([{"params": parameters(1), "quant_bits": 2, **group}], lr=0.1)
    with pytest.raises(ValueError, match=message):
        QuantOptimizer(base, SOON)


def test_no_parameters_at_all() -> None:
    optimizer = TransformOptimizer([{"params": []}], pf.sgd(0.1))
    assert optimizer.step(lambda: 3.0) == 3.0


def test_changed_quant_bits_raise() -> None:
    (w,) = parameters(1)
    optimizer = quantized([w])
    for bits in (4, 16):
        optimizer.param_groups[0]["quant_bits"] = bits
        with pytest.raises(ValueError, match=rf"has quant_bits={bits} and was built with 2"):
            optimizer.step()


def test_a_saved_rate_does_not_replace_a_schedule() -> None:
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    one = TransformOptimizer([("w", a)], pf.sgd(0.1, 0.9))
    other = TransformOptimizer([("w", b)], pf.sgd(pf.schedules.cosine(0.5, 0.0, 0, 10), 0.9))
    other.load_state_dict(one.state_dict())
    assert "lr" not in other.param_groups[0]


# What quant_bits makes of the prox link's quantizer

HALF = torch.float16
#: (quantizer, bits, the quantizer of the group)
SET: list[tuple[Any, int, Any]] = [
    (pf.uniform(2), 4, pf.uniform(4)),
    (pf.uniform(2, center=True), 0, pf.ternary_uniform(center=True)),
    (pf.ternary_uniform(), 0, pf.ternary_uniform()),
    (pf.lsbq(2), 0, pf.lsbq(0)),
    (pf.integer(8, "mean"), 4, pf.integer(4, "mean")),
    (pf.affine(2), 3, pf.affine(3)),
    (pf.gaussian(2), 0, pf.gaussian(0)),
    (pf.stored(pf.integer(8), HALF), 4, pf.stored(pf.integer(4), HALF)),
    (pf.centered(pf.uniform(2)), 0, pf.centered(pf.ternary_uniform())),
    (pf.codebook.nf4, 4, pf.codebook.nf4),
    (pf.mxfp4(), 4, pf.mxfp4()),
    (pf.nvfp4(), 4, pf.nvfp4()),
]


@pytest.mark.parametrize(("quantizer", "bits", "want"), SET, ids=str)
def test_bits_of_a_group_are_set(quantizer: Any, bits: int, want: Any) -> None:
    assert link_of(pf.hard_prox(quantizer), {"quant_bits": bits}).quantizer == want


@pytest.mark.parametrize(
    ("quantizer", "bits"),
    [(pf.mxfp4(), 2), (pf.stored(pf.codebook.nf4, HALF), 8), (pf.ternary_uniform(), 2)],
    ids=str,
)
def test_bits_that_a_table_has_not_are_refused(quantizer: Any, bits: int) -> None:
    with pytest.raises(ValueError, match=f"has no field bits to be set to quant_bits={bits}"):
        link_of(pf.hard_prox(quantizer), {"quant_bits": bits})
