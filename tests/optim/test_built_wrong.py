"""What cannot be right where an optimizer is built or its parameters change, refused with the
reason; and states of other links than the optimizer has."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer, load_checkpoint, save_checkpoint
from tests.optim.adapters import ADAPTERS, LATE, ones_for, parameters, transformed

FRACTIONS = [{"anneal_start": 0.1, "anneal_end": 9}, {"anneal_start": 0, "anneal_end": 0.9}]
ANNEALED = {
    "parq_prox": pf.parq_prox,
    "soft_prox": pf.soft_prox,
    "binary_relax_prox": pf.binary_relax_prox,
    "proxquant_prox": partial(pf.proxquant_prox, strength=0.1),
}


@pytest.mark.parametrize("bounds", FRACTIONS)
@pytest.mark.parametrize("link", ANNEALED)
def test_bounds_that_are_meant_for_fractions_are_refused(link: str, bounds: Any) -> None:
    (got,) = (f"{name}={bound}" for name, bound in bounds.items() if 0 < bound < 1)
    wanted = f"{link}: {got} is between 0 and 1, and bounds are steps, not fractions"
    with pytest.raises(ValueError, match=wanted):
        ANNEALED[link](pf.lsbq(2), **bounds)
    with pytest.raises(ValueError, match=f"{got} is between 0 and 1"):
        pf.schedules.inverse_slope(**bounds)


def test_bounds_of_whole_steps_and_batched_ones_are_taken() -> None:
    for link in ANNEALED.values():
        link(pf.lsbq(2), anneal_start=0, anneal_end=1)
        link(pf.lsbq(2), anneal_start=torch.tensor(0), anneal_end=torch.tensor(1.0))
    pf.schedules.inverse_slope(1, 2.5)


SHARES = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@pytest.mark.parametrize("link", ANNEALED)
@given(SHARES, st.integers(1, 10**6), st.booleans())
def test_fractions_of_total_steps_are_the_whole_steps_nearest_to_them(
    link: str, shares: Any, total: int, as_tensors: bool
) -> None:
    first, last = (round(share * total) for share in shares)
    given_as = torch.tensor if as_tensors else float
    bounds = {"anneal_start": given_as(shares[0]), "anneal_end": given_as(shares[1])}
    if as_tensors:
        first, last = (int((one * total).round()) for one in bounds.values())
    if first == last:
        with pytest.raises(ValueError, match="before"):
            ANNEALED[link](pf.lsbq(2), **bounds, total_steps=total)
        return
    made = ANNEALED[link](pf.lsbq(2), **bounds, total_steps=total)
    steps = ANNEALED[link](pf.lsbq(2), anneal_start=first, anneal_end=last)
    at = torch.tensor([first - 1, first, (first + last) // 2, last])
    assert torch.equal(made.coefficient(at), steps.coefficient(at))
    if not as_tensors:
        assert made == steps
        assert repr(made) == repr(steps)
        assert replace(made, anneal_end=last + 1) == replace(steps, anneal_end=last + 1)


def test_fractions_may_be_batched() -> None:
    def slope(share: torch.Tensor) -> torch.Tensor:
        link = pf.parq_prox(pf.lsbq(1), anneal_start=0.0, anneal_end=share, total_steps=10)
        return link.coefficient(torch.tensor(3))

    shares = torch.tensor([0.4, 0.5, 1.0])
    alone = torch.stack([slope(share) for share in shares])
    torch.testing.assert_close(torch.vmap(slope)(shares), alone)


@pytest.mark.parametrize(
    ("bounds", "total", "error", "match"),
    [
        (
            (0.1, 900),
            1000,
            ValueError,
            r"total_steps=1000 bounds are fractions .* got anneal_end=900",
        ),
        ((-0.1, 0.9), 1000, ValueError, r"in \[0, 1\], got anneal_start=-0\.1"),
        ((0.5, 0.2), 1000, ValueError, "anneal_start must come before anneal_end"),
        ((0.1, 0.11), 9, ValueError, r"0\.1 and anneal_end=0\.11 are both step 1 of total_steps=9"),
        ((0.1, 0.9), 0, ValueError, "total_steps must be 1 or more, got 0"),
        ((0.1, 0.9), 1e3, TypeError, "total_steps must be a whole number"),
        ((0.1, 0.9), None, ValueError, "0.1 times the number of steps, or total_steps="),
    ],
)
def test_fractions_that_say_nothing_are_refused(
    bounds: Any, total: Any, error: type[Exception], match: str
) -> None:
    first, last = bounds
    with pytest.raises(error, match=match):
        pf.parq_prox(pf.lsbq(2), anneal_start=first, anneal_end=last, total_steps=total)


# Parameters on the meta device, and flattened ones


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_optimizer_is_built_after_the_weights_are_there(adapter: str) -> None:
    meta = nn.Parameter(torch.empty(4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"p?0.*is on the meta device.*build the optimizer after"):
        ADAPTERS[adapter]([meta])
    (a,) = parameters(1)
    more = [("other", meta)] if adapter == "TransformOptimizer" else [meta]
    optimizer = ADAPTERS[adapter]([a])
    with pytest.raises(ValueError, match="is on the meta device"):
        optimizer.add_param_group({"params": more, "quant_bits": 2})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_parameter_exchanged_for_a_flat_one_is_refused(adapter: str, trained: bool) -> None:
    (a,) = parameters(1)
    optimizer = ADAPTERS[adapter]([a])
    if trained:
        ones_for(a)
        optimizer.step()
    flat = nn.Parameter(a.detach().flatten())
    optimizer.param_groups[0]["params"][0] = flat
    ones_for(flat)
    wanted = r"had the shape \(4, 4\) and has \(16,\) now, which lost what its rows are"
    with pytest.raises(ValueError, match=wanted):
        optimizer.step()


@pytest.mark.parametrize(
    ("groups", "had", "has", "apart"),
    [(1, 2, 1, True), (1, 1, 1, True), (2, 1, 1, True), (1, 2, 1, False), (1, 2, 0, False)],
)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_groups_that_zero_of_deepspeed_flattens_are_refused(
    adapter: str, groups: int, had: int, has: int, apart: bool
) -> None:
    """One flat parameter in the place of a group's: stages 1 and 2 step each group as the only
    one, stage 3 leaves the others empty."""
    params = parameters(had)
    optimizer = ADAPTERS[adapter](params)
    if groups == 2:
        more: Any = nn.Parameter(torch.zeros(4))
        named = ("more", more) if adapter == "TransformOptimizer" else more
        optimizer.add_param_group({"params": [named]})
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in params]))
    group = optimizer.param_groups[0]
    group["params"] = [flat][:has]
    if apart:
        optimizer.param_groups = [group]
    ones_for(flat)
    with pytest.raises(ValueError, match=r"ZeRO of DeepSpeed flattens .*fully_shard"):
        optimizer.step()


@pytest.mark.parametrize("method", ["step", "state_dict"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_parameter_flattened_in_place_is_refused(adapter: str, method: str) -> None:
    (a,) = parameters(1)
    optimizer = ADAPTERS[adapter]([a])
    a.data = a.data.flatten()
    with pytest.raises(ValueError, match=r"had the shape \(4, 4\) and has \(16,\) now"):
        getattr(optimizer, method)()


# States of other links

OTHERS: dict[str, Callable[[Any], Any]] = {
    "quantizer": lambda prox: replace(prox, quantizer=pf.lsbq(2, "optimal")),
    "qparams": lambda prox: replace(prox, quantizer=pf.uniform(2)),
    "granularity": lambda prox: replace(prox, granularity=pf.per_channel()),
    "map": lambda _: pf.soft_prox(pf.lsbq(2), anneal_start=1000, anneal_end=2000),
    "schedule": lambda prox: replace(prox, anneal_end=2001),
    "period": lambda prox: replace(prox, period=3),
}


@pytest.mark.parametrize("way", ["state_dict", "checkpoint"])
@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_state_of_another_link_is_refused(
    adapter: str, other: str, way: str, tmp_path: Path
) -> None:
    net, fresh = (nn.ParameterDict({"p0": p}) for p in parameters(2))
    optimizer = ADAPTERS[adapter]([net["p0"]])
    ones_for(net["p0"])
    optimizer.step()
    resumed = ADAPTERS[adapter]([fresh["p0"]], OTHERS[other](LATE))
    optimizer = ADAPTERS[adapter]([net["p0"]], LATE)
    save_checkpoint(tmp_path / "last", net, optimizer)
    state = optimizer.state_dict()
    load = {
        "state_dict": lambda: resumed.load_state_dict(state),
        "checkpoint": lambda: load_checkpoint(tmp_path / "last", fresh, resumed),
    }
    with pytest.raises(ValueError, match=r"was trained with (another|other) prox link"):
        load[way]()


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_state_of_another_quantizer_is_refused_by_the_names_of_links(
    adapter: str, deleted: bool
) -> None:
    """Not by a shape, which says nothing to who changed the quantizer; nor where the digest was
    deleted, as the first error advises."""
    a, b = parameters(2)
    of_two = replace(LATE, quantizer=pf.lsbq(2))
    state = ADAPTERS[adapter]([a], replace(LATE, quantizer=pf.uniform(2))).state_dict()
    message = r"'p?0.*': it was trained with (an)?other prox link.*parq_prox\(lsbq\(2\), "
    if deleted:
        for entries in state["state"].values():
            entries.pop("link", None), entries.pop("prox_links", None)
        message = r"qparams has shape \(1,\), expected \(2,\): 2 for each row of lsbq\(2\); it was"
    with pytest.raises(ValueError, match=message) as caught:
        ADAPTERS[adapter]([b], of_two).load_state_dict(state)
    if adapter == "QuantOptimizer" and not deleted:
        assert "of 1 qparam(s) a row, than" in str(caught.value)
        assert ", of 2; build" in str(caught.value)


def test_a_transformation_may_be_resumed_with_another_learning_rate() -> None:
    a, b = parameters(2)
    rated = replace(LATE, learning_rate=0.05)
    optimizer = transformed([a], rated)
    ones_for(a)
    optimizer.step()
    fresh = TransformOptimizer(
        [("p0", b)], pf.chain(pf.adamw(0.01), replace(LATE, learning_rate=0.01))
    )
    fresh.load_state_dict(optimizer.state_dict())
    assert torch.equal(fresh.state[b]["latent"], optimizer.state[a]["latent"])


def test_states_saved_before_transformations_had_digests_are_loaded(tmp_path: Path) -> None:
    net, fresh = (nn.ParameterDict({"p0": p}) for p in parameters(2))
    optimizer = transformed([net["p0"]], LATE)
    ones_for(net["p0"])
    optimizer.step()
    state = optimizer.state_dict()
    del state["state"][0]["prox_links"], optimizer.state[net["p0"]]["prox_links"]
    resumed = transformed([fresh["p0"]], LATE)
    own = resumed.state[fresh["p0"]]["prox_links"]
    resumed.load_state_dict(state)
    assert resumed.state[fresh["p0"]]["prox_links"] == own
    save_checkpoint(tmp_path / "last", net, optimizer)
    load_checkpoint(tmp_path / "last", fresh, resumed)
    assert torch.equal(resumed.state[fresh["p0"]]["latent"], optimizer.state[net["p0"]]["latent"])


def test_bounds_of_an_annealing_from_0_to_1_as_floats_are_meant_for_fractions() -> None:
    with pytest.raises(ValueError, match=r"anneal_end=1\.0 is between 0 and 1"):
        pf.parq_prox(pf.lsbq(1), anneal_start=0.0, anneal_end=1.0)
    pf.parq_prox(pf.lsbq(1), anneal_start=0, anneal_end=1)  # one step


@pytest.mark.parametrize("key", ["quant_bits", "prox", "granularity"])
def test_keys_of_quant_optimizer_are_refused_by_the_other_adapter(key: str) -> None:
    group = {"params": [torch.nn.Parameter(torch.ones(2, 2))], key: 2}
    with pytest.raises(ValueError, match=f"group 0 has {key}, which are keys of QuantOptimizer"):
        TransformOptimizer([group], pf.sgd(0.1))


@pytest.mark.parametrize(
    ("key", "got"), [("prox", LATE), ("quant_bits", 2), ("quantizer", pf.lsbq(2)), ("prox_", 1)]
)
def test_keys_that_are_put_into_a_group_later_are_refused(key: str, got: Any) -> None:
    """They would do nothing: what a group's levels follow is taken when it is added."""
    a, b = parameters()
    groups = [{"params": [a], "prox": LATE}, {"params": [b]}]
    optimizer = QuantOptimizer(torch.optim.AdamW(groups, lr=0.05))
    optimizer.param_groups[1][key] = got
    ones_for(a, b)
    with pytest.raises(ValueError, match=f"group 1 has {key}=.* and was built with None"):
        optimizer.step()
    del optimizer.param_groups[1][key]
    optimizer.step()


@pytest.mark.parametrize(("key", "got"), [("prox", LATE), ("quant_bits", 2), ("weight_decay", 0.1)])
def test_keys_that_are_put_into_a_group_of_transform_optimizer_later_are_refused(
    key: str, got: Any
) -> None:
    (a,) = parameters(1)
    optimizer = TransformOptimizer([a], pf.chain(pf.sgd(0.1), LATE))
    optimizer.param_groups[0][key] = got
    ones_for(a)
    with pytest.raises(ValueError, match=f"group 0 has {key}"):
        optimizer.step()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_optimizer_prints_what_it_was_built_with(adapter: str) -> None:
    optimizer = ADAPTERS[adapter](parameters(1), LATE)
    lines = repr(optimizer).splitlines()
    assert lines[0] == f"{adapter} ("
    expected = {"QuantOptimizer": f"prox: {LATE}", "TransformOptimizer": "transformation: chain("}
    assert any(line.startswith(expected[adapter]) for line in lines)
    assert "Parameter Group 0" in lines


def test_an_optimizer_that_quantizes_nothing_says_so() -> None:
    """A baseline, without a link, is the base alone; groups that all say None may be a mistake."""
    groups: list[Any] = [{"params": [p]} for p in parameters(2)]
    assert "quantized: nothing" in repr(QuantOptimizer(torch.optim.SGD(groups, lr=0.1)))
    for group, own in ((0, LATE), (1, None)):
        groups[group]["prox"] = own
    assert "quantized: nothing" not in repr(QuantOptimizer(torch.optim.SGD(groups, lr=0.1)))
    unset = [{"params": [p], "prox": None} for p in parameters(2)]
    with pytest.warns(UserWarning, match='every group has "prox": None .* nothing is quantized'):
        QuantOptimizer(torch.optim.SGD(unset, lr=0.1))
    unset = [{"params": [p], "prox": None} for p in parameters(2)]
    with pytest.raises(ValueError, match="no group has quant_bits below 16"):
        QuantOptimizer(torch.optim.SGD(unset, lr=0.1), LATE)


# Modes of torch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "on meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_modes_of_torch_change_nothing(adapter: str, mode: str) -> None:
    """In which it is built, stepped, saved and loaded, all of it or each by itself."""

    def run(*inside: str) -> list[Any]:
        def during(what: str) -> AbstractContextManager[Any]:
            return MODES[mode]() if what in inside else nullcontext()

        (p,) = parameters(1)
        with during("build"):
            optimizer = ADAPTERS[adapter]([p])
        for i in range(4):
            ones_for(p)
            with during("step"):
                optimizer.step()
                optimizer.zero_grad()
            if i == 2:
                with during("save"):
                    saved = copy.deepcopy(optimizer.state_dict())
                with during("load"):
                    optimizer.load_state_dict(saved)
        entries = optimizer.state[p]
        return [p.detach(), *(entries[key].double() for key in sorted(entries))]

    alone, parts = run(), ("build", "step", "save", "load")
    for inside in (*((part,) for part in parts), parts):
        assert all(map(torch.equal, alone, run(*inside)))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_parameters_that_inference_made_are_refused(adapter: str) -> None:
    with torch.inference_mode():
        p = nn.Parameter(torch.ones(4, 4), requires_grad=False)
    optimizer = ADAPTERS[adapter](parameters(1))
    optimizer.param_groups[0]["params"][0] = p
    for use in (lambda: ADAPTERS[adapter]([p]), optimizer.step):
        with pytest.raises(ValueError, match=r"'.*0.*' was made in torch.inference_mode\(\), of"):
            use()


def test_counts_and_schedules_stay_where_they_are_whatever_the_default_device() -> None:
    with torch.device("meta"):
        slope = pf.schedules.inverse_slope(0, 5)(torch.zeros((), dtype=torch.int64, device="cpu"))
    assert slope.device.type == "cpu"
