"""The prox link along trajectories: when levels move, what weights are, what never changes."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import parq_fn as pf
from parq_fn import proxmaps, schedules
from tests.helpers import pairwise

RATE = 0.05
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
MAPS = ["hard", "parq", "soft", "binary_relax", "proxquant"]


def link(kind: str, quantizer=None, start: int = 3, end: int = 9, **options) -> pf.Prox:
    quantizer = quantizer or pf.lsbq(2)
    window = {"anneal_start": start, "anneal_end": end}
    return {
        "hard": lambda: pf.hard_prox(quantizer, **options),
        "parq": lambda: pf.parq_prox(quantizer, **window, **options),
        "soft": lambda: pf.soft_prox(quantizer, **window, **options),
        "binary_relax": lambda: pf.binary_relax_prox(quantizer, **window, **options),
        "proxquant": lambda: pf.proxquant_prox(quantizer, strength=0.3, **window, **options),
    }[kind]()


def problem(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], ...]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    params = {
        "conv": draw(4, 3, 2, 2).to(memory_format=torch.channels_last),
        "matrix": draw(4, 8),
        "vector": draw(8),
    }
    return params, {k: draw(*p.shape) for k, p in params.items()}


def train(transform, steps: int, params=None, state=None, first: int = 0):
    """(params, state, weights) after each step of a quadratic around drifting targets."""
    start, targets = problem()
    params = start if params is None else params
    state = transform.init(params) if state is None else state

    def loss(w: dict[str, Tensor], t: int) -> Tensor:
        return sum(
            0.5 * (w[k] - (1 + 0.1 * t) * x.to(w[k].dtype)).square().sum()
            for k, x in targets.items()
        )

    step = pf.value_and_grad(loss, transform)
    for t in range(first, first + steps):
        _, grads = step(params, state, t)
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        yield params, state, transform.weights(state, params)


def levels_in_rows(transform, state) -> dict[str, Tensor]:
    """[r, k] of each leaf."""
    levels = pf.levels_of(transform, state)
    return {k: q.unsqueeze(0).flatten(0, -2) for k, q in levels.items()}


@pytest.mark.parametrize("kind", MAPS)
def test_weights_are_the_map_of_the_latent(kind: str) -> None:
    """Law 4: bit for bit, with the schedule of the step, levels of the last refit."""
    prox = link(kind, period=2, granularity=pf.per_channel())
    transform = pf.chain(pf.sgd(RATE, momentum=0.9), prox)
    cut = pf.per_channel()
    for t, (params, state, weights) in enumerate(train(transform, 14)):
        for k, latent in params.items():
            expected = latent
            if t >= prox.begins:
                levels = levels_in_rows(transform, state)[k]
                rows = prox.proxmap(cut.rows(latent), levels, prox.coefficient(torch.tensor(t)))
                expected = rows.reshape(latent.shape)
            assert torch.equal(weights[k], expected)


@pytest.mark.parametrize("kind", MAPS)
def test_before_annealing_it_is_the_base_optimizer_alone(kind: str) -> None:
    """Law 2: bit-identical params, and w = u."""
    options = {"warmup": 3} if kind == "hard" else {}
    base = pf.adamw(RATE)
    together = train(pf.chain(base, link(kind, **options)), 3)
    for (params, _, weights), (alone, _, _) in zip(together, train(base, 3), strict=True):
        for k in params:
            assert torch.equal(params[k], alone[k])
            assert torch.equal(weights[k], alone[k])


@pytest.mark.parametrize("base", [pf.sgd(RATE), pf.sgd(RATE, momentum=0.9), pf.adamw(RATE)])
def test_hard_map_is_the_straight_through_estimator(base) -> None:
    """Law 3: gradient at the rounded weights, applied to the latent; written out by hand."""
    params, targets = problem()
    quantizer, cut = pf.lsbq(1), pf.per_channel()
    steps = train(pf.chain(base, pf.hard_prox(quantizer, period=1, granularity=cut)), 8)
    state = base.init(params)
    w = params
    for t, (latent, _, weights) in enumerate(steps):
        grads = {k: w[k] - (1 + 0.1 * t) * targets[k] for k in w}
        updates, state = base.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        w = {}
        for k, p in params.items():
            rows = p.reshape(1, -1) if p.dim() == 1 else p.reshape(p.shape[0], -1)
            scale = rows.abs().mean(-1, keepdim=True)
            w[k] = torch.where(rows > 0, scale, -scale).reshape(p.shape)
            torch.testing.assert_close(latent[k], p, rtol=0, atol=1e-12)
            torch.testing.assert_close(weights[k], w[k], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("period", "warmup"), [(1, 0), (3, 0), (4, 2), (1000, 1)])
def test_levels_change_on_refit_steps_only(period: int, warmup: int) -> None:
    """Law 7; the first quantized step always fits."""
    transform = pf.chain(pf.sgd(RATE), link("parq", period=period, warmup=warmup))
    before = {k: torch.zeros(4) for k in problem()[0]}
    for t, (params, state, _) in enumerate(train(transform, 10)):
        levels = pf.levels_of(transform, state)
        due = t >= warmup and (t - warmup) % period == 0
        for k in params:
            expected = pf.lsbq(2)(params[k].reshape(1, -1))[0] if due else before[k]
            assert torch.equal(levels[k], expected.to(levels[k].dtype))
        before = levels


@pytest.mark.parametrize(
    ("kind", "dtype", "cut"),
    pairwise(MAPS, DTYPES, [pf.per_tensor(), pf.per_channel(), pf.per_block(4)]),
    ids=str,
)
def test_after_annealing_weights_are_bit_equal_to_levels(kind, dtype, cut) -> None:
    """Law 6, on irregular levels that drift at every step."""
    params, _ = problem(dtype)
    if isinstance(cut, pf.per_block):
        del params["conv"]
    quantizer = pf.lloyd_max(2, symmetric=False)
    transform = pf.chain(pf.sgd(RATE), link(kind, quantizer, period=1, granularity=cut))
    grads = {k: torch.ones_like(p) for k, p in params.items()}
    state = transform.init(params)
    for t in range(13):
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        if t < 9:
            continue
        weights = transform.weights(state, params)
        for k, w in weights.items():
            levels = levels_in_rows(transform, state)[k].to(dtype)
            assert w.dtype == dtype
            assert w.stride() == params[k].stride()
            rows = cut.rows(w)
            assert bool((rows[..., None] == levels[:, None]).any(-1).all())
            assert all(row.unique().numel() <= 4 for row in rows)


@pytest.mark.parametrize("kind", MAPS)
def test_no_gradient_no_motion(kind: str) -> None:
    """Law 5: latents constant, and after annealing nothing changes any more."""
    params, _ = problem()
    transform = pf.chain(pf.sgd(RATE, momentum=0.9), link(kind, period=2))
    zeros = {k: torch.zeros_like(p) for k, p in params.items()}
    state, seen = transform.init(params), None
    for t in range(15):
        updates, state = transform.update(zeros, state, params)
        moved = pf.apply_updates(params, updates)
        assert all(torch.equal(moved[k], params[k]) for k in params)
        weights = transform.weights(state, params)
        if t > 9:
            assert all(torch.equal(weights[k], seen[k]) for k in params)
        seen = weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("at", [1, 4, 10])
def test_resuming_from_a_saved_state_changes_no_bit(kind: str, at: int, tmp_path) -> None:
    """Law 8, with every quantity that a state may hold."""
    transform = pf.chain(
        pf.adamw(RATE), link(kind, period=3, warmup=1, shrink=True, learning_rate=RATE)
    )
    whole = list(train(transform, 14))
    torch.save(whole[at][:2], tmp_path / "checkpoint.pt")
    params, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = train(transform, 13 - at, params, state, first=at + 1)
    for a, b in zip(whole[at + 1 :], resumed, strict=True):
        for k in params:
            assert torch.equal(a[0][k], b[0][k])
            assert torch.equal(a[2][k], b[2][k])
            assert torch.equal(pf.read(a[1], "qparams")[k], pf.read(b[1], "qparams")[k])


def test_normal_map_with_gamma_lr_is_proximal_sgd() -> None:
    """Law 9: w <- prox(w - lr g), the latent being w before its prox."""
    kwargs = {"period": 1, "normal_map": RATE, "learning_rate": RATE}
    transform = pf.chain(pf.sgd(RATE), link("parq", start=0, end=8, **kwargs))
    params, targets = problem()
    prox = link("parq", start=0, end=8)
    w = params
    for t, (_, _, weights) in enumerate(train(transform, 12)):
        u = {k: w[k] - RATE * (w[k] - (1 + 0.1 * t) * targets[k]) for k in w}
        slope = prox.coefficient(torch.tensor(t))
        w = {
            k: proxmaps.parq(
                v.reshape(1, -1), pf.lsbq(2)(v.reshape(1, -1)), slope
            ).reshape(v.shape)
            for k, v in u.items()
        }  # fmt: skip
        for k in w:
            torch.testing.assert_close(weights[k], w[k], rtol=0, atol=1e-12)


def test_normal_map_with_infinite_gamma_is_aprox() -> None:
    far = {"normal_map": 1e18, "learning_rate": RATE}
    plain = train(pf.chain(pf.sgd(RATE), link("parq")), 12)
    pulled = train(pf.chain(pf.sgd(RATE), link("parq", **far)), 12)
    for a, b in zip(plain, pulled, strict=True):
        for k in a[0]:
            torch.testing.assert_close(a[0][k], b[0][k], rtol=0, atol=1e-12)


def test_shrink_divides_what_map_and_quantizer_see() -> None:
    rate = schedules.linear(1.0, 0.5, 0, 10)
    transform = pf.chain(
        pf.sgd(0.01), link("parq", start=0, period=1, shrink=True, learning_rate=rate)
    )
    total = 0.0
    for t, (params, state, weights) in enumerate(train(transform, 8)):
        total += float(rate(t))
        assert float(pf.read(state, "lr_sum")) == pytest.approx(total)
        for k, u in params.items():
            seen = u.reshape(1, -1) / max(1.0, total)
            levels = pf.lsbq(2)(seen)
            expected = proxmaps.parq(seen, levels, pf.read(state, "slope")).reshape(u.shape)
            torch.testing.assert_close(weights[k], expected, rtol=0, atol=1e-12)


def test_a_learning_rate_given_to_update_stands_in() -> None:
    params, _ = problem()
    prox = link("parq", shrink=True)
    with pytest.raises(ValueError, match="shrink, normal_map and pull need the learning rate"):
        prox.update(params, prox.init(params), params)
    _, state = prox.update(params, prox.init(params), params, learning_rate=0.25)
    assert state.lr_sum == 0.25


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_clipped_start_holds_weights_to_the_range_from_the_beginning(warmup: int) -> None:
    transform = pf.chain(pf.sgd(RATE), pf.parq_prox(
        pf.lsbq(1), anneal_start=5, anneal_end=9, warmup=warmup, period=1, clipped_start=True
    ))  # fmt: skip
    for t, (params, state, weights) in enumerate(train(transform, 5)):
        for k, u in params.items():
            levels = levels_in_rows(transform, state)[k]
            expected = u if t < warmup else proxmaps.clip(u.reshape(1, -1), levels).reshape(u.shape)
            assert torch.equal(weights[k], expected)


def test_nan_latents_stay_in_their_row() -> None:
    """Their weights are NaN, the levels finite, and other rows as if nothing had happened."""
    transform = pf.chain(
        pf.sgd(1.0), pf.hard_prox(pf.lsbq(2), period=1, granularity=pf.per_channel())
    )
    params = {"w": torch.randn(3, 6, generator=torch.Generator().manual_seed(0))}
    grads = {"w": torch.ones(3, 6)}
    updates, state = transform.update(grads, transform.init(params), params)
    params = pf.apply_updates(params, updates)
    poisoned = {"w": grads["w"].clone()}
    poisoned["w"][1, 2] = torch.nan
    results = []
    for g in (grads, poisoned):
        updates, after = transform.update(g, state, params)
        results.append((after, transform.weights(after, pf.apply_updates(params, updates))["w"]))
    (_, clean), (after, dirty) = results
    assert torch.equal(pf.read(after, "qparams")["w"][1], pf.read(state, "qparams")["w"][1])
    assert bool(pf.read(after, "qparams")["w"].isfinite().all())
    assert bool(dirty[1, 2].isnan())
    assert torch.equal(clean[[0, 2]], dirty[[0, 2]])


def test_nothing_is_half_changed_by_an_error() -> None:
    params, _ = problem()
    transform = pf.chain(pf.sgd(RATE, momentum=0.9), link("parq"))
    state = transform.init(params)
    kept = copy.deepcopy((params, state))
    with pytest.raises(ValueError, match="trees differ in structure"):
        transform.update({"conv": params["conv"]}, state, params)
    torch.testing.assert_close((params, state), kept, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: link("parq", start=5, end=5), ValueError, "anneal_start must come before"),
        (lambda: pf.parq_prox(pf.lsbq, anneal_start=0, anneal_end=1), TypeError, "such as lsbq"),
        (lambda: pf.hard_prox(2), TypeError, r"expected a quantizer such as lsbq\(2\), got 2"),
        (lambda: link("hard", granularity=pf.per_channel), TypeError, "such as per_channel"),
        (lambda: link("hard", period=0), ValueError, "period must be 1 or more, got 0"),
        (lambda: link("hard", warmup=-1), ValueError, "warmup must be 0 or more, got -1"),
        (lambda: link("hard", normal_map=0.0), ValueError, r"normal_map must lie in \(0, inf\)"),
        (lambda: pf.parq_prox(pf.lsbq(1), anneal_start=0, anneal_end=1, steepness=0),
         ValueError, r"steepness must lie in \(0, inf\), got 0"),
        (lambda: pf.parq_prox(quantiser=pf.lsbq(1), anneal_start=0, anneal_end=1),
         TypeError, "quantiser"),
        (lambda: pf.proxquant_prox(pf.lsbq(1), anneal_start=0, anneal_end=1, strength=-1.0),
         ValueError, r"strength must lie in \[0, inf\)"),
        (lambda: link("hard", learning_rate=-1.0), ValueError, "learning_rate must lie in"),
        (lambda: link("soft", temperature=-1.0), ValueError, r"temperature must lie in \[0, inf\)"),
        (lambda: link("soft", end_temperature=-1.0), ValueError, "end_temperature must lie in"),
        (lambda: link("soft", power=0.0), ValueError, r"power must lie in \(0, inf\)"),
        (lambda: link("binary_relax", start=5, end=4), ValueError, "anneal_start must come before"),
        (lambda: link("parq", center=float("nan")), ValueError, "center must lie in"),
        (lambda: link("hard", SimpleNamespace(fit=1)), TypeError, "expected a quantizer"),
        (lambda: link("hard", SimpleNamespace(num_levels=1)), TypeError, "expected a quantizer"),
        (lambda: link("hard", granularity=3), TypeError, "expected a granularity"),
    ],
)  # fmt: skip
def test_bad_settings(build, error, message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize(
    ("params", "options", "error", "message"),
    [
        ({"a": torch.zeros(2, 6)}, {"granularity": pf.per_block(4)}, ValueError,
         "parq_prox: parameter 'a': block size 4 does not divide"),
        ({"a": torch.zeros(())}, {"granularity": pf.per_block(1)}, ValueError,
         "parameter 'a': per_block"),
        ({"a": torch.zeros(2, dtype=torch.int32)}, {}, TypeError,
         "parq_prox: parameter 'a' has dtype torch.int32"),
        ({"a": torch.tensor([1.0, torch.nan])}, {}, ValueError,
         "parameter 'a' holds NaN or infinities"),
    ],
)  # fmt: skip
def test_bad_params_are_named(params, options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        link("parq", **options).init(params)


def test_defaults() -> None:
    spelled = {"granularity": pf.per_tensor(), "period": 10, "warmup": 0, "learning_rate": None,
               "shrink": False, "normal_map": None}  # fmt: skip
    assert link("hard") == link("hard", **spelled)
    own = {"steepness": 10.0, "center": 0.5, "clipped_start": False}
    assert link("parq") == link("parq", **spelled, **own)
    own = {"temperature": 1.0, "end_temperature": 1000.0, "power": 1.0}
    assert link("soft") == link("soft", **spelled, **own)
    custom = pf.custom_prox(pf.lsbq(2), proxmaps.parq, 0.5)
    assert custom == pf.custom_prox(pf.lsbq(2), proxmaps.parq, 0.5, start=0, **spelled)


def test_a_prox_link_must_define_its_map() -> None:
    class bare(pf.Prox):
        pass

    params, _ = problem()
    prox = bare(pf.lsbq(1))
    updates, state = prox.update(params, prox.init(params), params)
    assert state.slope == prox.begins == 0
    assert state.lr_sum == 0
    with pytest.raises(NotImplementedError, match="bare must define proxmap"):
        prox.weights(state, pf.apply_updates(params, updates))


def test_a_custom_prox_follows_its_schedule_from_its_start() -> None:
    schedule = schedules.linear(0.0, 1.0, 0, 10)
    prox = pf.custom_prox(pf.lsbq(2), proxmaps.binary_relax, schedule, start=2, period=1)
    assert float(prox.coefficient(torch.tensor(5))) == 0.5
    for t, (params, state, weights) in enumerate(train(pf.chain(pf.sgd(RATE), prox), 5)):
        for k, u in params.items():
            expected = u
            if t >= 2:
                levels = levels_in_rows(pf.chain(pf.sgd(RATE), prox), state)[k]
                rows = proxmaps.binary_relax(u.reshape(1, -1), levels, schedule(t))
                expected = rows.reshape(u.shape)
            assert torch.equal(weights[k], expected)


def test_the_soft_link_anneals_by_its_power_and_is_hard_at_the_end() -> None:
    prox = link("soft", start=2, end=6, temperature=3.0, end_temperature=19.0, power=2.0)
    got = prox.coefficient(torch.tensor([0, 2, 4, 5, 6, 7])).tolist()
    assert got == [3, 3, 7, 12, float("inf"), float("inf")]
    link("soft", temperature=0.0, end_temperature=0.0)


@pytest.mark.parametrize("options", [{"shrink": True}, {"normal_map": 0.5}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_options_keep_every_dtype(options, dtype: torch.dtype) -> None:
    """A rate in float64 widens neither updates, levels nor weights."""
    params, updates = problem(dtype)
    prox = link("parq", start=0, period=1, learning_rate=0.5, **options)
    first = prox.init(params)
    assert first.lr_sum.dtype == first.slope.dtype == torch.float64
    out, state = prox.update(updates, first, params)
    weights = prox.weights(state, pf.apply_updates(params, out))
    for tree in (out, weights):
        assert all(leaf.dtype == dtype for leaf in tree.values())
    wide = torch.promote_types(dtype, torch.float32)
    assert all(leaf.dtype == wide for leaf in state.qparams.values())
    assert state.lr_sum.dtype == state.slope.dtype == torch.float64
    assert state.count.dtype == torch.int64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_normal_map_shrinks_by_gamma_and_pulls_toward_the_weights(dtype) -> None:
    params = {"w": torch.tensor([4.0, -1.0, 2.0, -3.0], dtype=dtype)}
    zeros = {"w": torch.zeros(4, dtype=dtype)}
    prox = pf.hard_prox(pf.lsbq(1), period=1, shrink=True, normal_map=2.0, learning_rate=0.5)
    _, state = prox.update(zeros, prox.init(params), params)
    assert pf.levels_of(prox, state)["w"].tolist() == [-1.25, 1.25]
    updates, _ = prox.update(zeros, state, params)
    assert updates["w"].tolist() == [-0.6875, -0.0625, -0.1875, 0.4375]


def test_a_missing_gradient_is_pulled_neither() -> None:
    params = {"a": torch.ones(2), "b": torch.tensor([1.0, 3.0])}
    prox = link("hard", period=1, normal_map=1.0, learning_rate=0.5)
    _, state = prox.update(params, prox.init(params), params)
    updates, _ = prox.update({"a": params["a"], "b": None}, state, params)
    assert updates["b"] is None


def test_the_pull_keeps_the_dtype_of_narrower_updates() -> None:
    params = {"w": torch.tensor([1.0, -3.0])}
    prox = pf.hard_prox(pf.lsbq(1), period=1, normal_map=1.0, learning_rate=0.5)
    narrow = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    state = prox.init(params)
    for _ in range(2):
        updates, state = prox.update(narrow, state, params)
        assert updates["w"].dtype == torch.bfloat16


def test_coefficients_are_kept_in_float64() -> None:
    prox = pf.custom_prox(pf.lsbq(1), proxmaps.parq, lambda step: torch.tensor(0.5))
    params = {"w": torch.tensor([1.0, -3.0])}
    state = prox.init(params)
    assert state.slope.dtype == prox.update(params, state, params)[1].slope.dtype == torch.float64


def test_a_sum_of_rates_below_one_stretches_nothing() -> None:
    params, updates = problem()
    prox = link("hard", period=1, shrink=True, learning_rate=0.25)
    plain = link("hard", period=1)
    state, expected = prox.init(params), plain.init(params)
    for total in (0.25, 0.5, 0.75, 1.0):
        _, state = prox.update(updates, state, params)
        _, expected = plain.update(updates, expected, params)
        assert state.lr_sum == total
        for k in params:
            assert torch.equal(state.qparams[k], expected.qparams[k])
            assert torch.equal(prox.weights(state, params)[k], plain.weights(expected, params)[k])


def test_narrow_latents_are_shrunk_in_float32() -> None:
    params, updates = problem(torch.bfloat16)
    prox = link("hard", period=1, shrink=True, learning_rate=3.0)
    _, state = prox.update(updates, prox.init(params), params)
    for k, latent in pf.apply_updates(params, updates).items():
        seen = latent.float().reshape(1, -1) / 3
        assert torch.equal(state.qparams[k], pf.lsbq(2).fit(seen)[0])


@pytest.mark.parametrize("kind", MAPS)
def test_options_go_by_their_names(kind: str) -> None:
    fields = dataclasses.fields(link(kind))
    assert [f.name for f in fields if not f.kw_only] == ["quantizer"]


def test_a_custom_link_takes_its_map_and_schedule_by_place() -> None:
    fields = dataclasses.fields(pf.custom_prox)
    assert [f.name for f in fields if not f.kw_only] == ["quantizer", "map", "schedule"]


@pytest.mark.parametrize("kind", MAPS)
def test_every_link_checks_the_options_of_all(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind}_prox: period must be 1 or more, got 0"):
        link(kind, period=0)
    if kind != "hard":
        with pytest.raises(ValueError, match=f"{kind}_prox: anneal_start must come before"):
            link(kind, start=5, end=5)


@pytest.mark.parametrize(
    "link",
    [
        pf.hard_prox(pf.lsbq(2)),
        pf.parq_prox(pf.lsbq(2), anneal_start=1, anneal_end=5),
        pf.soft_prox(pf.lsbq(2), anneal_start=0, anneal_end=3),
        pf.binary_relax_prox(pf.lsbq(2), anneal_start=2, anneal_end=4),
        pf.proxquant_prox(pf.lsbq(2), anneal_start=0, anneal_end=6, strength=0.01),
    ],
)
def test_ends_is_the_first_step_whose_weights_are_levels(link: pf.Prox) -> None:
    params = {"w": torch.randn(1, 400, generator=torch.Generator().manual_seed(0))}
    zeros, state, on = {"w": torch.zeros(1, 400)}, link.init(params), []
    for _ in range(9):
        _, state = link.update(zeros, state, params)
        weight = link.weights(state, params)["w"]
        on.append(bool((weight[0, :, None] == pf.levels_of(link, state)["w"]).any(-1).all()))
    assert on.index(True) == link.ends
    assert all(on[on.index(True) :])


# Learning rates by leaf name, as the torch adapters give them


def sum_of_rates(rates: Any, names: str = "abc", **options: Any) -> float:
    link = pf.hard_prox(pf.lsbq(1), **options)
    params = {name: torch.ones(1, 2) for name in names}
    _, state = link.update(params, link.init(params), params, learning_rate=rates)
    return float(state.lr_sum)


def test_one_rate_for_all_leaves_is_the_link_s() -> None:
    assert sum_of_rates(0.3) == 0.3
    assert sum_of_rates({"a": 0.3, "b": 0.3, "c": 0.3, "other": 9.0}) == 0.3
    assert sum_of_rates({"a": 0.3, "b": 0.3, "c": 0.3}, shrink=True) == 0.3
    assert sum_of_rates({"a": None, "b": None, "c": None}, learning_rate=0.7) == 0.7
    assert sum_of_rates({}, "") == 0.0
    assert sum_of_rates({"a": 0.3}, "a") == 0.3


@pytest.mark.parametrize("rates", [(0.1, 0.2, 0.2), (0.1, 0.1, 0.2), (0.2, 0.1, 0.2), (0.1, None)])
def test_several_rates_are_refused_where_they_count_and_zero_elsewhere(rates: Any) -> None:
    given = dict(zip("abc", rates, strict=False))
    names = "".join(given)
    assert sum_of_rates(given, names, learning_rate=0.5) == 0.0
    for options in ({"shrink": True}, {"normal_map": 2.0}):
        with pytest.raises(ValueError, match="shrink, normal_map and pull take one learning"):
            sum_of_rates(given, names, learning_rate=0.5, **options)


# Found by attack, each with the input that showed it.


@pytest.mark.slow
@pytest.mark.parametrize("steepness", [200, 2000])
def test_steep_annealing_trains(steepness: float) -> None:
    prox = pf.parq_prox(pf.lsbq(2), anneal_start=5, anneal_end=195, steepness=steepness)
    transform = pf.chain(pf.sgd(0.05), prox)
    params = {"w": torch.randn(4, 8, generator=torch.Generator().manual_seed(0))}
    state = transform.init(params)
    step = pf.value_and_grad(lambda w: (w["w"] - 0.3).square().sum(), transform)
    for _ in range(200):
        _, grads = step(params, state)
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        assert bool(transform.weights(state, params)["w"].isfinite().all())


def test_a_row_that_holds_nan_at_its_first_fit_gives_nan_not_zero() -> None:
    link = pf.hard_prox(pf.lsbq(1), granularity=pf.per_channel(), period=2)
    params = {"w": torch.ones(2, 4)}
    broken = {"w": torch.tensor([[0.0, torch.nan, 0.0, 0.0], [0.0] * 4])}
    _, state = link.update(broken, link.init(params), params)
    assert bool(link.weights(state, params)["w"][0].isnan().all())
    assert link.weights(state, params)["w"][1].tolist() == [1.0] * 4
    for _ in range(2):
        _, state = link.update({"w": torch.zeros(2, 4)}, state, params)
    assert link.weights(state, params)["w"].tolist() == [[1.0] * 4] * 2


def test_a_quantizer_with_another_number_of_levels_is_named() -> None:
    class three(pf.Quantizer):
        num_levels = 2

        def qparams(self, x):
            return x[..., :3]

    with pytest.raises(ValueError, match=r"three\(\): qparams\(x\) has shape \(1, 3\), .*\(1, 2\)"):
        three()(torch.ones(1, 5))
