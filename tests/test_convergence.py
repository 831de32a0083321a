"""Law 10: the last iterate of AProx on a convex problem, and how much of it lands on the grid.

F(w) = |A w - b|^2 / 2 + Psi(w), Psi the convex piecewise-affine regularizer, infinite outside
[-1, 1]. AProx takes u <- u - eta_t g(w), w = prox of (eta_1 + ... + eta_t) Psi at u; proximal
SGD takes w = prox of eta_t Psi at w - eta_t g(w). Both are the same two links with other options.
"""

from __future__ import annotations

import torch
from torch import Tensor

import parq_fn as pf
from parq_fn.value import value

GRID = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0]], dtype=torch.float64)
SLOPES = pf.proxmaps.symmetric_slopes(torch.tensor([[0.1, 0.3]], dtype=torch.float64))


@value
class fixed(pf.Quantizer):
    """The same levels for every row, whatever its weights."""

    @property
    def num_levels(self) -> int:
        return GRID.shape[1]

    def fit(self, rows: Tensor) -> Tensor:
        return GRID.expand(rows.shape[0], -1)


def scaled_par(u: Tensor, levels: Tensor, coefficient: Tensor) -> Tensor:
    return pf.proxmaps.par(u, levels, coefficient * SLOPES)


class Problem:
    def __init__(self, rows: int = 60, n: int = 20) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a = torch.randn(rows, n, dtype=torch.float64, generator=generator) / rows**0.5
        grid = GRID[0, torch.randint(5, (n,), generator=generator)]
        self.b = self.a @ grid + 0.1 * torch.randn(rows, dtype=torch.float64, generator=generator)
        corners = self.a.abs().sum(1) + self.b.abs()  # |A w - b| on the box
        self.bound = float((self.a.T.abs() @ corners).norm())  # G: a gradient's greatest norm

    def value(self, w: Tensor) -> Tensor:
        penalty = pf.proxmaps.par_regularizer(w[None], GRID, SLOPES)
        return (self.a @ w - self.b).square().sum() / 2 + penalty.sum()

    def optimum(self) -> Tensor:
        """By 20,000 proximal gradient steps, which converge linearly here."""
        w, rate = torch.zeros_like(self.a[0]), 1 / torch.linalg.matrix_norm(self.a, 2) ** 2
        for _ in range(20_000):
            gradient = self.a.T @ (self.a @ w - self.b)
            w = pf.proxmaps.par((w - rate * gradient)[None], GRID, rate * SLOPES)[0]
        return w


def run(problem: Problem, steps: int, radius: float, aprox: bool, noisy: bool):
    """w after every step."""
    rates = radius / (2 * problem.bound) / torch.arange(1, steps + 1, dtype=torch.float64).sqrt()

    def rate(count: Tensor) -> Tensor:
        return rates[count]

    if aprox:
        prox = pf.custom_prox(fixed(), scaled_par, lambda count: rates.cumsum(0)[count])
    else:
        prox = pf.custom_prox(
            fixed(), scaled_par, rate, normal_map=1.0, learning_rate=1.0, period=10**9
        )
    transform = pf.chain(pf.sgd(rate), prox)

    def loss(w: Tensor, index: Tensor) -> Tensor:
        share = len(problem.a) / len(index)
        return share * (problem.a[index] @ w - problem.b[index]).square().sum() / 2

    generator = torch.Generator().manual_seed(1)
    params = torch.zeros_like(problem.a[0])
    state = transform.init(params)
    step = pf.value_and_grad(loss, transform)
    for _ in range(steps):
        everything = torch.arange(len(problem.a))
        some = torch.randint(len(everything), (6,), generator=generator) if noisy else everything
        _, grads = step(params, state, some)
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        yield transform.weights(state, params)


def on_grid(w: Tensor) -> float:
    return float((w[:, None] == GRID[0]).any(-1).double().mean())


def test_the_last_iterate_of_aprox_stays_under_the_bound() -> None:
    problem = Problem()
    best = problem.optimum()
    least, radius = problem.value(best), float(best.norm())
    steps = 3000
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    bounds = problem.bound * radius * (2 + 1.5 * t.log()) / t.sqrt()
    gaps = torch.stack(
        [problem.value(w) - least for w in run(problem, steps, radius, aprox=True, noisy=False)]
    )
    assert bool((gaps > -1e-9).all())
    assert bool((gaps <= bounds).all())
    assert gaps[-1] < 0.05 * gaps[0]


def test_aprox_lands_on_the_grid_where_proximal_sgd_does_not() -> None:
    problem = Problem()
    radius = float(problem.optimum().norm())
    shares = {
        aprox: sum(map(on_grid, list(run(problem, 1500, radius, aprox, noisy=True))[-300:])) / 300
        for aprox in (True, False)
    }
    assert shares[True] > 0.5 * on_grid(problem.optimum()) > 0
    assert shares[False] < 0.1 * shares[True]
