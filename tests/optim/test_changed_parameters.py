"""Parameters that code outside the optimizer writes, exchanges, moves or converts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, TransformOptimizer
from tests.optim.adapters import ADAPTERS, LATE, ones_for, parameters


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_weights_loaded_after_the_optimizer_was_built_are_trained_on(
    adapter: str, dtype: torch.dtype, steps: int
) -> None:
    a, b = parameters(2, dtype)
    optimizer = ADAPTERS[adapter]([a, b], LATE)
    for _ in range(steps):
        ones_for(a, b)
        optimizer.step()
    pretrained = torch.full((4, 4), 7.0, dtype=dtype)
    with torch.no_grad():
        a.copy_(pretrained)
        kept = b.clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    ones_for(a, b)
    optimizer.step()
    assert torch.equal(a, pretrained)
    assert torch.equal(b, kept)
    assert torch.equal(optimizer.state[a]["latent"], pretrained.to(optimizer.state[a]["latent"]))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_elements_changed_in_mid_annealing_become_latents_and_the_others_keep_theirs(
    adapter: str,
) -> None:
    (a,) = parameters(1)
    optimizer = ADAPTERS[adapter]([a])
    for _ in range(4):
        ones_for(a)
        optimizer.step()
    before = optimizer.state[a]["latent"].clone()
    with torch.no_grad():
        a[0, 0] = 3.0
        a[1] *= 1 + 1e-7  # within rounding
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    ones_for(a)
    optimizer.step()
    before[0, 0] = 3.0
    assert torch.equal(optimizer.state[a]["latent"], before)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_state_is_where_exchanged_and_moved_parameters_are(adapter: str, in_place: bool) -> None:
    params = parameters()
    optimizer = ADAPTERS[adapter](params)
    ones_for(*params)
    optimizer.step()
    there = [nn.Parameter(torch.empty_like(p, device="meta")) for p in params]
    if in_place:
        for p, other in zip(params, there, strict=True):
            torch.utils.swap_tensors(p, other)
        there = params
    for group in optimizer.param_groups:
        group["params"] = there
    for _ in range(2):
        for entries in optimizer.state_dict()["state"].values():
            kept = [got for got in entries.values() if isinstance(got, Tensor) and got.dim()]
            assert len(kept) >= 3  # latent, moments, levels
            assert {got.device.type for got in kept} == {"meta"}
        ones_for(*there)
        optimizer.step()


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_parameter_that_is_given_another_shape_in_place_is_refused(
    adapter: str, edited: bool
) -> None:
    (p,) = parameters(1)
    optimizer = ADAPTERS[adapter]([p])
    p.data = torch.ones(2, 4)
    if edited:
        optimizer.state[p]["latent"].neg_()
    wanted = r"0.*' had the shape \(4, 4\) and has \(2, 4\) now, which its state does not fit"
    for method in (optimizer.step, optimizer.state_dict):
        with pytest.raises(ValueError, match=wanted):
            method()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_a_parameter_holds_that_was_exchanged_before_loading_does_not_count(
    adapter: str,
) -> None:
    (p,), (q,) = parameters(1), parameters(1)
    optimizer, saved = ADAPTERS[adapter]([p], LATE), ADAPTERS[adapter]([q], LATE)
    ones_for(q)
    saved.step()
    other = nn.Parameter(torch.full((4, 4), 7.0, dtype=torch.float64))
    optimizer.param_groups[0]["params"][0] = other
    optimizer.load_state_dict(saved.state_dict())
    optimizer.sync()
    torch.testing.assert_close(other.detach(), q.detach().double())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_module_moved_to_another_device_after_the_optimizer_was_built(adapter: str) -> None:
    runs = []
    for device in ("cpu", "cuda"):
        module = nn.ParameterList(parameters())
        optimizer = ADAPTERS[adapter](list(module))
        module.to(device)
        for _ in range(8):
            ones_for(*module)
            optimizer.step()
        runs.append([p.detach().cpu() for p in module])
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_small_changes_of_bfloat16_weights_are_seen(adapter: str) -> None:
    w = nn.Parameter(torch.tensor([[1.0, 0.05, 0.03, -0.05]], dtype=torch.bfloat16))
    optimizer = ADAPTERS[adapter]([w], LATE)
    new = torch.tensor([[1.0, 0.0, -0.03, -0.02]], dtype=torch.bfloat16)
    with torch.no_grad():
        w.copy_(new)
    optimizer.step()  # without a gradient
    assert torch.equal(w, new)
    assert torch.equal(optimizer.state[w]["latent"], new.float())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_good_weights_loaded_over_infinite_ones_are_taken(adapter: str) -> None:
    w = nn.Parameter(torch.ones(2, 2))
    optimizer = ADAPTERS[adapter]([w], LATE)
    with torch.no_grad():
        optimizer.state[w]["latent"].copy_(torch.tensor([[torch.inf, torch.nan], [0.5, 0.5]]))
    optimizer.step()
    assert w[0, 0] == torch.inf
    with torch.no_grad():
        w.copy_(torch.ones(2, 2))
    optimizer.step()
    assert torch.equal(w, torch.ones(2, 2))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_row_without_a_number_leaves_the_latents_of_others_alone_in_a_copy(adapter: str) -> None:
    torch.manual_seed(0)
    net = nn.Linear(8, 4, bias=False)
    prox = pf.hard_prox(pf.lsbq(2), granularity=pf.per_channel())
    optimizer = ADAPTERS[adapter]([net.weight], prox)
    for bad in (1.0, torch.nan):
        net.weight.grad = torch.randn(4, 8)
        net.weight.grad[0, 0] *= bad
        optimizer.step()
    other, its = copy.deepcopy((net, optimizer))
    for one, two in ((net, optimizer), (other, its)):
        one.weight.grad = torch.zeros(4, 8)
        two.step()
    latents = [o.state[n.weight]["latent"][1:] for n, o in ((net, optimizer), (other, its))]
    assert torch.equal(*latents)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_weights_loaded_before_a_group_is_added_or_a_parameter_exchanged(adapter: str) -> None:
    w, v = parameters()
    optimizer = ADAPTERS[adapter]([w], LATE)
    seven, three = torch.full((4, 4), 7.0), nn.Parameter(torch.full((4, 4), 3.0))
    with torch.no_grad():
        w.copy_(seven)
    named = adapter == "TransformOptimizer"
    bits = {"quant_bits": 2} if isinstance(optimizer, QuantOptimizer) else {}
    optimizer.add_param_group({"params": [("v", v)] if named else [v], **bits})
    optimizer.step()
    assert torch.equal(w, seven)
    optimizer.param_groups[0]["params"][0] = three
    optimizer.step()
    assert torch.equal(three, torch.full((4, 4), 3.0))


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_converting_a_module_after_the_optimizer_was_built_raises(adapter: str) -> None:
    net = nn.Linear(4, 4, bias=False)
    optimizer = ADAPTERS[adapter]([net.weight])
    net.double()
    with pytest.raises(ValueError, match=r"is torch\.float64 now and its latent torch\.float32"):
        optimizer.step()


COPIES = {
    "lookahead": lambda: pf.lookahead(pf.sgd(0.25), 2),
    "schedule_free": lambda: pf.schedule_free(pf.sgd(0.25)),
    "averaged": lambda: pf.averaged(pf.sgd(0.25), 0.5),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", COPIES)
def test_a_link_copies_the_weights_that_training_starts_from(name: str, frozen: bool) -> None:
    """Those that were loaded after the optimizer was built; it went back to the initial ones."""
    runs = []
    for late in (False, True):
        p, q = (nn.Parameter(torch.zeros(3)) for _ in range(2))
        given = nn.Parameter(torch.full((3,), 64.0))
        start = p if late else given
        optimizer = TransformOptimizer([("w", start), ("other", q)], COPIES[name]())
        with torch.no_grad():
            start.copy_(given)
        found = []
        for t in range(7):
            start.requires_grad_(t > 3 or not frozen)
            if name != "lookahead":
                with optimizer.averaged_weights():
                    found.append(start.detach().clone())
            start.grad, q.grad = (torch.ones(3) for _ in range(2))
            optimizer.step()
            found.append(start.detach().clone())
        runs.append(torch.stack(found))
    assert torch.equal(*runs)
    assert runs[0].min() > 60


def test_the_average_of_loaded_weights_is_they_until_a_step_is_made() -> None:
    p, q = (nn.Parameter(torch.zeros(2, 3)) for _ in range(2))
    groups = [{"params": [p], "prox": pf.hard_prox(pf.lsbq(1))}, {"params": [q]}]
    optimizer = QuantOptimizer(torch.optim.SGD(groups, lr=0.1), average=0.9)
    with torch.no_grad():
        p.fill_(5.0)
        q.fill_(5.0)
    with optimizer.averaged_weights():
        assert bool((p == 5).all())
        assert bool((q == 5).all())
