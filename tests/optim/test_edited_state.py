"""Entries of the optimizers' state that other code puts there, writes or deletes; and what a step
leaves behind that an error has stopped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from tests.optim.adapters import ADAPTERS, SOON, ones_for, parameters, quantized, transformed


def trained(adapter: str, steps: int = 3) -> tuple[nn.Parameter, Any]:
    (p,) = parameters(1)
    optimizer = ADAPTERS[adapter]([p])
    for _ in range(steps):
        ones_for(p)
        optimizer.step()
    return p, optimizer


def key_of(entries: dict[str, Any], name: str) -> str:
    return next(key for key in entries if key.rpartition(".")[2] == name)


def copies(p: Tensor, optimizer: Any) -> dict[str, Any]:
    return copy.deepcopy({"": p.detach(), **optimizer.state[p]})


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


LATENTS: dict[str, Callable[[Tensor], Any]] = {
    "float64": Tensor.double,
    "a parameter": nn.Parameter,
    "without memory of its own": lambda t: t[0, 0].expand(4, 4),
    "transposed": lambda t: t.t().contiguous().t(),
    "of an inference": lambda t: torch.inference_mode()(t.clone)(),
}


@pytest.mark.parametrize("kind", LATENTS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_latent_put_into_the_state_is_the_one_that_is_trained(adapter: str, kind: str) -> None:
    (p, optimizer), (q, other) = trained(adapter), trained(adapter)
    new = torch.randn(4, 4, generator=torch.Generator().manual_seed(5))
    given = LATENTS[kind](new)
    kept = given.detach().clone()
    optimizer.state[p]["latent"] = given
    with torch.no_grad():
        other.state[q]["latent"].copy_(given)
    for _ in range(3):
        for own, its in ((p, optimizer), (q, other)):
            ones_for(own)
            its.step()
    assert same(copies(p, optimizer), copies(q, other))
    assert torch.equal(given, kept)  # the user's own


def moments(p: Tensor, optimizer: Any) -> list[Tensor]:
    entries = optimizer.state[p].items()
    return [got for key, got in entries if got.shape == p.shape and key != "latent"]


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_parameter_has_the_weights_of_a_latent_that_was_edited_before_it_is_used(
    adapter: str, beside: bool
) -> None:
    p, optimizer = trained(adapter, 8)  # on levels
    latent = optimizer.state[p]["latent"].neg_()
    for moment in moments(p, optimizer) if beside else ():
        moment.mul_(0.5)
    before = p.detach().clone()
    optimizer.zero_grad()
    assert torch.equal(p, -before)
    assert optimizer.state[p]["latent"] is latent


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_edited_latent_stays_where_its_parameter_is_exchanged_at_once(adapter: str) -> None:
    p, optimizer = trained(adapter, 8)
    optimizer.state[p]["latent"].neg_()
    other = optimizer.param_groups[0]["params"][0] = nn.Parameter(p.detach().clone())
    optimizer.zero_grad()
    assert torch.equal(other, -p)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_was_written_to_a_parameter_is_its_latent_though_moments_were_edited(
    adapter: str,
) -> None:
    p, optimizer = trained(adapter)
    for moment in moments(p, optimizer):
        moment.mul_(0.5)
    with torch.no_grad():
        p.fill_(2.0)
    optimizer.state_dict()
    assert torch.equal(optimizer.state[p]["latent"], torch.full((4, 4), 2.0))


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a latent of another shape": (
        lambda s: s.update(latent=torch.zeros(2, 8)),
        r"latent has shape \(2, 8\), expected \(4, 4\)",
    ),
    "a latent that is no tensor": (lambda s: s.update(latent=3.0), "latent is a float, expected a"),
    "a complex latent": (
        lambda s: s.update(latent=torch.zeros(4, 4, dtype=torch.complex64)),
        "latent is complex",
    ),
    "no latent": (lambda s: s.pop("latent"), "latent missing; put back what is, load"),
    "no qparams": (lambda s: s.pop(key_of(s, "qparams")), "qparams missing; put back what is"),
    "no number of steps, or no moment": (
        lambda s: s.pop(key_of(s, "updates") if "updates" in s else key_of(s, "first")),
        "(updates|first) missing; put back what is",
    ),
    "qparams of another shape": (
        lambda s: s.update({key_of(s, "qparams"): torch.zeros(7)}),
        r"qparams has shape \(7,\), expected \(2,\)",
    ),
    "a count in words": (lambda s: s.update({key_of(s, "count"): "3"}), "count is a str"),
    "half a step": (lambda s: s.update({key_of(s, "count"): 0.5}), r"count is 0\.5, expected a"),
    "nothing": (lambda s: s.clear(), "missing; put back what is, load a state dict, or build an"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_entries_that_do_not_fit_are_refused_and_may_be_put_back(adapter: str, wrong: str) -> None:
    p, optimizer = trained(adapter)
    state, before = copy.deepcopy(optimizer.state_dict()), copies(p, optimizer)
    kept = dict(optimizer.state[p])
    change, message = WRONG[wrong]
    for mend in (lambda: optimizer.state[p].update(kept), lambda: optimizer.load_state_dict(state)):
        change(optimizer.state[p])
        for method in (optimizer.step, optimizer.state_dict, optimizer.zero_grad):
            with pytest.raises(ValueError, match=f"the state of parameter '.*0.*': .*{message}"):
                method()
        mend()
        optimizer.state_dict()
        assert same(copies(p, optimizer), before)
    ones_for(p)
    optimizer.step()


def test_a_state_of_a_parameter_that_is_not_quantized_is_refused_where_it_is_gone() -> None:
    p, q = parameters()
    groups = [{"params": [p], "quant_bits": 2}, {"params": [q]}]
    optimizer = QuantOptimizer(torch.optim.SGD(groups, lr=0.05), SOON)
    optimizer.state[q].clear()
    with pytest.raises(ValueError, match="'0 of group 1': updates missing; put back what is"):
        optimizer.step()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_where_parameter_and_latent_were_both_written_the_last_one_must_be_told(
    adapter: str,
) -> None:
    p, optimizer = trained(adapter)
    with torch.no_grad():
        p.fill_(2.0)
        optimizer.state[p]["latent"].fill_(3.0)
    with pytest.raises(ValueError, match=r"'.*0.*' and its latent .* call optimizer\.sync\(\)"):
        optimizer.step()
    with torch.no_grad():
        p.copy_(optimizer.state[p]["latent"])
    for value, write in ((3.0, None), (4.0, p), (5.0, "latent")):
        with torch.no_grad():
            if write is not None:
                (optimizer.state[p]["latent"] if write == "latent" else write).fill_(value)
        optimizer.sync()
        assert torch.equal(optimizer.state[p]["latent"], torch.full((4, 4), value))


@pytest.mark.parametrize("fresh", ["same", "copy"])
def test_entries_exchanged_for_others_are_those_that_the_base_goes_on_with(fresh: str) -> None:
    p, optimizer = trained("QuantOptimizer")
    entries = copy.deepcopy(optimizer.state[p]) if fresh == "copy" else dict(optimizer.state[p])
    entries["exp_avg"] = torch.full((4, 4), 7.0)
    optimizer.state[p] = entries
    p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg"], torch.full((4, 4), 6.3))


def other_parameter(p: Tensor, optimizer: Any) -> Callable[[], Any]:
    params = optimizer.param_groups[0]["params"]
    params[0] = nn.Parameter(torch.ones(3, 3))
    return lambda: params.__setitem__(0, p)


def other_bits(p: Tensor, optimizer: Any) -> Callable[[], Any]:
    group = optimizer.param_groups[0]
    before = {key: group.pop(key) for key in ("quant_bits",) if key in group}
    group["quant_bits"] = 3
    return lambda: (group.pop("quant_bits"), group.update(before))


def converted(p: Tensor, optimizer: Any) -> Callable[[], Any]:
    before = p.data
    p.data = p.data.double()
    return lambda: setattr(p, "data", before)


def another_group(p: Tensor, optimizer: Any) -> Callable[[], Any]:
    optimizer.param_groups.append({"params": []})
    return optimizer.param_groups.pop


def state_thrown_away(p: Tensor, optimizer: Any) -> Callable[[], Any]:
    before = optimizer.state.pop(p)
    return lambda: optimizer.state.update({p: before})


@pytest.mark.parametrize(
    "edit", [other_parameter, other_bits, converted, another_group, state_thrown_away]
)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_refused_edit_that_is_undone_leaves_no_trace(adapter: str, edit: Any) -> None:
    (p, optimizer), (q, other) = trained(adapter), trained(adapter)
    undo = edit(p, optimizer)
    for method in (optimizer.step, optimizer.state_dict, lambda: copy.deepcopy(optimizer)):
        with pytest.raises(ValueError, match=adapter):
            method()
    undo()
    for own, its in ((p, optimizer), (q, other)):
        ones_for(own)
        its.step()
    assert same(copies(p, optimizer), copies(q, other))


# Steps that an error stops


class Breaks:
    """Raises at one of its calls."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyError("broken")


def breaking(where: str, at: int) -> tuple[pf.Prox, Breaks]:
    breaks = Breaks(at)

    class Quantizer(type(SOON.quantizer)):  # type: ignore[misc] # of no class that is known
        def fit(self, rows: Tensor) -> Tensor:
            breaks()
            return super().fit(rows)

    def proxmap(u: Tensor, levels: Tensor, coefficient: Tensor) -> Tensor:
        if where == "map":
            breaks()
        return pf.proxmaps.parq(u, levels, coefficient)

    def slope(step: Tensor) -> Tensor:
        if where == "schedule":
            breaks()
        return pf.schedules.inverse_slope(0, 5)(step)

    quantizer = Quantizer(2) if where == "quantizer" else pf.lsbq(2)
    return pf.custom_prox(quantizer, proxmap, slope, period=1), breaks


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("where", ["map", "quantizer", "schedule"])
def test_after_an_error_in_a_link_the_base_has_moved_and_nothing_else(where: str, at: int) -> None:
    """Another step goes on from there as from a state that was saved then."""
    link, breaks = breaking(where, 10**6)
    params, alone = parameters(3), parameters(3)
    groups = [{"params": params[:2], "quant_bits": 2}, {"params": params[2:], "quant_bits": 2}]
    base = torch.optim.AdamW(groups, lr=0.05)
    optimizer, its = QuantOptimizer(base, link), torch.optim.AdamW(alone, lr=0.05)
    for i in range(4):
        before = [copies(p, optimizer) for p in params]
        if i == 2:
            breaks.left = at
        ones_for(*params, *alone)
        its.step()
        try:
            optimizer.step()
        except KeyError:
            assert i == 2
            for p, was in zip(params, before, strict=True):
                now = copies(p, optimizer)
                for key in ("qparams", "count", "slope", "lr_sum"):
                    assert torch.equal(now[key], was[key])
        else:
            assert i != 2
    assert [int(optimizer.state[p]["count"]) for p in params] == [3, 3, 3]
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(optimizer.state[p]["latent"], q)  # gradients do not depend on weights
        weight = optimizer.link(optimizer.param_groups[0]).weights(
            pf.ProxState(*(optimizer.state[p][key] for key in ("count", "slope", "lr_sum")),
                         [optimizer.state[p]["qparams"]]), [optimizer.state[p]["latent"]]
        )[0]  # fmt: skip
        assert torch.equal(p, weight)


@pytest.mark.parametrize("where", ["map", "quantizer", "schedule"])
def test_after_an_error_in_a_link_a_transformation_has_not_moved(where: str) -> None:
    (p,), (q,) = parameters(1), parameters(1)
    link, breaks = breaking(where, 10**6)
    optimizer, other = transformed([p], link), transformed([q], breaking(where, 10**6)[0])
    for i in range(5):
        if i == 3:
            breaks.left, before = 1, copies(p, optimizer)
            ones_for(p)
            with pytest.raises(KeyError):
                optimizer.step()
            assert same(copies(p, optimizer), before)
        for own, its in ((p, optimizer), (q, other)):
            ones_for(own)
            its.step()
    assert same(copies(p, optimizer), copies(q, other))


def test_after_an_error_parameters_updated_before_it_keep_their_latents() -> None:
    link, breaks = breaking("map", 10**6)
    params, alone = parameters(2), parameters(2)
    net = nn.ParameterDict({"p0": params[0], "p1": params[1]})
    optimizer = TransformOptimizer(net.named_parameters(), pf.chain(pf.sgd(0.05), link))
    assert len(optimizer._tree.parts) == 2
    ones_for(*params)
    optimizer.step()
    breaks.left = 2
    with pytest.raises(KeyError):
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    again = TransformOptimizer(
        [(f"p{i}", p) for i, p in enumerate(alone)], pf.chain(pf.sgd(0.05), breaking("map", 0)[0])
    )
    with torch.no_grad():
        for p, q in zip(params, alone, strict=True):
            q.copy_(p)
    again.load_state_dict(state)
    moved = [p0 - optimizer.state[p]["latent"] for p0, p in zip(parameters(2), params, strict=True)]
    torch.testing.assert_close(moved, [torch.full((4, 4), 0.1), torch.full((4, 4), 0.05)])
    for one, two in ((params, optimizer), (alone, again)):
        ones_for(*one)
        two.step()
    for p, q in zip(params, alone, strict=True):
        assert same(copies(p, optimizer), copies(q, again))


def test_after_an_error_of_the_base_its_next_step_goes_on() -> None:
    params, alone = parameters(2), parameters(2)
    optimizer, its = quantized(params), torch.optim.AdamW(alone, lr=0.05)
    breaks = Breaks(2)
    optimizer.base.register_step_post_hook(lambda *_: breaks())
    for i in range(3):
        ones_for(*params, *alone)
        its.step()
        if i == 1:
            with pytest.raises(KeyError):
                optimizer.step()
        else:
            optimizer.step()
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(optimizer.state[p]["latent"], q)
        assert torch.equal(optimizer.state[p]["exp_avg"], its.state[q]["exp_avg"])
