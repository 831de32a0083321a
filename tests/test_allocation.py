"""What bits cost in each weight, and the cheapest bits under a size."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, param_groups
from parq_fn.sensitivities import Cost, Sensitivity

LINK = pf.hard_prox(pf.lsbq(2), granularity=pf.per_channel())


def best_of_all(table: Sensitivity, budget: float) -> float:
    """The least cost, by trying every choice."""
    sizes, costs = np.zeros(1), np.zeros(1)
    for own in table.values():
        sizes = (sizes[:, None] + [one.size for one in own]).ravel()
        costs = (costs[:, None] + [one.change for one in own]).ravel()
    return float(costs[sizes <= budget].min())


def check_best(table: Sensitivity, budget: int) -> None:
    found = pf.allocate(table, budget / sum(table.numel.values()))
    chosen = {name: 16 if bits is None else bits for name, bits in found.items()}
    own = {name: next(c for c in table[name] if c.bits == b) for name, b in chosen.items()}
    assert found.size == sum(cost.size for cost in own.values()) <= budget
    assert math.isclose(found.cost, sum(cost.change or 0 for cost in own.values()), abs_tol=1e-12)
    want = best_of_all(table, budget)
    assert found.gap >= 0
    assert want - 1e-9 * abs(want) - 1e-12 <= found.cost
    assert found.cost <= want + found.gap + 1e-9 * abs(want) + 1e-12


@given(st.data())
def test_the_choice_is_the_best_of_all(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 6))
    changes = st.sampled_from([-1.0, 0.0, 0.25, 1.0, 3.0]) | st.floats(-10, 10)
    table = {}
    for i in range(count):
        bits = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16]), min_size=1, unique=True))
        table[str(i)] = [
            Cost(b, data.draw(st.integers(1, 400)), 0.0, data.draw(changes)) for b in bits
        ]
    given_table = Sensitivity(table, {name: data.draw(st.integers(1, 90)) for name in table})
    least = sum(min(c.size for c in own) for own in table.values())
    most = sum(max(c.size for c in own) for own in table.values())
    check_best(given_table, data.draw(st.integers(least, most + 1)))


def test_a_size_in_bits_a_weight_is_a_budget_that_it_fits() -> None:
    for size in range(1, 500):  # 4.35 * 100 is 434.99999999999994
        table = Sensitivity({"w": [Cost(4, size, 0.0, 1.0)]}, {"w": 100})
        assert pf.allocate(table, pf.allocate(table, 9.0).bits_per_weight).size == size


@pytest.mark.parametrize("large", [1e20, 1e308, -1e308])
def test_costs_of_any_size_are_compared(large: float) -> None:
    """What all choices share does not hide what differs, and sums that overflow do not either."""
    own = [Cost(1, 10, 0.0, 5.0), Cost(4, 40, 0.0, 1.0)]
    table = {"a": [Cost(2, 20, 0.0, large)], "b": own, "c": own}
    found = pf.allocate(Sensitivity(table, dict.fromkeys("abc", 10)), 7 / 3)
    assert sorted(bits or 16 for bits in found.values()) == [1, 2, 4]
    far = [Cost(1, 10, 0.0, abs(large)), Cost(4, 40, 0.0, -abs(large))]
    best = pf.allocate(Sensitivity({"a": far, "b": far}, dict.fromkeys("ab", 10)), 2.5)
    assert sorted(bits or 16 for bits in best.values()) == [1, 4]


def test_weights_without_elements_are_allotted_nothing() -> None:
    table = pf.sensitivity(nn.Sequential(nn.Embedding(0, 4)), LINK, bits=(2, 4))
    assert pf.allocate(table, 3.0).bits_per_weight == 0


@pytest.mark.parametrize("seed", range(3))
def test_what_is_dropped_is_no_further_off_than_the_gap(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of matrices whose costs are in proportion to their sizes, no choice can be ruled out."""
    monkeypatch.setattr("parq_fn.allocation._MOST", 20)
    random = np.random.default_rng(seed)
    numel = {str(i): int(random.integers(100, 4000)) for i in range(60)}
    gaps = []
    for names in (list(numel)[:9], list(numel)):
        table = {
            name: [Cost(b, numel[name] * b, 0.0, -numel[name] * b) for b in (1, 2, 4)]
            for name in names
        }
        own = Sensitivity(table, {name: numel[name] for name in names})
        if len(names) == 9:
            check_best(own, int(2.3 * sum(own.numel.values())))
        found = pf.allocate(own, 2.3)
        gaps.append(found.gap / -found.cost)
        assert ("above the least" in str(found)) == (found.gap > 0)
    assert 0 < max(gaps) < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_twelve_layers_of_three_choices_are_tried_one_by_one(seed: int) -> None:
    random = np.random.default_rng(seed)
    table, numel = {}, {}
    for i in range(12):
        n, scale = int(random.integers(100, 4000)), random.lognormal()
        numel[str(i)] = n
        table[str(i)] = [
            Cost(b, n * b + 32 * int(random.integers(1, 40)), 0.0, scale * n * 4.0**-b)
            for b in (1, 2, 4)
        ]
    for bits_per_weight in (1.7, 2.0, 2.5, 3.3, 5.0):
        check_best(Sensitivity(table, numel), int(bits_per_weight * sum(numel.values())))


def test_a_model_of_hundreds_of_layers_is_decided() -> None:
    """What is kept stays small where sizes and costs are all different."""
    random = np.random.default_rng(0)
    numel = {str(i): int(random.integers(10**6, 10**8)) for i in range(300)}
    table = {
        name: [
            Cost(b, n * b + 32 * (n // 64), 0.0, random.lognormal() * 4.0**-b) for b in range(1, 9)
        ]
        for name, n in numel.items()
    }
    found = pf.allocate(Sensitivity(table, numel), 3.0)
    assert 2.999 < found.bits_per_weight <= 3.0


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 4))


def test_errors_are_those_of_rounding_to_the_nearest_levels() -> None:
    module = net()
    table = pf.sensitivity(module, LINK, bits=(0, 1, 3, 16))
    assert list(table) == ["0.weight", "1.weight", "3.weight"]
    for name, costs in table.items():
        w = module.get_parameter(name).detach()
        for cost, bits in zip(costs, (0, 1, 3, 16), strict=True):
            if bits == 16:
                assert cost[1:] == (32 * w.numel(), 0.0, None)
                continue
            want = pf.quantizers.relative_error(w, pf.lsbq(bits))
            assert math.isclose(cost.error, want, rel_tol=1e-5)


def test_the_change_of_the_loss_is_that_of_the_rounded_weight() -> None:
    module = net()
    apply, params = pf.functional(module)
    tokens = torch.arange(7)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    seen = []

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return apply(weights, tokens).square().mean()

    table = pf.sensitivity(
        module, LINK, bits=(2,), loss=loss, progress=lambda i, n: seen.append((i, n))
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())
    w = params["1.weight"]
    rounded = pf.proxmaps.hard(w, pf.lsbq(2)(w))
    want = float(loss({**params, "1.weight": rounded}) - loss(params))
    assert math.isclose(table["1.weight"][0].change or 0, want, rel_tol=1e-5)


def test_squares_weigh_the_error_of_each_weight() -> None:
    module = net()
    squares = {name: torch.rand_like(p) for name, p in module.named_parameters()}
    table = pf.sensitivity(module, LINK, bits=(2,), squares=squares, exclude=["0.weight"])
    assert list(table) == ["1.weight", "3.weight"]
    w = module[3].weight.detach()
    off = w - pf.proxmaps.hard(w, pf.lsbq(2)(w))
    want = float((squares["3.weight"] * off.square()).sum() / 2)
    assert math.isclose(table["3.weight"][0].change or 0, want, rel_tol=1e-5)


def test_sizes_are_those_of_coverage_and_rules_are_for_param_groups() -> None:
    module = nn.Sequential(nn.Linear(64, 32), nn.ConvTranspose1d(32, 16, 4), nn.Linear(16, 8))
    link = pf.hard_prox(pf.integer(4), granularity=pf.per_block(4))
    table = pf.sensitivity(module, link, bits=(2, 4, 16))
    rules = pf.allocate(table, 14.0)
    assert set(rules.values()) == {4, None}
    groups = param_groups(module, {name: bits for name, bits in rules.items() if bits})
    optimizer = QuantOptimizer(torch.optim.SGD(groups, lr=0.1), link)
    rows = {row.name: row.nbytes for row in pf.coverage(module, optimizer).rows}
    assert rules.size == 8 * sum(rows[name] or 0 for name in rules)
    assert pf.optim.param_groups(module, rules)  # None is full precision
    assert str(rules).splitlines()[-1].startswith("all")
    assert "full precision" in str(rules)
    assert "4 bits" in str(table)


def test_the_loss_gets_what_is_not_frozen_and_the_matrix_that_is_asked() -> None:
    module = net()
    module[0].weight.requires_grad_(False)
    x = torch.arange(7)
    seen = set()

    def loss(weights: dict[str, Tensor]) -> Tensor:
        seen.add("0.weight" in weights)
        return torch.func.functional_call(module, weights, x).sum()

    table = pf.sensitivity(module, LINK, bits=(1,), loss=loss)
    assert list(table) == ["0.weight", "1.weight", "3.weight"]
    assert seen == {True, False}
    apply, _ = pf.functional(module)
    table = pf.sensitivity(module, LINK, bits=(1,), loss=lambda w: apply(w, x).sum(), exclude=["0"])
    assert list(table) == ["1.weight", "3.weight"]
    with pytest.raises(
        ValueError, match=r"given '0\.weight', which is frozen: functional: weights"
    ):
        pf.sensitivity(module, LINK, bits=(1,), loss=lambda w: apply(w, x).sum())


def test_a_loss_of_chance_is_warned_of_and_no_number_is_refused() -> None:
    module = nn.Sequential(nn.Linear(9, 9), nn.Dropout())
    apply, _ = pf.functional(module)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return apply(weights, torch.ones(9)).sum()

    with pytest.warns(UserWarning, match="for the same weights, so that changes of this size are"):
        pf.sensitivity(module, LINK, bits=(1,), loss=loss)
    module.eval()
    before = torch.get_rng_state()
    pf.sensitivity(module, LINK, bits=(1,), loss=loss)
    assert torch.equal(before, torch.get_rng_state())
    for wrong in (None, torch.ones(2), "1"):
        with pytest.raises(TypeError, match=r"loss gave .*expected one number"):
            pf.sensitivity(module, LINK, loss=lambda _, got=wrong: got)  # type: ignore[misc]
    with pytest.raises(TypeError, match="expected squares as"):
        pf.sensitivity(module, LINK, squares=[])  # type: ignore[arg-type] # what is refused


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e300])
def test_errors_are_those_of_weights_of_any_size(scale: float) -> None:
    one, other = nn.Linear(9, 6).double(), nn.Linear(9, 6).double()
    with torch.no_grad():
        other.weight.copy_(one.weight * scale)
    table, scaled = (pf.sensitivity(m, LINK, bits=(0, 2)) for m in (one, other))
    for a, b in zip(table["weight"], scaled["weight"], strict=True):
        assert math.isclose(a.error, b.error, rel_tol=1e-6)
    assert pf.quantizers.relative_error(torch.zeros(2, 3), pf.lsbq(2)) == 0


def test_weights_without_values_are_refused() -> None:
    with pytest.raises(ValueError, match="parameter 'weight' is on the meta device"):
        pf.sensitivity(nn.Linear(3, 2, device="meta"), LINK)


SQUARES = {"0.weight": torch.ones(7, 8), "1.weight": torch.ones(6, 8), "3.weight": torch.ones(4, 6)}


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"bits": ()}, "expected bits as different whole numbers"),
        ({"bits": (2, 2)}, "expected bits as different whole numbers"),
        ({"bits": (9,)}, "bits=9"),
        ({"loss": lambda w: 0.0, "squares": {}}, "got both"),
        ({"squares": {}}, r"expected squares\['0.weight'\] of shape \(7, 8\), got None"),
        ({"squares": SQUARES | {"1.weight": torch.ones(8, 6)}}, r"\(6, 8\), got shape \(8, 6\)"),
        ({"squares": SQUARES | {"1.weight": -torch.ones(6, 8)}}, r"'1.weight'\] has numbers below"),
        ({"squares": SQUARES | {"1.weight": torch.full((6, 8), math.nan)}}, "below 0 or NaN"),
        ({"exclude": "nobody"}, "exclude pattern 'nobody' matches no parameter"),
        ({"exclude": "*.weight"}, "has no matrix"),
        ({"exclude": ["0.weight", "1.weight", "3.weight"]}, "has no matrix"),
    ],
)
def test_what_cannot_be_asked_is_refused(given: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        pf.sensitivity(net(), LINK, **given)


def test_a_quantizer_of_a_table_has_the_bits_that_it_has() -> None:
    link = pf.hard_prox(pf.codebook.nf4, granularity=pf.per_channel())
    assert pf.sensitivity(net(), link, bits=(4,))
    with pytest.raises(ValueError, match="cannot have 2 bits"):
        pf.sensitivity(net(), link, bits=(2,))


def test_a_budget_that_nothing_fits_is_refused() -> None:
    table = pf.sensitivity(net(), LINK, bits=(1, 2))
    with pytest.raises(ValueError, match="is less than the smallest choice, which takes"):
        pf.allocate(table, 1.0)
    with pytest.raises(TypeError, match="expected what sensitivity"):
        pf.allocate({})  # type: ignore[arg-type] # what is refused
    with pytest.raises(TypeError, match="budget: expected what sensitivity"):
        pf.plot.budget(Sensitivity({}, {}))
    with pytest.raises(ValueError, match=r"cost\['1.weight'\] lacks 1 bit, 2 bits"):
        pf.allocate(table, 9.0, cost={"0.weight": {1: 1.0, 2: 1.0}})
    with pytest.raises(TypeError, match="expected cost as"):
        pf.allocate(table, 9.0, cost=[1.0])  # type: ignore[arg-type] # what is refused
    assert set(pf.allocate(table, 1e300).values()) == {2}
    with pytest.raises(ValueError, match=r"cost names 2\.weight, which the table has not"):
        pf.allocate(table, 9.0, cost={"2.weight": {}})
    costs = {name: dict.fromkeys((1, 2), math.nan) for name in table}
    with pytest.raises(ValueError, match="expected finite numbers"):
        pf.allocate(table, 9.0, cost=costs)


def test_an_order_of_choices_changes_nothing() -> None:
    table = pf.sensitivity(net(), LINK, bits=(1, 2, 4))
    for names in itertools.permutations(table):
        turned = Sensitivity({name: table[name] for name in names}, table.numel)
        assert pf.allocate(turned, 12.0).cost == pytest.approx(pf.allocate(table, 12.0).cost)
