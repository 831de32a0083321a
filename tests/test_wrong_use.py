"""Functions of the public API taken the wrong way: each error says what was got, where, and what to
do. None of them is silent."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.foundation.tree import tree_leaves, tree_map
from parq_fn.foundation.value import state_class

PROX = pf.hard_prox(pf.lsbq(1), period=1)
PARAMS = {"a": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)), "b": torch.ones(1, 4)}
GRADS = tree_map(torch.ones_like, PARAMS)
ALONE = {"a": PARAMS["a"]}

#: Whole transformations of every kind, as users train with.
WHOLE: dict[str, Any] = {
    "chain": pf.chain(pf.sgd(0.1), PROX),
    "named_chain": pf.named_chain(base=pf.adam(0.1), prox=PROX),
    "composite": pf.adamw(0.1),
    "masked": pf.masked(pf.chain(pf.sgd(0.1), PROX), "a"),
    "partition": pf.partition({"x": pf.sgd(0.1), "y": pf.adam(0.1)}, {"a": "x", "*": "y"}),
    "accumulate": pf.accumulate(pf.chain(pf.sgd(0.1), PROX), 1),
    "apply_if_finite": pf.apply_if_finite(pf.chain(pf.sgd(0.1), PROX)),
    "holding": pf.chain(pf.sgd(0.1), pf.hard_prox(pf.lsbq(1), hold=pf.oscillation(0.1))),
    "learning": pf.chain(pf.sgd(0.1), pf.hard_prox(pf.lsbq(1), learn=pf.sgd(0.1))),
    "conditionally": pf.conditionally(pf.chain(pf.sgd(0.1), PROX), True),
    "averaged": pf.averaged(pf.chain(pf.sgd(0.1), PROX), 0.9),
    "monitor_flips": pf.monitor_flips(pf.chain(pf.sgd(0.1), PROX)),
    "lookahead": pf.lookahead(pf.sgd(0.1), 2),
    "schedule_free": pf.schedule_free(pf.sgd(0.1)),
}
#: Single links, which are given states of their own.
SINGLE: dict[str, Any] = {
    "prox": PROX,
    "trace": pf.trace(0.9),
    "scale_by_adam": pf.scale_by_adam(),
    "scale_by_lion": pf.scale_by_lion(),
    "add_noise": pf.add_noise(0.1),
    "scale": pf.scale(2.0),
    "scale_by_learning_rate": pf.scale_by_learning_rate(0.1),
    "scale_by_schedule": pf.scale_by_schedule(pf.schedules.constant(1.0)),
    "add_decayed_weights": pf.add_decayed_weights(0.1),
    "clip": pf.clip(1.0),
    "clip_by_global_norm": pf.clip_by_global_norm(1.0),
    "freeze": pf.freeze(),
    "stateless": pf.stateless(lambda updates, params: updates),
    "muon": pf.muon(0.1),
    "as_link": pf.as_link(torch.optim.Adam, lr=0.1),
}
WRONG = (TypeError, ValueError)


# update and weights


@pytest.mark.parametrize("name", [*WHOLE, *SINGLE])
def test_params_in_the_place_of_the_state_are_refused(name: str) -> None:
    link = (WHOLE | SINGLE)[name]
    for params in (link.init(PARAMS), PARAMS):
        with pytest.raises(WRONG, match=r"the order is|update\(updates, state, params\)"):
            link.update(GRADS, PARAMS, params)


@pytest.mark.parametrize("name", WHOLE)
def test_gradients_in_the_place_of_the_state_and_a_state_for_params_are_refused(name: str) -> None:
    link = WHOLE[name]
    state = link.init(PARAMS)
    for swapped in ((state, GRADS, PARAMS), (GRADS, state, state)):
        with pytest.raises(WRONG, match=r"the order is|update\(updates, state, params\)"):
            link.update(*swapped)


@pytest.mark.parametrize("name", [*WHOLE, "prox"])
def test_weights_of_swapped_arguments_are_refused(name: str) -> None:
    link = (WHOLE | SINGLE)[name]
    with pytest.raises(WRONG, match=r"its state is a|matches no parameter|state of the links"):
        link.weights(PARAMS, link.init(PARAMS))


def test_params_as_many_as_links_are_no_state_of_theirs() -> None:
    link = pf.chain(pf.sgd(0.1), PROX)
    with pytest.raises(TypeError, match="chain: its state is a dict, expected a tuple"):
        link.weights(PARAMS, link.init(PARAMS))
    with pytest.raises(TypeError, match="chain: its state is a Tensor, expected a tuple"):
        link.weights(tuple(PARAMS.values()), link.init(PARAMS))
    four = pf.chain(pf.sgd(0.1), pf.clip(1.0), pf.identity(), PROX)
    with pytest.raises(TypeError, match="chain: its state is a ProxState"):
        four.weights(PROX.init(PARAMS), PARAMS)


@pytest.mark.parametrize("name", [*WHOLE, "muon", "as_link"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": GRADS["a"]}, r"lack leaves that params have: 'b' \(None stands"),
        ({**GRADS, "c": GRADS["b"]}, "have leaves that params lack: 'c'"),
        ({**GRADS, "a": torch.ones(1, 3)}, r"'a' has shape \(1, 3\), its parameter \(2, 3\)"),
        ({**GRADS, "a": torch.ones(2, 3, dtype=torch.int64)}, "'a' has dtype torch.int64"),
        ({**GRADS, "a": torch.ones(2, 3, dtype=torch.complex64)}, "'a' has dtype torch.complex64"),
        ({**GRADS, "a": 1.0}, "'a' is a float, expected a tensor"),
    ],
    ids=["lacking", "unknown", "shape", "whole_numbers", "complex", "number"],
)
def test_gradients_that_do_not_fit_name_the_leaf(name: str, wrong: Any, message: str) -> None:
    link = (WHOLE | SINGLE)[name]
    with pytest.raises(WRONG, match=message):
        link.update(wrong, link.init(PARAMS), PARAMS)


@pytest.mark.parametrize("name", ["trace", "scale_by_adam", "scale_by_lion", "add_decayed_weights"])
def test_a_single_link_spreads_no_gradient_of_another_shape(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: the update of 'a' has shape"):
        SINGLE[name].update({"a": torch.ones(1, 3)}, SINGLE[name].init(ALONE), ALONE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", [*WHOLE, *SINGLE])
def test_gradients_of_another_floating_dtype_change_no_dtype(name: str, dtype: torch.dtype) -> None:
    link = (WHOLE | SINGLE)[name]
    old = link.init(PARAMS)
    updates, new = link.update(tree_map(lambda g: g.to(dtype), GRADS), old, PARAMS)
    assert [leaf.dtype for leaf in tree_leaves(new)] == [leaf.dtype for leaf in tree_leaves(old)]
    assert pf.apply_updates(PARAMS, updates)["a"].dtype == torch.float32
    if name.startswith("scale_by"):
        assert updates["a"].dtype == dtype


@pytest.mark.parametrize("link", [pf.chain(pf.sgd(0.1)), pf.chain(pf.sgd(0.1, 0.9), PROX)])
@pytest.mark.parametrize("key", ["learning_rate", "weight_decay"])
def test_scalars_by_name_name_the_leaf_that_they_lack(link: Any, key: str) -> None:
    link = pf.chain(pf.add_decayed_weights(0.1), link)
    with pytest.raises(ValueError, match="values by name lack those of 'b'"):
        link.update(GRADS, link.init(PARAMS), PARAMS, **{key: {"a": 0.1}})


# init


@pytest.mark.parametrize("name", [*WHOLE, *SINGLE])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            lambda module: module,
            r"got a Linear, expected a tree .*use functional\(module\)",
        ),
        (
            lambda module: module.parameters(),
            "got a generator, .*use functional",
        ),
        (lambda module: {"net": module}, "parameter 'net' is a Linear"),
        (lambda module: dict(module.named_parameters()), "'bias' is an nn.Parameter"),
    ],
    ids=["module", "parameters", "of_modules", "nn_parameters"],
)
def test_init_of_a_module_is_refused(name: str, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        (WHOLE | SINGLE)[name].init(given(nn.Linear(3, 2)))


# What a chain is built of


class pair(NamedTuple):
    """As of optax: functions of trees, and no weights."""

    init: Callable[..., Any]
    update: Callable[..., Any]


def _init(params: Any) -> tuple[()]:
    return ()


def _update(updates: Any, state: Any, params: Any = None) -> Any:
    return tree_map(torch.neg, updates), state


BUILT: dict[str, Callable[[Any], Any]] = {
    "chain": lambda link: pf.chain(link, PROX),
    "named_chain": lambda link: pf.named_chain(base=link, prox=PROX),
    "masked": lambda link: pf.masked(link, "a"),
    "partition": lambda link: pf.partition({"x": link}, {"*": "x"}),
    "accumulate": lambda link: pf.accumulate(link, 2),
    "apply_if_finite": lambda link: pf.apply_if_finite(link),
    "conditionally": lambda link: pf.conditionally(link, True),
    "averaged": lambda link: pf.averaged(link, 0.9),
    "lookahead": lambda link: pf.lookahead(link),
    "schedule_free": lambda link: pf.schedule_free(link),
    "value_and_grad": lambda link: pf.value_and_grad(lambda w: w["a"].sum(), link),
}


@pytest.mark.parametrize("how", ["accumulate", "apply_if_finite", "conditionally", "averaged"])
def test_wrappers_refuse_a_module_for_params_whatever_is_inside(how: str) -> None:
    link = BUILT[how](pf.GradientTransformation(init=_init, update=_update))
    with pytest.raises(TypeError, match=r"got a Linear, expected a tree .*use functional"):
        link.init(nn.Linear(3, 2))


@pytest.mark.parametrize("how", BUILT)
@pytest.mark.parametrize(
    ("link", "message"),
    [
        (torch.optim.AdamW, r"torch\.optim's AdamW, .* parq_fn\.optim\.QuantOptimizer\("),
        (torch.optim.SGD([torch.ones(1)], lr=0.1), r"torch\.optim's SGD, .*QuantOptimizer\("),
        (pair(_init, _update), r"GradientTransformation\(init=\.\.\., update=\.\.\.\)"),
        ((_init, _update), r"GradientTransformation\(init=\.\.\., update=\.\.\.\)"),
        ([pf.sgd(0.1), PROX], r"one by one: chain\(\*links\)"),
        (pf.lsbq(2), r"a prox link: hard_prox\(quantizer\)"),
    ],
    ids=["optimizer_class", "optimizer", "init_update", "tuple", "list", "quantizer"],
)
def test_what_is_no_transformation_names_what_makes_one(how: str, link: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        BUILT[how](link)


def test_what_the_error_names_takes_an_init_update_pair() -> None:
    link = pf.chain(pf.GradientTransformation(init=_init, update=_update), PROX)
    updates, _ = link.update(GRADS, link.init(PARAMS), PARAMS)
    assert torch.equal(updates["a"], -GRADS["a"])


# Links of one's own that return something else


class only_updates(pf.Link):
    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        return tree_map(torch.neg, updates)


class nothing(pf.Link):
    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        tree_map(torch.neg, updates)


class no_weights(pf.Link):
    def weights(self, state: Any, params: Any) -> Any:
        tree_map(torch.neg, params)


class only_gradients(pf.Link):
    def pullback(self, grads: Any, state: Any, params: Any, *, weights: Any = None) -> Any:
        return grads


@pytest.mark.parametrize("how", [how for how in BUILT if how != "value_and_grad"])
@pytest.mark.parametrize("link", [only_updates(), nothing()])
def test_a_link_that_returns_only_updates_is_named(how: str, link: Any) -> None:
    whole = BUILT[how](link)
    kind = "dict" if isinstance(link, only_updates) else "NoneType"
    if how == "accumulate":
        whole = pf.accumulate(link, 1)
    message = rf"{type(link).__name__}\.update returned a {kind}, expected \(updates, state\)"
    with pytest.raises(TypeError, match=message):
        whole.update(GRADS, whole.init(PARAMS), PARAMS)


def test_only_updates_that_are_a_pair_are_told_from_updates_and_a_state() -> None:
    params = PARAMS["a"], PARAMS["b"]
    link = pf.chain(only_updates())
    with pytest.raises(TypeError, match=r"only_updates\.update returned a tensor for the updates"):
        link.update(params, link.init(params), params)


def test_a_link_without_weights_or_the_second_result_of_its_pullback_is_named() -> None:
    link = pf.chain(no_weights())
    with pytest.raises(TypeError, match=r"no_weights\.weights returned None, expected the weights"):
        link.weights(link.init(PARAMS), PARAMS)
    link = pf.chain(only_gradients())
    with pytest.raises(TypeError, match=r"only_gradients.pullback returned a dict, expected \(gr"):
        link.update(GRADS, link.init(PARAMS), PARAMS)


# Learning rates in front of a prox link


class flip(pf.Link):
    """Does not say how many learning rates it takes."""

    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        return tree_map(torch.neg, updates), state


class flipped_clip(pf.clip):
    def update(self, updates: Any, state: Any, params: Any, **extra: Any) -> Any:
        return tree_map(torch.neg, updates), state


SGD, ADAM, RATE = pf.sgd(0.1), pf.adam(0.1), pf.scale_by_learning_rate(0.1)


@pytest.mark.parametrize(
    "build",
    [
        lambda: pf.chain(SGD, RATE, PROX),
        lambda: pf.chain(SGD, ADAM, PROX),
        lambda: pf.named_chain(a=SGD, b=RATE, prox=PROX),
        lambda: pf.chain(SGD, pf.chain(RATE, PROX)),
        lambda: pf.chain(pf.chain(SGD, RATE), PROX),
        lambda: pf.chain(SGD, pf.masked(pf.chain(ADAM, PROX), "a")),
        lambda: pf.chain(SGD, pf.partition({"x": pf.chain(ADAM, PROX), "y": flip()}, {"*": "x"})),
        lambda: pf.chain(pf.partition({"x": SGD, "y": ADAM}, {"*": "x"}), RATE, PROX),
        lambda: pf.chain(SGD, pf.apply_if_finite(pf.chain(RATE, PROX))),
        lambda: pf.chain(flip(), SGD, ADAM, PROX),
        lambda: pf.chain(pf.conditionally(SGD, True), SGD, pf.muon(0.1), PROX),
        lambda: pf.chain(pf.lion(0.1), pf.as_link(torch.optim.SGD), PROX),
    ],
)
def test_two_learning_rates_in_front_of_a_prox_link_are_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"pass more than one learning rate .*prox link, in "):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: pf.chain(pf.scale_by_adam(), PROX),
        lambda: pf.chain(pf.clip(1.0), PROX),
        lambda: pf.named_chain(norm=pf.clip_by_global_norm(1.0), m=pf.trace(0.9), prox=PROX),
        lambda: pf.chain(pf.add_decayed_weights(0.1), pf.identity(), pf.masked(PROX, "a")),
        lambda: pf.chain(pf.chain(pf.clip(1.0), pf.scale_by_adam()), PROX),
        lambda: pf.chain(pf.clip(1.0), pf.chain(PROX)),
        lambda: pf.chain(pf.masked(pf.scale_by_adam(), "a"), PROX),
        lambda: pf.chain(pf.accumulate(pf.scale_by_adam(), 2), PROX),
        lambda: pf.chain(pf.partition({"x": pf.clip(1.0)}, {"*": "x"}), PROX),
        lambda: pf.chain(pf.conditionally(pf.clip(1.0), True), pf.add_noise(0.1), PROX),
    ],
)
def test_no_learning_rate_in_front_of_a_prox_link_is_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"pass no learning rate .* put scale_by_learning_rate"):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: pf.chain(PROX),
        lambda: pf.chain(pf.identity(), PROX),
        lambda: pf.chain(pf.scale_by_adam(), pf.scale(-0.1), PROX),
        lambda: pf.chain(pf.scale(-1.0), SGD, PROX),  # ascends, as told
        lambda: pf.chain(pf.scale_by_adam(), pf.scale_by_schedule(lambda t: -0.1), PROX),
        lambda: pf.chain(pf.scale_by_adam(), flip(), PROX),
        lambda: pf.chain(flipped_clip(1.0), PROX),
        lambda: pf.chain(pf.clip(1.0), SGD, pf.clip(0.1), PROX),
        lambda: pf.chain(pf.stateless(lambda u, p: u), PROX),
        lambda: pf.chain(pf.GradientTransformation(_init, _update), PROX),
        lambda: pf.chain(pf.masked(SGD, "a"), pf.masked(ADAM, "b"), PROX),
        lambda: pf.chain(pf.partition({"x": SGD, "y": pf.freeze()}, {"*": "x"}), PROX),
        lambda: pf.chain(SGD, pf.partition({"x": PROX, "y": pf.identity()}, {"*": "x"})),
        lambda: pf.chain(SGD, pf.freeze(), PROX),
        lambda: pf.chain(pf.conditionally(pf.scale_by_lion(), True), SGD, PROX),
        lambda: pf.chain(pf.muon(0.1), PROX),
        lambda: pf.chain(pf.as_link(torch.optim.SGD), PROX),
        lambda: pf.chain(pf.conditionally(SGD, True), pf.add_noise(0.1), PROX),
        lambda: pf.chain(SGD, RATE),  # no prox link
    ],
)
def test_one_learning_rate_or_links_that_do_not_say_are_taken(build: Any) -> None:
    build()


# Functions beside them


def test_apply_updates_of_swapped_arguments_loses_no_parameter() -> None:
    with pytest.raises(ValueError, match=r"params has None at 'b', .*apply_updates\(params, upd"):
        pf.apply_updates({"a": GRADS["a"], "b": None}, PARAMS)
    assert pf.apply_updates({"a": None}, {"a": None}) == {"a": None}


def test_apply_updates_of_what_update_returned_whole_is_refused() -> None:
    link = WHOLE["chain"]
    with pytest.raises(TypeError, match=r"update returns \(updates, state\)"):
        pf.apply_updates(PARAMS, link.update(GRADS, link.init(PARAMS), PARAMS))
    both = pf.apply_updates((PARAMS["a"], PARAMS["b"]), (GRADS["a"], GRADS["b"]))
    assert torch.equal(both[0], PARAMS["a"] + 1)


def test_value_and_grad_of_a_module_names_functional() -> None:
    module = nn.Linear(3, 2)
    for loss in (module, nn.MSELoss()):
        with pytest.raises(TypeError, match=r"the loss is the module .*functional\(module\)"):
            pf.value_and_grad(loss, SGD)
    with pytest.raises(TypeError, match="expected a loss, a function of"):
        pf.value_and_grad({"a": 1}, SGD)  # type: ignore[arg-type] # what is refused
    step = pf.value_and_grad(lambda w, x: (w["a"] * x).sum(), SGD)
    with pytest.raises(TypeError, match=r"value_and_grad: got a Linear, .*functional\("):
        step(module, SGD.init(PARAMS), 1.0)
    with pytest.raises(TypeError, match="chain: its state is a dict"):
        step(SGD.init(PARAMS), PARAMS, 1.0)


def test_levels_of_a_state_that_is_none_of_its_own_is_refused() -> None:
    link = WHOLE["chain"]
    state = link.init(PARAMS)
    with pytest.raises(TypeError, match=r"levels_of: the transformation is .*expected a transf"):
        pf.levels_of(state, link)
    with pytest.raises(TypeError, match="chain: its state is a dict"):
        pf.levels_of(link, PARAMS)
    with pytest.raises(TypeError, match="hard_prox: its state is a dict"):
        pf.levels_of(PROX, PARAMS)
    with pytest.raises(TypeError, match="partition: its state is a tuple"):
        pf.levels_of(pf.partition({"x": PROX}, {"*": "x"}), state)
    with pytest.raises(TypeError, match="accumulate: its state is a tuple"):
        pf.levels_of(WHOLE["accumulate"], state)


def test_read_of_something_else_than_a_state_is_refused() -> None:
    state = WHOLE["chain"].init(PARAMS)
    with pytest.raises(TypeError, match=r"read takes \(state, name\), got a tuple for the name"):
        pf.read("slope", state)  # type: ignore[arg-type] # what is refused
    with pytest.raises(TypeError, match=r"read takes the state .* got a Chain"):
        pf.read(WHOLE["chain"], "slope")
    net = nn.Linear(3, 2)
    optimizer = pf.optim.TransformOptimizer(net.named_parameters(), pf.sgd(0.1))
    with pytest.raises(TypeError, match="TransformOptimizer; use its transformation_state"):
        pf.read(optimizer, "step")


def test_labels_that_are_no_strings_name_a_parameter() -> None:
    labels: Any = {"a": None, "b": "z"}.get
    link = pf.partition({"x": SGD}, lambda name, leaf: labels(name))
    with pytest.raises(ValueError, match=r"\['None', 'z'\].*first parameter .* is 'a'"):
        link.init(PARAMS)
    with pytest.raises(TypeError, match=r'transformations by label, such as \{"train": sgd'):
        pf.partition([SGD, ADAM], {"*": "x"})  # type: ignore[arg-type] # what is refused


# States that are dataclasses


@dataclass
class Counted:
    count: Tensor


class dataclass_state(pf.Link):
    def init(self, params: Any) -> Any:
        return Counted(torch.zeros((), dtype=torch.int64))


@pytest.mark.parametrize("how", [how for how in BUILT if how != "value_and_grad"])
def test_a_dataclass_for_a_state_is_refused_where_it_is_made(how: str) -> None:
    with pytest.raises(TypeError, match=r"dataclass_state.init gave .* Counted\(NamedTuple\)"):
        BUILT[how](dataclass_state()).init(PARAMS)
    with pytest.raises(TypeError, match=r"the dataclass Counted, .* Counted\(NamedTuple\)"):
        pf.read((dataclass_state().init(PARAMS),), "count")
    with pytest.raises(TypeError, match="the dataclass Counted"):
        pf.read(dataclass_state().init(PARAMS), "count")


@pytest.mark.parametrize("kind", [Counted, type("Counted", (), {})])
def test_state_class_takes_named_tuples_alone(kind: type) -> None:
    with pytest.raises(TypeError, match=r"expected a NamedTuple .* class Counted\(NamedTuple\)"):
        state_class(kind)


# Checks leave functions of torch.func and the compiler alone


@pytest.mark.slow
def test_steps_are_batched_differentiated_and_traced_as_without_checks() -> None:
    link = pf.apply_if_finite(WHOLE["chain"])
    state = link.init(PARAMS)

    def stepped(params: Any, grads: Any) -> Any:
        updates, _ = link.update(grads, state, params)
        return pf.apply_updates(params, updates)

    batch = tree_map(lambda x: torch.stack([x, 2 * x]), GRADS)
    both = torch.vmap(stepped, (None, 0))(PARAMS, batch)
    assert torch.equal(both["a"][1], stepped(PARAMS, tree_map(lambda x: 2 * x, GRADS))["a"])
    slope = torch.func.grad(lambda params: stepped(params, GRADS)["a"].sum())(PARAMS)
    assert torch.equal(slope["a"], torch.ones(2, 3))
    torch.compiler.reset()
    compiled = torch.compile(stepped, fullgraph=True, backend="eager")
    assert torch.equal(compiled(PARAMS, GRADS)["a"], stepped(PARAMS, GRADS)["a"])


@pytest.mark.parametrize("learn", [None, pf.sgd(0.1)], ids=repr)
def test_the_state_of_another_granularity_is_refused(learn: Any) -> None:
    """The numbers of one row were taken for those of all."""
    cuts = (pf.per_tensor(), pf.per_channel())
    links = [pf.hard_prox(pf.uniform(2), granularity=c, period=1, learn=learn) for c in cuts]
    params = {"w": torch.tensor([[1.0, -3.0], [0.5, 2.0]])}
    for one, other in itertools.permutations(pf.chain(pf.sgd(0.1), link) for link in links):
        _, state = one.update(params, one.init(params), params)
        for use in (
            lambda other=other, state=state: other.weights(state, params),
            lambda other=other, state=state: other.update(params, state, params),
        ):
            with pytest.raises(ValueError, match="of other rows; a state belongs to"):
                use()


@pytest.mark.parametrize("learn", [None, pf.sgd(0.1)], ids=repr)
def test_the_state_of_another_quantizer_is_refused(learn: Any) -> None:
    """Its one number of a row was taken for the row's levels, all weights for that number."""
    links = (pf.hard_prox(q, period=9, learn=learn) for q in (pf.uniform(2), pf.affine(2)))
    one, other = (pf.chain(pf.sgd(0.1), link) for link in links)
    params = {"w": torch.tensor([1.0, -3.0, 2.0])}
    _, state = one.update(params, one.init(params), params)
    message = r"affine\(2\) has 2 qparam\(s\) a row, and the state 1; a state belongs to"
    for use in (
        lambda: other.weights(state, params),
        lambda: pf.levels_of(other, state),
        *([] if learn is None else [lambda: other.update(params, state, params)]),
    ):
        with pytest.raises(ValueError, match=message):
            use()
