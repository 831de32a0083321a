"""Defects found by attack, each with the input that showed it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import parq_fn as pf
from parq_fn import tree
from parq_fn.quantizers.kmeans_1d import least_squares_levels


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


@pytest.mark.slow
def test_a_step_with_a_weight_mask_and_its_init_compile() -> None:
    torch.compiler.reset()
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    apply, params = pf.functional(net)
    mask = pf.weight_mask(net, exclude="1")
    prox = pf.hard_prox(pf.lsbq(1), granularity=pf.per_channel())
    transform = pf.chain(pf.sgd(0.1), pf.masked(prox, mask))
    x = torch.ones(2, 3)

    def step(params, state):
        gradient = pf.value_and_grad(lambda w: apply(w, x).square().sum(), transform)
        _, grads = gradient(params, state)
        updates, state = transform.update(grads, state, params)
        return pf.apply_updates(params, updates), state

    init = torch.compile(prox.init, fullgraph=True, backend="eager")
    assert init({"w": params["0.weight"]}).levels["w"].shape == (4, 2)
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    ours = theirs = (params, transform.init(params))
    for _ in range(3):
        ours, theirs = compiled(*ours), step(*theirs)
    for name in params:
        torch.testing.assert_close(ours[0][name], theirs[0][name])


@pytest.mark.slow
def test_dynamic_shapes_compile() -> None:
    torch.compiler.reset()
    link = pf.hard_prox(pf.lsbq(1), granularity=pf.per_channel())
    params = {"w": torch.randn(4, 6)}
    _, state = link.update(params, link.init(params), params)
    compiled = torch.compile(link.weights, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(compiled(state, params)["w"], link.weights(state, params)["w"])


def test_modules_with_running_statistics_are_refused_in_train_mode() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    apply, params = pf.functional(net)
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) would change its running"):
        apply(params, torch.randn(4, 2))
    net.eval()
    assert apply(params, torch.randn(4, 2)).shape == (4, 2)


def test_missing_and_unknown_weights_are_refused() -> None:
    apply, params = pf.functional(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"without \['weight'\] .* with \['wieght'\] unknown"):
        apply({"bias": params["bias"], "wieght": params["weight"]}, torch.ones(1, 2))


def test_module_parameters_are_refused_where_their_graph_would_grow() -> None:
    params = dict(nn.Linear(2, 2).named_parameters())
    with pytest.raises(TypeError, match=r"parameter 'bias' is an nn.Parameter"):
        pf.hard_prox(pf.lsbq(1)).init(params)
    step = pf.value_and_grad(lambda w: w["weight"].sum(), pf.sgd(0.1))
    with pytest.raises(TypeError, match=r"takes plain tensors, got an nn.Parameter"):
        step(params, pf.sgd(0.1).init(params))


@pytest.mark.parametrize("shape", [(8,), (1, 8), (), (8, 4)])
def test_gradients_of_another_shape_are_named(shape) -> None:
    transform = pf.chain(pf.sgd(0.1, 0.9), pf.hard_prox(pf.lsbq(1)))
    params = {"a": torch.zeros(1), "w": torch.zeros(4, 8)}
    grads = {"a": torch.zeros(1), "w": torch.ones(shape)}
    with pytest.raises(ValueError, match=r"chain: the update of 'w' has shape .* \(4, 8\)"):
        transform.update(grads, transform.init(params), params)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 512), (torch.float16, 4096)])
def test_accumulation_does_not_stall_in_a_narrow_dtype(dtype, steps: int) -> None:
    transform = pf.accumulate(pf.sgd(1.0), steps)
    params = {"w": torch.zeros(2, dtype=dtype)}
    state = transform.init(params)
    for _ in range(steps):
        updates, state = transform.update({"w": torch.ones(2, dtype=dtype)}, state, params)
    assert updates["w"].tolist() == [-1.0, -1.0]
    assert updates["w"].dtype == dtype


def test_apply_if_finite_around_accumulate_takes_missing_gradients() -> None:
    transform = pf.apply_if_finite(pf.accumulate(pf.sgd(0.1), 2))
    params = {"a": torch.ones(1), "b": torch.ones(1)}
    updates, _ = transform.update({"a": None, "b": params["b"]}, transform.init(params), params)
    assert updates["b"] == 0


def test_a_schedule_may_return_a_number() -> None:
    optimizer = pf.sgd(lambda step: 0.5)
    params = {"w": torch.ones(1)}
    assert optimizer.update(params, optimizer.init(params), params)[0]["w"] == -0.5


@pytest.mark.parametrize("mask", [[], (), set(), lambda name, leaf: False])
def test_masks_that_pick_nothing_are_refused(mask) -> None:
    with pytest.raises(ValueError, match=r"picks no parameter|matches no parameter"):
        pf.masked(pf.freeze(), mask).init({"w": torch.ones(1)})


def test_of_overlapping_mask_entries_the_longest_decides() -> None:
    params = {"layer1.weight": torch.ones(1), "layer1.bias": torch.ones(1)}
    assert tree.resolve_mask({"layer1": True, "layer1.bias": False}, params) == [False, True]
    with pytest.raises(ValueError, match="two leaves have one name"):
        tree.resolve_mask({"a.b": True, "a": {"b": False}}, {"a.b": params, "a": {"b": 1.0}})


@pytest.mark.parametrize(
    "build",
    [
        lambda: pf.parq_prox(pf.lsbq(2), anneal_start=np.int64(9), anneal_end=np.int64(3)),
        lambda: pf.hard_prox(pf.lsbq(1), period=np.int64(0)),
        lambda: pf.sgd(np.float32(-1)),
        lambda: pf.accumulate(pf.sgd(0.1), np.int64(0)),
        lambda: pf.lsbq(0, multiplier=np.float32(-1)),
    ],
)
def test_numpy_scalars_are_checked_like_numbers(build) -> None:
    with pytest.raises(ValueError, match=r"must"):
        build()


def test_levels_that_are_neighbouring_floats_are_fixed_points() -> None:
    low = torch.tensor(1.7).nextafter(torch.tensor(2.0))
    levels = torch.stack([low, low.nextafter(torch.tensor(2.0))])[None]
    for w in (pf.proxmaps.hard, lambda u, q: pf.proxmaps.parq(u, q, 0.0)):
        assert torch.equal(w(levels, levels), levels)


@pytest.mark.slow
def test_long_rows_of_ties_are_within_half_a_percent() -> None:
    """Ties crowd a few values; with too few candidate cuts the rest got none (2% off)."""
    ties = torch.arange(58.0).repeat_interleave(200) * 0.6
    x = torch.cat([ties, 58 * 0.6 + 1 + torch.arange(2000.0)])[None].double()
    x = x / x.max()
    ours, best = (least_squares_levels(x, 128, exact_up_to=n) for n in (4096, x.shape[1]))
    errors = [float((x - pf.proxmaps.hard(x, q)).square().sum()) for q in (ours, best)]
    assert errors[0] <= 1.005 * errors[1]


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


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pf.sgd(torch.tensor(-0.1)), r"learning_rate must lie in \[0, inf\), got -0.1"),
        (lambda: pf.sgd(torch.ones(3)), r"0-d tensor, got shape \(3,\); vmap over it"),
        (lambda: pf.sgd(float("inf")), r"learning_rate must lie in \[0, inf\), got inf"),
        (lambda: pf.adam(float("nan")), r"learning_rate must lie in \[0, inf\), got nan"),
        (
            lambda: pf.parq_prox(pf.lsbq(1), anneal_start=torch.tensor(9), anneal_end=3),
            "parq_prox: anneal_start must come before anneal_end, got anneal_start=9, anneal_end=3",
        ),
        (
            lambda: pf.parq_prox(pf.lsbq(1), anneal_start=0, anneal_end=1, steepness=float("inf")),
            r"steepness must lie in \(0, inf\), got inf",
        ),
        (lambda: pf.schedules.exponential(1e-300, -1e-300, 0, 1), "one sign"),
        (lambda: pf.schedules.constant(float("nan")), "constant: value must lie in"),
    ],
)
def test_what_can_be_read_of_a_hyperparameter_is_checked(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: pf.sgd("0.1"),
        lambda: pf.sgd(None),
        lambda: pf.adamw(True),
        lambda: pf.clip(None),
        lambda: pf.hard_prox(pf.lsbq(1), period=float("nan")),
        lambda: pf.hard_prox(pf.lsbq(1), period="3"),
        lambda: pf.hard_prox(pf.lsbq(1), period=None),
        lambda: pf.per_block("32"),
        lambda: pf.per_block(32.0),
        lambda: pf.accumulate(pf.sgd(1.0), True),
    ],
)
def test_what_is_no_number_is_named(build) -> None:
    with pytest.raises(TypeError, match=r"must be a (whole )?number.*, got"):
        build()


def test_small_exponential_paths_do_not_underflow_in_the_check() -> None:
    path = pf.schedules.exponential(1e-200, 1e-300, 0, 2)
    assert float(path(1)) == pytest.approx(1e-250)


def test_numpy_bits_are_whole_numbers() -> None:
    assert pf.lsbq(np.int64(2)) == pf.lsbq(2)


def test_a_quantizer_with_another_number_of_levels_is_named() -> None:
    class three(pf.Quantizer):
        num_levels = 2

        def levels(self, x):
            return x[..., :3]

    with pytest.raises(ValueError, match=r"three\(\): levels\(x\) has shape \(1, 3\), .*\(1, 2\)"):
        three()(torch.ones(1, 5))


def test_a_subclass_with_an_init_of_its_own_compares_by_its_attributes() -> None:
    class shifted(pf.Link):
        def __init__(self, by):
            self.by = by

    assert shifted(1) != shifted(2)
    assert shifted(1) == shifted(1)
    assert hash(shifted(1)) == hash(shifted(1))
    assert repr(shifted(1)) == "shifted(by=1)"


def test_values_that_hold_tensors_anywhere_are_unhashable() -> None:
    schedule = pf.schedules.piecewise((torch.tensor(1.0), 0.5), (3,))
    with pytest.raises(TypeError, match="field 'values' holds a tensor"):
        hash(schedule)


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


@pytest.mark.parametrize("leaf", [torch.ones(4).to(torch.float8_e4m3fn), torch.eye(4).to_sparse()])
def test_narrow_and_sparse_leaves_are_named(leaf) -> None:
    with pytest.raises(TypeError, match=r"hard_prox: parameter 'w' is torch.float.* and dense"):
        pf.hard_prox(pf.lsbq(1)).init({"w": leaf})


def test_counts_stay_on_the_cpu_under_another_default_device() -> None:
    with torch.device("meta"):
        state = pf.chain(pf.sgd(0.1, 0.9), pf.hard_prox(pf.lsbq(1))).init({"w": torch.ones(2, 2)})
    assert tree.read(state, "count").device.type == "cpu"
    assert tree.read(state, "slope").device.type == "cpu"


@pytest.mark.slow
def test_permuted_weights_keep_their_strides_under_dynamic_shapes() -> None:
    torch.compiler.reset()
    link = pf.hard_prox(pf.lsbq(1), granularity=pf.per_channel())
    image = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    params = {"conv": image, "linear": torch.randn(6, 4).t()}
    _, state = link.update(params, link.init(params), params)
    compiled = torch.compile(link.weights, fullgraph=True, backend="eager", dynamic=True)
    for name, weight in compiled(state, params).items():
        assert torch.equal(weight, link.weights(state, params)[name])
        assert weight.stride() == params[name].stride()


def test_a_tied_weight_is_excluded_by_either_name() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert pf.weight_mask(net, exclude="1")["0.weight"] is False
