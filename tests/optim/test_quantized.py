"""QuantOptimizer on one process: the functional core's mathematics in a real optimizer."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import parq_fn as pf
from parq_fn.optim import QuantOptimizer
from tests.helpers import copies, equal, pairwise, sampled
from tests.optim.helpers import PROXES

BASES = {
    "sgd": (
        lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
        pf.sgd(0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    ),
    "nesterov": (
        lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, nesterov=True),
        pf.sgd(0.1, momentum=0.9, nesterov=True),
    ),
    "plain": (lambda g: torch.optim.SGD(g, lr=0.1), pf.sgd(0.1)),
    "adam": (lambda g: torch.optim.Adam(g, lr=0.1, amsgrad=True), pf.adam(0.1, amsgrad=True)),
    "adamw": (lambda g: torch.optim.AdamW(g, lr=0.1), pf.adamw(0.1)),
    "adamw_foreach": (lambda g: torch.optim.AdamW(g, lr=0.1, foreach=True), pf.adamw(0.1)),
    "adamw_fused": (lambda g: torch.optim.AdamW(g, lr=0.1, fused=True), pf.adamw(0.1)),
}


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (4, 6), (4,), (10, 6), (10, 4)
    return tuple(torch.randn(s, generator=generator, dtype=dtype) for s in shapes)


def loss_of(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return (x @ weight.T + bias - y).square().mean()


class Training:
    """A quantized weight and a plain bias, trained by the real optimizer."""

    def __init__(self, base: Any, prox: pf.Prox, dtype: torch.dtype = torch.float64, **options):
        weight, bias, self.x, self.y = problem(dtype)
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.base = base([{"params": [self.weight], "quant_bits": 2}, {"params": [self.bias]}])
        self.optimizer = QuantOptimizer(self.base, prox, **options)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.optimizer.zero_grad()
            loss_of(self.weight, self.bias, self.x, self.y).backward()
            self.optimizer.step()

    @property
    def quantized(self) -> dict[str, Any]:
        return self.optimizer.state[self.weight]

    def tensors(self) -> list[Tensor]:
        """All that a step may change, in a fixed order."""
        entries = [self.optimizer.state[p] for p in (self.weight, self.bias)]
        states = [e[key] for e in entries for key in sorted(e)]
        return [self.weight, self.bias, *(s for s in states if isinstance(s, Tensor))]


def adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.1)


# One mathematics


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("prox", PROXES)
def test_equals_the_functional_loop(base: str, prox: str) -> None:
    make, link = BASES[base]
    real = Training(make, PROXES[prox])
    transform = pf.chain(link, pf.masked(PROXES[prox], "weight"))
    params = {"weight": real.weight.detach().clone(), "bias": real.bias.detach().clone()}
    state = transform.init(params)
    step = pf.value_and_grad(lambda w: loss_of(w["weight"], w["bias"], real.x, real.y), transform)
    inner = PROXES[prox]
    for _ in range(12):
        real.step()
        _, grads = step(params, state)
        updates, state = transform.update(grads, state, params, learning_rate=0.1)
        params = pf.apply_updates(params, updates)
        latent, qparams = real.quantized["latent"], real.quantized["qparams"]
        torch.testing.assert_close(latent, params["weight"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(real.bias, params["bias"], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            qparams, pf.read(state, "qparams")["weight"], rtol=1e-12, atol=1e-12
        )
        # from the same latents the same weights and qparams, bit for bit
        own = pf.ProxState(
            real.quantized["count"], pf.read(state, "slope"), real.quantized["lr_sum"], [qparams]
        )
        assert torch.equal(inner.refit(own, [latent]).qparams[0], qparams)
        assert torch.equal(inner.weights(own, [latent])[0], real.weight)
    levels = real.optimizer.levels(real.weight)
    assert all(w in levels for w in real.weight.flatten())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prox", PROXES)
def test_narrow_parameters_have_float32_latents_and_the_cores_weights(prox: str, dtype) -> None:
    real, link = Training(adamw, PROXES[prox], dtype), PROXES[prox]
    for _ in range(12):
        real.step()
        names = "count", "slope", "lr_sum", "latent", "qparams"
        *scalars, latent, qparams = (real.quantized[name] for name in names)
        state = pf.ProxState(*scalars, [qparams])
        assert torch.equal(link.refit(state, [latent]).qparams[0], qparams)
        assert torch.equal(link.weights(state, [latent], dtype=dtype)[0], real.weight)
    assert latent.dtype == real.quantized["exp_avg"].dtype == torch.float32
    levels = real.optimizer.levels(real.weight)
    assert levels.dtype == dtype
    assert set(real.weight.flatten().tolist()) <= set(levels.flatten().tolist())


class signs(torch.optim.Optimizer):
    """A user's own optimizer, with a state that it makes in its first step."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"], state["count_of_mine"] = torch.zeros_like(p), 0
                state["mean"].mul_(0.9).add_(p.grad)
                state["count_of_mine"] += 1
                p.data.sub_(group["lr"] * state["mean"].sign())


@pytest.mark.parametrize(
    "base",
    [
        lambda g: torch.optim.RMSprop(g, lr=0.01, momentum=0.5, centered=True),
        lambda g: torch.optim.Adagrad(g, lr=0.1),
        lambda g: torch.optim.NAdam(g, lr=0.01),
        lambda g: torch.optim.Rprop(g, lr=0.01),
        signs,
    ],
)
def test_other_bases_move_the_latents_as_they_would_alone(base) -> None:
    far = pf.hard_prox(pf.lsbq(2), warmup=99)  # weights are the latents: plain training
    real = Training(base, far)
    weight, bias, x, y = problem()
    weight, bias = nn.Parameter(weight), nn.Parameter(bias)
    alone = base([weight, bias])
    for _ in range(5):
        real.step()
        alone.zero_grad()
        loss_of(weight, bias, x, y).backward()
        alone.step()
        assert torch.equal(real.weight, weight)
        assert torch.equal(real.bias, bias)


def test_muon() -> None:
    weight = nn.Parameter(problem()[0].float())
    base = torch.optim.Muon([{"params": [weight], "quant_bits": 1}], lr=0.1)
    optimizer = QuantOptimizer(base, pf.hard_prox(pf.lsbq(2), period=1))
    weight.square().sum().backward()
    optimizer.step()
    assert weight.unique().numel() == 2


def test_groups_have_their_bits_and_blocks() -> None:
    params = [nn.Parameter(torch.randn(4, 6)) for _ in range(4)]
    settings = [{"quant_bits": 0}, {"quant_bits": 3, "quant_block_size": 2}, {"quant_bits": 16}, {}]
    groups = [{"params": [p], **s} for p, s in zip(params, settings, strict=True)]
    prox = pf.hard_prox(pf.uniform(2), granularity=pf.per_channel(), period=1)
    optimizer = QuantOptimizer(torch.optim.SGD(groups, lr=0.0), prox)
    for p in params:
        p.grad = torch.zeros_like(p)
    before = copies(params)
    optimizer.step()
    assert optimizer.levels(params[0]).shape == (4, 3)
    assert optimizer.levels(params[1]).shape == (4, 3, 8)
    assert torch.equal(params[2], before[2])
    assert torch.equal(params[3], before[3])
    assert optimizer.param_groups[0]["inverse_slope"] == 0.0
    assert "inverse_slope" not in optimizer.param_groups[3]


def test_annealed_weight_decay_follows_the_slope_that_the_step_before_left() -> None:
    weight = nn.Parameter(torch.ones(2, 2, dtype=torch.float64))
    groups = [{"params": [weight], "quant_bits": 1}]
    base = torch.optim.SGD(groups, lr=1.0, weight_decay=0.1)
    prox = pf.parq_prox(pf.lsbq(1), anneal_start=0, anneal_end=4)
    optimizer = QuantOptimizer(base, prox, anneal_weight_decay=0.5)
    latent, decay = 1.0, pf.schedules.anneal_decay(0.1, pf.inverse_slope(0, 4), 0.5)
    for t in range(7):
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        latent -= float(decay(t)) * latent
        assert float(optimizer.state[weight]["latent"][0, 0]) == pytest.approx(latent, abs=1e-12)
        assert base.param_groups[0]["weight_decay"] == 0.1


# The contract, by number


def test_r1_asking_for_the_state_before_training_changes_nothing() -> None:
    real = Training(adamw, PROXES["hard"])
    before = copies(real.tensors())
    module = nn.Module()
    module.weight, module.bias = real.weight, real.bias
    state = get_optimizer_state_dict(module, real.optimizer)
    assert equal(real.tensors(), before)
    assert set(state["state"]) == {"weight", "bias"}


@pytest.mark.parametrize("base", BASES)
def test_r2_every_key_and_shape_exists_from_construction(base: str) -> None:
    real = Training(BASES[base][0], PROXES["parq"])
    shapes = [
        {k: getattr(v, "shape", None) for k, v in real.optimizer.state[p].items()}
        for p in (real.weight, real.bias)
    ]
    real.step(3)
    for p, keys in zip((real.weight, real.bias), shapes, strict=True):
        now = {k: getattr(v, "shape", None) for k, v in real.optimizer.state[p].items()}
        assert now == keys


def test_r3_r4_states_and_groups_hold_tensors_numbers_and_strings() -> None:
    real = Training(adamw, PROXES["parq"])
    real.step(3)
    state = real.optimizer.state_dict()
    for entries in state["state"].values():
        assert all(isinstance(v, Tensor | int | float) for v in entries.values())
    for group in state["param_groups"]:
        plain = (int, float, str, bool, tuple, list, type(None))
        assert all(isinstance(v, plain) for v in group.values())
    assert all(isinstance(p, Tensor) for p in real.optimizer.state)


@pytest.mark.parametrize(
    ("steps", "dtype", "base", "way"),
    pairwise(
        [0, 1, 4, 11],
        [torch.float32, torch.bfloat16],
        ["sgd", "adamw"],
        ["torch", "pickle", "nested", "flattened"],
    ),
)
def test_r5_r6_a_loaded_run_continues_bit_for_bit(steps, dtype, base, way) -> None:
    make = BASES[base][0]
    one, other = (Training(make, PROXES["parq_normal_map"], dtype) for _ in range(2))
    one.step(steps)
    modules = [nn.Module(), nn.Module()]
    for module, run in zip(modules, (one, other), strict=True):
        module.weight, module.bias = run.weight, run.bias
    if way in ("nested", "flattened"):
        options = StateDictOptions(flatten_optimizer_state_dict=way == "flattened")
        saved = get_optimizer_state_dict(modules[0], one.optimizer, options=options)
        saved = copy.deepcopy(saved)
        set_optimizer_state_dict(modules[1], other.optimizer, saved, options=options)
    else:
        saved = one.optimizer.state_dict()
        if way == "pickle":
            saved = pickle.loads(pickle.dumps(saved))
        else:
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            buffer.seek(0)
            saved = torch.load(buffer, weights_only=True)
        other.optimizer.load_state_dict(saved)
    with torch.no_grad():
        other.weight.copy_(one.weight)
        other.bias.copy_(one.bias)
    assert equal(one.tensors(), other.tensors())
    for _ in range(3):
        one.step()
        other.step()
        assert equal(one.tensors(), other.tensors())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("steps", [0, 3])
def test_r7_copies_continue_bit_for_bit_and_leave_the_original_alone(copied, steps: int) -> None:
    one = Training(BASES["sgd"][0], PROXES["parq"])
    one.step(steps)
    other = copied(one)
    assert other.optimizer.param_groups is other.optimizer.base.param_groups
    before = copies(one.tensors())
    other.step(3)
    assert equal(one.tensors(), before)
    one.step(3)
    assert equal(one.tensors(), other.tensors())


def test_r8_parameters_exchanged_in_the_groups_are_followed_by_position() -> None:
    one, other = Training(adamw, PROXES["parq"]), Training(adamw, PROXES["parq"])
    one.step(3)
    other.step(3)
    one.weight, one.bias = (nn.Parameter(p.detach().clone()) for p in (one.weight, one.bias))
    for group, p in zip(one.optimizer.param_groups, (one.weight, one.bias), strict=True):
        group["params"] = [p]
    one.step(3)
    other.step(3)
    assert equal(one.tensors(), other.tensors())
    assert set(one.optimizer.state) == {one.weight, one.bias}


def test_r9_a_missing_latent_is_taken_from_the_parameter() -> None:
    real = Training(adamw, PROXES["parq"])
    state = real.optimizer.state_dict()
    del state["state"][0]
    with torch.no_grad():
        real.weight.mul_(2)
    real.optimizer.load_state_dict(state)
    assert torch.equal(real.quantized["latent"], real.weight)


SCHEDULERS = {
    "StepLR": lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 8),
    "OneCycleLR": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=20),
    "LambdaLR": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "CyclicLR": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "LinearLR": lambda o: torch.optim.lr_scheduler.LinearLR(o),
    "PolynomialLR": lambda o: torch.optim.lr_scheduler.PolynomialLR(o),
    "WarmRestarts": lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ExponentialLR": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9),
    "MultiStepLR": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 3]),
    "ConstantLR": lambda o: torch.optim.lr_scheduler.ConstantLR(o),
    "MultiplicativeLR": lambda o: torch.optim.lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_r10_r11_schedulers_may_be_built_on_either_optimizer(scheduler: str) -> None:
    runs = []
    for which in ("optimizer", "base"):
        real = Training(adamw, PROXES["parq_shrink"])
        schedule = SCHEDULERS[scheduler](getattr(real, which))
        sums = 0.0
        for _ in range(4):
            sums += real.optimizer.param_groups[0]["lr"]
            real.step()
            if which == "base":
                schedule.optimizer._opt_called = True  # what wrapping base.step would have set
            schedule.step()
        runs.append(copies(real.tensors()))
        assert real.optimizer.param_groups[0]["lr_sum"] == pytest.approx(sums)
        real.optimizer.load_state_dict(real.optimizer.state_dict())  # with the schedulers' keys
    assert equal(*runs)


def test_r10_a_tensor_learning_rate() -> None:
    runs = []
    for rate in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        real = Training(lambda g, rate=rate: torch.optim.SGD(g, lr=rate), PROXES["both"])
        real.step(5)
        runs.append(real.weight)
    torch.testing.assert_close(*runs)


def test_r12_groups_names_and_groups_added_later() -> None:
    net = nn.Linear(6, 4)
    named = [("w", net.weight)], [("b", net.bias)]
    base = torch.optim.SGD([{"params": named[0], "quant_bits": 1}], lr=0.1, momentum=0.9)
    optimizer = QuantOptimizer(base, pf.hard_prox(pf.lsbq(2), period=1))
    optimizer.add_param_group({"params": named[1], "quant_bits": 2})
    optimizer.step()
    assert optimizer.levels(net.bias).shape == (4,)
    extra = nn.Parameter(torch.ones(3))
    group = {"params": [("x", extra)], "quant_bits": 2, "quant_block_size": 4}
    with pytest.raises(ValueError, match="parameter 'x': block size 4 does not divide"):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == len(base.param_groups) == 2


def test_r13_the_closure_runs_first_at_the_weights_and_its_value_is_returned() -> None:
    real = Training(adamw, PROXES["parq"])
    other = Training(adamw, PROXES["parq"])
    for _ in range(6):
        seen = []

        def closure(seen: list[Tensor] = seen) -> Tensor:
            seen.append(real.weight.detach().clone())
            real.optimizer.zero_grad()
            loss = loss_of(real.weight, real.bias, real.x, real.y)
            loss.backward()
            return loss

        before = real.weight.detach().clone()
        with torch.no_grad():
            value = real.optimizer.step(closure)
        assert torch.equal(seen[0], before)
        assert value.requires_grad
        other.step()
    assert equal(real.tensors(), other.tensors())


def test_r14_without_a_gradient_the_base_skips_and_annealing_continues() -> None:
    real = Training(adamw, PROXES["parq"])
    real.step(3)
    latent = real.quantized["latent"].clone()
    moments = real.quantized["exp_avg"].clone()
    for _ in range(9):
        real.weight.grad = None
        real.bias.grad = torch.ones_like(real.bias)
        real.optimizer.step()
    assert torch.equal(real.quantized["latent"], latent)
    assert torch.equal(real.quantized["exp_avg"], moments)
    assert int(real.quantized["updates"]) == 3
    levels = real.optimizer.levels(real.weight)
    assert all(w in levels for w in real.weight.flatten())


@pytest.mark.parametrize("stale", [False, True])
def test_frozen_parameters_are_left_alone_and_go_on_where_they_stood(stale: bool) -> None:
    real = Training(adamw, PROXES["parq"])
    real.step(3)
    real.weight.requires_grad_(False)
    before = copies([real.weight, *(real.quantized[k] for k in ("latent", "qparams", "count"))])
    real.weight.grad = torch.ones_like(real.weight) if stale else None
    for _ in range(9):
        real.bias.grad = torch.ones_like(real.bias)
        real.optimizer.step()
    after = [real.weight, *(real.quantized[k] for k in ("latent", "qparams", "count"))]
    assert equal(before, after)
    real.weight.requires_grad_(True)
    real.step()
    assert int(real.quantized["count"]) == 4


def test_r15_a_step_that_the_scaler_skips_advances_nothing() -> None:
    real = Training(adamw, PROXES["hard"], torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    real.step(2)
    before = copies(real.tensors())
    real.optimizer.zero_grad()
    scaler.scale(loss_of(real.weight, real.bias, real.x * float("inf"), real.y)).backward()
    scaler.step(real.optimizer)
    scaler.update()
    assert equal(real.tensors(), before)
    real.optimizer.zero_grad()
    scaler.scale(loss_of(real.weight, real.bias, real.x, real.y)).backward()
    scaler.step(real.optimizer)
    assert int(real.quantized["count"]) == 3
    assert not hasattr(real.optimizer, "_step_supports_amp_scaling")


def test_r16_modes_change_nothing_where_the_base_has_none() -> None:
    real = Training(adamw, PROXES["parq"])
    real.step(4)
    before = real.weight.clone(), real.optimizer.state[real.weight]["latent"].clone()
    real.optimizer.eval()
    real.optimizer.train()
    assert torch.equal(real.weight, before[0])
    assert torch.equal(real.optimizer.state[real.weight]["latent"], before[1])


def test_r20_parameters_are_written_in_place_and_stay_leaves() -> None:
    real = Training(adamw, PROXES["parq"])
    where, before = real.weight.data_ptr(), real.weight._version
    real.step(4)
    assert real.weight.data_ptr() == where
    assert real.weight._version > before
    assert real.weight.is_leaf
    assert real.weight.requires_grad
    assert real.quantized["latent"].grad_fn is None


def test_an_exception_in_the_base_leaves_weights_in_the_model() -> None:
    real = Training(adamw, PROXES["parq"])
    real.step(6)
    before, groups = copies(real.tensors()), real.optimizer.param_groups
    real.optimizer.param_groups[0]["betas"] = None
    with pytest.raises(TypeError):
        real.optimizer.step()
    assert equal(real.tensors(), before)
    assert groups[0]["params"] == [real.weight]
    assert real.quantized["latent"].grad is None


@pytest.mark.rare
@pytest.mark.parametrize(
    "prox", sampled(["hard", "parq", "parq_shrink", "parq_normal_map", "soft"], 1)
)
def test_r22_compiled_steps_equal_eager_ones_and_never_compile_again(prox: str) -> None:
    torch.compiler.reset()
    one = Training(adamw, PROXES[prox])
    other = Training(adamw, PROXES[prox], compile=True)
    for t in range(14):
        for each in (one, other):  # a schedule; a graph break is an error: they compile whole
            each.optimizer.param_groups[0]["lr"] = 0.1 / (t + 1)
        one.step()
        with torch._dynamo.config.patch(error_on_recompile=t >= 4):
            other.step()
        for a, b in zip(one.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_a_step_may_itself_be_compiled() -> None:
    torch.compiler.reset()
    sgd, _ = BASES["nesterov"]  # torch's own AdamW rounds its step to float32 when compiled
    one, other = Training(sgd, PROXES["parq"]), Training(sgd, PROXES["parq"])
    step = torch.compile(other.optimizer.step, backend="eager")
    for _ in range(6):
        one.step()
        other.optimizer.zero_grad()
        loss_of(other.weight, other.bias, other.x, other.y).backward()
        step()
        for a, b in zip(one.tensors(), other.tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda p: QuantOptimizer(torch.optim.LBFGS([p]), PROXES["hard"]), TypeError, "LBFGS"),
        (lambda p: QuantOptimizer(p, PROXES["hard"]), TypeError, "got Parameter"),
        (lambda p: QuantOptimizer(torch.optim.SGD([p]), pf.lsbq(2)), TypeError, r"got lsbq\(2\)"),
        (
            lambda p: QuantOptimizer(torch.optim.SGD([p]), PROXES["hard"]),
            ValueError,
            "no group has quant_bits below 16",
        ),
        (
            lambda p: QuantOptimizer(
                torch.optim.SGD([{"params": [p], "quant_bits": 9}]), PROXES["hard"]
            ),
            ValueError,
            r"group 0 has quant_bits=9, expected a whole number in 0\.\.8",
        ),
        (
            lambda p: QuantOptimizer(
                torch.optim.SGD([{"params": [p], "quant_bits": 2}]),
                PROXES["hard"],
                anneal_weight_decay=0.5,
            ),
            ValueError,
            "which parq_prox has and hard_prox has not",
        ),
    ],
)
def test_bad_settings(build, error, message: str) -> None:
    with pytest.raises(error, match=message):
        build(nn.Parameter(torch.ones(2, 2)))


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    real = Training(adamw, PROXES["parq"])
    real.step(2)
    before = copies(real.tensors())
    state = copy.deepcopy(real.optimizer.state_dict())
    state["state"][0]["latent"] = torch.ones(3, 3)
    with pytest.raises(
        ValueError, match=r"'0 of group 0': latent has shape \(3, 3\), expected \(4, 6\)"
    ):
        real.optimizer.load_state_dict(state)
    state = copy.deepcopy(real.optimizer.state_dict())
    state["param_groups"][0]["quant_bits"] = 4
    with pytest.raises(ValueError, match="quant_bits=4 in group 0, the optimizer 2"):
        real.optimizer.load_state_dict(state)
    assert equal(real.tensors(), before)


@pytest.mark.parametrize(
    ("mark", "name"), [("_is_flat_param", "FSDP1"), ("ds_id", "ZeRO of DeepSpeed")]
)
def test_parameters_that_are_cut_where_no_row_ends_are_refused(mark: str, name: str) -> None:
    flat = nn.Parameter(torch.ones(4))
    setattr(flat, mark, True)  # what each sets
    base = torch.optim.SGD([{"params": [flat], "quant_bits": 1}], lr=0.1)
    wanted = rf"'0 of group 0' is flattened by {name}, .* shard with .*fully_shard"
    with pytest.raises(TypeError, match=wanted):
        QuantOptimizer(base, pf.hard_prox(pf.lsbq(1)))
    with pytest.raises(TypeError, match=wanted):
        pf.optim.TransformOptimizer([flat], pf.sgd(0.1))
    exchanged = pf.optim.TransformOptimizer([nn.Parameter(torch.ones(4))], pf.sgd(0.1))
    exchanged.param_groups[0]["params"][0] = flat
    with pytest.raises(TypeError, match=wanted):
        exchanged.step()
    net = nn.Linear(2, 2)
    net.weight = flat
    with pytest.raises(TypeError, match=f"parameter 'weight' is flattened by {name}"):
        pf.functional(net)


def test_compile_is_a_choice_of_two() -> None:
    base = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2, 2))], "quant_bits": 2}], lr=0.1)
    with pytest.raises(TypeError, match="compile must be True or False, got 'max-autotune'"):
        QuantOptimizer(base, pf.hard_prox(pf.lsbq(2)), compile="max-autotune")
