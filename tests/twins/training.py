"""AProx with momentum SGD on one row of weights, a float at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

Row = list[float]


def aprox(
    u: Row,
    gradient: Callable[[Row, int], Row],
    steps: int,
    *,
    quantizer: Callable[[Row], Row],
    proxmap: Callable[[float, Row, float], float],
    schedule: Callable[[int], float],
    start: int,
    period: int,
    warmup: int,
    rate: float,
    momentum: float = 0.0,
    decay: float = 0.0,
    gamma: float | None = None,
) -> Iterator[tuple[Row, Row, Row]]:
    """(u, Q, w) after every step; with gamma the latent is pulled to the weight besides."""
    u, w, velocity, levels = list(u), list(u), [0.0] * len(u), []
    for t in range(steps):
        grad = gradient(w, t)
        for i in range(len(u)):
            g = grad[i] + decay * u[i]
            velocity[i] = g if t == 0 else momentum * velocity[i] + g
            pull = 0.0 if gamma is None else rate / gamma * (u[i] - w[i])
            u[i] = u[i] - rate * velocity[i] - pull
        if t >= warmup and (t - warmup) % period == 0:
            levels = quantizer(u)
        on = t >= warmup and t >= start
        w = [proxmap(a, levels, schedule(t)) for a in u] if on else list(u)
        yield list(u), list(levels), list(w)
