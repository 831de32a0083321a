"""Groups of a module's parameters by rules."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, param_groups

LINK = pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=2, granularity=pf.per_channel())


BLOCKS = pf.hard_prox(pf.lsbq(2), granularity=pf.per_block(3))


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(6, 4),
        nn.Linear(4, 8),
        nn.LayerNorm(8),
        nn.ConvTranspose1d(8, 6, 2),
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6, bias=False)),
    )


def how(groups: Any) -> dict[str, Any]:
    """{name: what its group says}, but for parameters."""
    found = {}
    for group in groups:
        own = {key: got for key, got in group.items() if key not in ("params", "weight_decay")}
        found |= {name: own for name, _ in group["params"]}
    return found


def test_the_first_rule_that_matches_wins_and_the_rest_stays_in_full_precision() -> None:
    own = pf.hard_prox(pf.integer(4), granularity=pf.per_channel())
    found = how(
        param_groups(net(), {"0": own, "4.1 | 4.1.weight": None, "3|4": 3, re.compile("^1"): 0})
    )
    assert found["0.weight"] == {"prox": own}
    assert found["1.weight"] == {"quant_bits": 0}
    assert found["3.weight"] == {"quant_bits": 3, "quant_axis": 1}
    assert found["4.0.weight"] == {"quant_bits": 3}
    left = {"1.bias", "2.weight", "2.bias", "3.bias", "4.0.bias", "4.1.weight"}
    assert {name for name, keys in found.items() if not keys} == left


RULES = ["*", "0", "1", "4", "*.weight", "4.0|4.1", "3.weight", "1.bias"]


@given(
    st.lists(st.sampled_from(RULES), min_size=1, max_size=4, unique=True),
    st.sampled_from([None, 0.0, 0.1]),
)
def test_every_parameter_is_in_one_group(patterns: list[str], decay: float | None) -> None:
    module = net()
    try:
        groups = param_groups(module, dict.fromkeys(patterns, 2), weight_decay=decay)
    except ValueError as error:
        assert "takes nothing" in str(error)  # noqa: PT017 # some orders leave a rule nothing
        return
    named = [pair for group in groups for pair in group["params"]]
    assert sorted(name for name, _ in named) == sorted(dict(module.named_parameters()))
    assert {id(p) for _, p in named} == {id(p) for p in module.parameters()}
    for group in groups:
        if any(p.dim() < 2 for _, p in group["params"]):
            assert group["weight_decay"] == 0.0
        else:
            assert group.get("weight_decay") == decay


def test_what_has_one_dimension_is_not_decayed_whatever_it_is() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ParameterDict({"scale": torch.ones(3)}))
    matrix, scale = param_groups(net, weight_decay=0.1)
    assert (matrix["weight_decay"], scale["weight_decay"]) == (0.1, 0.0)


def test_groups_train_pack_and_print() -> None:
    module = net()
    groups = param_groups(module, weight_decay=0.1)
    assert copy.deepcopy(groups)[0].keys() == groups[0].keys()
    optimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=0.01), LINK)
    for _ in range(4):
        for p in module.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    kernel = module[3].weight
    assert optimizer.levels(kernel).shape == (6, 4)
    assert all(kernel[:, i].unique().numel() <= 4 for i in range(6))
    assert pf.export.pack(module, optimizer)["3.weight"].num_bytes
    assert "quant_bits" not in str(groups)
    assert "embedding" not in str(groups)
    assert "4.*.weight" in str(groups)


def test_a_name_in_full_takes_whatever_it_names_that_is_floating() -> None:
    module = net()
    assert how(param_groups(module, {"1.bias": 4}))["1.bias"] == {"quant_bits": 4}
    for dtype in (torch.int64, torch.complex64, torch.float8_e4m3fn):
        module.other = nn.Parameter(torch.zeros(2, 2, dtype=dtype), requires_grad=False)
        assert how(param_groups(module, {"other": None, "*": 2}))["other"] == {}
        with pytest.raises(TypeError, match="rule 'other': parameter 'other' has dtype torch"):
            param_groups(module, {"other": 2})


def test_a_name_in_a_rule_stands_for_itself_whatever_is_in_it() -> None:
    names = ["a|b", "c[0]", "*", "d"]
    module = nn.ModuleDict({name: nn.Linear(2, 3) for name in names})
    found = how(param_groups(module, {"a|b": 2, "c[0]|d": 3, "*": 4}))
    assert [found[f"{name}.weight"]["quant_bits"] for name in names] == [2, 3, 4, 3]
    assert not pf.weight_mask(module, exclude="c[0]")["c[0].weight"]


def test_a_tied_parameter_goes_by_any_of_its_names_and_appears_once() -> None:
    module = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    module[1].weight = module[0].weight
    groups = param_groups(module, {"1": 4})
    assert how(groups) == {"0.weight": {"quant_bits": 4}}


@pytest.mark.parametrize(
    ("rules", "error", "match"),
    [
        ({"nobody": 2}, ValueError, "rule 'nobody' matches no parameter.*are: 0.weight, 1.weight"),
        ({"*": 2, "0": 4}, ValueError, "rule '0' takes nothing: '0.weight' and all else.*rule '"),
        ({"0|nobody": 2}, ValueError, r"part 'nobody' of rule '0\|nobody' matches no parameter"),
        ({"2": 2}, ValueError, "rule '2' takes nothing: '2.weight' is 'norm', which stays"),
        ({"*": 9}, ValueError, r"rule '\*' has quant_bits=9"),
        ({"*": "2"}, ValueError, r"rule '\*' has quant_bits='2'"),
        ({"1": BLOCKS}, ValueError, "param_groups: parameter '1.weight': block size 3 does not"),
        (
            {"3": BLOCKS},
            ValueError,
            r"'3.weight': block size 3 does not .* 16 along \(0, 2\)",
        ),
        ({3: 2}, TypeError, "pattern to be a string such as 'lm_head'"),
        ({}, TypeError, "expected rules such as"),
        ("*", TypeError, "expected rules such as"),
    ],
)
def test_rules_that_say_nothing_are_refused(rules: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        param_groups(net(), rules)


@pytest.mark.parametrize(
    ("count", "end"), [(8, r"6\.weight, 7\.weight$"), (9, r"7\.weight, \.\.\.$")]
)
def test_a_rule_that_matches_nothing_is_told_the_first_eight(count: int, end: str) -> None:
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
    with pytest.raises(ValueError, match=rf"can be quantized are: 0\.weight, .*{end}"):
        param_groups(module, {"head": 2})


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ValueError, match="param_groups: weight_decay must lie in"):
        param_groups(net(), weight_decay=-0.1)
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        param_groups([torch.ones(2)])  # type: ignore[arg-type] # what is refused
