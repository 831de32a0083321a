"""Modules have their former names too, and what was saved before the package had folders loads.

tests/data/*_before_folders were written by the commit f9e7995, from what `TRANSFORM`, `VALUES` and
`optimizers` are.
"""

from __future__ import annotations

import importlib
import pickle
from io import BytesIO
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.foundation.checks import Interval
from parq_fn.foundation.value import same
from parq_fn.moved import MOVED, former_names
from parq_fn.transforms import links, wrappers
from parq_fn.transforms.wrappers import FiniteState

DATA = Path(__file__).parent / "data"
PARAMS = {
    "bias": torch.tensor([0.5, -1.0]),
    "weight": torch.tensor([[1.0, -3.0], [0.5, 2.0]]),
}
PROX = pf.masked(pf.hard_prox(pf.lsbq(1), granularity=pf.per_channel(), period=1), "weight")
MOMENTS = pf.chain(pf.sgd(pf.schedules.constant(0.1), momentum=0.9), pf.adam(0.1))
TRANSFORM = pf.apply_if_finite(pf.accumulate(pf.chain(MOMENTS, pf.freeze(), PROX), 1))
VALUES = [
    TRANSFORM,
    pf.parq_prox(
        pf.uniform(2, center=True), anneal_start=1, anneal_end=9, granularity=pf.per_block(32)
    ),
    pf.custom_prox(
        pf.lloyd_max(2), pf.proxmaps.binary_relax, pf.schedules.linear(0.0, 0.9, 0, 1000)
    ),
    Interval(0.0, torch.inf, open_high=True),
    pf.value_and_grad(torch.sin, pf.adamw()),
]


@pytest.mark.parametrize("name", MOVED)
def test_a_former_name_is_of_the_same_objects(name: str) -> None:
    former = importlib.import_module(f"parq_fn.{name}")
    for now in MOVED[name].split():
        for key, got in vars(importlib.import_module(f"parq_fn.{now}")).items():
            if not key.startswith("__"):
                assert getattr(former, key) is got


def test_a_former_name_does_not_change_its_module() -> None:
    former, now = (importlib.import_module(f"parq_fn.{n}") for n in ("tree", "foundation.tree"))
    assert former is now
    assert now.__name__ == now.__spec__.name == "parq_fn.foundation.tree"


def test_modules_are_attributes_of_the_package() -> None:
    names = [name for name in MOVED if "." not in name]
    later = ["convergence", "display", "export", "optim", "plot", "show", "testing"]
    assert all(hasattr(pf, name) for name in [*names, *later])
    assert {*later} - {"testing"} <= {*dir(pf)}
    with pytest.raises(AttributeError, match="module 'parq_fn' has no attribute 'nothing'"):
        pf.nothing  # noqa: B018


def _after_two_steps() -> Any:
    state = TRANSFORM.init(PARAMS)
    for _ in range(2):
        _, state = TRANSFORM.update(PARAMS, state, PARAMS)
    return state


def test_states_saved_before_load() -> None:
    state = torch.load(DATA / "states_before_folders.pt", weights_only=True)
    expected = _after_two_steps()
    assert type(state) is FiniteState
    assert optree.tree_structure(state) == optree.tree_structure(expected)
    assert pf.read(state, "prox.qparams")["weight"].shape == (2, 2)  # the levels that it kept
    levels = [pf.levels_of(TRANSFORM, each)["weight"] for each in (state, expected)]
    assert torch.equal(*levels)
    assert same(*(TRANSFORM.weights(each, PARAMS) for each in (state, expected)))
    states = [TRANSFORM.update(PARAMS, each, PARAMS)[1] for each in (state, expected)]
    assert same(*map(optree.tree_leaves, states))
    kinds = {type(node) for node in _nodes(state)}
    assert all(former_names(kind) for kind in kinds)
    assert {kind.__name__ for kind in kinds} == {
        "AccumulateState", "AdamState", "EmptyState", "FiniteState", "Masked", "ProxState",
        "StepState", "TraceState",
    }  # fmt: skip
    same_kinds = torch.load(_saved(expected), weights_only=True)
    assert optree.tree_structure(same_kinds) == optree.tree_structure(expected)


def _nodes(tree: Any) -> list[Any]:
    """The NamedTuples of a tree."""
    if isinstance(tree, Tensor):
        return []
    children = tree.values() if isinstance(tree, dict) else tree
    own = [tree] if optree.is_namedtuple(tree) else []
    return own + [node for child in children for node in _nodes(child)]


def _saved(state: Any) -> Any:
    file = BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def _stepped(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[Tensor]:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return [p.detach().clone() for p in params]


def optimizers() -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Both adapters, before their first step."""
    nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for net in nets:
        net.load_state_dict(PARAMS)
    groups = [{"params": [nets[0].weight], "quant_bits": 1}, {"params": [nets[0].bias]}]
    link = pf.hard_prox(pf.lsbq(2), granularity=pf.per_channel(), period=1)
    base = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    transformation = pf.chain(pf.sgd(0.1, momentum=0.9), PROX)
    return (
        pf.optim.QuantOptimizer(base, link),
        pf.optim.TransformOptimizer(nets[1].named_parameters(), transformation),
    )


def test_pickles_of_before_load() -> None:
    values, *adapters = pickle.loads((DATA / "objects_before_folders.pkl").read_bytes())
    assert same(values, VALUES)
    for saved, new in zip(adapters, optimizers(), strict=True):
        params, old = ([p for g in o.param_groups for p in g["params"]] for o in (new, saved))
        _stepped(new, params)
        assert same(_stepped(saved, old), _stepped(new, params))


def test_states_keep_their_fields_which_pickled_optimizers_name() -> None:
    """A pickled TransformOptimizer holds the structure of its state: a class with one field more,
    though it has a default, makes it unreadable. What needs more fields has a class of its own."""
    assert pf.ProxState._fields == ("count", "slope", "lr_sum", "qparams")
    assert FiniteState._fields == ("skipped", "inner")
    assert wrappers.AccumulateState._fields == ("waiting", "total", "inner")
    assert links.AdamState._fields == ("step", "first", "second", "largest")
    assert links.TraceState._fields == ("step", "trace")
    assert links.StepState._fields == ("step",)
