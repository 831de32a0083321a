"""Which operator declares which law, as Markdown: `python -m parq_fn.testing.table`.

The second half of this folder's README is what it prints.
"""

from __future__ import annotations

import re
from typing import Any

import torch

import parq_fn as pq
from parq_fn import proxmaps, schedules
from parq_fn.foundation.command import Parser, command
from parq_fn.foundation.value import show
from parq_fn.testing import laws
from parq_fn.testing.law import Law

OPERATORS: dict[str, tuple[Any, ...]] = {
    "proxmap": proxmaps.MAPS,
    "quantizer": (
        pq.lsbq(0),
        pq.lsbq(1),
        pq.lsbq(2),
        pq.lsbq(2, "optimal"),
        pq.lsbq(3, "alternating"),
        pq.lloyd_max(2),
        pq.lloyd_max(2, symmetric=False),
        pq.uniform(2),
        pq.uniform(2, "max"),
        pq.max_uniform(2),
        pq.asymmetric(2),
        pq.ternary_uniform(),
        pq.integer(2),
        pq.integer(2, "max_symmetric"),
        pq.affine(2),
        pq.codebook.nf4,
        pq.codebook.iq4_nl,
        pq.gaussian(2),
        pq.mxfp4(),
        pq.nvfp4(),
        pq.centered(pq.max_uniform(2)),
        pq.stored(pq.uniform(2, "max"), torch.bfloat16),
    ),
    "schedule": (
        schedules.inverse_slope(0, 100),
        schedules.linear(1.0, 0.0, 0, 100),
        schedules.cosine(1.0, 0.0, 0, 100),
        schedules.exponential(1.0, 0.01, 0, 100),
        schedules.polynomial(1.0, 0.0, 0, 100, 2.0),
        schedules.constant(1.0),
        schedules.warmup(schedules.constant(1.0), 10),
    ),
    "transformation": (
        pq.scale(0.5),
        pq.sgd(0.1),
        pq.adamw(0.1),
        pq.clip_by_global_norm(1.0),
        pq.accumulate(pq.sgd(0.1), 2),
        pq.apply_if_finite(pq.sgd(0.1)),
        pq.chain(pq.sgd(0.1), pq.hard_prox(pq.lsbq(2))),
        pq.hard_prox(pq.lsbq(2)),
        pq.parq_prox(pq.lsbq(2), anneal_start=0, anneal_end=100),
        pq.soft_prox(pq.lsbq(2), anneal_start=0, anneal_end=100),
        pq.binary_relax_prox(pq.lsbq(2), anneal_start=0, anneal_end=100),
        pq.proxquant_prox(pq.lsbq(2), anneal_start=0, anneal_end=100, strength=0.1),
    ),
}

_DECLARED = {
    "proxmap": laws.for_proxmap,
    "quantizer": laws.for_quantizer,
    "schedule": laws.for_schedule,
    "transformation": laws.for_transformation,
}


def table(kind: str, operators: tuple[Any, ...] | None = None) -> str:
    """A Markdown table: laws down, operators across, a mark where it is declared.

    >>> print(table("proxmap", (proxmaps.hard, proxmaps.parq)).splitlines()[2])
    | `pure` | f(u) = f(u) | x | x |
    """
    across = OPERATORS[kind] if operators is None else operators
    declared = [{law.name for law in _DECLARED[kind](op)} for op in across]
    head = ["law", "formula", *(f"`{show(op)}`" for op in across)]
    lines = [head, ["---"] * 2 + [":-:"] * len(across)]
    for law in laws.ALL[kind]:
        # as text, of which Markdown makes no tag, emphasis or attribute
        formula = re.sub(r"([|*{])", r"\\\1", law.formula).replace("<", "&lt;")
        marks = ["x" if law.name in names else "" for names in declared]
        lines.append([f"`{law.name}`", formula, *marks])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def document() -> str:
    """The tables of all kinds, with what each law says below."""
    parts = []
    for kind, all_ in laws.ALL.items():
        says = [f"- `{law.name}`: {law.statement} {_held_to(law)}".rstrip() for law in all_]
        parts.append("\n".join([f"## Laws of a {kind}", "", table(kind), "", *says]))
    return "\n\n".join(parts)


def _held_to(law: Law) -> str:
    return f"To {law.tolerance:g}: {law.reason}." if law.tolerance else ""


def main() -> None:
    about = "Prints which operator declares which law, as Markdown."
    Parser("parq_fn.testing.table", about).parse_args()
    print(document())


if __name__ == "__main__":
    command(main)
