"""Prox maps: every declared law, the slow twins, and the laws that must not hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from parq_fn import proxmaps as maps
from parq_fn.foundation.traits import traits_of
from parq_fn.testing import Violation, check, check_proxmap, laws, strategies
from tests.twins import proxmaps as twins


@pytest.mark.parametrize("map_", strategies.MAPS, ids=lambda m: m.__name__)
@pytest.mark.laws
def test_every_declared_law(map_: Any) -> None:
    check_proxmap(map_)


def test_all_laws_are_declared_by_some_map() -> None:
    declared = {law.name for m in strategies.MAPS for law in laws.for_proxmap(m)}
    assert declared == {law.name for law in laws.ALL["proxmap"]}


# The twins


def each(twin: Any, u: Tensor, q: Tensor, *c: Any) -> Tensor:
    rows = zip(u.tolist(), q.tolist(), strict=True)
    made = [[twin(x, levels, *c) for x in row] for row, levels in rows]
    return torch.tensor(made, dtype=torch.float64).reshape(u.shape)


def assert_close_off_ties(got: Tensor, want: Tensor, u: Tensor, q: Tensor) -> None:
    mask = laws.proxmaps.off_ties(u, q)
    torch.testing.assert_close(got[mask], want[mask], rtol=1e-11, atol=1e-10)


TWINS = [
    (maps.hard, twins.hard),
    (maps.clip, twins.clip),
    (maps.parq, twins.parq),
    (maps.soft, twins.soft),
    (maps.binary_relax, twins.binary_relax),
    (maps.proxquant, twins.proxquant),
]


@pytest.mark.parametrize(("map_", "twin"), TWINS, ids=lambda f: f.__name__)
@given(data=st.data())
def test_equals_its_twin(map_: Any, twin: Any, data: st.DataObject) -> None:
    q, u = data.draw(strategies.problems())
    c = data.draw(strategies.coefficients(traits_of(map_).coefficients, q))
    given_ = () if c is None else (c,)
    assert_close_off_ties(map_(u, q, *given_), each(twin, u, q, *given_), u, q)


PENALTIES = [
    (maps.clip, maps.clip_regularizer, twins.clip_penalty),
    (maps.parq, maps.parq_regularizer, twins.parq_penalty),
    (maps.binary_relax, maps.binary_relax_regularizer, twins.binary_relax_penalty),
    (maps.proxquant, maps.proxquant_regularizer, twins.proxquant_penalty),
]


@pytest.mark.parametrize(
    ("map_", "penalty", "twin"), PENALTIES, ids=[m.__name__ for m, _, _ in PENALTIES]
)
@given(data=st.data())
def test_is_the_argmin_by_scan_and_golden_section(
    map_: Any, penalty: Any, twin: Any, data: st.DataObject
) -> None:
    q = data.draw(strategies.levels(count=1))
    u = data.draw(strategies.latents(q, length=1))
    c = data.draw(strategies.coefficients(traits_of(map_).coefficients, q))
    given_ = () if c is None else (min(c, 0.999) if map_ is maps.binary_relax else c,)
    levels, at = q[0].tolist(), u.item()

    def objective(w: float) -> float:
        return (w - at) ** 2 / 2 + twin(w, levels, *given_)

    ends = min(at, levels[0]) - 0.1, max(at, levels[-1]) + 0.1
    least = twins.minimum(objective, *ends, levels)
    assert objective(map_(u, q, *given_).item()) <= least + 1e-9 * max(1, abs(least))
    own = penalty(u, q, *given_).item()
    assert own == pytest.approx(twin(at, levels, *given_), rel=1e-9, abs=1e-12)


steps = st.lists(strategies.numbers(0.05, 2.0), min_size=1, max_size=3)


@given(steps, st.data(), strategies.numbers())
def test_par_is_the_papers(gaps: list[float], data: st.DataObject, u: float) -> None:
    """Levels 0 = q_0 < q_1 ..., a slope for each, on |w|: our levels of both signs."""
    rises = data.draw(st.lists(strategies.numbers(0.05, 2.0), min_size=len(gaps) + 1, max_size=4))
    rises = rises[: len(gaps) + 1]
    q = [sum(gaps[:i]) for i in range(len(gaps) + 1)]
    a = [sum(rises[: i + 1]) for i in range(len(q))]
    levels = torch.tensor([[-x for x in reversed(q[1:])] + q], dtype=torch.float64)
    # 2k - 1 levels, 2k slopes: those of the k cells on either side, the outermost unbounded
    slopes = maps.symmetric_slopes(torch.tensor([a], dtype=torch.float64))
    got = maps.par(torch.tensor([[u]], dtype=torch.float64), levels, slopes)
    assert got.item() == pytest.approx(twins.paper_par(u, q, a), abs=1e-12)

    def objective(w: float) -> float:
        return (w - u) ** 2 / 2 + twins.paper_par_penalty(w, q, a)

    marks = [*q, *(-x for x in q)]
    assert objective(got.item()) <= twins.minimum(objective, -9.0, 9.0, marks) + 1e-9
    zero = maps.par_regularizer(torch.zeros(1, 1).double(), levels, slopes)
    penalty = maps.par_regularizer(got, levels, slopes) - zero
    assert penalty.item() == pytest.approx(twins.paper_par_penalty(got.item(), q, a), abs=1e-11)


@given(st.data())
def test_parq_is_a_par_of_a_rescaled_latent(data: st.DataObject) -> None:
    q, u = data.draw(strategies.problems(kinds=("irregular", "symmetric")))
    s = data.draw(strategies.numbers(0.01, 1.0))
    slopes = (1 - s) / s * laws.proxmaps.midpoints(q)
    torch.testing.assert_close(maps.parq(u, q, s), maps.par(u / s, q, slopes), atol=1e-9, rtol=1e-9)


# Ties, pinned: a weight on a midpoint goes to the lower level.


@pytest.mark.parametrize("dtype", strategies.FLOATING)
def test_ties_go_down(dtype: torch.dtype) -> None:
    q = torch.tensor([[-2.0, -1.0, 1.0, 4.0]], dtype=dtype)
    u = torch.tensor([[-1.5, 0.0, 2.5]], dtype=dtype)
    lower = torch.tensor([[-2.0, -1.0, 1.0]], dtype=dtype)
    assert torch.equal(maps.hard(u, q), lower)
    assert torch.equal(maps.parq(u, q, 0.0), lower)
    assert torch.equal(maps.parq(u, q, 0.25), u)
    assert torch.equal(maps.soft(u, q, torch.inf), lower)
    assert torch.equal(maps.soft(u, q, 4.0), u)
    assert torch.equal(maps.binary_relax(u, q, 1.0), lower)
    assert torch.equal(maps.binary_relax(u, q, 0.5), (u + lower) / 2)
    assert torch.equal(maps.proxquant(u, q, torch.inf), lower)
    assert torch.equal(maps.proxquant(u, q, 0.25), u - 0.25)


# What must not hold: a counterexample is found.


def same(c: Any) -> float:
    del c
    return 1.0


FAILS = [
    ("firmly_nonexpansive", maps.parq, {"firmly_nonexpansive": True}),
    ("firmly_nonexpansive", maps.soft, {"firmly_nonexpansive": True}),
    ("firmly_nonexpansive", maps.hard, {"firmly_nonexpansive": True}),
    ("firmly_nonexpansive", maps.binary_relax, {"firmly_nonexpansive": True}),
    ("firmly_nonexpansive", maps.proxquant, {"firmly_nonexpansive": True}),
    ("lipschitz", maps.parq, {"lipschitz": same}),
    ("lipschitz", maps.soft, {"lipschitz": same}),
    ("lipschitz", maps.hard, {"lipschitz": lambda _: 100.0}),
    ("lipschitz", maps.binary_relax, {"lipschitz": lambda _: 100.0}),
    ("lipschitz", maps.proxquant, {"lipschitz": lambda _: 100.0}),
    ("continuous", maps.hard, {"continuous": True}),
    ("continuous", maps.binary_relax, {"continuous": True}),
    ("continuous", maps.proxquant, {"continuous": True}),
    ("in_range", maps.binary_relax, {"in_range": True}),
    ("in_range", maps.proxquant, {"in_range": True}),
    ("fixes_levels", maps.par, {"fixes_levels": True}),
    ("fixes_midpoints", maps.hard, {"fixes_midpoints": True}),
    ("fixes_midpoints", maps.binary_relax, {"fixes_midpoints": True}),
    ("fixes_midpoints", maps.proxquant, {"fixes_midpoints": True}),
    ("fixes_midpoints", maps.par, {"fixes_midpoints": True}),
    ("semigroup", maps.soft, {"semigroup": lambda a, b: max(a, b)}),
    ("semigroup", maps.soft, {"semigroup": lambda a, b: a + b}),
    ("semigroup", maps.par, {"semigroup": lambda a, b: a + b}),
    ("idempotent", maps.parq, {"idempotent": True}),
    ("idempotent", maps.soft, {"idempotent": True}),
    ("idempotent", maps.binary_relax, {"idempotent": True}),
    ("idempotent", maps.proxquant, {"idempotent": True}),
    ("idempotent", maps.par, {"idempotent": True}),
    ("keeps_side", maps.par, {"keeps_side": True}),
    ("between", maps.par, {"between": True}),
    ("onto_levels", maps.parq, {"onto_levels": True}),
    ("is_prox", maps.soft, {"regularizer": maps.parq_regularizer}),
    ("is_prox", maps.parq, {"growth": lambda s: 0.51 * s + 0.01}),
    ("cocoercive", maps.parq, {"cocoercive": lambda s: 1.1 * s}),
    ("cocoercive", maps.soft, {"cocoercive": same}),
    ("odd", maps.par, {"odd": lambda a: a}),
    ("scale", maps.proxquant, {"scales": lambda c, _: c}),
    ("scale_exact", maps.par, {"scales": lambda c, _: c}),
    ("share", maps.soft, {"share": lambda t: 1 - 1 / (1 + t)}),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("law", "map_", "claims"), FAILS, ids=[f"{m.__name__}-{law}" for law, m, _ in FAILS]
)
def test_what_must_not_hold_does_not(law: str, map_: Any, claims: dict[str, Any]) -> None:
    def claimed(u: Tensor, levels: Tensor, *c: Any) -> Tensor:
        return map_(u, levels, *c)

    claimed.traits = replace(traits_of(map_), **claims)
    wanted, called = laws.named("proxmap", law), check.MapAdapter(claimed)
    found = check.find_violation(
        [wanted], called, check.proxmap_inputs(claimed), 4000, shrink=False
    )
    assert found is not None
    assert f"claimed breaks the law '{law}'" in str(found)


@pytest.mark.slow
def test_parq_is_firmly_nonexpansive_at_one_alone() -> None:
    check_proxmap(maps.parq, coefficient=1.0, laws={"firmly_nonexpansive"})
    with pytest.raises(Violation, match="firmly_nonexpansive"):
        check_proxmap(maps.parq, coefficient=0.9, laws={"firmly_nonexpansive"}, max_examples=300)


@pytest.mark.parametrize("map_", [maps.parq, maps.soft, maps.proxquant])
def test_the_sharp_end_obeys_the_laws_of_hard(map_: Any) -> None:
    sharp = traits_of(map_).sharp

    def at_the_end(u: Tensor, levels: Tensor) -> Tensor:
        return map_(u, levels, sharp)

    at_the_end.traits = maps.hard.traits
    check_proxmap(at_the_end, laws={"onto_levels", "idempotent", "keeps_side", "jump", "pure"})
