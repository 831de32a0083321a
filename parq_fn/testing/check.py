"""Checkers: an operator against its laws, on random input, with a small counterexample.

Each takes `laws`: None for what the operator declares (and what all of its kind keep to), or
names of laws, laws, or both. `max_examples` counts per law; without it the loaded hypothesis
profile's. They raise AssertionError (a `Violation`, with the law and both sides as attributes)
for the first law that does not hold (its text names the others), and ValueError for a name that
no law of the kind has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException
from torch import Tensor

from parq_fn.foundation.value import show
from parq_fn.testing import cases
from parq_fn.testing import laws as all_laws
from parq_fn.testing.law import Law, Violation

Laws = Iterable[str | Law] | None
#: Names of inputs -> the strategy of a dict of them.
Inputs = Callable[[set[str]], st.SearchStrategy[Any]]


def find_violation(
    laws: Sequence[Law], operator: Any, inputs: Inputs, max_examples: int | None, *, shrink: bool
) -> Violation | None:
    """A violation of one of the laws, on inputs that all of them are checked on.

    An exception that the operator raises is a violation too.
    """
    seen: list[Violation] = []

    def run(case: dict[str, Any]) -> None:
        for law in laws:
            own = {name: case[name] for name in law.inputs}
            try:
                law.check(operator, **own)
                continue
            except Violation as violation:
                seen.append(violation)
            except HypothesisException:
                raise
            except Exception as error:
                seen.append(Violation(law, own, None, operator, error))
            raise seen[-1]

    options = {} if max_examples is None else {"max_examples": max_examples}
    quiet = settings(
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
        **options,  # type: ignore[arg-type] # of one key, which is of this type
    )
    names = {name for law in laws for name in law.inputs}
    try:
        quiet(given(inputs(names))(run))()
    except Exception:  # a violation, or hypothesis on one that does not repeat
        if not seen:
            raise
        return seen[-1]
    return None


def violations(
    laws: Iterable[Law], operator: Any, inputs: Inputs, max_examples: int | None = None
) -> list[Violation]:
    """A violation of every law that does not hold, in the order of the laws, as first found.

    Laws that share inputs are checked together, which saves drawing them anew.
    """
    laws = list(laws)
    for law in laws:
        cases.check_inputs(law)
    groups: dict[frozenset[str], list[Law]] = {}
    for law in laws:
        groups.setdefault(frozenset(law.inputs) & cases.SETS, []).append(law)
    found: dict[str, Violation] = {}
    for group in groups.values():
        while group:
            violation = find_violation(group, operator, inputs, max_examples, shrink=False)
            if violation is None:
                break
            found[violation.law.name] = violation
            group.remove(violation.law)
    return [found[law.name] for law in laws if law.name in found]


def shrunk(violation: Violation, inputs: Inputs, max_examples: int | None = None) -> Violation:
    """A small violation of the same law by the same operator, where it is found once more."""
    more = 10 * (max_examples or settings().max_examples)  # inputs are drawn anew
    alone = find_violation([violation.law], violation.operator, inputs, more, shrink=True)
    return alone or violation


def _check(operator: Any, laws: Iterable[Law], inputs: Inputs, max_examples: int | None) -> None:
    found = violations(laws, operator, inputs, max_examples)
    if found:
        first = shrunk(found[0], inputs, max_examples)
        if first.error is None:  # else they only tell the same again
            first.others = tuple(violation.law.name for violation in found[1:])
        raise first from first.error


class MapAdapter:
    """A map as the laws call it: f(u, levels, c), with c None for a map without coefficient."""

    def __init__(self, map: Any):
        self.map, self.__name__ = map, show(map)

    def __call__(self, u: Any, levels: Any, c: Any) -> Any:
        got = self.map(u, levels) if c is None else self.map(u, levels, c)
        if not isinstance(got, Tensor):
            raise TypeError(f"a map gives a tensor, this one gave a {type(got).__name__}")
        return got


def proxmap_inputs(map: Any, coefficient: Any = None) -> Inputs:
    """The inputs of a map's laws; ValueError for a coefficient that is missing."""
    traits = all_laws.proxmap_traits(map)
    if coefficient is None and traits.coefficients is None:
        third = list(inspect.signature(map).parameters.values())[2:3]
        if any(p.default is p.empty and p.kind is not p.VAR_POSITIONAL for p in third):
            raise ValueError(
                f"{show(map)} takes a coefficient and declares no domain for it; give a value "
                "or a strategy: check_proxmap(map, coefficient=...)"
            )
    return partial(cases.proxmap_case, traits=traits, coefficient=coefficient)


def check_proxmap(
    map: Any, *, coefficient: Any = None, laws: Laws = None, max_examples: int | None = None
) -> None:
    """Checks map(u [r, n], levels [r, k], coefficient) -> w [r, n], or map(u, levels).

    map: a `ProxMap`, or a function.
    coefficient: a number, or a hypothesis strategy of them; without it, from what the map
    declares. ValueError where it declares nothing and needs one.
    laws: names of them, or laws; by default all that the operator is held to.
    max_examples: of each law; by default hypothesis's.

    >>> import torch
    >>> def lowest(u, levels):
    ...     return levels[..., :1] - u
    >>> try:
    ...     check_proxmap(lowest, laws={"monotone"}, max_examples=20)
    ... except AssertionError as error:
    ...     print(str(error).splitlines()[0])
    lowest breaks the law 'monotone'
    """
    inputs = proxmap_inputs(map, coefficient)
    chosen = all_laws.chosen("proxmap", all_laws.proxmap_traits(map), laws)
    _check(MapAdapter(map), chosen, inputs, max_examples)


def check_quantizer(quantizer: Any, *, laws: Laws = None, max_examples: int | None = None) -> None:
    """Checks quantizer(rows [r, n]) -> levels [r, k].

    quantizer: one of the library, or of one's own.
    laws: names of them, or laws; by default all that the operator is held to.
    max_examples: of each law; by default hypothesis's.

    >>> from parq_fn import lsbq
    >>> check_quantizer(lsbq(1), laws={"pythagoras"}, max_examples=5)
    """
    traits = all_laws.quantizer_traits(quantizer)
    inputs = partial(cases.quantizer_case, traits=traits)
    _check(quantizer, all_laws.chosen("quantizer", traits, laws), inputs, max_examples)


def check_schedule(
    schedule: Any,
    *,
    start: float | None = None,
    end: float | None = None,
    laws: Laws = None,
    max_examples: int | None = None,
) -> None:
    """Checks schedule(step) between start and end, 0 and 10 where nothing says which.

    Without traits it is held to an annealing's laws: from 1 down to 0.

    schedule: step -> number.
    start, end: the steps between which it changes.
    laws: names of them, or laws; by default all that the operator is held to.
    max_examples: of each law; by default hypothesis's.

    >>> from parq_fn import schedules
    >>> check_schedule(schedules.linear(1.0, 0.0, 5, 15), max_examples=5)
    """
    traits = all_laws.schedule_traits(schedule, start, end)
    inputs = partial(cases.schedule_case, traits=traits)
    _check(schedule, all_laws.chosen("schedule", traits, laws), inputs, max_examples)


def check_transformation(
    transformation: Any,
    *,
    params: st.SearchStrategy[Any] | None = None,
    laws: Laws = None,
    max_examples: int | None = None,
) -> None:
    """Checks init, update and weights along random trainings.

    transformation: a link, a chain, or anything with these three methods.
    params: a strategy of parameter trees, dicts with an entry "w0"; without it every kind of
    tree, leaf, dtype and memory format.
    laws: names of them, or laws; by default all that the operator is held to.
    max_examples: of each law; by default hypothesis's.

    >>> from parq_fn import sgd
    >>> check_transformation(sgd(0.1), laws={"update_is_pure"}, max_examples=5)
    """
    traits = all_laws.transformation_traits(transformation)
    inputs = partial(
        cases.transformation_case, traits=traits, params=params, transformation=transformation
    )
    chosen = all_laws.chosen("transformation", traits, laws)
    _check(transformation, chosen, inputs, max_examples)


__all__ = [
    "check_proxmap",
    "check_quantizer",
    "check_schedule",
    "check_transformation",
    "find_violation",
    "shrunk",
    "violations",
]
