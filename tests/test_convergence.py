"""Law 10: the last iterate of AProx on a convex problem, and how much of it lands on the grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from parq_fn.convergence import (
    Convex,
    aprox,
    logistic,
    objective,
    on_grid,
    optimum,
    random_problem,
)


def classification() -> logistic:
    problem, draw = random_problem(), torch.Generator().manual_seed(3)
    a = torch.randn(80, 20, dtype=torch.float64, generator=draw)
    y = (a @ problem.levels[torch.randint(5, (20,), generator=draw)]).sign()
    return logistic(a, y, problem.levels, 0.05 * problem.slopes)


PROBLEMS = {"least_squares": random_problem, "logistic": classification}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_optimum_is_one(name: str) -> None:
    """No feasible point around it, or far from it, has a smaller value."""
    problem = PROBLEMS[name]()
    best = optimum(problem)
    least = objective(problem, best)
    draw = torch.Generator().manual_seed(1)
    for radius in (1e-6, 1e-3, 0.1, 2.0):
        for _ in range(50):
            way = torch.randn(problem.size, dtype=torch.float64, generator=draw)
            other = (best + radius * way).clamp(float(problem.levels[0]), float(problem.levels[-1]))
            assert objective(problem, other) >= least - 1e-12


@pytest.mark.parametrize("name", PROBLEMS)
def test_no_gradient_within_the_levels_is_longer_than_the_bound(name: str) -> None:
    problem = PROBLEMS[name]()
    draw = torch.Generator().manual_seed(2)
    gradient = torch.func.grad(problem.loss)
    for _ in range(200):
        corner = torch.randint(2, (problem.size,), generator=draw).double() * 2 - 1
        found = gradient(corner * problem.levels.abs().max(), torch.arange(problem.samples))
        assert float(found.norm()) <= problem.gradient_bound()


@pytest.mark.rare
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_last_iterate_of_aprox_stays_under_the_bound(name: str) -> None:
    run = aprox(PROBLEMS[name](), 1000)
    assert bool((run.gap > -1e-9).all())
    assert bool((run.gap <= run.bound).all())
    assert run.gap[-1] < 0.1 * run.gap[0]


@pytest.mark.rare
def test_aprox_lands_on_the_grid_where_proximal_sgd_does_not() -> None:
    problem = random_problem()
    best = optimum(problem)
    shares = {
        method: float(aprox(problem, 900, method=method, batch=6, best=best).on_grid[-300:].mean())
        for method in ("aprox", "proximal_sgd")
    }
    assert shares["aprox"] > 0.5 * on_grid(best, problem.levels) > 0
    assert shares["proximal_sgd"] < 0.1 * shares["aprox"]


@pytest.mark.parametrize("method", ["proximal_sgd", "normal_map"])
def test_the_methods_are_their_formulas(method: str) -> None:
    problem, gamma = random_problem(), 0.7
    best = optimum(problem)
    run = aprox(problem, 40, method=method, gamma=gamma, best=best)
    w = z = torch.zeros(problem.size, dtype=torch.float64)
    gradient = torch.func.grad(problem.loss)
    for t in range(40):
        rate = float(best.norm()) / (2 * problem.gradient_bound()) / (t + 1) ** 0.5
        g = gradient(w, torch.arange(problem.samples))
        if method == "proximal_sgd":
            w = naive_prox(w - rate * g, problem, rate)
        else:
            z = z - rate * (g + (z - w) / gamma)
            w = naive_prox(z, problem, gamma)
        torch.testing.assert_close(run.weights[t], w, rtol=1e-9, atol=1e-9)


def naive_prox(u: Tensor, problem: Convex, weight: float) -> Tensor:
    """argmin of (w - u)^2 / 2 + weight Psi(w), cell by cell: Psi is affine on each."""
    q = problem.levels
    inner = problem.slopes[0] * weight
    found = []
    for value in u:
        candidates = [q]
        for i in range(len(q) - 1):
            candidates.append((value - inner[i]).clamp(q[i], q[i + 1])[None])
        points = torch.cat(candidates)
        steps = torch.cat([torch.zeros(1, dtype=q.dtype), (inner * q.diff()).cumsum(0)])
        cell = (torch.searchsorted(q, points) - 1).clamp(0, len(q) - 2)
        psi = steps[cell] + inner[cell] * (points - q[cell])
        found.append(points[((points - value).square() / 2 + psi).argmin()])
    return torch.stack(found)


def test_bad_settings() -> None:
    with pytest.raises(ValueError, match="got 'sgd'"):
        aprox(random_problem(), 5, method="sgd")
    problem = random_problem()
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        aprox(problem, 0)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        aprox(problem, 5, batch=0)
    with pytest.raises(ValueError, match="levels must increase"):
        aprox(replace(problem, levels=problem.levels.flip(0)), 5)
    with pytest.raises(ValueError, match=r"slopes must be \[1, 4\]"):
        aprox(replace(problem, slopes=problem.slopes[:, :2]), 5)
    ones = torch.ones(problem.size, dtype=torch.float64)
    with pytest.raises(ValueError, match="20 weights within the levels"):
        aprox(problem, 5, best=2 * ones)
    with pytest.raises(ValueError, match="best is none: the run found a value smaller by"):
        aprox(problem, 5, best=ones)
