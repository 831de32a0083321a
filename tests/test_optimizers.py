"""Optimizers are torch.optim's, or their papers', step for step, to 1e-12 in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import parq_fn as pf
from parq_fn import schedules

SHAPES = {"matrix": (4, 3), "vector": (5,), "scalar": ()}

sgds = st.builds(
    dict,
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    dampening=st.sampled_from([0.0, 0.3]),
    weight_decay=st.sampled_from([0.0, 1e-2]),
    nesterov=st.booleans(),
).filter(lambda s: not s["nesterov"] or (s["momentum"] > 0 and s["dampening"] == 0))
adams = st.builds(
    dict,
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.5, 0.5)]),
    eps=st.sampled_from([1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 1e-2]),
    amsgrad=st.booleans(),
)


def agree(ours, theirs, rates, steps: int = 12, missing: str | None = None):
    """(state, params), the same params after every step; `missing` never gets a gradient."""
    generator = torch.Generator().manual_seed(0)
    draw = {k: torch.randn(s, dtype=torch.float64, generator=generator) for k, s in SHAPES.items()}
    mirror = {k: torch.nn.Parameter(v.clone()) for k, v in draw.items()}
    optimizer = theirs(list(mirror.values()))
    params, state = draw, ours.init(draw)
    for t in range(steps):
        grads = {
            k: torch.randn(s, dtype=torch.float64, generator=generator) for k, s in SHAPES.items()
        }
        for group in optimizer.param_groups:
            group["lr"] = rates[t % len(rates)]
        for k, p in mirror.items():
            p.grad = None if k == missing else grads[k].clone()
        given_grads = {k: None if k == missing else g for k, g in grads.items()}
        optimizer.step()
        updates, state = ours.update(given_grads, state, params)
        params = pf.apply_updates(params, updates)
        for k in SHAPES:
            torch.testing.assert_close(params[k], mirror[k].detach(), rtol=1e-12, atol=1e-12)
    return state, params


@given(sgds)
def test_sgd(settings: dict) -> None:
    agree(pf.sgd(0.1, **settings), lambda p: torch.optim.SGD(p, 0.1, **settings), [0.1])


@given(adams, st.sampled_from([(pf.adam, torch.optim.Adam), (pf.adamw, torch.optim.AdamW)]))
def test_adam(settings: dict, pair) -> None:
    ours, theirs = pair
    b1, b2 = settings["betas"]
    own = {k: v for k, v in settings.items() if k != "betas"}
    agree(ours(0.1, b1, b2, **own), lambda p: theirs(p, 0.1, **settings), [0.1])


class Lion(torch.optim.Optimizer):
    """As the paper's algorithm 2 says it; betas: those of one step after another."""

    def __init__(self, params, lr: float, betas: list[tuple[float, float]], weight_decay: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.betas = itertools.cycle(betas)

    @torch.no_grad()
    def step(self) -> None:
        b1, b2 = next(self.betas)
        for group in self.param_groups:
            lr, decay = group["lr"], group["weight_decay"]
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                p -= lr * ((b1 * m + (1 - b1) * p.grad).sign() + decay * p)
                m.mul_(b2).add_((1 - b2) * p.grad)


def cycled(numbers):
    """A schedule that takes three numbers again and again."""
    return lambda t: schedules.piecewise(numbers, (1, 2))(t % 3)


@given(st.permutations([(0.9, 0.99), (0.0, 0.5), (0.4, 0.0)]), st.sampled_from([0.0, 0.3]))
def test_lion(betas: list[tuple[float, float]], decay: float) -> None:
    rates = [0.1, 0.03, 0.01]
    ours = pf.lion(cycled(rates), *map(cycled, zip(*betas, strict=True)), decay)
    for missing in (None, "matrix"):
        agree(ours, lambda p: Lion(p, 0.1, betas, decay), rates, missing=missing)


@given(st.sampled_from([1, 2, 3]), st.permutations([0.0, 0.5, 1.0]))
def test_lookahead(period: int, sizes: list[float]) -> None:
    class Ahead(torch.optim.SGD):
        """As the paper's algorithm 1 says it."""

        def step(self) -> None:  # type: ignore[override]
            super().step()
            self.count = getattr(self, "count", 0) + 1
            with torch.no_grad():
                for p in self.param_groups[0]["params"] if self.count % period == 0 else ():
                    slow = self.slow[p]
                    slow += sizes[(self.count - 1) % 3] * (p - slow)
                    p.copy_(slow)

    def theirs(params):
        made = Ahead(params, 0.1, momentum=0.9)
        made.slow = {p: p.detach().clone() for p in params}
        return made

    agree(pf.lookahead(pf.sgd(0.1, 0.9), period, cycled(sizes)), theirs, [0.1])
    assert pf.lookahead(pf.sgd(0.1)) == pf.lookahead(pf.sgd(0.1), 6, 0.5)  # as optax's


class Free(torch.optim.Optimizer):
    """As the paper says it: of SGD, or with an average of squares of AdamW."""

    def __init__(self, params, b1: float, b2: float | None, decay: float):
        super().__init__(params, {"lr": 0.1})
        self.b1, self.b2, self.decay = b1, b2, decay
        self.own = {p: [p.detach().clone(), p.detach().clone(), 0.0] for p in params}
        self.t, self.total = 0, 0.0

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        lr = self.param_groups[0]["lr"]
        self.total += lr**2
        c = lr**2 / (self.total or 1.0)
        for y, (z, x, v) in self.own.items():
            if y.grad is None:
                continue
            g = y.grad.clone()
            if self.b2 is not None:
                v = self.own[y][2] = self.b2 * v + (1 - self.b2) * g**2
                g = g / ((v / (1 - self.b2**self.t)).sqrt() + 1e-8)
            z -= lr * (g + self.decay * y)
            x += c * (z - x)
            y.copy_((1 - self.b1) * z + self.b1 * x)


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("b1", [0.9, 0.2, 1.0])
@pytest.mark.parametrize("b2", [None, 0.99])
def test_schedule_free(b1: float, b2: float | None, decay: float) -> None:
    """SGD's and AdamW's form, by a learning rate that is warmed up, and what is evaluated."""
    rates = [0.0, 0.05, 0.1]
    rate = cycled(rates)
    base = pf.sgd(rate, weight_decay=decay)
    if b2 is not None:
        base = pf.adamw(rate, b1=0.0, b2=b2, weight_decay=decay)
    ours = pf.schedule_free(base, b1, lambda t: rate(t) ** 2)
    made = []

    def theirs(params):
        made.append(Free(params, b1, b2, decay))
        return made[-1]

    for missing in (None, "matrix"):
        state, params = agree(ours, theirs, rates, missing=missing)
        average = pf.weights_of_average(ours, state, params)
        for wanted, found in zip(made[-1].own.values(), average.values(), strict=True):
            torch.testing.assert_close(found, wanted[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("wrapper", [pf.lookahead, pf.schedule_free])
def test_prox_links_stand_behind_what_moves_their_params(wrapper) -> None:
    prox = pf.hard_prox(pf.lsbq(1), period=1)
    with pytest.raises(ValueError, match=r"looks at params \+ updates, as prox links and averages"):
        wrapper(pf.chain(pf.sgd(0.1), prox))
    with pytest.raises(ValueError, match="put it last"):
        pf.chain(wrapper(pf.sgd(0.1)), pf.clip(1.0))
    transform, params = pf.chain(wrapper(pf.sgd(0.1)), prox), {"w": torch.tensor([1.0, -3.0])}
    state = transform.init(params)
    for _ in range(8):
        updates, state = transform.update(params, state, params)
        params = pf.apply_updates(params, updates)
    levels = pf.levels_of(transform, state)["w"]
    assert torch.isin(transform.weights(state, params)["w"], levels).all()
    if wrapper is pf.schedule_free:
        found = pf.weights_of_average(transform, state, params)["w"]
        assert torch.isin(found, levels).all()
    with pytest.raises(ValueError, match="sync_period must be 1 or more, got 0"):
        pf.lookahead(pf.sgd(0.1), 0)
    with pytest.raises(ValueError, match=r"schedule_free: b1 must lie in \(0, 1\], got 0"):
        pf.schedule_free(pf.sgd(0.1), 0)


MUONS = [
    {},
    {"nesterov": False, "momentum": [0.8, 0.3, 0.9]},  # of one step after another
    {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
    {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings", MUONS)
def test_muon_is_torch_s_bit_for_bit(settings: dict, dtype: torch.dtype) -> None:
    """In float32, of weights that no step halves; in float64, where torch rounds p + lr * u once
    and what is added to p is rounded before, to the last places."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (3, 40), "tall": (65, 33), "one": (1, 1), "zero": (4, 4)}
    shapes |= {"column": (5, 1), "square": (9, 9)}
    params = {k: torch.randn(s, dtype=dtype, generator=generator) for k, s in shapes.items()}
    params = {k: p.sign() * (2 + p.abs()) for k, p in params.items()}
    mirror = {k: torch.nn.Parameter(p.clone()) for k, p in params.items()}
    rates = [0.02, 0.1, 0.05]
    momenta = settings.get("momentum")
    theirs = torch.optim.Muon(mirror.values(), lr=0.02, **{**settings, "momentum": 0.95})
    ours = pf.muon(cycled(rates), **settings | ({"momentum": cycled(momenta)} if momenta else {}))
    state = ours.init(params)
    for t in range(9):
        theirs.param_groups[0]["lr"] = rates[t % 3]
        if momenta:
            theirs.param_groups[0]["momentum"] = momenta[t % 3]
        grads = {k: torch.randn(s, dtype=dtype, generator=generator) for k, s in shapes.items()}
        grads["zero"].zero_()
        if t in (0, 4):
            grads["tall"] = None
        for k, p in mirror.items():
            p.grad = None if grads[k] is None else grads[k].clone()
        theirs.step()
        updates, state = ours.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        for k, p in mirror.items():
            if dtype == torch.float32:
                assert torch.equal(params[k], p.detach()), (t, k)
            else:
                torch.testing.assert_close(params[k], p.detach(), rtol=1e-14, atol=0)


def test_muon_takes_matrices_alone_and_says_which_are_none() -> None:
    params = {"w": torch.ones(2, 2), "conv": [torch.ones(2, 2, 3, 3)]}
    with pytest.raises(ValueError, match=r"muon: parameter 'conv.0' has shape \(2, 2, 3, 3\), exp"):
        pf.muon(0.1).init(params)
    with pytest.raises(ValueError, match="muon: adjust_lr_fn must be one of None, 'original', 'm"):
        pf.muon(0.1, adjust_lr_fn="adamw")
    with pytest.raises(ValueError, match=r"muon: ns_steps must lie in 1..99, got 0"):
        pf.muon(0.1, ns_steps=0)
    none = {"w": torch.zeros(3, 0)}
    assert pf.muon(0.1).update(none, pf.muon(0.1).init(none), none)[0]["w"].shape == (3, 0)
    batch = {"w": torch.randn(3, 4, 5)}
    alone = [
        pf.muon(0.1).update({"w": w}, pf.muon(0.1).init({"w": w}), {"w": w}) for w in batch["w"]
    ]
    one = torch.vmap(lambda w: pf.muon(0.1).update(w, pf.muon(0.1).init(w), w)[0])(batch)["w"]
    torch.testing.assert_close(one, torch.stack([u["w"] for u, _ in alone]), rtol=0.05, atol=0.005)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_schedules_and_tensors_as_hyperparameters(name: str) -> None:
    rates = [0.1, 0.03, 0.01]
    decay = torch.tensor(1e-2, dtype=torch.float64)
    if name == "sgd":
        ours = pf.sgd(cycled(rates), momentum=0.9, weight_decay=decay)
        theirs = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2)  # noqa: E731
    else:
        ours = pf.adamw(cycled(rates), weight_decay=decay)
        theirs = lambda p: torch.optim.AdamW(p, 0.1, weight_decay=1e-2)  # noqa: E731
    agree(ours, theirs, rates)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (pf.sgd(0.1, momentum=0.9, weight_decay=0.1), torch.optim.SGD),
        (pf.adamw(0.1, weight_decay=0.1), torch.optim.AdamW),
    ],
)
def test_a_param_without_gradient_stays(ours, theirs) -> None:
    more = {"momentum": 0.9} if theirs is torch.optim.SGD else {}
    agree(ours, lambda p: theirs(p, 0.1, weight_decay=0.1, **more), [0.1], missing="matrix")


def test_updates_pass_one_learning_rate_in_an_optimizer_and_nothing_pulls_them_back() -> None:
    own = [make(0.1) for make in (pf.sgd, pf.adam, pf.adamw, pf.lion, pf.muon)]
    links = [*own, pf.as_link(torch.optim.SGD, lr=0.1)]
    assert [link.rates for link in links] == [(1, 1)] * len(links)
    assert not any(link.pulls_back for link in links)


def test_learning_rate_by_argument_wins() -> None:
    params = {"w": torch.ones(2)}
    optimizer = pf.sgd(0.1)
    updates, _ = optimizer.update(params, optimizer.init(params), params, learning_rate=1.0)
    assert torch.equal(updates["w"], -torch.ones(2))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pf.sgd(-0.1), r"learning_rate must lie in \[0, inf\), got -0.1"),
        (lambda: pf.sgd(0.1, nesterov=True), "nesterov takes a momentum and no dampening"),
        (lambda: pf.lion(0.1, b1=1.0), r"lion: b1 must lie in \[0, 1\), got 1.0"),
        (lambda: pf.lion(0.1, b2=1.0), r"lion: b2 must lie in \[0, 1\), got 1.0"),
        (lambda: pf.lion(-0.1), r"lion: learning_rate must lie in \[0, inf\), got -0.1"),
        (lambda: pf.lion(0.1, weight_decay=-1), r"lion: weight_decay must lie in \[0, inf\)"),
        (lambda: pf.scale_by_lion(b1=-0.1), r"scale_by_lion: b1 must lie in \[0, 1\), got -0.1"),
        (lambda: pf.scale_by_lion(b2=1.0), r"scale_by_lion: b2 must lie in \[0, 1\), got 1.0"),
        (lambda: pf.muon(-0.1), r"muon: learning_rate must lie in \[0, inf\), got -0.1"),
        (lambda: pf.muon(0.1, momentum=-1.0), r"muon: momentum must lie in \[0, inf\), got -1"),
        (lambda: pf.muon(0.1, weight_decay=-1.0), r"muon: weight_decay must lie in \[0, inf\)"),
        (lambda: pf.muon(0.1, eps=0.0), r"muon: eps must lie in \(0, inf\), got 0.0"),
        (lambda: pf.muon(0.1, ns_steps=100), r"muon: ns_steps must lie in 1..99, got 100"),
        (lambda: pf.muon(0.1, ns_coefficients=(1.0, 2.0)), "muon: expected a tuple of 3 ns_coeff"),
        (lambda: pf.muon(0.1, ns_coefficients=3.0), "tuple of 3 ns_coefficients, got 3.0"),
        (lambda: pf.muon(0.1, ns_coefficients=(1.0, torch.inf, 2.0)), r"ns_coefficients\[1\] must"),
        (
            lambda: pf.lookahead(pf.sgd(0.1), slow_step_size=1.5),
            r"lookahead: slow_step_size must lie in \[0, 1\], got 1.5",
        ),
        (
            lambda: pf.schedule_free(pf.sgd(0.1), weight=-1.0),
            r"schedule_free: weight must lie in \[0, inf\), got -1.0",
        ),
        (lambda: pf.adam(b1=1.0), r"b1 must lie in \[0, 1\), got 1.0"),
        (lambda: pf.adamw(weight_decay=-1), r"adamw: weight_decay must lie in \[0, inf\), got -1"),
    ],
)
def test_bad_hyperparameters(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_adam_has_derivatives_in_a_decay_of_zero() -> None:
    """b^t is 0 there, with derivative 1 at t = 1 and 0 later."""
    params, grads = {"w": torch.tensor([1.0], dtype=torch.float64)}, {"w": torch.ones(1).double()}

    def moved(b: torch.Tensor, steps: int) -> torch.Tensor:
        transform = pf.adamw(0.1, b1=b)
        state, total = transform.init(params), torch.zeros(1, dtype=torch.float64)
        for _ in range(steps):
            updates, state = transform.update(grads, state, params)
            total = total + updates["w"]
        return total.sum()

    for steps in (1, 2, 3):
        zero = torch.zeros((), dtype=torch.float64)
        assert torch.func.grad(moved)(zero, steps).isfinite()
