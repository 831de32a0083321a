"""What values and states show in a notebook: well-formed, complete, and never an exception."""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import parq_fn as pf
from parq_fn import display, schedules
from parq_fn.testing import report

PROX = pf.parq_prox(pf.lsbq(2), anneal_start=10, anneal_end=90)
#: (value, its pictures)
VALUES: dict[str, tuple[Any, int]] = {
    "quantizer": (pf.lsbq(2), 1),
    "ternary": (pf.ternary_uniform(), 1),
    "schedule": (pf.inverse_slope(10, 90), 1),
    "constant": (schedules.constant(0.1), 1),
    "join": (schedules.join([schedules.constant(1.0), schedules.constant(2.0)], [9]), 1),
    "granularity": (pf.per_channel(), 0),
    "parq": (PROX, 2),
    "soft": (pf.soft_prox(pf.lsbq(2), anneal_start=0, anneal_end=9), 2),
    "hard": (pf.hard_prox(pf.lsbq(1)), 1),
    "custom": (
        pf.custom_prox(pf.lsbq(2), pf.proxmaps.binary_relax, schedules.linear(0.0, 1.0, 10, 80)),
        2,
    ),
    "tensors": (
        pf.parq_prox(pf.lsbq(2), anneal_start=torch.tensor(10.0), anneal_end=torch.tensor(20.0)),
        2,
    ),
    "chain": (pf.chain(pf.adamw(1e-3), pf.masked(PROX, "*.weight")), 2),
    "named_chain": (pf.named_chain(base=pf.sgd(0.1), prox=PROX), 2),
    "partition": (pf.partition({"q": PROX, "rest": pf.identity()}, {"a": "q", "*": "rest"}), 2),
}


@pytest.mark.parametrize("name", VALUES)
def test_values_show_their_call_and_pictures(name: str) -> None:
    value, pictures = VALUES[name]
    html = value._repr_html_()
    root = ElementTree.fromstring(html)
    assert root.find("code").text == repr(value)
    svgs = list(root.iter("svg"))
    assert len(svgs) == pictures
    for svg in svgs:
        assert svg.get("aria-label")
        points = " ".join(line.get("points") for line in svg.iter("polyline"))
        numbers = [float(number) for number in re.split("[ ,]", points)]
        assert numbers
        assert min(numbers) >= 0
        assert max(numbers) <= display.WIDTH


def test_a_value_whose_methods_fail_shows_its_call() -> None:
    class broken(pf.Quantizer):
        num_levels = 2

        def qparams(self, x):
            raise RuntimeError("no")

    assert "<svg" not in broken()._repr_html_()
    assert "broken()" in broken()._repr_html_()


def test_markup_in_a_name_is_text() -> None:
    link = pf.masked(pf.identity(), "<b>&")
    ElementTree.fromstring(link._repr_html_())


def test_states_are_tables() -> None:
    params = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0)}
    transform = pf.chain(pf.adam(0.1), pf.masked(pf.hard_prox(pf.lsbq(1)), "w"))
    state = transform.init(params)
    table = display.table(state)
    lines = repr(table).splitlines()
    assert lines[0].split() == ["state", "shape", "dtype", "value"]
    assert len(lines) - 1 == len(torch.utils._pytree.tree_leaves(state))
    assert "0.0.first.b" in repr(table)
    assert "empty" in repr(table)
    rows = list(ElementTree.fromstring(table._repr_html_()).iter("tr"))
    assert len(rows) == len(lines)
    for inner in (state[1], state[0][0]):
        assert ElementTree.fromstring(inner._repr_html_()).tag == "table"
    assert "0 .. 5" in repr(display.table(params))


def test_odd_leaves_are_rows_too() -> None:
    leaves = {
        "count": torch.tensor(2**53 + 1),
        "nan": torch.tensor([1.0, torch.nan, 3.0]),
        "meta": torch.zeros(2, device="meta"),
        "complex": torch.ones(2, dtype=torch.complex64),
        "number": 3.5,
    }
    rows = {row[0]: row[3] for row in display.table(leaves).rows}
    expected = {"count": str(2**53 + 1), "nan": "1 .. 3, 1 NaN", "number": "3.5"}
    assert rows == {**expected, "meta": "-", "complex": "-"}


def test_the_law_report_is_a_table_too() -> None:
    assert "<table" in report(pf.proxmaps.hard, max_examples=5)._repr_html_()
