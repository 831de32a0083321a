"""Defects found by attack, each with the input that showed it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import parq_fn as pf
from parq_fn import tree
from parq_fn.quantizers._partition import least_squares_levels


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


def test_long_rows_of_ties_are_within_half_a_percent() -> None:
    """Ties crowd a few values; with too few candidate cuts the rest got none (2% off)."""
    ties = torch.arange(58.0).repeat_interleave(200) * 0.6
    x = torch.cat([ties, 58 * 0.6 + 1 + torch.arange(2000.0)])[None].double()
    x = x / x.max()
    ours, best = (least_squares_levels(x, 128, exact_up_to=n) for n in (4096, x.shape[1]))
    errors = [float((x - pf.proxmaps.hard(x, q)).square().sum()) for q in (ours, best)]
    assert errors[0] <= 1.005 * errors[1]
