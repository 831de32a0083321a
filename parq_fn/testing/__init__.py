"""The laws of this library's operators, as a test kit for yours.

    check_proxmap(map)    check_quantizer(quantizer)    check_schedule(schedule)
    check_transformation(transformation)                report(operator)

check an operator against the laws that it declares (its `traits`) and those of all its kind,
on random input, and raise an AssertionError with a small counterexample. `laws` holds the laws
as values, `strategies` the hypothesis strategies that they are checked on.

>>> from parq_fn.testing import check_proxmap, laws
>>> from parq_fn import proxmaps
>>> check_proxmap(proxmaps.parq, laws={"cocoercive", "share"}, max_examples=5)
>>> [law.name for law in laws.for_proxmap(proxmaps.hard)][:3]
['pure', 'finite', 'monotone']
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
from parq_fn.testing.law import Claim, Law, Violation
from parq_fn.testing.report import Report, report

del _hypothesis

__all__ = [
    "Claim",
    "Law",
    "Report",
    "Violation",
    "check_proxmap",
    "check_quantizer",
    "check_schedule",
    "check_transformation",
    "laws",
    "report",
    "strategies",
]
