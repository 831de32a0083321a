"""The laws, as values: all of a kind, those that an operator declares, or one by name.

>>> from parq_fn import proxmaps
>>> named("proxmap", "cocoercive").formula
'<f(u) - f(v), u - v> >= g(c) |f(u) - f(v)|^2'
>>> {law.name for law in for_proxmap(proxmaps.parq)} >= {"cocoercive", "semigroup"}
True
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

from parq_fn.foundation.traits import (
    ProxTraits,
    QuantizerTraits,
    ScheduleTraits,
    TransformationTraits,
    traits_of,
)
from parq_fn.foundation.value import show
from parq_fn.schedules import Schedule
from parq_fn.testing.law import Law
from parq_fn.testing.laws import levels as _levels
from parq_fn.testing.laws import motion as _motion
from parq_fn.testing.laws import prox_links as _prox_links
from parq_fn.testing.laws import proximal as _proximal
from parq_fn.testing.laws import proxmaps, quantizers, schedules, transformations
from parq_fn.testing.laws import pullback as _pullback
from parq_fn.testing.laws import qparams as _qparams

# imported for the laws that they add
del _levels, _motion, _proximal, _prox_links, _pullback, _qparams

#: All laws, by kind.
ALL: dict[str, tuple[Law, ...]] = {
    "proxmap": tuple(proxmaps.LAWS),
    "quantizer": tuple(quantizers.LAWS),
    "schedule": tuple(schedules.LAWS),
    "transformation": tuple(transformations.LAWS),
}


def named(kind: str, name: str) -> Law:
    """The law of that kind and name; ValueError with the names there are."""
    for law in ALL[kind]:
        if law.name == name:
            return law
    known = ", ".join(law.name for law in ALL[kind])
    raise ValueError(f"no {kind} law is named {name!r}; there are: {known}")


def chosen(kind: str, traits: Any, laws: Iterable[str | Law] | None) -> tuple[Law, ...]:
    """What `laws=` means: None all that apply, otherwise those named or given.

    Raises ValueError for an unknown name, a law of another kind, and one made from a trait that
    is not declared.
    """
    if laws is None:
        return tuple(w for w in ALL[kind] if not w.missing(traits) and w.applies(traits))
    if isinstance(laws, str | Law):
        laws = (laws,)
    out: list[Law] = []
    for law in laws:
        if isinstance(law, str):
            law = named(kind, law)
        if not isinstance(law, Law):
            raise TypeError(f"laws are names or laws, got {law!r}")
        if law.kind != kind:
            raise ValueError(f"{law.name!r} is a law of a {law.kind}, not of a {kind}")
        if missing := law.missing(traits):
            raise ValueError(
                f"the law {law.name!r} is made from what the {kind} declares, and these of its "
                f"traits are missing: {', '.join(missing)}; see {type(traits).__name__}"
            )
        if law not in out:
            out.append(law)
    if not out:
        raise ValueError("laws is empty: there is nothing to check; None checks what is declared")
    order = {law.name: i for i, law in enumerate(ALL[kind])}
    return tuple(sorted(out, key=lambda law: order.get(law.name, len(order))))


_Traits = TypeVar("_Traits")


def _declared(operator: Any, kind: str, traits: type[_Traits]) -> _Traits:
    """What the operator declares, or what all of its kind must keep to; TypeError where it is
    of another kind."""
    if isinstance(operator, type):
        name = operator.__name__
        raise TypeError(f"expected a {kind}, got the class {name}; call it: {name}(...)")
    got = traits_of(operator)
    if got is None:
        if not callable(operator) and not hasattr(operator, "update"):
            raise TypeError(f"expected a {kind}, got {operator!r}")
        return traits()
    if not isinstance(got, traits):
        raise TypeError(f"expected a {kind}, got {show(operator)}, which has {type(got).__name__}")
    return got


def proxmap_traits(map: Any) -> ProxTraits:
    """What the map declares, or what every map must keep to."""
    return _declared(map, "prox map", ProxTraits)


def quantizer_traits(quantizer: Any) -> QuantizerTraits:
    """What the quantizer declares, or what every quantizer must keep to."""
    return _declared(quantizer, "quantizer", QuantizerTraits)


def schedule_traits(
    schedule: Any, start: float | None = None, end: float | None = None
) -> ScheduleTraits:
    """What the schedule declares, or an annealing's traits; start and end as given."""
    traits = _declared(schedule, "schedule", ScheduleTraits)
    if (start is not None or end is not None) and traits == Schedule().traits:
        traits = ScheduleTraits()  # says nothing of itself, and is said to anneal
    if start is not None:
        traits = replace(traits, start=start)
    traits = traits if end is None else replace(traits, end=end)
    if traits.start is not None and traits.end is not None and not traits.start < traits.end:
        raise ValueError(f"start must come before end, got {traits.start} and {traits.end}")
    return traits


def transformation_traits(transformation: Any) -> TransformationTraits:
    """What the transformation declares, or what every transformation must keep to."""
    return _declared(transformation, "transformation", TransformationTraits)


def for_proxmap(map: Any) -> tuple[Law, ...]:
    """The laws that the map declares, and those of every map."""
    return chosen("proxmap", proxmap_traits(map), None)


def for_quantizer(quantizer: Any) -> tuple[Law, ...]:
    """The laws that the quantizer declares, and those of every quantizer."""
    return chosen("quantizer", quantizer_traits(quantizer), None)


def for_schedule(schedule: Any) -> tuple[Law, ...]:
    """The laws that the schedule declares, or an annealing's."""
    return chosen("schedule", schedule_traits(schedule), None)


def for_transformation(transformation: Any) -> tuple[Law, ...]:
    """The laws of every transformation, and of a prox link those of its kind."""
    return chosen("transformation", transformation_traits(transformation), None)
