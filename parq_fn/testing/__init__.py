"""The laws of this library's operators, as a test kit for yours.

    check_proxmap(map)    check_quantizer(quantizer)    check_schedule(schedule)
    check_transformation(transformation)                report(operator)

check an operator against the laws that it declares (its `traits`) and those of all its kind,
on random input, and raise an AssertionError with a small counterexample. `laws` holds the laws
as values, `strategies` the hypothesis strategies that they are checked on. What an operator can
declare say `help(ProxTraits)`, `help(QuantizerTraits)`, `help(ScheduleTraits)` and
`help(TransformationTraits)`, of `parq_fn.foundation.traits`.

>>> from parq_fn.testing import check_proxmap, laws
>>> from parq_fn import proxmaps
>>> check_proxmap(proxmaps.parq, laws={"cocoercive", "share"}, max_examples=5)
>>> [law.name for law in laws.for_proxmap(proxmaps.hard)][:3]
['pure', 'finite', 'elementwise']

A law of your own
-----------------

is a function of the operator and of inputs that it names as parameters. It returns what is claimed,
`equal(left, right)` or `at_most(left, right)`, or yields several claims; tensors are compared
element by element, to a tolerance relative to what is larger than 1. A `Collection` makes a `Law`
of it, with a statement, a formula, and a reason for a tolerance other than 0:

>>> from parq_fn.foundation.checks import Interval
>>> from parq_fn.foundation.traits import ProxTraits, declares
>>> from parq_fn.testing import Collection, at_most
>>> own = Collection("proxmap")  # or "quantizer", "schedule", "transformation"
>>> @own.law(
...     "no weight loses more than c of its size",
...     "|u| - c <= |f(u)|",
...     tolerance=1e-12,
...     reason="two differences, each rounded",
... )
... def loses_little(f, u, levels, c):
...     return at_most(u.abs() - c, f(u, levels, c).abs())

The operator that it is a law of, with what it declares (the coefficients that c is drawn from), and
one that breaks it:

>>> @declares(ProxTraits(coefficients=Interval(0.0, 10.0), elementwise=True))
... def soft_threshold(u, levels, c):
...     return u.sign() * (u.abs() - c).clamp(min=0)
>>> check_proxmap(soft_threshold, laws=own, max_examples=20)
>>> @declares(soft_threshold.traits)
... def twice(u, levels, c):
...     return u.sign() * (u.abs() - 2 * c).clamp(min=0)
>>> try:
...     check_proxmap(twice, laws=own, max_examples=20)
... except AssertionError as violation:
...     print(violation.law.name, [name for name in violation.inputs])
loses_little ['u', 'levels', 'c', 'f(u)']

`laws=[*laws.for_proxmap(map), *own]` checks what the map declares and this. A law may also need
traits, `needs=("regularizer",)`, and take them: `def loses_little(f, u, levels, c, traits)`.

The inputs that a law may name
------------------------------

prox maps, called f(u, levels, c), or f(u, levels, None) where they take no coefficient
    levels      [r, k], sorted, gaps of at least 1e-3, float64
    any_levels  as levels, duplicates among them
    u, v        [r, n], weights for those levels, both of one shape
    c, d        coefficients from what the map declares; None for a map without one
    any_c       one of those, or nearer than 1e-3 to an open end of what it declares, or huge
quantizers, called quantizer(x) -> levels [r, k]
    x           rows [r, n], now and then of more than 64
    short       rows of at most 7 entries
    wild        rows of any magnitude
schedules, called schedule(step)
    start, end  the steps between which it changes
    step, later two steps, step <= later, before, between and beyond those
    whole       a whole step
    every       int64 [n]: all whole steps from start to end and two beyond either, of many 300
    offset      a share of the way, in [0, 1]
transformations, with init, update and weights
    params      a tree of parameters of every kind
    plain       a dict {"w0": leaf} of float64 of ordinary size, for vmap; not beside params
    steps       a list of gradient trees for params, None here and there, or for plain
    state       of a prox link that learns its levels one that updates of such params may have left;
                of others the first
all
    factor      a positive number in [0.01, 100]
    power       a power of two, 2^-10 to 2^10
    shift       a number in [-8, 8]
    dtype       a floating dtype
    traits      what the operator declares, or what all of its kind keep to
"""

try:
    import hypothesis as _hypothesis
except ImportError as error:  # pragma: no cover - run in a process of its own
    raise ImportError("parq_fn.testing needs hypothesis: pip install 'parq_fn[laws]'") from error

from parq_fn.testing import laws, strategies
from parq_fn.testing.check import (
    check_proxmap,
    check_quantizer,
    check_schedule,
    check_transformation,
)
from parq_fn.testing.law import Claim, Collection, Law, Violation, at_most, equal
from parq_fn.testing.report import Report, report

del _hypothesis

__all__ = [
    "Claim",
    "Collection",
    "Law",
    "Report",
    "Violation",
    "at_most",
    "check_proxmap",
    "check_quantizer",
    "check_schedule",
    "check_transformation",
    "equal",
    "laws",
    "report",
    "strategies",
]
