"""What `help()` tells authors of operators: traits, and the inputs that laws may name. (A law from
start to end is a doctest of `parq_fn.testing`.)"""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import re
from typing import Any

import pytest

import parq_fn as pf
from parq_fn import testing
from parq_fn.foundation import traits
from parq_fn.testing import cases, check_quantizer, check_transformation
from parq_fn.testing.law import Collection, at_most

KINDS = [
    traits.ProxTraits,
    traits.QuantizerTraits,
    traits.ScheduleTraits,
    traits.TransformationTraits,
]


@pytest.mark.parametrize("kind", KINDS)
def test_help_says_what_each_trait_means(kind: type) -> None:
    doc = inspect.getdoc(kind) or ""
    told = re.findall(r"^ *((?:\w+, )*\w+): \S", doc, re.MULTILINE)
    names = [name for line in told for name in line.split(", ")]
    fields = [field.name for field in dataclasses.fields(kind)]
    assert sorted(names) == sorted(fields)
    assert kind.__name__ in (inspect.getdoc(testing) or "")


def test_help_of_the_kit_names_the_inputs_of_every_kind() -> None:
    text = pydoc.plain(pydoc.render_doc(testing))
    for names in [*cases.INPUTS.values(), (*cases._COMMON, "traits")]:
        for name in names:
            assert re.search(rf"^ *\|? *(\w+, )?{name}(, \w+)? ", text, re.MULTILINE), name
    assert "A law of your own" in text


def test_every_input_that_is_named_is_drawn() -> None:
    for kind, names in cases.INPUTS.items():
        for name in (*names, *cases._COMMON, "traits"):
            own = Collection(kind)
            scope: dict[str, Any] = {"at_most": at_most}
            exec(f"def looks(operator, {name}):\n    return at_most(0.0, 1.0)\n", scope)
            own.law("it is there", "0 <= 1")(scope["looks"])
            {
                "proxmap": lambda laws: testing.check_proxmap(
                    pf.proxmaps.parq, laws=laws, max_examples=1
                ),
                "quantizer": lambda laws: check_quantizer(pf.lsbq(1), laws=laws, max_examples=1),
                "schedule": lambda laws: testing.check_schedule(
                    pf.inverse_slope(0, 9), laws=laws, max_examples=1
                ),
                "transformation": lambda laws: check_transformation(
                    pf.sgd(0.1), laws=laws, max_examples=1
                ),
            }[kind](own)


def test_a_law_that_names_an_unknown_input_is_told_which_there_are() -> None:
    own = Collection("quantizer")

    @own.law("it is small", "|Q(w)| <= 1")
    def small(quantizer: Any, w: Any) -> Any:
        return at_most(quantizer(w).abs(), 1.0)

    with pytest.raises(ValueError, match=r"'small' names the input 'w'; .*x, short, wild, factor"):
        check_quantizer(pf.lsbq(1), laws=own)
    both = Collection("transformation")

    @both.law("it is there", "0 <= 1")
    def there(transformation: Any, params: Any, plain: Any) -> Any:
        return at_most(0.0, 1.0)

    with pytest.raises(ValueError, match="'there' names params and plain"):
        check_transformation(pf.sgd(0.1), laws=both)
