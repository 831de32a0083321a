"""AProx on convex problems, in the setting of its theorem.

F(w) = f(w) + Psi(w), f convex and smooth, Psi the convex piecewise-affine regularizer with the
given levels and slopes, infinite outside them. Everything is float64 and made of the links that
train networks: the same prox link with other options is

    AProx          u <- u - eta_t g(w)
                   w <- prox of (eta_1 + ... + eta_t) Psi at u
    proximal SGD   w <- prox of eta_t Psi at w - eta_t g(w)
    normal map     u <- u - eta_t (g(w) + (u - w) / gamma)
                   w <- prox of gamma Psi at u

Source: Jin et al., PARQ, arXiv 2503.15748, section 4; normal map: Qiu, Jiang, Milzarek, arXiv
2305.05828.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from parq_fn import proxmaps
from parq_fn.foundation.value import Value, value
from parq_fn.quantizers import Quantizer
from parq_fn.transforms.chain import chain
from parq_fn.transforms.optimizers import sgd
from parq_fn.transforms.prox_links import custom_prox
from parq_fn.transforms.train import apply_updates, value_and_grad


@value
class fixed(Quantizer):
    """The same levels, [k] in increasing order, for every row, whatever its weights.

    >>> fixed(torch.tensor([-1.0, 1.0]))(torch.ones(2, 3))
    tensor([[-1.,  1.],
            [-1.,  1.]])
    """

    #: [k], the levels.
    points: Tensor

    @property
    def num_levels(self) -> int:
        return len(self.points)

    def fit(self, rows: Tensor, whole: Tensor | None = None) -> Tensor:
        del whole
        return self.points.to(rows.dtype).expand(*rows.shape[:-1], -1)


class Convex(Protocol):
    """A smooth convex f, the mean over samples, and what its regularizer is made of."""

    levels: Tensor  # [k], float64, in increasing order
    slopes: Tensor  # [1, k - 1], of `proxmaps.par`: infinite outside the levels
    samples: int
    size: int  # of w

    def loss(self, w: Tensor, index: Tensor) -> Tensor:
        """An unbiased estimate of f from the samples of the index."""
        ...

    def smoothness(self) -> float:
        """A Lipschitz constant of f's gradient."""
        ...

    def gradient_bound(self) -> float:
        """G: no gradient of f is longer while w lies within the levels."""
        ...


@value
class _OfMatrix(Value):
    """Base of the problems of a matrix."""

    #: [m, n], float64, a row a sample.
    a: Tensor

    @property
    def samples(self) -> int:
        return len(self.a)

    @property
    def size(self) -> int:
        return self.a.shape[1]


@value
class least_squares(_OfMatrix):
    """f(w) = |A w - b|^2 / 2.

    A is `a`.
    """

    #: [m], float64.
    b: Tensor
    #: [k], float64, in increasing order.
    levels: Tensor
    #: [1, k - 1], float64, as of `proxmaps.par`.
    slopes: Tensor

    def loss(self, w: Tensor, index: Tensor) -> Tensor:
        residual = self.a[index] @ w - self.b[index]
        return self.samples / len(index) * residual.square().sum() / 2

    def smoothness(self) -> float:
        return float(torch.linalg.matrix_norm(self.a, 2) ** 2)

    def gradient_bound(self) -> float:
        reach = float(self.levels.abs().max())
        residual = reach * self.a.abs().sum(1) + self.b.abs()
        return float((self.a.T.abs() @ residual).norm())


@value
class logistic(_OfMatrix):
    """f(w) = mean of log(1 + exp(-y_i a_i . w)).

    a_i is row i of `a`.
    """

    #: [m], float64, each -1 or 1.
    y: Tensor
    #: [k], float64, in increasing order.
    levels: Tensor
    #: [1, k - 1], float64, as of `proxmaps.par`.
    slopes: Tensor

    def loss(self, w: Tensor, index: Tensor) -> Tensor:
        return torch.nn.functional.softplus(-self.y[index] * (self.a[index] @ w)).mean()

    def smoothness(self) -> float:
        return float(torch.linalg.matrix_norm(self.a, 2) ** 2 / (4 * self.samples))

    def gradient_bound(self) -> float:
        return float(self.a.norm(dim=1).mean())


def random_problem(samples: int = 60, size: int = 20, seed: int = 0) -> least_squares:
    """A least-squares problem whose data come from weights on five levels, with noise.

    >>> random_problem().size
    20
    """
    draw = torch.Generator().manual_seed(seed)
    levels = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)
    a = torch.randn(samples, size, dtype=torch.float64, generator=draw) / samples**0.5
    truth = levels[torch.randint(5, (size,), generator=draw)]
    b = a @ truth + 0.1 * torch.randn(samples, dtype=torch.float64, generator=draw)
    slopes = proxmaps.symmetric_slopes(torch.tensor([[0.1, 0.3]], dtype=torch.float64))
    return least_squares(a, b, levels, slopes)


def objective(problem: Convex, w: Tensor) -> Tensor:
    """F(w) = f(w) + Psi(w), [] for w [n]."""
    penalty = proxmaps.par_regularizer(w[None], problem.levels[None], problem.slopes).sum()
    return problem.loss(w, torch.arange(problem.samples)) + penalty


def optimum(problem: Convex, steps: int = 20_000) -> Tensor:
    """The minimizer [n] of F, by proximal gradient steps of one over the smoothness."""
    w = torch.zeros(problem.size, dtype=torch.float64)
    rate, all_samples = 1 / problem.smoothness(), torch.arange(problem.samples)
    gradient = torch.func.grad(problem.loss)
    for _ in range(steps):
        u = w - rate * gradient(w, all_samples)
        new = proxmaps.par(u[None], problem.levels[None], rate * problem.slopes)[0]
        change, w = float((new - w).abs().max()), new
        if change <= 1e-15:  # the levels are of order 1
            break
    return w


def on_grid(w: Tensor, levels: Tensor) -> float:
    """The share of weights that are bit-equal to a level.

    >>> on_grid(torch.tensor([0.0, 0.3, 1.0, -1.0]), torch.tensor([-1.0, 0.0, 1.0]))
    0.75
    """
    return float((w[..., None] == levels).any(-1).double().mean())


class Run(NamedTuple):
    """What `aprox` reports, a row a step."""

    weights: Tensor  # [steps, n], float64: w after each step
    gap: Tensor  # [steps], float64: F(w) - min F
    on_grid: Tensor  # [steps], float64: share of weights bit-equal to a level
    bound: Tensor  # [steps], float64: the theorem's for AProx with whole gradients, else infinity


def aprox(
    problem: Convex,
    steps: int,
    *,
    method: str = "aprox",
    batch: int | None = None,
    gamma: float = 1.0,
    best: Tensor | None = None,
    seed: int = 0,
) -> Run:
    """Runs AProx, or what it is compared with, from w = 0 with the theorem's step sizes.

    eta_t = R / (2 G sqrt(t)), R = |w* - 0| and G the gradient's bound, for which

        F(w_t) - min F <= G R (2 + 1.5 ln t) / sqrt(t)

    at the last iterate of AProx, t from 1.

    problem: such as `least_squares(a, b, levels, slopes)`.
    steps: how many, 1 or more.
    method: "aprox", "proximal_sgd" or "normal_map" (with its gamma).
    batch: samples of a gradient, drawn anew each step; all of them by default.
    best: the minimizer of F, found by `optimum` where it is not given.
    gamma: of the normal map, of no meaning to the other methods.
    seed: of the samples that are drawn.
    Raises ValueError for another method, fewer than 1 step or sample, levels or slopes that are
    not increasing, and for a `best` that is no point within the levels, or is beaten.

    >>> run = aprox(random_problem(), 50)
    >>> bool((run.gap <= run.bound).all())
    True

    Source: Jin et al., PARQ, arXiv 2503.15748, theorem on the last iterate.
    """
    if method not in ("aprox", "proximal_sgd", "normal_map"):
        raise ValueError(f"method is aprox, proximal_sgd or normal_map, got {method!r}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    _check(problem)
    best = optimum(problem) if best is None else best
    if best.shape != (problem.size,) or not objective(problem, best).isfinite():
        raise ValueError(
            f"best must be {problem.size} weights within the levels, got {tuple(best.shape)}"
        )
    least, radius, bound = objective(problem, best), float(best.norm()), problem.gradient_bound()
    t = torch.arange(1, steps + 1, dtype=torch.float64)
    rates = radius / (2 * bound) / t.sqrt()

    def rate(count: Tensor) -> Tensor:
        return rates[count]

    def scaled_par(u: Tensor, levels: Tensor, coefficient: Tensor) -> Tensor:
        return proxmaps.par(u, levels, coefficient * problem.slopes)

    def total(count: Tensor) -> Tensor:
        return rates.cumsum(0)[count]

    grid = fixed(problem.levels)
    if method == "aprox":
        link = custom_prox(grid, scaled_par, total)
    elif method == "proximal_sgd":
        link = custom_prox(grid, scaled_par, rate, normal_map=1.0, learning_rate=1.0)
    else:
        link = custom_prox(grid, scaled_par, gamma, normal_map=gamma, learning_rate=rate)
    transform = chain(sgd(rate), link)

    draw = torch.Generator().manual_seed(seed)
    everything = torch.arange(problem.samples)
    params = torch.zeros(problem.size, dtype=torch.float64)
    state, step = transform.init(params), value_and_grad(problem.loss, transform)
    seen = []
    for _ in range(steps):
        some = everything if batch is None else _some(problem.samples, batch, draw)
        _, grads = step(params, state, some)
        updates, state = transform.update(grads, state, params)
        params = apply_updates(params, updates)
        seen.append(transform.weights(state, params))
    weights = torch.stack(seen)
    gap = torch.stack([objective(problem, w) - least for w in seen])
    if bool((gap < -1e-9).any()):
        raise ValueError(f"best is none: the run found a value smaller by {-float(gap.min()):.3g}")
    shares = (weights[..., None] == problem.levels).any(-1).double().mean(-1)
    applies = method == "aprox" and batch is None
    bounds = bound * radius * (2 + 1.5 * t.log()) / t.sqrt()
    return Run(weights, gap, shares, bounds if applies else torch.full_like(t, torch.inf))


def _check(problem: Convex) -> None:
    levels, slopes = problem.levels, problem.slopes
    if not bool((levels.diff() > 0).all()):
        raise ValueError(f"levels must increase, got {levels.tolist()}")
    if slopes.shape != (1, len(levels) - 1) or not bool((slopes.diff() >= 0).all()):
        raise ValueError(
            f"slopes must be [1, {len(levels) - 1}] and not decrease, got {slopes.tolist()}"
        )


def _some(samples: int, batch: int, draw: torch.Generator) -> Tensor:
    return torch.randint(samples, (batch,), generator=draw)
