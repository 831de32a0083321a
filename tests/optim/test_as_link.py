"""torch.optim's optimizers as links: their own steps, bit for bit."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn import schedules
from parq_fn.foundation.tree import tree_leaves, tree_map
from parq_fn.optim import TransformOptimizer

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "plain_sgd": (torch.optim.SGD, {}),
    "adam": (torch.optim.Adam, {"amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "rmsprop": (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
    "adagrad": (torch.optim.Adagrad, {"initial_accumulator_value": 0.1}),
    "adadelta": (torch.optim.Adadelta, {}),
    "adamax": (torch.optim.Adamax, {}),
    "asgd": (torch.optim.ASGD, {}),
    "rprop": (torch.optim.Rprop, {}),
    "adafactor": (torch.optim.Adafactor, {}),
    "muon": (torch.optim.Muon, {}),
}


def draw(generator: torch.Generator, dtype: torch.dtype, shapes: Any) -> dict[str, Tensor]:
    return {k: torch.randn(s, dtype=dtype, generator=generator) for k, s in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_and_state_are_the_optimizer_s_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    """From weights that no step halves or doubles; one has no gradient now and then."""
    kind, settings = OPTIMIZERS[name]
    shapes = {"a": (4, 3), "b": (2, 2)} if name == "muon" else {"a": (4, 3), "b": (5,), "c": ()}
    generator = torch.Generator().manual_seed(0)
    params = tree_map(lambda p: p.sign() * (2 + p.abs()), draw(generator, dtype, shapes))
    mirror = {k: nn.Parameter(p.clone()) for k, p in params.items()}
    optimizer = kind(mirror.values(), lr=0.01, **settings)
    link = pf.as_link(kind, lr=0.01, **settings)
    state = link.init(params)
    assert not any(leaf.any() for leaf in tree_leaves(state.entries))
    for t in range(12):
        grads: dict[str, Any] = draw(generator, dtype, shapes)
        if t in (0, 1, 5):
            grads["b"] = None
        for k, p in mirror.items():
            p.grad = None if grads[k] is None else grads[k].clone()
        optimizer.step()
        updates, state = link.update(grads, state, params)
        params = pf.apply_updates(params, updates)
        for k, p in mirror.items():
            assert torch.equal(params[k], p.detach()), (t, k)
            theirs = {key: got for key, got in optimizer.state[p].items() if got is not None}
            for key, got in theirs.items() if int(state.updates[k]) else ():
                assert torch.equal(state.entries[key][k], got), (t, k, key)
    assert {k: int(n) for k, n in state.updates.items()} == {
        k: 9 if k == "b" else 12 for k in shapes
    }


def test_weights_anywhere_are_the_optimizer_s_to_the_last_place() -> None:
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(20000, generator=generator) * 10.0 ** torch.arange(-6, 4).repeat(2000)
    q = nn.Parameter(p.clone())
    q.grad = torch.randn(20000, generator=generator)
    link, params = pf.as_link(torch.optim.SGD, lr=0.3), {"w": p}
    updates, _ = link.update({"w": q.grad}, link.init(params), params)
    torch.optim.SGD([q], lr=0.3).step()
    found = pf.apply_updates(params, updates)["w"]
    off = (found - q.detach()).abs()
    assert (off <= torch.finfo(torch.float32).eps * torch.maximum(p.abs(), q.detach().abs())).all()
    stays = (q.detach() / p >= 0.5) & (q.detach() / p <= 2)
    assert not off[stays].any()
    assert stays.float().mean() > 0.3


def test_hyperparameters_are_schedules_tensors_and_those_of_groups() -> None:
    rates = [0.1, 0.03, 0.2]
    link = pf.as_link(
        torch.optim.SGD, lr=schedules.piecewise(rates, (1, 2)), momentum=torch.tensor(0.5).double()
    )
    twin = pf.sgd(schedules.piecewise(rates, (1, 2)), momentum=0.5)
    params = {"w": torch.ones(2).double(), "v": torch.ones(3).double()}
    state, other, same = link.init(params), twin.init(params), params
    for t in range(4):
        extra = {"learning_rate": {"w": 0.7, "v": None}} if t == 3 else {}
        grads = tree_map(torch.cos, params)
        updates, state = link.update(grads, state, params, **extra)
        wanted, other = twin.update(tree_map(torch.cos, same), other, same, **extra)
        params, same = pf.apply_updates(params, updates), pf.apply_updates(same, wanted)
        tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=1e-12, atol=0), params, same)

    a, b, c, d = (nn.Parameter(torch.full((2,), 4.0).double()) for _ in range(4))
    groups = [{"params": [("a", a)]}, {"params": [("b", b)], "lr": 0.5, "weight_decay": 0.2}]
    optimizer = TransformOptimizer(groups, pf.as_link(torch.optim.AdamW, lr=0.1, weight_decay=0.01))
    base = torch.optim.AdamW([{"params": [c]}, {"params": [d], "lr": 0.5, "weight_decay": 0.2}],
                             lr=0.1, weight_decay=0.01)  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 0.1
    for p in (a, b, c, d):
        p.grad = torch.ones_like(p)
    optimizer.step()
    base.step()
    assert torch.equal(a, c)
    assert torch.equal(b, d)


def test_a_link_of_an_optimizer_is_a_value() -> None:
    link = pf.as_link(torch.optim.AdamW, lr=0.1, betas=(0.5, 0.9))
    assert repr(link) == "as_link(AdamW, lr=0.1, weight_decay=0.01, betas=(0.5, 0.9))"
    assert pickle.loads(pickle.dumps(link)) == link
    assert link != pf.as_link(torch.optim.AdamW, lr=0.2, betas=(0.5, 0.9))
    assert hash(link) == hash(pf.as_link(torch.optim.AdamW, lr=0.1, betas=(0.5, 0.9)))


class Counting(torch.optim.SGD):
    """Keeps a Python number of each parameter."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["times"] = self.state[p].get("times", 0) + 1
        return super().step(closure)


class Growing(torch.optim.SGD):
    """Keeps more after its second step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                seen = self.state[p].get("seen", torch.zeros(0))
                self.state[p]["seen"] = torch.cat([seen, torch.ones(1)])
        return super().step(closure)


class Noting(torch.optim.SGD):
    """Keeps what is None at every step."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["note"] = None
        return super().step(closure)


def test_what_an_optimizer_keeps_as_none_is_no_state_of_the_link() -> None:
    _step(link := pf.as_link(Noting, lr=0.1, momentum=0.9), 3)
    assert list(link.init({"w": torch.ones(2)}).entries) == ["momentum_buffer"]


class Spoiling(torch.optim.SGD):
    """Changes gradients in their place, as a clipping optimizer does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.clamp_(-0.5, 0.5)
        return super().step(closure)


def test_an_optimizer_that_changes_gradients_changes_copies_of_them() -> None:
    link, grads = pf.as_link(Spoiling, lr=1.0), {"w": torch.full((2,), 3.0)}
    updates, _ = link.update(grads, link.init(ONES), ONES)
    assert updates["w"].tolist() == [-0.5, -0.5]
    assert grads["w"].tolist() == [3.0, 3.0]


class Strict(torch.optim.SGD):
    """Takes a Python number for its rate; its state is wider from the second step on."""

    def __init__(self, params: Any, lr: float) -> None:
        assert type(lr) is float
        super().__init__(params, lr)

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["seen"] = torch.ones(1).double() + self.state[p].get("seen", 0)
        return super().step(closure)


def test_rates_are_numbers_and_entries_keep_their_dtypes() -> None:
    link = pf.as_link(Strict, lr=torch.tensor(0.5))
    narrow = link.init(ONES)
    narrow = narrow._replace(entries={"seen": {"w": narrow.entries["seen"]["w"].float()}})
    _, state = link.update(ONES, narrow, ONES)
    assert state.entries["seen"]["w"].dtype == torch.float32


SGD, ONES = pf.as_link(torch.optim.SGD, momentum=0.9), {"w": torch.ones(2)}
BEGUN = SGD.init(ONES)


def test_params_and_gradients_of_a_graph_leave_none_behind() -> None:
    params = {"w": torch.ones(2, requires_grad=True)}
    state = SGD.init(params)
    for _ in range(2):
        updates, state = SGD.update({"w": 2 * params["w"]}, state, params)
        assert not any(leaf.requires_grad for leaf in tree_leaves((updates, state)))


def _step(link: Any, steps: int = 1) -> None:
    params = {"w": torch.ones(2)}
    state = link.init(params)
    for _ in range(steps):
        _, state = link.update(params, state, params)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: pf.as_link(torch.optim.LBFGS), ValueError, "LBFGS takes a closure"),
        (lambda: pf.as_link(torch.optim.SparseAdam), ValueError, "SparseAdam takes sparse"),
        (lambda: pf.as_link(pf.sgd), TypeError, "expected a class of torch.optim .* class sgd"),
        (lambda: pf.as_link(torch.optim.SGD([torch.ones(1)])), TypeError, "SGD; give its class"),
        (lambda: pf.as_link(torch.optim.SGD, lr=-1.0), ValueError, "Invalid learning rate"),
        (lambda: pf.as_link(torch.optim.SGD, rate=1.0), TypeError, "rate"),
        (lambda: pf.as_link(Strict), TypeError, "as_link: Strict has no default for lr; give one"),
        (
            lambda: _step(pf.as_link(Counting)),
            ValueError,
            r"as_link\(Counting, .* keeps 'times' of parameter 'w' as a int",
        ),
        (
            lambda: _step(pf.as_link(Growing), 2),
            ValueError,
            "keeps 'seen' of parameter 'w' in another form than after its first step",
        ),
        (
            lambda: _step(pf.as_link(torch.optim.Muon)),
            ValueError,
            "parameter 'w' cannot be stepped: ValueError: Muon only supports 2D",
        ),
        (
            lambda: torch.vmap(
                lambda w: pf.as_link(torch.optim.SGD).init({"v": torch.ones(2), "w": w}).updates
            )(torch.ones(2, 2)),
            RuntimeError,
            "not under torch.vmap",
        ),
        (
            lambda: torch.vmap(pf.as_link(torch.optim.SGD).init)({"w": torch.ones(2, 2)}),
            RuntimeError,
            "not under torch.vmap",
        ),
        (
            lambda: torch.func.grad(lambda g: SGD.update({"w": g}, BEGUN, ONES)[0]["w"].sum())(
                torch.ones(2)
            ),
            RuntimeError,
            "not under torch.vmap, torch.func.grad",
        ),
        (
            lambda: torch.vmap(lambda g: SGD.update({"w": g}, BEGUN, ONES)[0])(torch.ones(3, 2)),
            RuntimeError,
            "not under torch.vmap",
        ),
        (  # of params that are not transformed
            lambda: torch.vmap(lambda g: SGD.init(ONES).calls + g)(torch.ones(3)),
            RuntimeError,
            "not under torch.vmap",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_a_link_is_refused(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()
