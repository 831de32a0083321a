"""Intervals, and checks of hyperparameters, made where a link, quantizer or schedule is built.

Checked is what can be read: a number, or a 0-d tensor on the CPU outside of any trace. A
schedule, a tensor batched by `vmap` and one traced by a compiler pass.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from parq_fn.foundation.scalar import concrete, is_number
from parq_fn.foundation.value import Value, briefly, value


@value
class Interval(Value):
    """The numbers from low to high, each end among them unless `open_low` or `open_high`.

    >>> share = Interval(0.0, 1.0, open_low=True)
    >>> 0.0 in share, 1.0 in share, str(share)
    (False, True, '(0, 1]')
    """

    #: The lower end.
    low: float
    #: The upper end.
    high: float
    #: Whether the lower end is left out.
    open_low: bool = False
    #: Whether the upper end is left out.
    open_high: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.low if self.open_low else number >= self.low
        below = number < self.high if self.open_high else number <= self.high
        return above and below

    def __str__(self) -> str:
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"{left}{self.low:g}, {self.high:g}{right}"


FINITE = Interval(-math.inf, math.inf, open_low=True, open_high=True)
NOT_NEGATIVE = Interval(0.0, math.inf, open_high=True)
POSITIVE = Interval(0.0, math.inf, open_low=True, open_high=True)
SHARE = Interval(0.0, 1.0)
DECAY = Interval(0.0, 1.0, open_high=True)


def readable(hyperparameter: Any) -> Any:
    """The number that a hyperparameter is or holds; None where there is none to be had."""
    if isinstance(hyperparameter, Tensor):
        return concrete(hyperparameter) if hyperparameter.dim() == 0 else None
    return hyperparameter if is_number(hyperparameter) else None


def check_numbers(
    who: str, within: Interval = FINITE, *, schedules: bool = False, **fields: Any
) -> None:
    """Raises TypeError unless every field is a number or a tensor, or with `schedules` a
    function of the step; ValueError unless it is 0-d and lies within the interval.

    >>> check_numbers("sgd", NOT_NEGATIVE, learning_rate=-0.1)
    Traceback (most recent call last):
    ValueError: sgd: learning_rate must lie in [0, inf), got -0.1
    """
    for name, got in fields.items():
        if schedules and callable(got) and not isinstance(got, type):
            continue
        if not (is_number(got) or isinstance(got, Tensor)):
            allowed = "a number, a 0-d tensor" + (" or a schedule" if schedules else "")
            raise TypeError(f"{who}: {name} must be {allowed}, got {briefly(got)}")
        if isinstance(got, Tensor) and got.dim() > 0:
            raise ValueError(
                f"{who}: {name} must be a number or a 0-d tensor, got shape {tuple(got.shape)}; "
                "vmap over it to try several"
            )
        number = readable(got)
        if number is not None and number not in within:
            raise ValueError(f"{who}: {name} must lie in {within}, got {number}")


def check_kind(who: str, got: Any, expected: str, *names: str) -> None:
    """Raises TypeError unless what was got has attributes of these names, and is no class.

    >>> from parq_fn import lsbq
    >>> check_kind("hard_prox", lsbq, "a quantizer such as lsbq(2)", "fit")
    Traceback (most recent call last):
    TypeError: hard_prox: expected a quantizer such as lsbq(2), got the class lsbq, which is to be
    called: lsbq(...)
    """
    if isinstance(got, type) or not all(hasattr(got, name) for name in names):
        raise TypeError(f"{who}: expected {expected}, got {briefly(got)}")


def check_whole(who: str, low: int, high: float = math.inf, **fields: Any) -> None:
    """Raises TypeError unless every field is a whole number or a tensor, ValueError unless it
    lies in low..high.

    >>> check_whole("lsbq", 0, 8, bits=9)
    Traceback (most recent call last):
    ValueError: lsbq: bits must lie in 0..8, got 9
    """
    for name, got in fields.items():
        whole = isinstance(got, numbers.Integral) and not isinstance(got, bool)
        if not (whole or isinstance(got, Tensor)):
            raise TypeError(f"{who}: {name} must be a whole number, got {briefly(got)}")
        number = readable(got)
        if number is not None and not low <= number <= high:
            bounds = f"lie in {low}..{high}" if high < math.inf else f"be {low} or more"
            raise ValueError(f"{who}: {name} must {bounds}, got {number}")


def check_before(who: str, **fields: Any) -> None:
    """Raises ValueError unless the first of two fields is less than the second.

    >>> check_before("linear", start_step=5, end_step=5)
    Traceback (most recent call last):
    ValueError: linear: start_step must come before end_step, got start_step=5, end_step=5
    """
    check_numbers(who, **fields)
    (first, start), (last, end) = ((name, readable(got)) for name, got in fields.items())
    if start is not None and end is not None and not start < end:
        raise ValueError(
            f"{who}: {first} must come before {last}, got {first}={start}, {last}={end}"
        )


def steps_of(who: str, total_steps: Any, **shares: Any) -> dict[str, Any]:
    """The whole steps nearest to two shares of a training, the first before the second; those of
    tensors are tensors.

    Raises TypeError and ValueError for what is no number of steps, or no share of them, and where
    both shares are one step.

    >>> steps_of("parq_prox", 1000, anneal_start=0.1, anneal_end=0.9)
    {'anneal_start': 100, 'anneal_end': 900}
    """
    check_whole(who, 1, total_steps=total_steps)
    check_numbers(who, **shares)
    for name, got in shares.items():
        share = readable(got)
        if share is not None and share not in SHARE:
            raise ValueError(
                f"{who}: with total_steps={total_steps} bounds are fractions of it, in {SHARE}, "
                f"got {name}={share}; leave total_steps out where bounds are steps"
            )
    check_before(who, **shares)
    found = {
        name: (got * total_steps).round()
        if isinstance(got, Tensor) or isinstance(total_steps, Tensor)
        else round(got * total_steps)
        for name, got in shares.items()
    }
    first, last = map(readable, found.values())
    if first is not None and first == last:
        both = " and ".join(f"{name}={readable(got)}" for name, got in shares.items())
        raise ValueError(
            f"{who}: {both} are both step {first} of total_steps={total_steps}, expected one "
            "before the other; take fractions that are further apart"
        )
    return found


def check_annealing(who: str, hint: str = "", **bounds: Any) -> None:
    """Raises ValueError unless two bounds of an annealing are steps, one before the other; between
    0 and 1, and as 0.0 and 1.0, they are meant for fractions of the training, of whose length
    nothing is known here. hint: what else can be done then.

    >>> check_annealing("parq_prox", anneal_start=0, anneal_end=0.9)
    Traceback (most recent call last):
    ValueError: parq_prox: anneal_end=0.9 is between 0 and 1, and bounds are steps, not fractions of
    the training; give 0.9 times the number of steps
    """
    check_before(who, **bounds)
    found = [readable(got) for got in bounds.values()]
    shares = found == [0, 1] and all(isinstance(got, float) for got in bounds.values())
    for name, bound in zip(bounds, found, strict=True):
        if bound is not None and (0 < bound < 1 or (shares and bound == 1)):
            raise ValueError(
                f"{who}: {name}={bound} is between 0 and 1, and bounds are steps, not fractions of "
                f"the training; give {bound} times the number of steps{hint}"
            )


def check_boundaries(who: str, what: str, count: int, boundaries: Sequence[Any]) -> None:
    """Raises ValueError unless boundaries increase and are one less than what they part.

    >>> check_boundaries("piecewise", "values", 2, (10, 20))
    Traceback (most recent call last):
    ValueError: piecewise: expected one more of values than of boundaries, got 2 values and 2
    boundaries
    """
    if count != len(boundaries) + 1:
        raise ValueError(
            f"{who}: expected one more of {what} than of boundaries, got {count} {what} and "
            f"{len(boundaries)} boundaries"
        )
    known = [b for b in map(readable, boundaries) if b is not None]
    if any(not a < b for a, b in itertools.pairwise(known)):
        raise ValueError(f"{who}: boundaries must increase, got {tuple(boundaries)}")


def instead_of(got: Any) -> str:
    """What to say of an optimizer in the place of a transformation."""
    name = getattr(got, "__name__", type(got).__name__)
    if hasattr(got, "transformation_state"):
        return f"a {name}; give its transformation and its transformation_state"
    if hasattr(got, "averaged_weights"):
        return (
            f"a {name}, expected a transformation; an optimizer has methods of its own: "
            "optimizer.levels(p), `with optimizer.averaged_weights():`, optimizer.state[p]"
        )
    return (
        f"torch.optim's {name}, expected a transformation such as sgd, adam or adamw; make one of "
        f"torch's, as_link({name}, lr=...), or to train a module with it, give it to "
        "parq_fn.optim.QuantOptimizer(optimizer, prox)"
    )
