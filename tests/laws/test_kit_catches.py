"""Deliberately wrong operators: each is caught within seconds, by the law's name."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor

import parq_fn as pq
from parq_fn import proxmaps as maps
from parq_fn import schedules as sched
from parq_fn.foundation.checks import Interval
from parq_fn.foundation.traits import (
    PER_LEAF,
    ProxTraits,
    QuantizerTraits,
    ScheduleTraits,
    declares,
    traits_of,
)
from parq_fn.foundation.tree import tree_map
from parq_fn.proxmaps.levels import between, cell, midpoint
from parq_fn.quantizers import Quantizer
from parq_fn.testing import (
    Violation,
    check_proxmap,
    check_quantizer,
    check_schedule,
    check_transformation,
    report,
)

PARQ, HARD = traits_of(maps.parq), traits_of(maps.hard)


@contextmanager
def caught(name: str) -> Iterator[None]:
    """A violation that names this law: first, or among the others that are broken."""
    with pytest.raises(Violation) as info:
        yield
    text = str(info.value)
    assert name in {info.value.law.name, *info.value.others}, text
    assert name in text
    first = info.value.law.name
    if info.value.error is None:
        assert f"breaks the law '{first}'" in text
    else:
        assert f" raised {type(info.value.error).__name__}: " in text
        assert f"on input of the law '{first}'" in text
        assert not info.value.others
    assert "counterexample" in text


# Prox maps


@declares(HARD)
def midpoints_off_by_one(u: Tensor, levels: Tensor) -> Tensor:
    middle = 0.5 * levels[..., :-1] + 0.5 * levels[..., 1:]
    shifted = torch.cat([middle[..., 1:], middle[..., -1:] + 1], -1)
    return levels.gather(-1, torch.searchsorted(shifted.contiguous(), u.contiguous()))


@declares(PARQ)
def slope_inverted(u: Tensor, levels: Tensor, s: Any) -> Tensor:
    lo, hi = cell(u, levels.to(u.dtype))
    c = midpoint(lo, hi)
    return between(c + (between(u, lo, hi) - c) * s, lo, hi)


@declares(PARQ)
def ends_not_clamped(u: Tensor, levels: Tensor, s: Any) -> Tensor:
    return torch.where((u < levels[..., :1]) | (u > levels[..., -1:]), u, maps.parq(u, levels, s))


@declares(HARD)
def adds_the_step(u: Tensor, levels: Tensor) -> Tensor:
    return u + (maps.hard(u, levels) - u)


@declares(PARQ)
def statistics_leak(u: Tensor, levels: Tensor, s: Any) -> Tensor:
    pooled = levels if levels.shape[0] == 1 else levels.mean(0, keepdim=True).expand_as(levels)
    return maps.parq(u, pooled.contiguous(), s)


@declares(PARQ)
def changes_its_input(u: Tensor, levels: Tensor, s: Any) -> Tensor:
    u.clamp_(levels[..., :1], levels[..., -1:])
    return maps.parq(u, levels, s)


@declares(PARQ)
def another_dtype(u: Tensor, levels: Tensor, s: Any) -> Tensor:
    return maps.parq(u, levels, s).float()


@declares(PARQ)
def drops_nan(u: Tensor, levels: Tensor, s: Any) -> Tensor:
    return maps.parq(u.nan_to_num(), levels, s)


@declares(HARD)
def all_rounded_up(u: Tensor, levels: Tensor) -> Tensor:
    return levels.gather(
        -1, torch.searchsorted(levels, u.contiguous()).clamp(max=levels.shape[-1] - 1)
    )


@declares(PARQ)
def raises(u: Tensor, levels: Tensor, s: Any) -> Tensor:
    raise RuntimeError("no such thing")


WRONG_MAPS = [
    (midpoints_off_by_one, "keeps_side"),
    (slope_inverted, "lipschitz_attained"),
    (ends_not_clamped, "in_range"),
    (adds_the_step, "onto_levels"),
    (statistics_leak, "rows_alone"),
    (changes_its_input, "pure"),
    (another_dtype, "keeps_dtype_and_shape"),
    (drops_nan, "nan_gives_nan"),
    (all_rounded_up, "keeps_side"),
    (raises, "pure"),
]


@pytest.mark.rare
@pytest.mark.parametrize(("wrong", "name"), WRONG_MAPS, ids=[m.__name__ for m, _ in WRONG_MAPS])
def test_wrong_maps(wrong: Any, name: str) -> None:
    with caught(name):
        check_proxmap(wrong, max_examples=40)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (midpoints_off_by_one, "keeps_side"),
        (slope_inverted, "lipschitz_attained"),
        (ends_not_clamped, "in_range"),
        (adds_the_step, "onto_levels"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_wrong_maps_by_the_law_in_question(wrong: Any, name: str) -> None:
    with caught(name):
        check_proxmap(wrong, laws={name}, max_examples=100)


# Quantizers


class levels_unsorted(Quantizer):
    num_levels, num_qparams = 2, 1

    def qparams(self, x: Tensor) -> Tensor:
        return x.abs().amax(-1, keepdim=True)

    def levels(self, qparams: Tensor) -> Tensor:
        return torch.cat([qparams, -qparams], -1)


class one_level_too_many(Quantizer):
    num_levels = 2

    def qparams(self, x: Tensor) -> Tensor:
        top = x.abs().amax(-1, keepdim=True)
        return torch.cat([-top, top, top], -1)


class batch_statistics(Quantizer):
    num_levels = 2

    def qparams(self, x: Tensor) -> Tensor:
        top = x.abs().mean().expand(x.shape[0], 1)
        return torch.cat([-top, top], -1)


class not_optimal(Quantizer):
    num_levels = 2

    @property
    def traits(self) -> QuantizerTraits:
        return replace(super().traits, optimal="symmetric", levels_are_means=True)

    def qparams(self, x: Tensor) -> Tensor:
        top = x.abs().median(-1, keepdim=True).values
        return torch.cat([-top, top], -1)


def sorts_in_place(rows: Tensor) -> Tensor:
    rows.copy_(rows.sort(-1).values)
    return torch.cat([rows[:, :1], rows[:, -1:]], -1)


def half_in_half(rows: Tensor) -> Tensor:
    v = rows.abs().cumsum(-1)[:, -1:] / rows.shape[-1]
    return torch.cat([-v, v], -1)


half_in_half.traits = QuantizerTraits(widens=True)


@pytest.mark.rare
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (one_level_too_many(), "pure"),
        (batch_statistics(), "rows_alone"),
        (not_optimal(), "least_squares"),
        (sorts_in_place, "pure"),
        (half_in_half, "widens"),
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)
def test_wrong_quantizers(wrong: Any, name: str) -> None:
    with caught(name):
        check_quantizer(wrong, max_examples=40)


def test_unsorted_levels_are_refused_by_the_fit() -> None:
    """Whichever law is the first that fits."""
    with pytest.raises(Violation, match=r"levels\(qparams\) are not sorted"):
        check_quantizer(levels_unsorted(), max_examples=40)


@pytest.mark.rare
def test_wrong_quantizers_by_the_law_in_question() -> None:
    with caught("least_squares"):
        check_quantizer(not_optimal(), laws={"least_squares"}, max_examples=100)
    with caught("widens"):
        check_quantizer(half_in_half, laws={"widens"}, max_examples=300)


# Schedules


def stops_short(step: Any) -> Tensor:
    return 1 - (torch.as_tensor(step).double() / 10).clamp(0, 0.999)


def jumps_at_the_end(step: Any) -> Tensor:
    t = torch.as_tensor(step).double()
    return torch.where(t < 10, 1 - 0.5 * (t / 10).clamp(0, 1), 0.0)


def turns_back(step: Any) -> Tensor:
    x = (torch.as_tensor(step).double() / 10).clamp(0, 1)
    rising = 0.1 + (x - 0.3) * 8 / 3
    return torch.where(x < 0.3, 1 - 3 * x, torch.where(x < 0.6, rising, 0.9 * (1 - x) / 0.4))


def python_numbers_only(step: Any) -> Tensor:
    return torch.tensor(1.0 if step <= 0 else 0.0 if step >= 10 else 1 - step / 10).double()


def published_slope(step: Any) -> Tensor:
    """Normalised by the values for the center 1/2, at another one: it ends elsewhere."""
    x = (torch.as_tensor(step).double() / 10).clamp(0, 1)
    h = torch.sigmoid(-10 * (torch.stack([x, x * 0, x * 0 + 1]) - 0.5))
    return (torch.sigmoid(-10 * (x - 0.3)) - h[2]) / (h[1] - h[2])


@pytest.mark.rare
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (stops_short, "ends"),
        (jumps_at_the_end, "lands"),
        (turns_back, "monotone"),
        (python_numbers_only, "finite"),
        (published_slope, "starts"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_wrong_schedules(wrong: Any, name: str) -> None:
    with caught(name):
        check_schedule(wrong, start=0, end=10, max_examples=100)


def test_a_schedule_that_does_not_reach_0() -> None:
    with caught("ends"):
        check_schedule(stops_short, start=0, end=10, laws={"ends"})
    check_schedule(sched.linear(1.0, 0.5, 0, 10))
    with caught("ends"):
        halfway = sched.linear(1.0, 0.5, 0, 10)
        check_schedule(lambda step: halfway(step), start=0, end=10, laws={"ends"})
    assert traits_of(halfway) != ScheduleTraits()


# Transformations


class Sum(NamedTuple):
    total: Any


class mutates_its_state(pq.Link):
    def init(self, params: Any) -> Sum:
        return Sum(tree_map(torch.zeros_like, params))

    def update(self, updates: Any, state: Sum, params: Any, **extra: Any) -> Any:
        tree_map(lambda t, u: t if u is None else t.add_(u), state.total, updates)
        return updates, state


class mutates_its_updates(pq.Link):
    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        return tree_map(lambda u: u.mul_(0.5), updates), state


class weights_count_calls(pq.Link):
    """A hidden counter: every third look at the weights is of something else."""

    calls: ClassVar = [0]

    def weights(self, state: Any, params: Any) -> Any:
        self.calls[0] += 1
        return tree_map(lambda p: p + 1 if self.calls[0] % 3 == 0 else p, params)


class remembers_the_params(pq.Link):
    """`weights` gives the params of the last update of whatever training."""

    seen: ClassVar = [None]

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        self.seen[0] = params
        return updates, state

    def weights(self, state: Any, params: Any) -> Any:
        return params if self.seen[0] is None else self.seen[0]


class scheduled_by_looks(pq.Link):
    """An update that grows with how often the weights were asked for."""

    looks: ClassVar = [0.0]

    def init(self, params: Any) -> Any:
        self.looks[0] = 0.0
        return super().init(params)

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        return tree_map(lambda u: u * (1 + self.looks[0]), updates), state

    def weights(self, state: Any, params: Any) -> Any:
        self.looks[0] += 1.0
        return params


class state_grows(pq.Link):
    def init(self, params: Any) -> Any:
        return ()

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        return updates, (*state, torch.zeros(()))


class float32_everywhere(pq.Link):
    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        return tree_map(lambda u: u.float(), updates), state


class fills_missing_gradients(pq.Link):
    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        full = tree_map(lambda p, u: torch.zeros_like(p) if u is None else u, params, updates)
        return full, state


class weights_in_a_tuple(pq.Link):
    """The weights of another structure than the params."""

    def weights(self, state: Any, params: Any) -> Any:
        return tuple(params.items())


DAMPED = pq.hard_prox(pq.lsbq(1), period=1, gradient=pq.estimators.damped(0.5))


class keeps_the_gradients(pq.Link):
    """A wrapper that does not say what is inside, and pulls nothing back."""

    def __init__(self, inner: Any) -> None:
        vars(self)["inner"] = inner

    def init(self, params: Any) -> Any:
        return self.inner.init(params)

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        return self.inner.update(updates, state, params, **extra)

    def weights(self, state: Any, params: Any) -> Any:
        return self.inner.weights(state, params)


class keeps_those_of_a_child(keeps_the_gradients):
    """One that does say."""

    def children(self) -> Any:
        return {"inner": self.inner}

    def with_children(self, children: Any) -> Any:
        return type(self)(children["inner"])


class loses_own(keeps_the_gradients):
    """Pulls back, and does not tell that it did."""

    def pullback(self, grads: Any, state: Any, params: Any, *, weights: Any = None) -> Any:
        return self.inner.pullback(grads, state, params, weights=weights)[0], ()


class hands_nothing_to_update(keeps_the_gradients):
    """Pulls back, and does not tell the inside."""

    def pullback(self, grads: Any, state: Any, params: Any, *, weights: Any = None) -> Any:
        return self.inner.pullback(grads, state, params, weights=weights)

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        extra.pop("pulled", None)
        return self.inner.update(updates, state, params, **extra)


class loses_the_weights(keeps_the_gradients):
    """Takes whatever is handed over for the params."""

    def pullback(self, grads: Any, state: Any, params: Any, *, weights: Any = None) -> Any:
        return self.inner.pullback(grads, state, params if weights is None else weights)


class halves_in_place(pq.Link):
    def pullback(self, grads: Any, state: Any, params: Any, *, weights: Any = None) -> Any:
        return tree_map(lambda g: g.mul_(0.5), grads), ()


class pulls_back_to_float32(pq.Link):
    def pullback(self, grads: Any, state: Any, params: Any, *, weights: Any = None) -> Any:
        return tree_map(lambda g: g.float(), grads), ()


class halves_for_no_reason(pq.Link):
    traits = PER_LEAF

    def pullback(self, grads: Any, state: Any, params: Any, *, weights: Any = None) -> Any:
        return tree_map(lambda g: g / 2, grads), ()


@pytest.mark.rare
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (mutates_its_state(), "update_is_pure"),
        (mutates_its_updates(), "update_is_pure"),
        (weights_count_calls(), "weights_are_pure"),
        (remembers_the_params(), "call_order"),
        (scheduled_by_looks(), "call_order"),
        (state_grows(), "state_keeps_form"),
        (float32_everywhere(), "updates_fit_params"),
        (fills_missing_gradients(), "none_stays_none"),
        (weights_in_a_tuple(), "weights_fit_params"),
        (keeps_the_gradients(DAMPED), "hands_pullback_on"),
        (keeps_those_of_a_child(DAMPED), "hands_pullback_on"),
        (loses_own(DAMPED), "hands_pullback_on"),
        (loses_own(pq.chain(pq.sgd(0.1), DAMPED)), "hands_pullback_on"),
        (hands_nothing_to_update(DAMPED), "hands_pullback_on"),
        (loses_the_weights(DAMPED), "pullback_takes_weights"),
        (halves_in_place(), "pullback_is_pure"),
        (pulls_back_to_float32(), "pullback_keeps_form"),
        (halves_for_no_reason(), "plain_pullback"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_wrong_transformations(wrong: Any, name: str) -> None:
    remembers_the_params.seen[0] = None
    with caught(name):
        check_transformation(wrong, laws=name, max_examples=25)


@pytest.mark.rare
def test_a_wrong_transformation_is_caught_by_some_law_of_all() -> None:
    with caught("state_keeps_form"):
        check_transformation(state_grows(), max_examples=20)


def test_a_hidden_counter_in_weights_is_caught_by_call_order() -> None:
    with caught("call_order"):
        check_transformation(weights_count_calls(), laws={"call_order"}, max_examples=50)


class refits_every_step(pq.hard_prox):
    """A prox link with a period that its update does not keep to."""

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        return (
            replace(self, period=1)
            .__class__.__mro__[1]
            .update(replace(self, period=1), updates, state, params, **extra)
        )


class weights_of_the_delta(pq.hard_prox):
    """w = u + (q - u)."""

    def weights(self, state: Any, params: Any) -> Any:
        hard = super().weights(state, params)
        return tree_map(lambda w, p: p + (w - p), hard, params)


class learns_without_bounds(pq.hard_prox):
    """Scales that go below 0 where a step is larger than they are."""

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        updates, new = super().update(updates, state, params, **extra)
        if not self.active(state):
            return updates, new
        qparams = tree_map(
            lambda d, q: None if d is None else q - 0.05 * d.sign(), extra["pulled"], state.qparams
        )
        moved = tree_map(lambda q, m: q if m is None else m, new.qparams, qparams)
        return updates, new._replace(qparams=moved)


class pulls_back_too_early(pq.hard_prox):
    """The estimator of levels that no step has fitted."""

    def pullback(self, grads: Any, state: Any, params: Any, *, weights: Any = None) -> Any:
        begun = state._replace(count=state.count + self.warmup + 1)
        return super().pullback(grads, begun, params, weights=weights)


def of_the_row(g: Tensor, u: Tensor, w: Tensor, levels: Tensor, step: Tensor) -> Tensor:
    """An estimator that looks at the whole row."""
    del u, w, levels, step
    return g - g.mean(-1, keepdim=True)


def of_the_next_latent(g: Tensor, u: Tensor, w: Tensor, levels: Tensor, step: Tensor) -> Tensor:
    del w, levels, step
    return torch.where(u.roll(1, -1) > 0, g, 0.0)


@pytest.mark.rare
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (refits_every_step(pq.lsbq(2), period=2), "refits_when_due"),
        (weights_of_the_delta(pq.lsbq(2), period=1), "weights_are_mapped"),
        (learns_without_bounds(pq.uniform(2), learn=pq.sgd(0.1)), "learns_within_bounds"),
        (
            pulls_back_too_early(pq.lsbq(1), gradient=pq.estimators.inside()),
            "waits_to_pull_back",
        ),
        (pq.hard_prox(pq.lsbq(1), period=1, gradient=of_the_row), "pullback_is_elementwise"),
        (
            pq.hard_prox(pq.lsbq(1), period=1, gradient=of_the_next_latent),
            "pullback_is_elementwise",
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_wrong_prox_links(wrong: Any, name: str) -> None:
    with caught(name):
        check_transformation(wrong, laws=name, max_examples=25)


@pytest.mark.rare
def test_the_report_names_what_is_broken() -> None:
    made = report(ends_not_clamped, max_examples=50)
    broken = {row.law.name for row in made.rows if row.counterexample}
    assert "in_range" in broken
    assert "pure" not in broken
    assert not made.passed
    assert "FAIL  in_range" in repr(made)
    assert "<b>FAIL</b>" in made._repr_html_()


# Found by attack: each passed once


@declares(ProxTraits(in_range=True))
def changes_single_precision(u: Tensor, levels: Tensor) -> Tensor:
    x = u.to(torch.float32)  # u itself where it is float32
    return maps.clip(x.clamp_(-0.5, 0.5), levels.to(x.dtype)).to(u.dtype)


@declares(ProxTraits(monotone=False))
def always_nan(u: Tensor, levels: Tensor) -> Tensor:
    del levels
    return torch.full_like(u, torch.nan)


@declares(ProxTraits(monotone=False, elementwise=True))
def spoils_its_row(u: Tensor, levels: Tensor) -> Tensor:
    return maps.hard(u, levels) + 0 * u[..., -1:]


@declares(ProxTraits(continuous=True, elementwise=True))
def jumps_at_quarters(u: Tensor, levels: Tensor) -> Tensor:
    lo, hi = cell(u, levels)
    return torch.where((u - lo) / (hi - lo).clamp(min=1e-9) < 0.25, lo, 0.5 * lo + 0.5 * u)


@pytest.mark.rare
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (changes_single_precision, "pure"),
        (always_nan, "finite"),
        (spoils_its_row, "nan_gives_nan"),
        (jumps_at_quarters, "continuous"),
    ],
)
def test_wrong_maps_that_once_passed(wrong: Any, name: str) -> None:
    with caught(name):
        check_proxmap(wrong, max_examples=100)


class ends_at_a_half(sched.Schedule):
    def __call__(self, step: Any) -> Tensor:
        return 0.5 + 0.5 * (1 - torch.as_tensor(step).double() / 10).clamp(0, 1)


@pytest.mark.parametrize("wrong", [ends_at_a_half(), sched.piecewise((1.0, 0.5), (10,))])
def test_a_schedule_that_declares_nothing_is_held_to_the_span_it_is_given(wrong: Any) -> None:
    with caught("ends"):
        check_schedule(wrong, start=0, end=10, max_examples=50)


class first_leaf_differs(pq.Link):
    traits = PER_LEAF

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        rates = [-0.1, *[-0.2] * len(updates)]
        pairs = zip(updates.items(), rates, strict=False)
        return {k: None if u is None else r * u for (k, u), r in pairs}, state


@pytest.mark.rare
def test_a_link_that_treats_the_first_leaf_apart() -> None:
    with caught("leafwise"):
        check_transformation(first_leaf_differs(), laws={"leafwise"}, max_examples=100)


class never_hardens(pq.parq_prox):
    def proxmap(self, u: Tensor, levels: Tensor, coefficient: Tensor) -> Tensor:
        return maps.binary_relax(u, levels, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("end", [3, torch.tensor(3.0)])
def test_a_prox_link_that_never_hardens(end: Any) -> None:
    link = never_hardens(pq.lsbq(1), anneal_start=1, anneal_end=end)
    with caught("hard_in_the_end"):
        check_transformation(link, laws={"hard_in_the_end"}, max_examples=30)


@pytest.mark.parametrize(
    "right",
    [
        sched.linear(1e6, 0.0, 0, 100),
        sched.linear(1.0, 0.0, -10, 10),
        sched.linear(1.0, 0.0, 0, 10**13),
        sched.inverse_slope(0, 100, 1e5, 1.0),
    ],
)
def test_schedules_that_once_were_accused(right: Any) -> None:
    check_schedule(right, max_examples=30)


@pytest.mark.slow
@pytest.mark.parametrize(
    "domain",
    [Interval(0.0, 1e-3), Interval(5.0, 5.0), Interval(1e6, 2e6), Interval(2000.0, math.inf)],
)
def test_coefficients_of_narrow_and_far_domains_are_drawn(domain: Interval) -> None:
    def keeps(u: Tensor, levels: Tensor, c: float) -> Tensor:
        assert c in domain
        return u + 0.0

    declares(ProxTraits(coefficients=domain))(keeps)
    check_proxmap(keeps, max_examples=20)


def test_arguments_that_check_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="laws is empty"):
        check_proxmap(maps.hard, laws=set())
    with pytest.raises(TypeError, match="laws are names or laws, got 1"):
        check_proxmap(maps.hard, laws={1})
    with pytest.raises(TypeError, match="expected a quantizer, got 3"):
        check_quantizer(3)
    with pytest.raises(ValueError, match="start must come before end"):
        check_schedule(lambda t: t, start=10, end=5)
