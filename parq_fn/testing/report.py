"""The whole table: an operator under its laws, law by law."""

from __future__ import annotations

import html
import inspect
from functools import partial
from typing import Any, NamedTuple

from parq_fn.foundation.traits import (
    ProxTraits,
    QuantizerTraits,
    ScheduleTraits,
    TransformationTraits,
    traits_of,
)
from parq_fn.foundation.value import Value, show, value
from parq_fn.schedules import Schedule
from parq_fn.testing import cases
from parq_fn.testing import laws as all_laws
from parq_fn.testing.check import Laws, MapAdapter, proxmap_inputs, shrunk, violations
from parq_fn.testing.law import Law


class Row(NamedTuple):
    """A law and what it found: None, or a counterexample's text."""

    law: Law
    counterexample: str | None


@value
class Report(Value):
    """What `report` gives. Prints as a table in a terminal and in a notebook."""

    #: What was checked, as it prints.
    operator: str
    #: One for each law.
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every law holds."""
        return all(row.counterexample is None for row in self.rows)

    def __repr__(self) -> str:
        width = max((len(row.law.name) for row in self.rows), default=0)
        failures = sum(row.counterexample is not None for row in self.rows)
        lines = [f"{self.operator}: {len(self.rows)} laws, {failures} broken", ""]
        for law, found in self.rows:
            lines.append(
                f"{'ok  ' if found is None else 'FAIL'}  {law.name:{width}}  {law.formula}"
            )
        for _, found in self.rows:
            if found is not None:
                lines += ["", found]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        body = "".join(
            f"<tr><td>{'ok' if found is None else '<b>FAIL</b>'}</td>"
            f"<td><code>{html.escape(law.name)}</code></td>"
            f"<td>{html.escape(law.statement)}</td>"
            f"<td><code>{html.escape(law.formula)}</code></td>"
            f"<td>{'' if found is None else f'<pre>{html.escape(found)}</pre>'}</td></tr>"
            for law, found in self.rows
        )
        head = "<tr><th></th><th>law</th><th>statement</th><th>formula</th><th></th></tr>"
        return f"<b>{html.escape(self.operator)}</b><table>{head}{body}</table>"


def kind_of(operator: Any) -> str:
    """Which kind of operator it is: by its traits, its methods, its parameters.

    Raises TypeError for what is none.

    >>> from parq_fn import lsbq, proxmaps, schedules, sgd
    >>> [kind_of(x) for x in (lsbq(2), proxmaps.hard, schedules.constant(1.0), sgd(0.1))]
    ['quantizer', 'proxmap', 'schedule', 'transformation']
    """
    if all(callable(getattr(operator, m, None)) for m in ("init", "update", "weights")):
        return "transformation"
    declared = {
        ProxTraits: "proxmap",
        QuantizerTraits: "quantizer",
        ScheduleTraits: "schedule",
        TransformationTraits: "transformation",
    }
    kind = declared.get(type(traits_of(operator)))
    if kind is not None:
        return kind
    if hasattr(operator, "num_levels"):
        return "quantizer"
    if isinstance(operator, Schedule):
        return "schedule"
    if not callable(operator):
        raise TypeError(
            "expected a prox map, quantizer, schedule or transformation, "
            f"got {type(operator).__name__}"
        )
    return "schedule" if len(inspect.signature(operator).parameters) == 1 else "proxmap"


def report(
    operator: Any,
    *,
    kind: str | None = None,
    laws: Laws = None,
    coefficient: Any = None,
    params: Any = None,
    start: float | None = None,
    end: float | None = None,
    max_examples: int | None = None,
) -> Report:
    """The operator under its laws: a table of pass or fail with the counterexamples.

    operator: a prox map, quantizer, schedule or transformation.
    kind: "proxmap", "quantizer", "schedule" or "transformation", where it cannot be seen from
    the operator.
    laws: names of them, or laws; by default all that the operator is held to.
    coefficient: of a prox map, see `check_proxmap`.
    params: of a transformation, see `check_transformation`.
    start, end: of a schedule, see `check_schedule`.
    max_examples: of each law; by default hypothesis's.
    Raises as the kind's checker does, but for broken laws.

    >>> from parq_fn import proxmaps
    >>> report(proxmaps.hard, laws={"idempotent"}, max_examples=5)
    hard: 1 laws, 0 broken
    <BLANKLINE>
    ok    idempotent  f(f(u)) = f(u)
    """
    kind = kind or kind_of(operator)
    called: Any = operator
    traits: Any
    inputs: Any
    if kind == "proxmap":
        called, traits = MapAdapter(operator), all_laws.proxmap_traits(operator)
        inputs = proxmap_inputs(operator, coefficient)
    elif kind == "quantizer":
        traits = all_laws.quantizer_traits(operator)
        inputs = partial(cases.quantizer_case, traits=traits)
    elif kind == "schedule":
        traits = all_laws.schedule_traits(operator, start, end)
        inputs = partial(cases.schedule_case, traits=traits)
    elif kind == "transformation":
        traits = all_laws.transformation_traits(operator)
        inputs = partial(
            cases.transformation_case, traits=traits, params=params, transformation=operator
        )
    else:
        raise ValueError(f"kind must be one of {', '.join(all_laws.ALL)}, got {kind!r}")
    chosen = all_laws.chosen(kind, traits, laws)
    found = {
        violation.law.name: str(shrunk(violation, inputs, max_examples))
        for violation in violations(chosen, called, inputs, max_examples)
    }
    return Report(show(operator), tuple(Row(law, found.get(law.name)) for law in chosen))
