"""The kit itself: what it imports, how it is asked, what it says, what its strategies draw."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Any

import optree
import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import Tensor

import parq_fn as pq
from parq_fn import proxmaps as maps
from parq_fn.foundation.traits import Interval, ProxTraits, declares, traits_of
from parq_fn.testing import (
    Violation,
    check_proxmap,
    check_quantizer,
    check_schedule,
    check_transformation,
    law,
    laws,
    report,
    strategies,
    table,
)


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.mark.rare
def test_the_package_does_not_import_hypothesis() -> None:
    assert run("import sys, parq_fn; print('hypothesis' in sys.modules)").strip() == "False"


@pytest.mark.rare
def test_without_hypothesis_it_says_what_to_install() -> None:
    said = run("import sys; sys.modules['hypothesis'] = None; import parq_fn.testing")
    assert "ImportError" in said
    assert "pip install 'parq_fn[laws]'" in said


# How it is asked


@pytest.mark.parametrize(
    ("check", "operator"),
    [
        (check_proxmap, maps.hard),
        (check_quantizer, pq.lsbq(1)),
        (check_schedule, pq.inverse_slope(0, 10)),
        (check_transformation, pq.sgd(0.1)),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_an_unknown_law_is_refused(check: Any, operator: Any) -> None:
    with pytest.raises(ValueError, match=r"no .* law is named 'nonsense'; there are: .*pure"):
        check(operator, laws={"nonsense"})


def test_a_law_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'pythagoras' is a law of a quantizer, not of a proxmap"):
        check_proxmap(maps.hard, laws=[laws.named("quantizer", "pythagoras")])


def test_laws_are_taken_by_name_as_values_and_as_what_another_declares() -> None:
    check_proxmap(maps.clip, laws="idempotent", max_examples=5)
    check_proxmap(maps.clip, laws=[laws.named("proxmap", "idempotent"), "pure"], max_examples=5)
    check_proxmap(maps.clip, laws=laws.for_proxmap(maps.clip), max_examples=5)
    with pytest.raises(Violation):
        check_proxmap(maps.binary_relax, laws={"in_range"})


@pytest.mark.rare
def test_a_map_that_needs_a_coefficient_is_asked_for_it() -> None:
    def scaled(u: Any, levels: Any, c: Any) -> Any:
        return c * u

    with pytest.raises(ValueError, match=r"scaled takes a coefficient .*coefficient=\.\.\."):
        check_proxmap(scaled)
    check_proxmap(scaled, coefficient=0.5)
    check_proxmap(scaled, coefficient=st.floats(0, 1))
    with pytest.raises(Violation, match="monotone"):
        check_proxmap(scaled, coefficient=st.floats(-1, 1))


def test_operators_without_traits_keep_to_what_all_must() -> None:
    def halfway(u: Any, levels: Any) -> Any:
        return (u + maps.hard(u, levels)) / 2

    names = {law.name for law in laws.for_proxmap(halfway)}
    assert {"pure", "monotone", "rows_alone", "nan_gives_nan"} <= names
    assert not {"in_range", "idempotent", "is_prox"} & names
    check_proxmap(halfway)
    check_quantizer(pq.lsbq(2).__call__, laws={"rows_alone", "pure", "levels_are_sorted"})
    check_schedule(lambda t: 1 - pq.schedules.progress(t, 3, 8), start=3, end=8)


def test_declared_traits_are_checked() -> None:
    @declares(ProxTraits(coefficients=Interval(0.0, 1.0), idempotent=True, monotone=False))
    def mixed(u: Any, levels: Any, c: Any) -> Any:
        return maps.binary_relax(u, levels, c)

    assert traits_of(mixed).coefficients == Interval(0.0, 1.0)
    with pytest.raises(Violation, match="mixed breaks the law 'idempotent'"):
        check_proxmap(mixed)


# What it says


def test_a_failure_reads_like_a_counterexample() -> None:
    with pytest.raises(Violation) as info:
        check_proxmap(maps.parq, laws={"firmly_nonexpansive"}, coefficient=0.5, max_examples=300)
    text = str(info.value).splitlines()
    assert text[0] == "parq breaks the law 'firmly_nonexpansive'"
    assert text[2] == "    The map is firmly nonexpansive."
    assert text[3] == "    <f(u) - f(v), u - v> >= |f(u) - f(v)|^2"
    assert text[6] == "counterexample"
    assert text[7].startswith("    u = [[")
    assert text[9].startswith("    levels = [[")
    assert text[10] == "    c = 0.5"
    assert text[11].startswith("    f(u) = [[")
    assert "left side" in text[12]
    assert "right side" in text[13]
    assert "difference" in text[14]
    inputs = info.value.inputs
    assert inputs["u"].numel() <= 4
    assert inputs["levels"].shape == (1, 2)


def test_the_report_is_a_table() -> None:
    good = report(pq.lsbq(1), max_examples=5)
    assert good.passed
    assert repr(good).startswith("lsbq(1): ")
    assert "0 broken" in repr(good)
    assert good._repr_html_().count("<tr>") == len(good.rows) + 1
    assert report(lambda t: t * 0.0 + 1.0, kind="schedule", laws={"starts"}, max_examples=5).passed
    with pytest.raises(TypeError, match="expected a prox map, quantizer"):
        report(3)
    with pytest.raises(ValueError, match="kind must be one of"):
        report(maps.hard, kind="nonsense")


def test_the_table_shows_what_is_declared() -> None:
    lines = table.table("proxmap").splitlines()
    onto = next(line for line in lines if line.startswith("| `onto_levels`"))
    assert onto.count(" x ") == 1
    for kind in laws.ALL:
        assert table.table(kind).count("\n") == len(laws.ALL[kind]) + 1


def test_laws_are_values_with_statement_formula_and_tolerance() -> None:
    for kind, all_ in laws.ALL.items():
        assert len({one.name for one in all_}) == len(all_)
        for one in all_:
            assert one.kind == kind
            assert one.statement
            assert one.formula
            assert one.reason
            assert "\n" not in one.statement
            assert one == laws.named(kind, one.name)
            assert hash(one) == hash(laws.named(kind, one.name))


def test_claims_compare_with_a_tolerance() -> None:
    one, near = torch.tensor([1.0, torch.nan, torch.inf]), torch.tensor([1.1, torch.nan, torch.inf])
    assert law.holds(law.equal(one, one), 0.0)
    assert not law.holds(law.equal(one, near), 0.0)
    assert law.holds(law.equal(one, near), 0.2)
    assert not law.holds(law.equal(one, one.double()), 0.0)
    assert law.holds(law.at_most(one[:1], near[:1]), 0.0)
    assert not law.holds(law.at_most(near[:1], one[:1]), 0.0)
    assert not law.holds(law.at_most(one, one[:1]), 1.0)
    assert law.holds(law.equal({"a": [one, None]}, {"a": [one, None]}), 0.0)
    assert not law.holds(law.equal({"a": one}, {"b": one}), 0.0)
    assert not law.holds(law.equal({"a": one}, {"a": near}), 0.0)
    assert law.holds(law.equal(1.0, 1.05), 0.1)
    assert law.holds(law.at_most(1.0, 1.0), 0.0)
    assert not law.holds(law.equal(torch.tensor(torch.inf), torch.tensor(1.0)), 1.0)
    assert not law.holds(law.equal("raised", "a value"), 0.0)


# What the strategies draw


@given(strategies.levels(kinds=("irregular", "symmetric", "single", "duplicated")))
def test_levels_are_sorted(q: Any) -> None:
    assert q.dtype == torch.float64
    assert (q.diff(dim=-1) >= 0).all()


@given(strategies.levels())
def test_levels_have_gaps(q: Any) -> None:
    assert (q.diff(dim=-1) >= 0.99 * strategies.MIN_GAP).all()


@given(strategies.problems(count=2))
def test_problems_fit(problem: Any) -> None:
    q, u, v = problem
    assert q.shape[0] == u.shape[0]
    assert u.shape == v.shape


@given(strategies.proxmaps())
def test_random_maps_run(drawn: Any) -> None:
    map_, q, c = drawn
    w = map_(q, q) if c is None else map_(q, q, c)
    assert w.shape == q.shape


@given(strategies.quantizers(), strategies.rows(dtype=torch.bfloat16))
def test_random_quantizers_run(quantizer: Any, x: Any) -> None:
    assert quantizer(x).shape == (x.shape[0], quantizer.num_levels)


@given(st.data())
def test_qparams_are_what_learning_may_leave(data: Any) -> None:
    quantizer = data.draw(strategies.quantizers())
    q = data.draw(strategies.qparams(quantizer, dtype=torch.float32))
    assert q.dtype == torch.float32
    assert torch.equal(q, quantizer.ordered(q))
    assert (q[:, list(quantizer.positive)] > 0).all()
    levels = quantizer.levels(q)
    assert levels.isfinite().all()
    assert (levels.diff(dim=-1) >= 0).all()
    whole = q[:, [not scales for scales in quantizer.scales]]
    assert torch.equal(whole, whole.round())


@given(st.data())
def test_states_of_links_that_learn_are_in_the_middle_of_a_training(data: Any) -> None:
    link: Any = data.draw(strategies.prox_links())
    link = replace(link, learn=pq.sgd(0.1))
    params = data.draw(strategies.params())
    state = data.draw(strategies.learning_states(link, params))
    assert link.active(state)
    first = pq.tree.tree_map(lambda x: (x.dtype, x.shape), link.init(params))
    assert pq.tree.tree_map(lambda x: (x.dtype, x.shape), state) == first
    link.weights(state, params)


@given(st.data())
def test_params_and_steps_fit(data: Any) -> None:
    params = data.draw(strategies.params())
    for leaf in optree.tree_leaves(params):
        assert leaf.isfinite().all()
    for grads in data.draw(strategies.training_steps(params)):
        pq.apply_updates(params, grads)


@pytest.mark.rare
@pytest.mark.parametrize(
    "wanted",
    [
        lambda p: any(x.dtype == torch.bfloat16 for x in optree.tree_leaves(p)),
        lambda p: any(x.dim() == 0 for x in optree.tree_leaves(p)),
        lambda p: any(x.numel() == 0 for x in optree.tree_leaves(p)),
        lambda p: any(not x.is_contiguous() for x in optree.tree_leaves(p)),
        lambda p: any(
            x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
            for x in optree.tree_leaves(p)
        ),
        lambda p: any(isinstance(node, strategies.Pair) for node in p.values()),
        lambda p: None in p.values(),
        lambda p: any(x.abs().max() > 1e15 for x in optree.tree_leaves(p) if x.numel()),
    ],
)
def test_params_are_of_every_kind(wanted: Any) -> None:
    loose = settings(max_examples=2000, derandomize=False, phases=[Phase.generate])
    find(strategies.params(), wanted, settings=loose)


@pytest.mark.rare
def test_they_shrink_to_something_readable() -> None:
    quiet = settings(max_examples=500, derandomize=False)
    q = find(strategies.levels(), lambda q: q.shape[-1] >= 2, settings=quiet)
    assert q.tolist() == [[0.0, 1.0]]
    x = find(strategies.rows(), lambda x: (x > 0).any(), settings=quiet)
    assert x.tolist() == [[1.0]]
    params = find(strategies.params(), lambda p: True, settings=quiet)
    assert list(params) == ["w0"]


def test_traits_pickle_with_their_operators() -> None:
    assert pickle.loads(pickle.dumps(maps.parq)) is maps.parq
    assert pickle.loads(pickle.dumps(pq.lsbq(2))).traits.symmetric


@pytest.mark.rare
@pytest.mark.parametrize(
    "link",
    [
        pq.custom_prox(pq.lsbq(2), maps.binary_relax, pq.schedules.linear(0.0, 1.0, 1, 4)),
        pq.custom_prox(pq.lsbq(2), maps.binary_relax, 0.5, start=2),
    ],
)
def test_a_prox_link_that_may_never_be_hard_is_not_held_to_an_end(link: Any) -> None:
    check_transformation(link, max_examples=10)


@pytest.mark.parametrize("name", ["is_prox", "semigroup", "share", "sharp_limit", "scale"])
def test_a_law_made_from_a_trait_asks_for_it(name: str) -> None:
    def undeclared(u: Tensor, levels: Tensor, s: Any) -> Tensor:
        return maps.parq(u, levels, s)

    with pytest.raises(ValueError, match=rf"'{name}' is made from what the proxmap declares"):
        check_proxmap(undeclared, laws={name}, coefficient=0.3)


@pytest.mark.parametrize(
    ("check", "operator", "message"),
    [
        (check_quantizer, pq.lsbq, r"expected a quantizer, got the class lsbq; call it"),
        (check_transformation, pq.sgd, r"expected a transformation, got the class sgd"),
        (check_schedule, pq.schedules.linear, r"expected a schedule, got the class linear"),
        (check_proxmap, pq.lsbq(2), r"expected a prox map, got lsbq\(2\), which has Quantizer"),
        (check_quantizer, maps.hard, r"expected a quantizer, got hard, which has ProxTraits"),
    ],
)
def test_operators_of_another_kind_are_named(check: Any, operator: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check(operator)


def test_a_counterexample_shows_the_input_that_was_used() -> None:
    @declares(ProxTraits())
    def drops_nan(u: Tensor, levels: Tensor) -> Tensor:
        return maps.hard(u.nan_to_num(), levels)

    with pytest.raises(Violation, match=r"u = \[\[nan"):
        check_proxmap(drops_nan, laws={"nan_gives_nan"})
