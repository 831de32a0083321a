"""vmap, grad and compile on every piece, and on whole train steps."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn import proxmaps, schedules
from parq_fn.foundation.tree import tree_map
from tests.helpers import sampled

LSBQ = importlib.import_module("parq_fn.quantizers.lsbq")
X = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def model(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    return {"hidden": {"weight": draw(8, 6), "bias": draw(8)}, "out": [draw(3, 8)]}


def loss(w: dict, x: Tensor, y: Tensor) -> Tensor:
    hidden = torch.tanh(x @ w["hidden"]["weight"].T + w["hidden"]["bias"])
    return (hidden @ w["out"][0].T - y).square().mean()


def train_step(transform):
    gradient = pf.value_and_grad(loss, transform)

    def step(params, state, x, y):
        value, grads = gradient(params, state, x, y)
        updates, state = transform.update(grads, state, params)
        return pf.apply_updates(params, updates), state, value

    return step


def run(transform, steps: int = 9, params=None, step=None):
    params = model() if params is None else params
    step = train_step(transform) if step is None else step
    state = transform.init(params)
    for _ in range(steps):
        params, state, _ = step(params, state, X, Y)
    return params, state


def assert_close(a, b, tolerance: float = 1e-12) -> None:
    tree_map(lambda x, y: torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance), a, b)


WINDOW = {"anneal_start": 2, "anneal_end": 7, "period": 3}
ROWS = {"granularity": pf.per_channel()}
MATRICES = ("hidden.weight", "out")
TRANSFORMS = [
    pf.chain(pf.sgd(0.1, momentum=0.9, weight_decay=1e-3), pf.parq_prox(pf.lsbq(2), **WINDOW)),
    pf.chain(pf.adamw(0.05, amsgrad=True), pf.masked(pf.hard_prox(pf.lsbq(1), **ROWS), MATRICES)),
    pf.chain(
        pf.clip_by_global_norm(1.0),
        pf.adam(schedules.warmup(schedules.cosine(0.05, 0.0, 0, 9), 2)),
        pf.soft_prox(pf.uniform(2), shrink=True, learning_rate=0.05, **WINDOW, **ROWS),
    ),
    pf.partition(
        {
            "quantized": pf.chain(
                pf.sgd(0.1),
                pf.binary_relax_prox(pf.lsbq(0, "optimal"), warmup=1, **WINDOW),
            ),
            "rest": pf.sgd(0.2),
        },
        {"*bias": "rest", "*": "quantized"},
    ),
    pf.chain(
        pf.sgd(0.1),
        pf.proxquant_prox(pf.lloyd_max(3), strength=0.3, **WINDOW),
    ),
    pf.chain(
        pf.sgd(0.1),
        pf.parq_prox(pf.asymmetric(2), normal_map=2.0, learning_rate=0.1, **WINDOW, **ROWS),
    ),
    pf.accumulate(pf.chain(pf.sgd(0.1), pf.parq_prox(pf.max_uniform(3), **WINDOW)), 2),
    pf.apply_if_finite(
        pf.named_chain(a=pf.sgd(0.1), b=pf.parq_prox(pf.lsbq(3, "alternating"), **WINDOW))
    ),
    pf.chain(pf.sgd(0.1), pf.parq_prox(pf.stored(pf.integer(3), torch.bfloat16), **WINDOW, **ROWS)),
    pf.chain(pf.sgd(0.1), pf.parq_prox(pf.nvfp4(), **WINDOW, **ROWS)),
    pf.chain(pf.sgd(0.1), pf.soft_prox(pf.stored(pf.codebook.nf4, "e8m0"), **WINDOW)),
    pf.averaged(pf.chain(pf.lion(0.05), pf.parq_prox(pf.lsbq(2), **WINDOW)), 0.9),
    pf.monitor_flips(
        pf.chain(
            pf.conditionally(pf.add_noise(0.01), lambda t: t < 4),
            pf.lookahead(pf.sgd(0.1), 2),
            pf.hard_prox(pf.lsbq(2), period=2),
        )
    ),
    pf.apply_if_finite(
        pf.chain(pf.schedule_free(pf.adamw(0.05, b1=0.0)), pf.parq_prox(pf.uniform(2), **WINDOW)),
        limit=2,
    ),
]
#: Batched sums in bfloat16 are rounded otherwise than in a loop.
MUON = pf.partition(
    {"matrix": pf.muon(0.05), "rest": pf.sgd(0.1)}, {"*bias": "rest", "*": "matrix"}
)
every = pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: repr(t)[:70])


@pytest.mark.slow
@every
def test_a_stack_of_models_by_vmap_is_the_loop(transform) -> None:
    models = [model(seed) for seed in range(3)]
    stacked = tree_map(lambda *leaves: torch.stack(leaves), *models)
    step = torch.vmap(train_step(transform), in_dims=(0, 0, None, None))
    params, state = stacked, torch.vmap(transform.init)(stacked)
    for _ in range(9):
        params, state, _ = step(params, state, X, Y)
    together = torch.vmap(transform.weights)(state, params)
    for i, one in enumerate(models):
        alone, own = run(transform, params=one)
        assert_close(tree_map(lambda leaf, i=i: leaf[i], params), alone)
        weights = tree_map(lambda leaf, i=i: leaf[i], together)
        assert_close(weights, transform.weights(own, alone))


@pytest.mark.rare
@pytest.mark.parametrize("transform", sampled([*TRANSFORMS, MUON], 3), ids=lambda t: repr(t)[:70])
def test_a_whole_step_compiles_once(transform, monkeypatch) -> None:
    """Full graph, no recompile from step to step, the same numbers."""
    monkeypatch.setattr(LSBQ, "_SWEEPS", 3)  # which a graph has one after the other
    torch.compiler.reset()
    step = torch.compile(train_step(transform), fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        params, state = run(transform, step=step)
    alone, own = run(transform)
    assert_close(params, alone)
    assert_close(state, own)


@pytest.mark.rare
def test_a_whole_step_compiles_with_inductor() -> None:
    torch.compiler.reset()
    prox = pf.masked(pf.parq_prox(pf.lsbq(2), **WINDOW), "hidden.weight")
    transform = pf.chain(pf.sgd(0.1, momentum=0.9, weight_decay=1e-3), prox)
    step = torch.compile(train_step(transform), fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        params, state = run(transform, step=step)
    alone, own = run(transform)
    assert_close(params, alone, 1e-9)
    assert_close(transform.weights(state, params), transform.weights(own, alone), 1e-9)


MODEL = model()


def sweep(rate, steepness, end):
    transform = pf.chain(
        pf.sgd(rate, momentum=0.9),
        pf.parq_prox(
            pf.lsbq(2), anneal_start=2, anneal_end=end, steepness=steepness, period=3, **ROWS
        ),
    )
    params, state = run(transform, params=MODEL)
    return loss(transform.weights(state, params), X, Y)


SETTINGS = (
    torch.tensor([0.1, 0.05, 0.2], dtype=torch.float64),
    torch.tensor([10.0, 1.0, 50.0], dtype=torch.float64),
    torch.tensor([8, 5, 20]),
)


def test_hyperparameters_by_vmap_are_the_loop() -> None:
    together = torch.vmap(sweep)(*SETTINGS)
    alone = torch.stack([sweep(*s) for s in zip(*SETTINGS, strict=True)])
    numbers = torch.stack([sweep(*(v.item() for v in s)) for s in zip(*SETTINGS, strict=True)])
    assert_close(together, alone)
    assert_close(alone, numbers)


@pytest.mark.rare
def test_a_sweep_step_compiles() -> None:
    """vmap over hyperparameters inside one compiled program."""
    torch.compiler.reset()

    def one(rate, steepness, end, params, state):
        transform = pf.chain(
            pf.sgd(rate),
            pf.parq_prox(pf.lsbq(2), anneal_start=1, anneal_end=end, steepness=steepness, period=2),
        )
        return train_step(transform)(params, state, X, Y)

    template = pf.chain(pf.sgd(0.1), pf.parq_prox(pf.lsbq(2), anneal_start=1, anneal_end=2))
    params = tree_map(lambda p: p.expand(3, *p.shape).contiguous(), model())
    batched = torch.vmap(one)
    compiled = torch.compile(batched, fullgraph=True, backend="aot_eager")
    # vmap expands what does not depend on its input; as plain tensors the strides stay the same
    state = tree_map(lambda s: s.contiguous(), torch.vmap(template.init)(params))
    ours = theirs = (params, state)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):
            ours, theirs = compiled(*SETTINGS, *ours)[:2], batched(*SETTINGS, *theirs)[:2]
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    "optimizer", [lambda r: pf.sgd(r, momentum=0.9), pf.adamw], ids=["sgd", "adamw"]
)
@pytest.mark.parametrize(
    "quantizer", [pf.lsbq(2), pf.lsbq(0, "optimal"), pf.lloyd_max(2)], ids=repr
)
def test_gradient_in_the_learning_rate(optimizer, quantizer) -> None:
    """The derivative through updates, levels and map, against a central difference."""

    def final(rate: Tensor) -> Tensor:
        prox = pf.parq_prox(quantizer, anneal_start=0, anneal_end=50, steepness=1.0, period=2)
        transform = pf.chain(optimizer(rate), prox)
        params, state = run(transform, 5)
        return loss(transform.weights(state, params), X, Y)

    rate, h = torch.tensor(0.03, dtype=torch.float64), 1e-6
    slope = torch.func.grad(final)(rate)
    torch.testing.assert_close(
        slope, (final(rate + h) - final(rate - h)) / (2 * h), rtol=1e-5, atol=1e-7
    )


def test_gradient_with_zero_gradients_is_finite() -> None:
    """A param that the loss ignores has second moment 0, where sqrt has no derivative."""

    def final(rate: Tensor) -> Tensor:
        transform = pf.adam(rate)
        params = {"used": torch.ones(2), "unused": torch.ones(2)}
        state = transform.init(params)
        for _ in range(3):
            _, grads = pf.value_and_grad(lambda w: w["used"].square().sum(), transform)(
                params, state
            )
            updates, state = transform.update(grads, state, params)
            params = pf.apply_updates(params, updates)
        return params["used"].sum() + params["unused"].sum()

    assert bool(torch.func.grad(final)(torch.tensor(0.1)).isfinite())


MAPS = [
    (proxmaps.hard, None), (proxmaps.clip, None), (proxmaps.parq, (0.0, 0.3, 1.0)),
    (proxmaps.soft, (0.0, 5.0, torch.inf)), (proxmaps.binary_relax, (0.0, 0.4, 1.0)),
    (proxmaps.proxquant, (0.0, 0.1, torch.inf)),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("function", "values"), MAPS, ids=lambda v: getattr(v, "__name__", ""))
def test_prox_maps_under_vmap_grad_and_compile(function, values) -> None:
    u = torch.randn(3, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    levels = torch.tensor([[-1.0, -0.2, 0.4, 1.1]], dtype=torch.float64).repeat(3, 1)
    arguments = [()] if values is None else [(torch.tensor(v, dtype=u.dtype),) for v in values]
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for more in arguments:
        w = function(u, levels, *more)
        assert_close(compiled(u, levels, *more), w)
        rows = torch.vmap(function, in_dims=(0, 0, *(None for _ in more)))
        assert_close(rows(u[:, None], levels[:, None], *more)[:, 0], w)
        gradient = torch.func.grad(lambda v, more=more: function(v, levels, *more).sum())(u)
        assert bool(gradient.isfinite().all())
        h = 1e-7
        smooth = (function(u + h, levels, *more) - function(u - h, levels, *more)) / (2 * h)
        calm = smooth.abs() < 100  # away from jumps
        torch.testing.assert_close(gradient[calm], smooth[calm], rtol=1e-5, atol=1e-5)
    if values is not None:
        stacked = torch.tensor(values, dtype=torch.float64)
        together = torch.vmap(function, in_dims=(None, None, 0))(u, levels, stacked)
        alone = torch.stack([function(u, levels, *more) for more in arguments])
        assert_close(together, alone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        schedules.constant(0.3), schedules.linear(1.0, 0.0, 2, 9),
        schedules.cosine(1.0, 0.0, 2, 9), schedules.exponential(1.0, 0.1, 2, 9),
        schedules.polynomial(1.0, 0.0, 2, 9, power=2.0), schedules.piecewise((1.0, 0.5), (4,)),
        schedules.join((schedules.constant(1.0), schedules.linear(1.0, 0.0, 0, 3)), (5,)),
        schedules.warmup(schedules.constant(1.0), 4), schedules.inverse_slope(2, 9),
        schedules.anneal_decay(0.1, schedules.inverse_slope(2, 9), 0.5),
    ],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_schedules_take_ints_tensors_batches_and_compile(schedule) -> None:
    steps = torch.arange(14)
    together = schedule(steps)
    assert together.dtype == torch.float64
    torch.compiler.reset()
    compiled = torch.compile(schedule, fullgraph=True, backend="aot_eager")
    for t in range(14):
        alone = schedule(torch.tensor(t))
        assert alone.shape == ()
        assert torch.equal(alone, schedule(t))
        assert_close(alone, together[t], 1e-15)
    assert_close(torch.vmap(schedule)(steps), together, 1e-15)
    assert_close(compiled(steps), together, 1e-15)


# Found by attack, each with the input that showed it.


@pytest.mark.rare
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
    assert init({"w": params["0.weight"]}).qparams["w"].shape == (4, 1)
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
