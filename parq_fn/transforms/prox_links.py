"""The prox links: for each map a schedule of its coefficient; `prox_link` says what they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field

import torch
from torch import Tensor

from parq_fn import proxmaps, schedules
from parq_fn.foundation.checks import (
    NOT_NEGATIVE,
    POSITIVE,
    check_annealing,
    check_numbers,
    readable,
    steps_of,
)
from parq_fn.foundation.scalar import Scalar, at
from parq_fn.foundation.value import value
from parq_fn.transforms.prox_link import Prox


@value
class hard_prox(Prox):
    """w = nearest level of u, from warmup on: the straight-through estimator as a link.

    Options as in `Prox`.

    >>> from parq_fn import apply_updates, chain, lsbq, sgd
    >>> transform, params = chain(sgd(0.0), hard_prox(lsbq(1))), {"w": torch.tensor([1.0, -3.0])}
    >>> updates, state = transform.update(params, transform.init(params), params)
    >>> transform.weights(state, apply_updates(params, updates))
    {'w': tensor([ 2., -2.])}
    """

    proxmap = proxmaps.hard

    @property
    def ends(self) -> float | Tensor:
        return 0


@value
class _Annealed(Prox):
    """A prox link whose map sharpens from anneal_start to anneal_end and is hard from then on.

    With total_steps, the number of steps of the training, both bounds are fractions of it; the
    link keeps the whole steps nearest to them, and prints and compares as one that was given these.

    Raises ValueError unless anneal_start < anneal_end, and for bounds between 0 and 1 without
    total_steps, or outside of them with it.
    """

    #: The step at which the annealing starts.
    anneal_start: float | Tensor = field(kw_only=True)
    #: The step from which on every weight is on a level.
    anneal_end: float | Tensor = field(kw_only=True)
    #: Of the training, where both are fractions of it; None where they are steps.
    total_steps: int | Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        who = type(self).__name__
        bounds = {"anneal_start": self.anneal_start, "anneal_end": self.anneal_end}
        if self.total_steps is None:
            check_annealing(who, ", or total_steps=", **bounds)
        else:
            steps = steps_of(who, self.total_steps, **bounds)
            for name, got in {**steps, "total_steps": None}.items():
                object.__setattr__(self, name, got)
        warmup, end = readable(self.warmup), readable(self.anneal_end)
        if warmup and end is not None and warmup >= end:
            raise ValueError(
                f"{who}: warmup must end before anneal_end, or nothing is annealed, got "
                f"warmup={warmup}, anneal_end={end}"
            )

    @property
    def begins(self) -> float | Tensor:
        return self.anneal_start

    @property
    def ends(self) -> float | Tensor:
        return self.anneal_end

    def _progress(self, step: Tensor) -> Tensor:
        return schedules.progress(step, self.anneal_start, self.anneal_end)


@value
class parq_prox(_Annealed):
    """w = parq(u, levels, s), s the `inverse_slope` schedule of anneal_start, anneal_end,
    steepness and center; w = u before anneal_start.

    At anneal_start s = 1, and weights outside the range of the levels jump to its ends. With
    clipped_start=True they are held to the range from warmup on instead.

    Options as in `Prox`.

    >>> from parq_fn import lsbq, per_channel
    >>> parq_prox(lsbq(2), anneal_start=100, anneal_end=2000, granularity=per_channel())
    parq_prox(lsbq(2), anneal_start=100, anneal_end=2000, granularity=per_channel())
    >>> parq_prox(lsbq(2), anneal_start=0.1, anneal_end=0.9, total_steps=2000)
    parq_prox(lsbq(2), anneal_start=200, anneal_end=1800)

    Source: Jin et al., PARQ, arXiv 2503.15748.
    """

    proxmap = proxmaps.parq

    #: Of the sigmoid between these steps.
    steepness: float | Tensor = field(default=10.0, kw_only=True)
    #: Of the sigmoid, as a share of the annealing.
    center: float | Tensor = field(default=0.5, kw_only=True)
    #: Whether weights are held to the range of the levels before anneal_start too.
    clipped_start: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._schedule()

    @property
    def begins(self) -> float | Tensor:
        return 0 if self.clipped_start else self.anneal_start

    def _schedule(self) -> schedules.inverse_slope:
        return schedules.inverse_slope(
            self.anneal_start, self.anneal_end, self.steepness, self.center
        )

    def coefficient(self, step: Tensor) -> Tensor:
        return self._schedule()(step)


@value
class soft_prox(_Annealed):
    """w = soft(u, levels, T), T from `temperature` to `end_temperature` in the `power`-th power
    of the progress from anneal_start to anneal_end, then hard; w = u before anneal_start.

    Options as in `Prox`.

    >>> from parq_fn import lsbq
    >>> soft_prox(lsbq(2), anneal_start=0, anneal_end=9).coefficient(torch.tensor([0, 9]))
    tensor([1., inf], dtype=torch.float64)
    """

    proxmap = proxmaps.soft

    #: At anneal_start.
    temperature: float | Tensor = field(default=1.0, kw_only=True)
    #: Just before anneal_end.
    end_temperature: float | Tensor = field(default=1000.0, kw_only=True)
    #: Of the progress.
    power: float | Tensor = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("soft_prox", NOT_NEGATIVE, temperature=self.temperature)
        check_numbers("soft_prox", NOT_NEGATIVE, end_temperature=self.end_temperature)
        check_numbers("soft_prox", POSITIVE, power=self.power)

    def coefficient(self, step: Tensor) -> Tensor:
        x = self._progress(step) ** self.power
        relaxed = (1 - x) * self.temperature + x * self.end_temperature
        return torch.where(step >= self.anneal_end, torch.inf, relaxed)


@value
class binary_relax_prox(_Annealed):
    """w = binary_relax(u, levels, theta), theta from 0 at anneal_start to 1 at anneal_end,
    linear in the steps between, then hard.

    Options as in `Prox`.

    >>> from parq_fn import lsbq
    >>> binary_relax_prox(lsbq(2), anneal_start=0, anneal_end=8).coefficient(torch.tensor(2))
    tensor(0.2500, dtype=torch.float64)

    Source: Yin et al., BinaryRelax, arXiv 1801.06313.
    """

    proxmap = proxmaps.binary_relax

    def coefficient(self, step: Tensor) -> Tensor:
        return self._progress(step)


@value
class proxquant_prox(_Annealed):
    """w = proxquant(u, levels, lam), lam from 0 at anneal_start to `strength` at anneal_end,
    linear in the steps between, then hard.

    strength is in the units of the weights: about half a cell's width makes the last annealed
    weights nearly hard. Options as in `Prox`.

    >>> from parq_fn import lsbq
    >>> link = proxquant_prox(lsbq(2), anneal_start=0, anneal_end=8, strength=0.1)
    >>> link.coefficient(torch.tensor([4, 8]))
    tensor([0.0500,    inf], dtype=torch.float64)

    Source: Bai, Wang, Liberty, ProxQuant, arXiv 1810.00861.
    """

    proxmap = proxmaps.proxquant

    #: The distance by which weights may move, just before anneal_end.
    strength: float | Tensor = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers("proxquant_prox", NOT_NEGATIVE, strength=self.strength)

    def coefficient(self, step: Tensor) -> Tensor:
        relaxed = self._progress(step) * self.strength
        return torch.where(step >= self.anneal_end, torch.inf, relaxed)


@value
class custom_prox(Prox):
    """w = map(u, levels, schedule(t)) from warmup and step `start` on: a prox link from a map
    and a schedule of your own.

    The map takes latent rows [r, n], levels [r, k] in ascending order and a 0-d coefficient, and
    gives weights [r, n]. What is to be a level at its end it must take from the levels
    (`torch.where(c >= 1, hard(u, levels), ...)`): u + c * (level - u) is not the level at c = 1.
    It sees whole rows, unless it declares the trait `elementwise` (see `proxmaps.prox_map`): such
    a one may be given pieces of them, which is faster.

    Options as in `Prox`.

    >>> from parq_fn import lsbq, proxmaps, schedules
    >>> custom_prox(lsbq(2), proxmaps.binary_relax, schedules.linear(0.0, 0.9, 0, 1000))
    custom_prox(lsbq(2), binary_relax, linear(0.0, 0.9, 0, 1000))
    """

    #: (u [r, n], levels [r, k], coefficient []) -> weights [r, n].
    map: Callable[[Tensor, Tensor, Tensor], Tensor]
    #: step -> coefficient.
    schedule: Scalar
    #: The first step whose weights the map makes.
    start: float | Tensor = field(default=0, kw_only=True)

    @property
    def begins(self) -> float | Tensor:
        return self.start

    def coefficient(self, step: Tensor) -> Tensor:
        return at(self.schedule, step)

    @property
    def proxmap(self) -> Callable[..., Tensor]:
        return self.map
