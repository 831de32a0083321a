"""Prox maps and penalties at chosen points: ends, degenerate cells, dtypes, gradients."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn import proxmaps as maps
from parq_fn.foundation.traits import ProxTraits, declares
from parq_fn.optim import QuantOptimizer

Q = torch.tensor([[-2.0, -1.0, 1.0, 4.0]], dtype=torch.float64)
SLOPES = torch.tensor([[-1.0, 0.5, 2.0]], dtype=torch.float64)
#: A coefficient inside the range of each map.
MAPS = [
    (maps.clip, ()),
    (maps.hard, ()),
    (maps.parq, (0.5,)),
    (maps.soft, (4.0,)),
    (maps.binary_relax, (0.5,)),
    (maps.proxquant, (0.25,)),
    (maps.par, (SLOPES,)),
]
PENALTIES = [
    (maps.clip_regularizer, ()),
    (maps.hard_regularizer, ()),
    (maps.parq_regularizer, (0.5,)),
    (maps.interpolant, ()),
    (maps.binary_relax_regularizer, (0.5,)),
    (maps.proxquant_regularizer, (0.25,)),
    (maps.par_regularizer, (SLOPES,)),
]


@pytest.mark.parametrize(("f", "c"), MAPS + PENALTIES, ids=lambda f: getattr(f, "__name__", ""))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_result_has_the_dtype_of_the_weights(f, c, dtype) -> None:
    u = torch.tensor([[-3.0, 0.25, torch.nan]], dtype=dtype)
    got = f(u, Q, *c)
    assert got.dtype == dtype
    assert got.shape == u.shape


def values(penalty, points: list[float], *c) -> list[float]:
    return penalty(torch.tensor([points], dtype=torch.float64), Q, *c)[0].tolist()


def test_penalties_on_levels_between_them_and_outside() -> None:
    points = [-2.5, -2.0, -1.25, -1.0, 1.0, 3.0, 4.0, 4.5]
    inf = math.inf
    assert values(maps.clip_regularizer, points) == [inf, 0, 0, 0, 0, 0, 0, inf]
    assert values(maps.hard_regularizer, points) == [inf, 0, inf, 0, 0, inf, 0, inf]
    assert values(maps.parq_regularizer, points, 0.5) == [
        inf, 0, 0.25 * 0.75 * 0.25, 0, 0, 0.25 * 2 * 1, 0, inf
    ]  # fmt: skip
    assert values(maps.parq_regularizer, points, 1.0) == [inf, 0, 0, 0, 0, 0, 0, inf]
    assert values(maps.interpolant, points) == [inf, 2, 0.875, 0.5, 0.5, 5.5, 8, inf]
    assert values(maps.binary_relax_regularizer, points, 0.5) == [
        0.125, 0, 0.03125, 0, 0, 0.5, 0, 0.125
    ]  # fmt: skip
    assert values(maps.binary_relax_regularizer, points, 1.0) == [inf, 0, inf, 0, 0, inf, 0, inf]
    assert values(maps.proxquant_regularizer, points, 0.5) == [
        0.25, 0, 0.125, 0, 0, 0.5, 0, 0.25
    ]  # fmt: skip
    assert values(maps.par_regularizer, points, SLOPES) == [inf, 0, -0.75, -1, 0, 4, 6, inf]
    outer = torch.tensor([[-3.0, -1.0, 0.5, 2.0, 5.0]], dtype=torch.float64)
    assert values(maps.par_regularizer, points, outer) == [1.5, 0, -0.75, -1, 0, 4, 6, 8.5]


@pytest.mark.parametrize(
    ("map_", "soft", "sharp", "soft_map"),
    [
        (maps.parq, 1.0, 0.0, maps.clip),
        (maps.soft, 0.0, math.inf, maps.clip),
        (maps.binary_relax, 0.0, 1.0, lambda u, q: u),
        (maps.proxquant, 0.0, math.inf, lambda u, q: u),
    ],
)
def test_the_ends_are_met_bit_for_bit(map_, soft, sharp, soft_map) -> None:
    generator = torch.Generator().manual_seed(0)
    u = 3 * torch.randn(1, 500, generator=generator)
    q = torch.randn(1, 5, generator=generator).sort().values
    assert torch.equal(map_(u, q, soft), soft_map(u, q))
    assert torch.equal(map_(u, q, sharp), maps.hard(u, q))


@pytest.mark.parametrize(
    ("map_", "sharp"),
    [(maps.parq, 0.0), (maps.soft, math.inf), (maps.binary_relax, 1.0), (maps.proxquant, math.inf)],
)
def test_sharp_maps_have_no_slope(map_, sharp: float) -> None:
    """In the weight and in the coefficient: the branch not taken spoils neither."""
    u = torch.tensor([[-3.0, -2.0, -1.5, 0.0, 0.3, 4.0, 5.0]], dtype=torch.float64)
    c = torch.tensor(sharp, dtype=torch.float64)
    grads = torch.func.grad(lambda u, c: map_(u, Q, c).sum(), argnums=(0, 1))(u, c)
    assert all(not bool(g.any()) for g in grads)


@pytest.mark.parametrize(("map_", "c"), MAPS[:-1], ids=lambda f: getattr(f, "__name__", ""))
def test_equal_levels_make_a_cell_without_width(map_, c) -> None:
    q = torch.tensor([[-1.0, -1.0, 2.0, 2.0, 2.0]], dtype=torch.float64)
    u = torch.tensor([[-3.0, -1.0, 0.3, 0.75, 2.0, 3.0]], dtype=torch.float64)
    distinct = map_(u, q[:, [0, 2]], *c)
    assert torch.equal(map_(u, q, *c), distinct)
    u = u.clone().requires_grad_()
    map_(u, q, *c).sum().backward()
    assert bool(u.grad.isfinite().all())


def test_symmetric_slopes_without_a_zero_level() -> None:
    a = torch.tensor([[0.5, 1.0]])
    slopes = maps.symmetric_slopes(a, zero_level=False)
    assert slopes.tolist() == [[-1.0, -0.5, 0.0, 0.5, 1.0]]
    assert torch.equal(maps.symmetric_slopes(a[0], zero_level=False), slopes[0])


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_another_number_of_slopes_is_refused(count: int) -> None:
    message = rf"4 levels takes 3 slopes \(or 5 with the outer ones\), got {count}"
    for f in (maps.par, maps.par_regularizer):
        with pytest.raises(ValueError, match=message):
            f(Q, Q, torch.zeros(1, count))


def test_par_beyond_the_levels_and_at_infinity() -> None:
    u = torch.tensor([[-math.inf, -9.0, 9.0, math.inf]], dtype=torch.float64)
    assert maps.par(u, Q, SLOPES).tolist() == [[-2, -2, 4, 4]]
    outer = torch.tensor([[-3.0, -1.0, 0.5, 2.0, 5.0]], dtype=torch.float64)
    assert maps.par(u, Q, outer).tolist() == [[-math.inf, -6, 4, math.inf]]
    half = torch.tensor([[-math.inf, -1.0, 0.5, 2.0, 5.0]], dtype=torch.float64)
    assert maps.par(u, Q, half).tolist() == [[-2, -2, 4, math.inf]]
    for slopes in (SLOPES, outer, half):
        assert bool(maps.par(torch.full_like(u, torch.nan), Q, slopes).isnan().all())


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 8.0, 100.0])
def test_soft_keeps_levels_and_range_where_midpoints_are_rounded(temperature: float) -> None:
    q = torch.randn(3000, 3, generator=torch.Generator().manual_seed(0)).sort(-1).values
    low, high = q[:, :1], q[:, -1:]
    assert torch.equal(maps.soft(q, q, temperature), q)
    near = torch.cat([q.nextafter(low), q.nextafter(high), low - 1, high + 1], -1)
    w = maps.soft(near, q, temperature)
    assert bool(((low <= w) & (w <= high)).all())
    assert torch.equal(w[:, -2:], q[:, [0, 2]])


def test_soft_at_temperatures_near_its_ends() -> None:
    u = torch.linspace(-3, 5, 200, dtype=torch.float64)[None]
    for temperature in (5e-324, 1e-300, 1e-12, 1e-6):
        exact = maps.clip(u, Q)
        torch.testing.assert_close(maps.soft(u, Q, temperature), exact, rtol=0, atol=1e-12)
    # in the middle of a cell [0, w]: w / 2 + w tanh(T (u / w - 1/2) / 2) / (2 tanh(T / 4))
    q = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    for t in (0.3, 1.0, 7.0):
        expected = 1 + math.tanh(-t / 8) / math.tanh(t / 4)
        got = maps.soft(torch.tensor([[0.5]], dtype=torch.float64), q, t)
        assert got.item() == pytest.approx(expected, rel=1e-12)


def test_soft_saturates_onto_levels_bit_for_bit() -> None:
    q = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0)).sort(-1).values
    u = q + 0.1 * (q.flip(-1) - q)
    assert torch.equal(maps.soft(u, q, 1e4), q)


@pytest.mark.parametrize("theta", [0.1, 0.3, 0.7, 0.9])
def test_relaxing_carries_no_weight_past_itself_or_its_level(theta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 300, generator=generator).sort(-1).values
    assert torch.equal(maps.binary_relax(q, q, theta), q)
    u = torch.cat([q.nextafter(q - 1), q.nextafter(q + 1)], -1)
    near, w = maps.hard(u, q), maps.binary_relax(u, q, theta)
    assert bool(((torch.minimum(u, near) <= w) & (w <= torch.maximum(u, near))).all())


def test_a_move_as_long_as_the_way_ends_on_the_level() -> None:
    generator = torch.Generator().manual_seed(0)
    q = 0.1 * torch.randn(1, 9, generator=generator).sort(-1).values
    u = 2 * torch.randn(1, 300, generator=generator)
    near = maps.hard(u, q)
    for i, way in enumerate((u - near).abs()[0]):
        assert maps.proxquant(u, q, way)[0, i] == near[0, i]


def test_the_indicator_of_the_levels_has_no_slope() -> None:
    w = torch.tensor([[-3.0, -2.0, 0.3, 4.0]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(maps.binary_relax_regularizer(w, Q, 1.0).sum(), w)
    assert not bool(slope.any())


@pytest.mark.parametrize(("f", "c"), MAPS + PENALTIES, ids=lambda f: getattr(f, "__name__", ""))
def test_rows_may_have_any_number_of_leading_dimensions(f, c) -> None:
    generator = torch.Generator().manual_seed(0)
    u = 3 * torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    q = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).sort(-1).values
    flat = f(u.flatten(0, 1), q.flatten(0, 1), *c)
    assert torch.equal(f(u, q, *c), flat.unflatten(0, (2, 3)))
    assert torch.equal(f(u[0, 0], q[0, 0], *(x[0] if x is SLOPES else x for x in c)), flat[0])


def test_par_stays_on_its_piece_where_sums_are_rounded() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3000, 2, generator=generator).sort(-1).values
    a = torch.randn(3000, 1, generator=generator)
    low, high = q[:, :1], q[:, 1:]
    for start in (low + a, high + a):
        for u in (start.nextafter(low - 9), start, start.nextafter(high + 9)):
            w = maps.par(u, q, a)
            assert bool(((low <= w) & (w <= high)).all())


def test_soft_reaches_the_end_of_the_narrowest_cell() -> None:
    levels = torch.tensor([[1e-45, 3e-45]])
    got = maps.soft(torch.tensor([[-math.inf, math.inf]]), levels, 1000.0)
    assert torch.equal(got, levels)


# Maps are values


def test_the_list_of_maps_is_all_of_them() -> None:
    exported = {got for got in vars(maps).values() if isinstance(got, maps.ProxMap)}
    assert exported == set(maps.MAPS) == {f for f, _ in MAPS}
    assert len(maps.MAPS) == len(exported)


@pytest.mark.parametrize("map_", maps.MAPS, ids=repr)
def test_a_map_is_its_name_printed_pickled_and_copied(map_: maps.ProxMap) -> None:
    assert repr(map_) == map_.__name__ == str(map_)
    assert getattr(maps, map_.__name__) is map_
    assert pickle.loads(pickle.dumps(map_)) is map_
    assert copy.deepcopy(map_) is map_
    assert len({map_, replace(map_)}) == 1
    assert map_.__doc__ == map_.function.__doc__ != maps.ProxMap.__doc__
    assert [*inspect.signature(map_).parameters][:2] == ["u", "levels"]
    assert map_.traits.elementwise
    assert map_.regularizer is map_.traits.regularizer


def test_a_changed_map_is_another_value() -> None:
    changed = replace(maps.parq, formulas=None)
    assert changed != maps.parq
    assert changed == replace(maps.parq, formulas=None)
    assert repr(changed).startswith("ProxMap(parq, ProxTraits(")
    again = pickle.loads(pickle.dumps(changed))
    assert again == changed
    assert again.function is maps.parq.function
    u = torch.tensor([[0.2]])
    assert torch.equal(changed(u, Q.float(), 0.5), maps.parq(u, Q.float(), inverse_slope=0.5))
    assert replace(changed, formulas=maps.parq.formulas) == maps.parq


@maps.prox_map(ProxTraits(elementwise=True, monotone=True))
def doubled(u: Tensor, levels: Tensor, coefficient: Any = None) -> Tensor:
    """A map of a user's own."""
    del levels, coefficient
    return 2 * u


def test_a_map_of_ones_own_is_its_name_too() -> None:
    assert repr(doubled) == "doubled"
    assert pickle.loads(pickle.dumps(doubled)) is doubled
    assert doubled.__doc__ == "A map of a user's own."
    local = maps.ProxMap(lambda u, levels, c: u)
    assert repr(local) == "ProxMap(<lambda>, ProxTraits())"
    assert not local.traits.elementwise
    assert "doubled" in repr(pf.custom_prox(pf.lsbq(1), doubled, 0.0))


def ends_and_between(map_: maps.ProxMap) -> list[float]:
    """Coefficients of the domain that it declares, and its sharp end."""
    domain, sharp = map_.traits.coefficients, map_.traits.sharp
    some = (0.0, 0.3, 0.5, 0.9, 1.0, math.inf)
    return [c for c in some if domain is None or c in domain or c == sharp]


@pytest.mark.parametrize(
    ("map_", "at"), [(f, c) for f in maps.MAPS if f.formulas for c in ends_and_between(f)], ids=repr
)
def test_formulas_give_what_the_function_does(map_: maps.ProxMap, at: float) -> None:
    generator = torch.Generator().manual_seed(0)
    u = 3 * torch.randn(3, 50, generator=generator)
    q = torch.randn(3, 4, generator=generator).sort(-1).values
    wanted = map_(u, q, at)
    for formula in (map_.formula(at), map_.formula(None)):
        assert torch.equal(formula(u, q, at), wanted)


def test_a_map_without_formulas_is_computed_by_its_function() -> None:
    formula = doubled.formula(0.5)
    assert not formula.prepared
    u = torch.ones(1, 2)
    assert torch.equal(formula.weight(u, Q.float(), None, *formula.scalars(u.sum())), 2 * u)


# Which maps may be given pieces of rows


def by_largest(u: Tensor, levels: Tensor, c: Tensor) -> Tensor:
    """Couples the weights of a row: each over the largest of all."""
    return u / u.abs().amax(-1, keepdim=True) * levels[..., -1:]


COUPLING = {
    "traits": declares(ProxTraits(in_range=True, monotone=True))(by_largest),
    "value": maps.ProxMap(by_largest, ProxTraits(in_range=True)),
    "replaced": replace(maps.parq, function=by_largest, traits=ProxTraits(), formulas=None),
}


@pytest.mark.parametrize("name", COUPLING)
def test_a_map_that_couples_weights_sees_whole_rows_whatever_else_it_declares(name: str) -> None:
    link = pf.custom_prox(pf.lsbq(1), COUPLING[name], 0.5, granularity=pf.per_channel(), period=1)
    assert not link.elementwise
    torch.manual_seed(0)
    shapes = [(2, 5), (3, 7), (2, 1 << 18)]  # small ones are padded, long rows cut, where allowed
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    base = torch.optim.SGD([{"params": params, "quant_bits": 1}], lr=0.0)
    optimizer = QuantOptimizer(base, link)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p in params:
        latent, levels = optimizer.state[p]["latent"], optimizer.levels(p)
        assert torch.equal(p.detach(), by_largest(latent, levels, torch.tensor(0.5)))


def test_elementwise_is_what_the_map_declares() -> None:
    @declares(ProxTraits(elementwise=True))
    def scaled(u: Tensor, levels: Tensor, c: Tensor) -> Tensor:
        return c * u

    class own_method(pf.parq_prox):
        @declares(ProxTraits(elementwise=True))
        def proxmap(self, u: Tensor, levels: Tensor, coefficient: Tensor) -> Tensor:
            return 2 * maps.parq(u, levels, coefficient)

    class other_map(pf.hard_prox):
        proxmap = maps.clip

    assert pf.custom_prox(pf.lsbq(1), scaled, 0.5).elementwise
    assert pf.custom_prox(pf.lsbq(1), maps.hard, 0.5).elementwise
    assert not pf.custom_prox(pf.lsbq(1), lambda u, q, c: u, 0.5).elementwise
    assert own_method(pf.lsbq(1), anneal_start=0, anneal_end=9).elementwise
    link = other_map(pf.lsbq(1))
    assert link.elementwise
    assert link.formula(0.5) is maps.clip.formula(0.5)


# Found by attack, each with the input that showed it.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slope", [1e-300, 1e-45, 1e-40, 1e-38])
def test_parq_at_a_subnormal_slope_is_finite(dtype, slope: float) -> None:
    u = torch.tensor([[-5.0, -1.0, 0.2, -0.5, 5.0]], dtype=dtype)
    levels = torch.tensor([[-1.0, 0.0, 1.0]], dtype=dtype)
    s = torch.tensor(slope, dtype=torch.float64)
    expected = torch.tensor([[-1.0, -1.0, 0.0, -0.5 if s.to(torch.float32) > 0 else -1.0, 1.0]])
    w = pf.proxmaps.parq(u, levels, s)
    assert bool(w.isfinite().all())
    assert torch.equal(w[:, [0, 1, 2, 4]], expected[:, [0, 1, 2, 4]].to(dtype))


@pytest.mark.parametrize("temperature", [1e-45, 1e-38, 1e-9, 3.0, 1e4])
def test_soft_is_finite_on_cells_as_wide_as_the_dtype(temperature: float) -> None:
    top = torch.finfo(torch.float32).max
    u = torch.tensor([[-torch.inf, -top, -1.0, 0.0, 1.0, top / 2, top, torch.inf]])
    w = pf.proxmaps.soft(u, torch.tensor([[-top, top]]), temperature)
    assert bool(w.isfinite().all())
    assert bool((w.diff() >= 0).all())
    assert w[0, 3] == 0
    if temperature <= 1e-9:
        exact = pf.proxmaps.clip(u, torch.tensor([[-top, top]]))
        torch.testing.assert_close(w, exact, rtol=1e-6, atol=1e-6 * top)


def test_par_regularizer_at_infinity() -> None:
    w, q = torch.tensor([[-torch.inf, 0.0, torch.inf, torch.nan]]), torch.tensor([[-1.0, 1.0]])
    bounded = pf.proxmaps.par_regularizer(w, q, torch.tensor([[0.0]]))
    flat = pf.proxmaps.par_regularizer(w, q, torch.tensor([[0.0, 1.0, 0.0]]))
    assert bounded[0, :3].tolist() == [torch.inf, 0.0, torch.inf]
    assert flat[0, :3].tolist() == [0.0, 1.0, 2.0]
    assert bool(bounded[0, 3].isnan() & flat[0, 3].isnan())
