"""Maps that skip None, names, masks, labels, and reading state by name."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any, NamedTuple

import optree
import pytest
import torch

import parq_fn as pf
from parq_fn import tree


class Pair(NamedTuple):
    left: Any
    right: Any


PARAMS = {
    "layer1": [{"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}],
    "head": Pair(torch.zeros(3), {"weight": torch.zeros(1), "none": None}),
}
NAMES = ["head.left", "head.right.weight", "layer1.0.bias", "layer1.0.weight"]


def test_names_follow_keys_positions_and_fields() -> None:
    assert tree.tree_leaves(tree.tree_names(PARAMS)) == NAMES
    assert tree.tree_names(PARAMS)["head"].right == {"weight": "head.right.weight", "none": None}


def test_a_bare_leaf_is_a_tree() -> None:
    assert tree.tree_leaves(tree.tree_names(torch.zeros(1))) == [""]
    optimizer = pf.sgd(1.0)
    updates, _ = optimizer.update(torch.ones(1), optimizer.init(torch.zeros(1)), torch.zeros(1))
    assert torch.equal(updates, -torch.ones(1))


def chosen(mask: Any, params: Any = PARAMS) -> list[str]:
    picked = tree.pick(tree.resolve_mask(mask, params), params, tree.tree_names(params))
    return tree.tree_leaves(picked)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ("*.weight", ["head.right.weight", "layer1.0.weight"]),
        ("head", ["head.left", "head.right.weight"]),
        (["layer1.0.bias", "head.left"], ["head.left", "layer1.0.bias"]),
        (re.compile(r"layer\d"), ["layer1.0.bias", "layer1.0.weight"]),
        (lambda name, leaf: leaf.dim() == 2, ["layer1.0.weight"]),
        ({"layer1": True, "head": False}, ["layer1.0.bias", "layer1.0.weight"]),
        ({"layer1": [{"weight": True, "bias": False}], "head": Pair(False, True)},
         ["head.right.weight", "layer1.0.weight"]),
    ],
)  # fmt: skip
def test_masks(mask: Any, expected: list[str]) -> None:
    assert chosen(mask) == expected


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ("heads", ValueError, "mask pattern 'heads' matches no parameter; .* head.left"),
        (["head", "laye1.*"], ValueError, "mask pattern 'laye1.\\*' matches no parameter"),
        ({"layer1": True}, ValueError, "parameters it leaves out: .*head"),
        ({"layer1": True, "hed": False}, ValueError, "names no parameter has: .'hed'."),
        ({"layer1": "yes", "head": False}, TypeError, "entry 'layer1' is a str, expected bool"),
    ],
)
def test_masks_that_fit_nothing(mask: Any, error: type, message: str) -> None:
    link = pf.masked(pf.freeze(), mask)
    with pytest.raises(error, match=message):
        link.init(PARAMS)


def test_labels_take_the_first_pattern_that_fits() -> None:
    labels = tree.resolve_labels({"*.bias": "b", "layer1": "l", "*": "rest"}, PARAMS)
    assert labels == ["rest", "rest", "b", "l"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"layer1": "a"}, "parameter 'head.left' fits no label pattern"),
        ({"nothing": "a", "*": "a"}, "label pattern 'nothing' matches no parameter"),
        ({"*": "c"}, r"labels without a transformation: \['c'\]; .* for: \['a', 'b'\]"),
        (lambda name, leaf: name, "labels without a transformation"),
    ],
)
def test_labels_that_fit_nothing(labels: Any, message: str) -> None:
    link = pf.partition({"a": pf.identity(), "b": pf.freeze()}, labels)
    with pytest.raises(ValueError, match=message):
        link.init(PARAMS)


def test_read_by_field_kind_key_and_position() -> None:
    prox = pf.parq_prox(pf.lsbq(1), anneal_start=1, anneal_end=3)
    params = {"w": torch.ones(2, 3), "count": torch.ones(1)}
    base = pf.chain(pf.clip(1.0), pf.adamw())
    state = pf.named_chain(base=base, prox=prox).init(params)
    assert pf.read(state, "slope") == 1
    assert set(pf.read(state, "qparams")) == {"w", "count"}
    assert pf.read(state, "count") is state["prox"].count
    assert pf.read(state, "prox.qparams") is state["prox"].qparams
    assert pf.read(state, "adam.step") == 0
    with pytest.raises(KeyError, match=r"3 states are named 'step': .*base\.1\.0\.adam\.step"):
        pf.read(state, "step")
    with pytest.raises(KeyError, match=r"no state is named 'slopes'; there are: .*slope"):
        pf.read(state, "slopes")
    for link in (prox, pf.hard_prox(pf.lsbq(1), learn=pf.sgd(0.1))):  # what states had before
        with pytest.raises(KeyError, match=r"no state is named 'levels'; .*: levels_of\("):
            pf.read(link.init(params), "levels")


@pytest.mark.parametrize("name", ["base.1.0.adam.step", "base.1.1.step.step", "base.1.2.step.step"])
def test_every_name_that_read_offers_is_unique(name: str) -> None:
    base = pf.chain(pf.clip(1.0), pf.adamw())
    state = pf.named_chain(base=base).init({"w": torch.ones(2)})
    with pytest.raises(KeyError) as error:
        pf.read(state, "step")
    assert name in str(error.value)
    assert pf.read(state, name) == 0


def _named(params: Any) -> Any:
    prox = pf.parq_prox(pf.lsbq(1), anneal_start=1, anneal_end=3)
    whole = pf.named_chain(base=pf.chain(pf.clip(1.0), pf.adamw()), prox=prox)
    return pf.chain(pf.partition({"all": pf.trace(0.9)}, {"*": "all"}), whole).init(params)


WRITTEN = {
    "slope": torch.tensor(0.25, dtype=torch.float64),
    "prox.count": torch.tensor(7),
    "qparams.w": torch.tensor([0.5]),
    "adam.second": {"list": [torch.ones(1)], "w": torch.ones(2, 3)},
    "base.1.0.adam.step": torch.tensor(3),
    "0.all.trace.trace": {"list": [torch.ones(1)], "w": torch.ones(2, 3)},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_read_and_all_else_stays(name: str) -> None:
    state = _named({"list": [torch.ones(1)], "w": torch.ones(2, 3)})
    new = pf.write(state, name, WRITTEN[name])
    assert pf.read(new, name) is WRITTEN[name]
    assert optree.tree_structure(new) == optree.tree_structure(state)
    before, after = (optree.tree_leaves(x) for x in (state, new))
    kept = [a is b for a, b in zip(before, after, strict=True)]
    assert kept.count(False) == len(optree.tree_leaves(WRITTEN[name]))
    assert all(a is b for a, b in zip(before, optree.tree_leaves(state), strict=True))
    old = pf.read(state, name)
    back = pf.write(new, name, old)
    assert all(a is b for a, b in zip(optree.tree_leaves(back), before, strict=True))


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("slopes", torch.ones(()), KeyError, "no state is named 'slopes'; there are: .*slope"),
        ("step", torch.tensor(1), KeyError, "4 states are named 'step'"),
        (3, 3, TypeError, r"write takes \(state, name, value\), got a int for the name"),
        ("prox.count", 3, TypeError, "'prox.count' is a Tensor, got a int"),
        (
            "prox.count",
            torch.ones(()),
            TypeError,
            "'prox.count' has dtype torch.int64, got torch.f",
        ),
        ("qparams.w", torch.ones(2), ValueError, r"'qparams.w' has shape \(1,\), got \(2,\)"),
        ("first", {"w": torch.ones(2, 3)}, ValueError, "write: 'first' has the structure .*list"),
        (
            "qparams",
            {"list": [torch.ones(1)], "w": torch.ones(1).double()},
            TypeError,
            "'qparams.w' has dtype torch.float32, got torch.float64",
        ),
    ],
)
def test_what_does_not_fit_is_not_written(name: Any, value: Any, error: Any, message: str) -> None:
    state = _named({"list": [torch.ones(1)], "w": torch.ones(2, 3)})
    with pytest.raises(error, match=message):
        pf.write(state, name, value)


def test_a_running_chain_takes_other_hyperparameters_with_the_same_state() -> None:
    params = {"w": torch.tensor([1.0, -3.0, 0.5])}
    prox = pf.parq_prox(pf.lsbq(1), anneal_start=1, anneal_end=30, period=2)
    one = pf.chain(pf.adamw(0.1), prox)
    other = replace(one, links=(replace(one.links[0], learning_rate=0.3), one.links[1]))
    state = one.init(params)
    for _ in range(5):
        updates, state = one.update(params, state, params)
        params = pf.apply_updates(params, updates)
    before, after = one.update(params, state, params), other.update(params, state, params)
    torch.testing.assert_close(before[0]["w"] * 3, after[0]["w"])
    assert optree.tree_structure(before[1]) == optree.tree_structure(after[1])
    longer = replace(one, links=(one.links[0], replace(prox, anneal_end=60)))
    assert torch.equal(longer.weights(state, params)["w"], one.weights(state, params)["w"])
    _, state = longer.update(params, state, params)
    assert pf.read(state, "count") == 6
    assert pf.read(state, "slope") == longer.links[1].coefficient(torch.tensor(5))


@pytest.mark.parametrize("base", [pf.sgd(0.1, momentum=0.9, weight_decay=0.1), pf.adamw()])
def test_the_names_of_a_prox_link_are_its_own(base) -> None:
    prox = pf.parq_prox(pf.lsbq(1), anneal_start=1, anneal_end=3)
    for transform in (pf.chain(base, prox), pf.accumulate(pf.chain(base, prox), 2)):
        state = transform.init({"w": torch.ones(2)})
        assert pf.read(state, "count") == 0
        assert pf.read(state, "slope") == 1
        assert pf.read(state, "qparams")["w"].shape == (1,)


def test_updates_of_another_shape_or_structure_name_the_leaf() -> None:
    params = {"a": torch.zeros(2, 1), "b": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"update of 'a' has shape \(2,\), its parameter \(2, 1\)"):
        pf.apply_updates(params, {"a": torch.zeros(2), "b": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"trees differ in structure: leaves of the first alone: \['b'\]"
    ):
        pf.apply_updates(params, {"a": torch.zeros(2, 1)})


# Found by attack, each with the input that showed it.


@pytest.mark.parametrize("mask", [[], (), set(), lambda name, leaf: False])
def test_masks_that_pick_nothing_are_refused(mask) -> None:
    with pytest.raises(ValueError, match=r"picks no parameter|matches no parameter"):
        pf.masked(pf.freeze(), mask).init({"w": torch.ones(1)})


def test_of_overlapping_mask_entries_the_longest_decides() -> None:
    params = {"layer1.weight": torch.ones(1), "layer1.bias": torch.ones(1)}
    assert tree.resolve_mask({"layer1": True, "layer1.bias": False}, params) == [False, True]
    with pytest.raises(ValueError, match="two leaves have one name"):
        tree.resolve_mask({"a.b": True, "a": {"b": False}}, {"a.b": params, "a": {"b": 1.0}})


@pytest.mark.parametrize("leaf", [torch.ones(4).to(torch.float8_e4m3fn), torch.eye(4).to_sparse()])
def test_narrow_and_sparse_leaves_are_named(leaf) -> None:
    with pytest.raises(TypeError, match=r"hard_prox: parameter 'w' is torch.float.* and dense"):
        pf.hard_prox(pf.lsbq(1)).init({"w": leaf})


def test_counts_stay_on_the_cpu_under_another_default_device() -> None:
    with torch.device("meta"):
        state = pf.chain(pf.sgd(0.1, 0.9), pf.hard_prox(pf.lsbq(1))).init({"w": torch.ones(2, 2)})
    assert tree.read(state, "count").device.type == "cpu"
    assert tree.read(state, "slope").device.type == "cpu"
