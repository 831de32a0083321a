"""Learned levels: gradients of qparams against autograd, and trainings against autograd twins."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import parq_fn as pf
from parq_fn import proxmaps
from parq_fn.foundation.torch_private import compiler_options
from parq_fn.foundation.traits import ProxTraits
from parq_fn.foundation.tree import tree_leaves, tree_map
from parq_fn.optim.engine import gradients
from parq_fn.proxmaps import binary_relax, hard, parq, proxquant, soft
from parq_fn.proxmaps.proxmap import prox_map
from parq_fn.quantizers.base import Grid
from parq_fn.transforms.learn import moved, of_all_rows
from parq_fn.transforms.qparams_gradient import KINDS, is_one_scale, of_codes, of_rows
from tests.helpers import pairwise, sampled

FLOAT64 = torch.float64


class pair(pf.Quantizer):
    """One level, the sum of two numbers."""

    num_levels, num_qparams = 1, 2

    def qparams(self, x: Tensor) -> Tensor:
        return torch.stack([x.mean(-1), x.abs().amax(-1)], -1)

    def levels(self, qparams: Tensor) -> Tensor:
        return qparams.sum(-1, keepdim=True)


ALL = [
    pf.uniform(1), pf.uniform(2), pf.uniform(4), pf.uniform(2, center=True), pf.max_uniform(3),
    pf.asymmetric(3), pf.ternary_uniform(), pf.lsbq(0), pf.lsbq(1), pf.lsbq(2), pf.lsbq(3),
    pf.lsbq(2, "optimal"), pf.lsbq(3, "alternating", center=True), pf.lloyd_max(2),
    pf.lloyd_max(2, symmetric=False), pf.gaussian(3), pf.integer(4), pf.affine(3),
    pf.codebook.nf4, pf.codebook.fp4, pf.mxfp4(), pf.nvfp4(),
    pf.stored(pf.uniform(4), torch.float16), pf.stored(pf.integer(4), "e8m0"),
    pf.centered(pf.codebook.nf4), pair(),
]  # fmt: skip
MAPS = [
    (proxmaps.hard, 0.0), (proxmaps.clip, 0.0), *((proxmaps.parq, s) for s in (1, 0.7, 1e-3, 0)),
    *((proxmaps.soft, t) for t in (0, 1, 20, torch.inf)),
    *((proxmaps.binary_relax, c) for c in (0, 0.3, 0.8, 1)),
    *((proxmaps.proxquant, c) for c in (0, 0.05, 0.3, torch.inf)),
]  # fmt: skip


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64)


def fitted(quantizer: Any, u: Tensor) -> Tensor:
    qparams = quantizer.fit(u)
    return torch.where(torch.tensor(quantizer.learnable), 1.2 * qparams, qparams)


# Gradients


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_the_derivative_of_maps_in_qparams_is_that_of_autograd(quantizer: Any) -> None:
    u, g = 1.3 * draw(5, 40), draw(5, 40, seed=1)
    qparams = fitted(quantizer, u)
    u = 1.01 * u  # off the levels that fits put on weights, where maps have kinks
    for map, coefficient in MAPS:
        s = torch.tensor(coefficient, dtype=FLOAT64)
        found = of_rows("map", map, quantizer, u, g, qparams, FLOAT64, s)
        own = qparams.clone().requires_grad_()
        (wanted,) = torch.autograd.grad((g * map(u, quantizer.levels(own), s)).sum(), own)
        steep = {proxmaps.parq: 1 / s if s > 0 else 1, proxmaps.soft: s if s < torch.inf else 1}
        size = g.abs().sum() * quantizer.largest_code * max(1.0, float(steep.get(map, 1)))
        assert float((found - wanted).abs().max() / size) < 1e-13, (map, coefficient)


def test_where_a_map_rounds_its_derivatives_are_those_of_rounding() -> None:
    """At midpoints and levels too, and of cells without width."""
    u = torch.linspace(-3, 3, 13, dtype=FLOAT64)
    for hi in (1.0, -1.0):
        ends = torch.full_like(u, -1.0), torch.full_like(u, hi)
        wanted = hard.derivatives(u, *ends, torch.tensor(0.0))
        for map, c in ((parq, 0.0), (soft, torch.inf), (binary_relax, 1.0), (proxquant, torch.inf)):
            found = map.derivatives(u, *ends, torch.tensor(c, dtype=FLOAT64))
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("quantizer", ALL, ids=repr)
def test_by_code_each_level_has_the_gradients_of_its_weights(
    quantizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In what a compiler traces too; of levels that a dtype rounds, as close as their middle is."""
    u, g = 1.3 * draw(5, 40), draw(5, 40, seed=1)
    qparams = fitted(quantizer, u)
    for dtype, compiling in itertools.product((FLOAT64, torch.bfloat16), (False, True)):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
        levels = quantizer.levels_in(qparams, dtype).to(FLOAT64)
        middle = (levels[:, 1:] + levels[:, :-1]) / 2
        x = torch.cat([u[:, middle.shape[-1] :], 1.0001 * middle], -1)
        sums = torch.zeros_like(levels)
        for i, row in enumerate(x):
            for j, weight in enumerate(row):
                sums[i, int((levels[i] - weight).abs().argmin())] += g[i, j]
        wanted = torch.func.grad(lambda q, s=sums: (s * quantizer.levels(q)).sum())(qparams)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda c=compiling: c)
        for map in (proxmaps.hard, proxmaps.parq):
            found = of_rows("code", map, quantizer, x, g, qparams, dtype, torch.tensor(0.5))
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


OF_ONE_SCALE = [
    *(pf.integer(3), pf.uniform(2), pf.codebook.nf4),
    *(pf.uniform(1), pf.lsbq(1), pf.lsbq(0), pf.ternary_uniform()),
]


@pytest.mark.parametrize("quantizer", OF_ONE_SCALE, ids=repr)
def test_lsq_has_the_residual_inside_and_the_end_level_beyond(quantizer: Any) -> None:
    u, g = 1.5 * draw(3, 50), draw(3, 50, seed=1)
    scale = 0.6 * quantizer.fit(u)
    levels = quantizer.levels(scale)
    u[:, :2] = levels[:, [0, -1]]  # which are not inside
    near = proxmaps.hard(u, levels) / scale
    inside = (u > levels[:, :1]) & (u < levels[:, -1:])
    assert bool(inside.any())
    assert not bool(inside.all())
    wanted = (g * torch.where(inside, near - u / scale, near)).sum(-1, keepdim=True)
    found = of_rows("lsq", None, quantizer, u, g, scale, FLOAT64, torch.tensor(0.0))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_map_of_ones_own_is_differentiated_by_autograd() -> None:
    def mean_and_level(u: Tensor, levels: Tensor, c: Tensor) -> Tensor:
        return 0.5 * u + 0.5 * proxmaps.hard(u, levels)

    u, g = draw(2, 30), draw(2, 30, seed=1)
    for quantizer in (pf.uniform(4), pf.lsbq(2)):
        q = fitted(quantizer, u)
        found = of_rows("map", mean_and_level, quantizer, u, g, q, FLOAT64, torch.tensor(0.0))
        half = of_rows("code", None, quantizer, u, g, q, FLOAT64, torch.tensor(0.0))
        torch.testing.assert_close(found, 0.5 * half)


def test_of_one_level_both_ends_of_the_cell_move_a_weight() -> None:
    def middle(u: Tensor, levels: Tensor, c: Tensor) -> Tensor:
        return levels.expand_as(u)

    def halves(u: Tensor, lo: Tensor, hi: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        return (half := torch.full_like(u, 0.5)), half

    u, g, s = draw(2, 30), draw(2, 30, seed=1), torch.tensor(0.5, dtype=FLOAT64)
    own = prox_map(ProxTraits(elementwise=True), derivatives=halves)(middle)
    found = of_rows("map", own, pair(), u, g, pair().fit(u), FLOAT64, s)
    torch.testing.assert_close(found, g.sum(-1, keepdim=True).expand(2, 2))


def test_levels_that_a_fit_gives_in_any_order_have_their_own_gradients() -> None:
    class falling(pf.Quantizer):
        num_levels = 2

        def qparams(self, x: Tensor) -> Tensor:
            top = x.abs().amax(-1, keepdim=True)
            return torch.cat([top, -top], -1)

    u, g = draw(2, 30), draw(2, 30, seed=1)
    qparams = falling().fit(u)
    found = of_rows("code", None, falling(), u, g, qparams, FLOAT64, torch.tensor(0.0))
    upper = torch.where(u > 0, g, 0.0).sum(-1)
    torch.testing.assert_close(found, torch.stack([upper, g.sum(-1) - upper], -1))


def test_gradients_are_over_the_root_of_weights_and_largest_code() -> None:
    """Of a row of n, unless they are not to be; rows without weights have none."""
    assert pf.learn(pf.sgd(1.0)) == pf.learn(pf.sgd(1.0), "code", normalize=True)
    params = {"long": draw(3, 40), "one": draw(3, 1), "none": draw(2, 0)}
    grads = {k: draw(*p.shape, seed=1) for k, p in params.items()}
    for normalize in (True, False):
        link = pf.hard_prox(
            pf.integer(4),
            granularity=pf.per_channel(),
            period=1,
            gradient=pf.estimators.inside(),
            learn=pf.learn(pf.sgd(1.0), normalize=normalize),
        )
        begun = link.init(params)
        assert not any(d.any() for d in link.pullback(grads, begun, params)[1].values())
        _, state = link.update(grads, begun, params, pulled=())
        found, own = link.pullback(grads, state, params)
        assert {k: g.shape for k, g in found.items()} == {k: p.shape for k, p in params.items()}
        for key, n in (("long", 40), ("one", 1)):
            qparams = state.qparams[key]
            some = params[key], grads[key], qparams, FLOAT64
            wanted = of_rows("code", link.proxmap, link.quantizer, *some, state.slope)
            wanted = wanted / (7 * n) ** 0.5 if normalize else wanted
            torch.testing.assert_close(own[key], wanted, rtol=1e-14, atol=0)
        assert own["none"].tolist() == [[0.0]] * 2


def test_levels_that_an_earlier_version_kept_do_not_learn() -> None:
    link = pf.hard_prox(pf.uniform(2), period=1, learn=pf.sgd(0.1))
    params = {"w": draw(2, 6)}
    _, state = link.update(params, link.init(params), params, pulled=())
    levels = link.quantizer.levels(state.qparams["w"])
    old = state._replace(qparams={"w": levels})
    with pytest.raises(ValueError, match="hard_prox: the state holds levels of an earlier version"):
        link.pullback(params, old, params)
    other = state._replace(qparams={"w": levels[..., :2]})
    with pytest.raises(ValueError, match=r"1 qparam.* a row, and the state 2; a state belongs to"):
        link.pullback(params, other, params)


class shifted(pf.Quantizer):
    """Levels from -2 a or -a on, by a bit of a."""

    num_levels, num_qparams = 4, 1

    def qparams(self, x: Tensor) -> Tensor:
        return x.abs().amax(-1, keepdim=True) / 2

    def grid(self, qparams: Tensor) -> Grid:
        first = (64 * qparams).floor().remainder(2) - 2
        return Grid(qparams, first, first + 3)


class Passing(TorchDispatchMode):
    """Sees operations and changes none."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def parq_of_rows(u: Tensor, levels: Tensor, s: Tensor) -> Tensor:
    """Looks at whole rows."""
    return proxmaps.parq(u - u.mean(-1, keepdim=True), levels, s)


@pytest.mark.parametrize("quantizer", [*ALL[2:15:3], pf.codebook.nf4, shifted()], ids=repr)
def test_rows_in_pieces_have_the_gradients_of_whole_rows(
    quantizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs are made of many weights alone, one for each kind and map."""
    made: list[Any] = []
    monkeypatch.setattr(gradients, "compiled", lambda run, options: made.append(options) or run)
    kinds = KINDS if is_one_scale(quantizer) else KINDS[:2]
    slope = torch.tensor(0.5, dtype=FLOAT64)

    def compare(rows: Any, shape: tuple[int, int]) -> Any:
        u, g = 1.3 * draw(*shape), draw(*shape, seed=1)
        qparams = fitted(quantizer, u)
        for kind, map in itertools.product(kinds, (proxmaps.parq, parq_of_rows)):
            some = kind, map, quantizer, u, g, qparams, FLOAT64, slope
            found, wanted = rows(*some), of_rows(*some)
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-10)
        return some

    compare(gradients.RowGradients(compile=True), (2, 9000))
    made.clear()
    for name, number in {"_PIECE": 32, "_COMPILED_PIECE": 64, "_WIDTH": 8, "_SMALL": 15}.items():
        monkeypatch.setattr(gradients, name, number)
    for compile in (False, True):
        rows = gradients.RowGradients(compile=compile)
        for shape in [(3, 5), (3, 40), (20, 3), (2, 19), (1, 65), (2, 8)]:
            some = compare(rows, shape)
            assert len(made) == (2 * len(kinds) - 1 if compile and shape != (3, 5) else 0)
    with Passing():
        gradients.RowGradients(compile=True)(*some)
    assert made == [compiler_options("cpu", two=False, narrow=False)] * (2 * len(kinds) - 1)


def test_a_scale_of_zero_has_no_gradient_and_no_derivative_of_one() -> None:
    u, g, s = draw(2, 30), draw(2, 30, seed=1), torch.tensor(0.5, dtype=FLOAT64)
    for quantizer, kind in itertools.product((pf.integer(3), pf.codebook.nf4), KINDS):
        q = quantizer.fit(u) * torch.tensor([[0.0], [1.0]])

        def total(u: Tensor, kind: Any = kind, quantizer: Any = quantizer, q: Any = q) -> Any:
            found = of_rows(kind, proxmaps.parq, quantizer, u, g, q, FLOAT64, s)
            return found.square().sum(), found

        derivative, found = torch.func.grad(total, has_aux=True)(u)
        assert found[0] == 0
        assert found[1] != 0
        assert not derivative[0].any()
        assert derivative.isfinite().all()


def test_equal_levels_have_gradients_of_their_own() -> None:
    """As where they are next to each other."""
    u, g, s = 2 * draw(1, 60), draw(1, 60, seed=1), torch.tensor(0.5, dtype=FLOAT64)
    for quantizer, q in (
        (pf.lloyd_max(2), [[0.7, 0.7]]),
        (pf.lloyd_max(2, symmetric=False), [[-0.5, 0.7, 0.7, 0.7]]),
        (pf.lsbq(2, "optimal"), [[0.7, 0.7]]),
    ):
        tied = torch.tensor(q, dtype=FLOAT64)
        near = tied * (1 + 1e-12 * torch.arange(tied.shape[-1]))
        found, wanted = (
            of_rows("code", proxmaps.hard, quantizer, u, g, one, FLOAT64, s) for one in (tied, near)
        )
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("quantizer", ALL[:-1], ids=repr)
def test_weights_that_are_held_at_levels_have_the_gradients_of_those_on_them(
    quantizer: Any,
) -> None:
    g = draw(5, 40, seed=1).bfloat16()
    qparams = quantizer.fit(draw(5, 30)).abs() + 0.1 * torch.arange(quantizer.num_qparams)
    levels = quantizer.levels(qparams)
    codes = torch.arange(200).reshape(5, 40).remainder(levels.shape[-1]).to(torch.int16)
    u = levels.gather(-1, codes.long())
    wanted = of_rows("code", None, quantizer, u, g, qparams, FLOAT64, torch.tensor(0.5))
    for lowest in (0, -1):  # -1 where a weight has no level yet, which counts for the lowest
        found = of_codes(quantizer, g, qparams, torch.where(codes == 0, lowest, codes))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["code", "map"])
@pytest.mark.parametrize("quantizer", [pf.uniform(4), pf.codebook.fp4, pf.lsbq(2)], ids=repr)
def test_gradients_of_narrow_numbers_are_summed_in_float32(quantizer: Any, kind: Any) -> None:
    """Of levels that bfloat16 holds."""
    u, g = (draw(3, 40, seed=seed).bfloat16() for seed in (0, 1))
    qparams, s = quantizer.fit(u).log2().round().exp2(), torch.tensor(0.5)
    for latent in (u, u.float()):
        found = of_rows(kind, proxmaps.parq, quantizer, latent, g, qparams, torch.bfloat16, s)
        wide = u.double(), g.double(), qparams.double(), FLOAT64
        wanted = of_rows(kind, proxmaps.parq, quantizer, *wide, s)
        torch.testing.assert_close(found, wanted.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [slice(1, 3), slice(3, 5), [3, 3], [4, 0], slice(None)])
def test_what_a_rank_found_of_its_rows_is_added_to_none_of_the_others(rows: Any) -> None:
    whole, mine = torch.ones(5, 2), torch.arange(5)[rows]
    found = draw(len(mine), 2).float()
    wanted = torch.zeros(5, 2)
    for row, own in zip(mine, found, strict=True):
        wanted[row] += own
    part: Any = SimpleNamespace(rows=mine if isinstance(rows, list) else rows)
    assert torch.equal(of_all_rows(found, part, whole), wanted)


# Steps of qparams


def test_a_step_that_makes_a_scale_not_positive_or_anything_not_finite_is_not_taken() -> None:
    quantizer = pf.affine(2)  # scale and minimum
    old = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [torch.nan, 2.0]])
    step = torch.tensor([[-1.0, -5.0], [-0.5, torch.inf], [torch.nan, 1.0], [1.0, 1.0]])
    found = moved(quantizer, old, step)
    wanted = torch.tensor([[1.0, -3.0], [0.5, 2.0], [1.0, 3.0], [torch.nan, 3.0]])
    torch.testing.assert_close(found, wanted, equal_nan=True)
    with torch.device("meta"):
        again = moved(quantizer, old, step.double())
    torch.testing.assert_close(again, found, rtol=0, atol=0, equal_nan=True)
    assert moved(quantizer, old, None) is old


def test_zero_points_stay_and_free_levels_are_kept_in_order() -> None:
    q = torch.tensor([[1.0, 3.0]])
    assert moved(pf.asymmetric(2), q, torch.ones(1, 2)).tolist() == [[2.0, 3.0]]
    pf.hard_prox(pf.asymmetric(2), learn=pf.sgd(0.1))  # its scale is learned
    levels, step = torch.tensor([[-1.0, 0.0, 0.5, 2.0]]), torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    free = pf.lloyd_max(2, symmetric=False)
    assert moved(free, levels, step).tolist() == [[-1.0, 0.5, 1.0, 2.0]]
    halves = pf.lsbq(2, "optimal", center=True)  # two magnitudes and a mean
    got = moved(halves, torch.tensor([[0.5, 1.0, 9.0]]), torch.tensor([[1.0, 0.0, -1.0]]))
    assert got.tolist() == [[1.0, 1.5, 8.0]]


# Trainings


def loss(w: Any, x: Tensor) -> Tensor:
    return ((w["b"] @ (w["a"] @ x).tanh()) - x[:2].sin()).square().mean()


PARAMS = {"a": 0.7 * draw(6, 4), "b": 0.7 * draw(2, 6, seed=1)}
RATES = {"code": 0.01, "map": 0.002}


INPUTS = [draw(4, 9, seed=100 + t) for t in range(50)]


def inputs(t: int) -> Tensor:
    return INPUTS[t]


def run(transform: Any, steps: int, params: Any = None) -> tuple[Any, Any, Any]:
    params = PARAMS if params is None else params
    state = transform.init(params)
    step = pf.value_and_grad(loss, transform)
    for t in range(steps):
        _, grads = step(params, state, inputs(t))
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
    return params, state, transform.weights(state, params)


LINKS: dict[str, Any] = {
    "hard": pf.hard_prox(pf.uniform(2), period=1000),
    "parq": pf.parq_prox(pf.uniform(2), anneal_start=3, anneal_end=40, period=1000),
    "soft": pf.soft_prox(
        pf.uniform(2), anneal_start=3, anneal_end=40, period=1000, end_temperature=20.0
    ),
    "binary_relax": pf.binary_relax_prox(pf.uniform(2), anneal_start=3, anneal_end=40, period=1000),
}
QUANTIZERS = [pf.integer(3, "mean"), pf.lsbq(2), pf.lloyd_max(2, symmetric=False), pf.affine(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantizer", "kind"), pairwise(list(LINKS), QUANTIZERS, ["code", "map"])
)
def test_a_training_with_learned_levels_is_that_of_autograd(
    name: str, quantizer: Any, kind: str
) -> None:
    """The twin differentiates w = map(u, levels(q), s) in q by autograd, and passes gradients at w
    straight to u."""
    how = pf.learn(pf.sgd(RATES[kind], momentum=0.5), gradient=kind)
    granularity = pf.per_channel()
    link = replace(LINKS[name], quantizer=quantizer, granularity=granularity, learn=how)
    transform = pf.chain(pf.sgd(0.05, momentum=0.9), link)
    u, velocity = dict(PARAMS), {k: torch.zeros_like(p) for k, p in PARAMS.items()}
    q: Any = {}
    moments: Any = dict.fromkeys(PARAMS, 0.0)
    weights = dict(PARAMS)
    params, state = PARAMS, transform.init(PARAMS)
    step = pf.value_and_grad(loss, transform)
    learned_from = max(0, int(link.begins))
    for t in range(50):
        leaves = {k: w.clone().requires_grad_() for k, w in weights.items()}
        grads = torch.autograd.grad(loss(leaves, inputs(t)), [*leaves.values()])
        g = dict(zip(leaves, grads, strict=True))
        learns = t > learned_from  # the weights of t = begins are made at its end
        for k in u:
            if learns:
                s = link.coefficient(torch.tensor(t - 1)).double()
                own = q[k].clone().requires_grad_()
                levels = quantizer.levels(own)
                if kind == "map":
                    made = link.proxmap(u[k], levels, s)
                else:
                    code = (u[k].unsqueeze(-1) - levels.detach().unsqueeze(1)).abs().argmin(-1)
                    made = levels.gather(-1, code)
                (d,) = torch.autograd.grad((made * g[k]).sum(), own)
                d = d / (u[k].shape[1] * quantizer.largest_code) ** 0.5
                moments[k] = 0.5 * moments[k] + d
            velocity[k] = 0.9 * velocity[k] + g[k]
            u[k] = u[k] - 0.05 * velocity[k]
            if learns:
                q[k] = quantizer.ordered(q[k] - RATES[kind] * moments[k])
            elif t == 0:
                q[k] = quantizer.fit(u[k])
            s = link.coefficient(torch.tensor(t)).double()
            on = t >= learned_from
            weights[k] = link.proxmap(u[k], quantizer.levels(q[k]), s) if on else u[k]
        _, found = step(params, state, inputs(t))
        updates, state = transform.update(found, state, params)
        params = pf.apply_updates(params, updates)
        torch.testing.assert_close(params, u, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            transform.weights(state, params), weights, rtol=1e-11, atol=1e-11
        )


LEARNED = pf.chain(
    pf.sgd(0.05, momentum=0.9),
    pf.parq_prox(
        pf.lsbq(2), anneal_start=2, anneal_end=7, granularity=pf.per_channel(), learn=pf.adam(0.01)
    ),
)


def test_before_the_map_makes_weights_levels_are_fitted_and_after_it_learned() -> None:
    link = pf.hard_prox(pf.uniform(2), warmup=3, period=2, learn=pf.sgd(0.1))
    transform, params = pf.chain(pf.sgd(0.05), link), PARAMS
    state, step = transform.init(params), pf.value_and_grad(loss, transform)
    fits, before = [], pf.read(state, "qparams")
    for t in range(8):
        _, grads = step(params, state, inputs(t))
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        qparams = pf.read(state, "qparams")
        fitted = link.quantizer.fit(params["a"].reshape(1, -1)).squeeze(0)
        same = torch.equal(qparams["a"], fitted)
        fits.append("fit" if same else "kept" if torch.equal(qparams["a"], before["a"]) else "new")
        before = qparams
    assert fits == ["kept"] * 3 + ["fit"] + ["new"] * 4


def test_a_row_whose_levels_cannot_learn_is_fitted_where_due() -> None:
    """A row of zeros has a scale of 0, and one of NaN none: both had the same levels for ever."""
    link = pf.hard_prox(pf.uniform(2), granularity=pf.per_channel(), period=1, learn=pf.sgd(0.1))
    transform = pf.chain(pf.sgd(0.1), link)
    params = {"w": torch.tensor([[0.0, 0.0], [1.0, -2.0]])}
    state = transform.init(params)
    _, state = transform.update(tree_map(torch.zeros_like, params), state, params)
    assert pf.read(state, "qparams")["w"].flatten().tolist()[0] == 0.0
    _, state = transform.update({"w": torch.tensor([[1.0, -1.0], [0.0, 0.0]])}, state, params)
    assert pf.read(state, "qparams")["w"][0] > 0


@pytest.mark.parametrize("around", [lambda t: pf.lookahead(t, 1), pf.schedule_free], ids=["l", "s"])
def test_what_moves_levels_starts_from_those_that_were_fitted(around: Any) -> None:
    """And not from the zeros before: scales went back towards these."""
    link = pf.hard_prox(pf.uniform(2), period=1, learn=around(pf.sgd(0.0)))
    transform = pf.chain(pf.sgd(0.1), link)
    _, first, _ = run(transform, 1)
    _, state, _ = run(transform, 5)
    torch.testing.assert_close(pf.read(state, "qparams"), pf.read(first, "qparams"))
    assert pf.read(first, "qparams")["a"] > 0


def test_a_link_whose_mask_holds_for_nothing_has_nothing_to_learn() -> None:
    link = pf.hard_prox(pf.uniform(2), period=1, learn=pf.sgd(0.1))
    transform, params = pf.chain(pf.sgd(0.5), pf.masked(link, False)), torch.ones(2)
    state = transform.init(params)
    for _ in range(2):  # the second one would learn
        updates, state = transform.update(params, state, params)
        assert updates.tolist() == [-0.5, -0.5]


def test_seeds_are_trained_by_vmap_as_each_alone() -> None:
    many = {k: torch.stack([p, 0.5 * p, p.flip(0)]) for k, p in PARAMS.items()}
    _, _, together = torch.vmap(lambda p: run(LEARNED, 10, p))(many)
    for i in range(3):
        _, _, alone = run(LEARNED, 10, {k: p[i] for k, p in many.items()})
        torch.testing.assert_close({k: w[i] for k, w in together.items()}, alone)


def test_an_example_of_a_batch_learns_from_its_own_count_of_updates_on() -> None:
    """One that has levels and is not mapped to them yet, one that learns them."""
    learn: Any = {"gradient": lambda g, *_: 2 * g, "learn": pf.sgd(0.1, 0.9)}
    link = pf.parq_prox(pf.uniform(2), anneal_start=3, anneal_end=9, period=1, **learn)
    transform, params = pf.chain(pf.sgd(0.05), link), PARAMS
    state, kept = transform.init(PARAMS), []
    for t in range(7):
        kept.append((tree_map(torch.cos, params), state, params))
        updates, state = transform.update(kept[t][0], state, params)
        params = pf.apply_updates(params, updates)
    assert all(leaf.any() for leaf in tree_leaves(kept[6][1][1].learned))  # moments are kept
    some = kept[2], kept[6]
    together = tree_map(lambda *of: torch.stack(of), *some)
    for function in (transform.update, transform.pullback):
        wanted = tree_map(lambda *of: torch.stack(of), *(function(*one) for one in some))
        torch.testing.assert_close(torch.vmap(function)(*together), wanted)


@pytest.mark.rare
@pytest.mark.usefixtures("graphs_alone")
@pytest.mark.parametrize("kind", sampled(["code", "map"], 1))
def test_a_compiled_step_learns_as_an_eager_one(kind: str) -> None:
    link = replace(LEARNED.links[1], learn=pf.learn(pf.sgd(0.01), gradient=kind))
    transform = pf.chain(LEARNED.links[0], link)

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        return params, state, transform.weights(state, params)

    compiled = torch.compile(step, fullgraph=True)
    params, state = PARAMS, transform.init(PARAMS)
    for t in range(9):
        grads = {k: draw(*p.shape, seed=t) for k, p in params.items()}
        got = compiled(params, state, grads)
        params, state, weights = step(params, state, grads)
        torch.testing.assert_close(got[2], weights)
        torch.testing.assert_close(pf.read(got[1], "qparams"), pf.read(state, "qparams"))


# Wrong use


class like_one:
    """Has what a prox link asks of a quantizer, and no more."""

    num_levels = num_qparams = 2

    def fit(self, rows: Tensor) -> Tensor:
        return torch.stack([rows.amin(-1), rows.amax(-1)], -1)

    def levels_in(self, qparams: Tensor, dtype: torch.dtype) -> Tensor:
        return qparams.to(dtype)


class fixed(pair):
    learnable = (False, False)


def test_a_link_that_learns_outside_of_a_chain_says_so() -> None:
    link = pf.hard_prox(pf.uniform(2), learn=pf.sgd(0.1))
    with pytest.raises(ValueError, match=r"hard_prox: it learns its levels.*put it in a chain"):
        link.update(PARAMS, link.init(PARAMS), PARAMS)


def test_the_state_of_a_link_that_does_not_learn_is_refused() -> None:
    link = pf.hard_prox(pf.uniform(2), period=1)
    _, state = link.update(PARAMS, link.init(PARAMS), PARAMS)
    learning = replace(link, learn=pf.sgd(0.1))
    with pytest.raises(TypeError, match="its state is a ProxState, expected the LearningState"):
        learning.update(PARAMS, state, PARAMS, pulled=state.qparams)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pf.learn(0.1), TypeError, "the transformation of learn"),
        (lambda: pf.learn(pf.sgd(0.1), gradient="exact"), ValueError, "'code', 'map' or 'lsq'"),
        (lambda: pf.learn(pf.scale_by_adam()), ValueError, r"pass no learning rate.* keep one"),
        (lambda: pf.learn(pf.chain(pf.sgd(0.1), pf.adam(0.1))), ValueError, r"2 learning rate"),
        (
            lambda: pf.hard_prox(pf.lsbq(2), learn=pf.learn(pf.sgd(0.1), "lsq")),
            ValueError,
            "2 qparams a row; take gradient='code'",
        ),
        (
            lambda: pf.hard_prox(fixed(), learn=pf.sgd(0.1)),
            ValueError,
            r"fixed\(\) has no qparams that are learned; leave learn out",
        ),
        (
            lambda: pf.hard_prox(like_one(), learn=pf.sgd(0.1)),
            TypeError,
            "learn= takes a quantizer of the class Quantizer, got like_one",
        ),
        (lambda: pf.hard_prox(pf.lsbq(2), learn=True), TypeError, "expected a transformation"),
        (
            lambda: pf.hard_prox(pf.lsbq(2), pull=0.1, shrink=True, learning_rate=0.1),
            ValueError,
            "pull stands for a normal map",
        ),
        (lambda: pf.hard_prox(pf.lsbq(2), pull=-1.0), ValueError, "pull"),
    ],
)
def test_bad_values_are_refused(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


# Pull


def test_a_pull_is_a_normal_map_of_its_inverse() -> None:
    one = pf.hard_prox(pf.uniform(2), period=1, normal_map=4.0, learning_rate=0.05)
    two = pf.hard_prox(pf.uniform(2), period=1, pull=0.25, learning_rate=0.05)
    got = [run(pf.chain(pf.sgd(0.05), link), 12) for link in (one, two)]
    torch.testing.assert_close(got[0][0], got[1][0], rtol=1e-13, atol=1e-13)
