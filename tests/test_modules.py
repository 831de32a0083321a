"""Modules as functions, and the mask of what to quantize."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

import parq_fn as pf


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.embed = nn.Embedding(10, 4)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.LayerNorm((4, 4))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.rnn = nn.GRU(4, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.tied = nn.Linear(4, 10, bias=False)
        self.tied.weight = self.embed.weight
        self.head = nn.Linear(4, 3)


def quantized(mask: dict[str, bool]) -> list[str]:
    return [name for name, chosen in mask.items() if chosen]


def test_weight_mask_picks_matrices_and_kernels() -> None:
    everything = [
        "conv.weight", "attention.in_proj_weight", "attention.out_proj.weight",
        "rnn.weight_ih_l0", "rnn.weight_hh_l0", "body.0.weight", "head.weight",
    ]  # fmt: skip
    module = Small()
    assert quantized(pf.weight_mask(module)) == everything
    assert quantized(pf.weight_mask(module, "head")) == everything[:-1]
    assert quantized(pf.weight_mask(module, ["head", "rnn", "conv"])) == [
        n for n in everything if n.partition(".")[0] not in ("head", "rnn", "conv")
    ]
    assert set(pf.weight_mask(module)) == {name for name, _ in module.named_parameters()}


class Named(nn.Module):
    """Matrices under names of one's own, and what looks like one and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(torch.randn(2, 3, 4))
        self.position_table = nn.Parameter(torch.randn(1, 5, 4))
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.body = nn.Linear(4, 3)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("build", "names"),
    [
        (Named, ["experts"]),
        (
            lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4))),
            ["0.parametrizations.weight.original1"],
        ),
        (lambda: weight_norm(nn.Linear(3, 4)), ["weight_v"]),
        (lambda: spectral_norm(nn.Linear(3, 4)), ["weight_orig"]),
    ],
)
def test_weight_mask_names_matrices_that_it_leaves_alone(
    build: Callable[[], nn.Module], names: list[str]
) -> None:
    module = build()
    quoted = ", ".join(map(repr, names))
    with pytest.warns(UserWarning, match=f"leaves alone {quoted}, which may be weights"):
        mask = pf.weight_mask(module)
    assert quantized(mask) == (["body.weight"] if isinstance(module, Named) else [])
    assert pf.weight_mask(module, exclude=names) == mask  # without a warning


def test_weight_mask_refuses_names_that_are_none() -> None:
    with pytest.raises(ValueError, match="exclude pattern 'heads' matches no parameter"):
        pf.weight_mask(Small(), "heads")
    for wrong in (3, ["head", 3]):
        with pytest.raises(TypeError, match=r"expected exclude patterns such as 'head', .* got 3"):
            pf.weight_mask(Small(), wrong)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got {"):
        pf.weight_mask({"weight": 1})


def test_functional_is_the_module_and_leaves_it_alone() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    apply, params = pf.functional(module)
    x = torch.randn(5, 1, 4, 4)
    assert torch.equal(apply(params, x), module(x))
    mask = pf.weight_mask(module)
    transform = pf.chain(pf.sgd(0.1), pf.masked(pf.hard_prox(pf.lsbq(1)), mask))
    state = transform.init(params)
    before = {k: v.clone() for k, v in module.named_parameters()}
    _, grads = pf.value_and_grad(lambda w: apply(w, x).square().mean(), transform)(params, state)
    updates, state = transform.update(grads, state, params)
    params = pf.apply_updates(params, updates)
    weights = transform.weights(state, params)
    assert weights["0.weight"].unique().numel() == 2
    assert torch.equal(weights["0.bias"], params["0.bias"])
    assert all(torch.equal(v, before[k]) for k, v in module.named_parameters())
    assert not any(p.requires_grad for p in params.values())


class Writes(nn.Module):
    """Does something to itself in its forward."""

    def __init__(self, act: Callable[[Any], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.act = act

    def forward(self, x):
        with torch.no_grad():
            self.act(self)
        return self.frozen(self.linear(x)) + self.average


WRITES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "buffer": (lambda: Writes(lambda its: its.average.mul_(0.9).add_(1.0)), "'average'"),
    "counter": (lambda: Writes(lambda its: its.calls.add_(1)), "'calls'"),
    "assigned": (lambda: Writes(lambda its: setattr(its, "average", torch.ones(3))), "'average'"),
    "new": (lambda: Writes(lambda its: its.register_buffer("new", torch.ones(3))), "'new'"),
    "frozen": (lambda: Writes(lambda its: its.frozen.weight.mul_(0.9)), r"'frozen\.weight'"),
    "weight": (lambda: Writes(lambda its: its.linear.weight.mul_(0.9)), r"'linear\.weight'"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 3)), "_u'"),
    "its_older_form": (lambda: spectral_norm(nn.Linear(3, 3)), "'weight_u', 'weight_v'"),
}


@pytest.mark.parametrize("writes", WRITES)
def test_a_forward_that_writes_parameters_or_buffers_is_refused(writes: str) -> None:
    torch.manual_seed(0)
    build, named = WRITES[writes]
    module, x = build(), torch.randn(4, 3)
    apply, params = pf.functional(module)
    before = {name: (got, got.clone()) for name, got in module.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError, match=f"forward writes .*{named}"):
        apply(params, x)
    if writes in ("weight", "frozen"):
        return  # before it is found
    with pytest.raises(ValueError, match=f"forward writes .*{named}"):
        torch.func.grad(lambda w: apply(w, x).sum())(params)
    for name, (got, values) in before.items():
        assert module.state_dict(keep_vars=True)[name] is got
        assert torch.equal(got, values)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weights_that_hooks_make_at_each_call_are_put_back() -> None:
    module, x = weight_norm(nn.Linear(3, 3)), torch.randn(4, 3)
    made, expected = module.weight, module(x)
    made = module.weight
    apply, params = pf.functional(module)
    assert torch.equal(apply(params, x), expected)
    torch.func.grad(lambda w: apply(w, x).sum())(params)
    assert module.weight is made


def test_calls_from_several_threads_see_the_weights_they_gave() -> None:
    module, x = nn.Sequential(*[nn.Linear(4, 4) for _ in range(20)]), torch.ones(1, 4)
    before = list(module.parameters())
    apply, params = pf.functional(module)
    runs = [{name: scale * w for name, w in params.items()} for scale in (0.5, 1.0, 2.0)]
    expected, wrong = [apply(weights, x) for weights in runs], []

    def work(weights: dict[str, Tensor], result: Tensor) -> None:
        for _ in range(30):
            if not torch.equal(apply(weights, x), result):
                wrong.append(weights)

    threads = [
        threading.Thread(target=work, args=each) for each in zip(runs, expected, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert all(p is was for p, was in zip(module.parameters(), before, strict=True))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
        self.checkpoints = True

    def forward(self, x):
        return checkpoint(self.parts, x, use_reentrant=False) if self.checkpoints else self.parts(x)


def test_what_would_be_computed_anew_with_other_weights_is_refused() -> None:
    """It gave wrong gradients: those at the module's own weights."""
    module, x = Checkpointed(), torch.randn(4, 3)
    apply, params = pf.functional(module)
    weights = {name: (2 * w).requires_grad_() for name, w in params.items()}
    with pytest.raises(RuntimeError, match="with the module's own weights; turn that off"):
        apply(weights, x)
    with torch.no_grad():
        apply(weights, x)  # nothing is computed anew
    module.checkpoints = False
    grads = []
    for called in (apply, lambda *got: checkpoint(apply, *got, use_reentrant=False)):
        loss = called(weights, x).square().sum()
        grads.append(torch.autograd.grad(loss, list(weights.values())))
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize(
    ("build", "advice"),
    [
        (lambda net: nn.DataParallel(net), r"'itself' calls copies .* its \.module"),
        (lambda net: type("ScriptModule", (nn.Sequential,), {})(net), "that it was made of"),
        (lambda net: type("DistributedDataParallel", (nn.Sequential,), {})(net), "average the gra"),
    ],
)
def test_modules_that_would_not_be_called_with_the_weights_are_refused(
    build: Callable[[nn.Module], nn.Module], advice: str
) -> None:
    with pytest.raises(TypeError, match=advice):
        pf.functional(build(nn.Linear(3, 3)))


def test_lazy_modules_are_refused_until_they_have_seen_a_batch() -> None:
    module = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    for act in (pf.functional, pf.weight_mask):
        with pytest.raises(ValueError, match=r"'0\.weight' has no shape yet, .* is lazy; call"):
            act(module)
    module.eval()(torch.ones(2, 4))
    assert list(pf.functional(module)[1]) == [name for name, got in pf.weight_mask(module).items()]


class Twice(nn.Module):
    """A layer under two names, a weight that two layers share, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(3, 3)
        self.block = nn.Sequential(layer, nn.Tanh(), layer)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = layer.weight
        self.scale = nn.Parameter(torch.rand(3), requires_grad=False)

    def forward(self, x):
        return self.tied(self.block(x)) * self.scale


def test_functional_leaves_a_module_with_layers_under_two_names_alone() -> None:
    module = Twice()
    before = {name: (p, p.detach().clone()) for name, p in module.named_parameters()}
    apply, params = pf.functional(module)
    assert list(params) == ["block.0.weight", "block.0.bias"]
    x = torch.randn(4, 3)
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    for _ in range(2):
        assert torch.equal(apply(params, x), module(x))
        assert not apply(zeros, x).any()
        grads = torch.func.grad(lambda w: apply(w, x).square().sum())(params)
        assert all(grad.any() for grad in grads.values())
        torch.vmap(apply, (0, None))({n: p.expand(2, *p.shape) for n, p in params.items()}, x)
        copy.deepcopy(module)
        for name, p in module.named_parameters():
            held, values = before[name]
            assert p is held
            assert torch.equal(p, values)
            assert p.requires_grad == (name != "scale")
        assert module.block[0] is module.block[2]
        assert module.tied.weight is module.block[0].weight


def test_functional_trains_no_frozen_parameter() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    module[0].requires_grad_(False)
    apply, params = pf.functional(module)
    assert list(params) == ["1.weight", "1.bias"]
    with pytest.raises(ValueError, match=r"with \['0.weight'\] unknown to it or frozen"):
        apply({**params, "0.weight": torch.zeros(2, 2)}, torch.zeros(1, 2))
    mask = {name: pf.weight_mask(module)[name] for name in params}
    transform = pf.chain(pf.adamw(0.1, weight_decay=0.5), pf.masked(pf.hard_prox(pf.lsbq(1)), mask))
    state = transform.init(params)
    x = torch.randn(5, 2)
    _, grads = pf.value_and_grad(lambda w: apply(w, x).square().mean(), transform)(params, state)
    assert grads["1.weight"].any()
    module.requires_grad_(False)
    with pytest.raises(ValueError, match="all 4 parameters of the module are frozen"):
        pf.functional(module)
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got {"):
        pf.functional({})


def test_a_module_sharded_by_fully_shard_is_refused() -> None:
    from torch.distributed.fsdp import FSDPModule

    class Sharded(FSDPModule, nn.Linear):
        """What fully_shard makes of a Linear's class, without a process group."""

        def __new__(cls, *args, **kwargs):
            return nn.Linear.__new__(cls)

    module = nn.Sequential(Sharded(2, 2))
    with pytest.raises(TypeError, match="module '0' is sharded by fully_shard"):
        pf.functional(module)


# Found by attack, each with the input that showed it.


def test_modules_with_running_statistics_are_refused_in_train_mode() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    apply, params = pf.functional(net)
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) would change its running"):
        apply(params, torch.randn(4, 2))
    net.eval()
    assert apply(params, torch.randn(4, 2)).shape == (4, 2)


def test_missing_and_unknown_weights_are_refused() -> None:
    apply, params = pf.functional(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"without \['weight'\] .* with \['wieght'\] unknown"):
        apply({"bias": params["bias"], "wieght": params["weight"]}, torch.ones(1, 2))


def test_module_parameters_are_refused_where_their_graph_would_grow() -> None:
    params = dict(nn.Linear(2, 2).named_parameters())
    with pytest.raises(TypeError, match=r"parameter 'bias' is an nn.Parameter"):
        pf.hard_prox(pf.lsbq(1)).init(params)
    step = pf.value_and_grad(lambda w: w["weight"].sum(), pf.sgd(0.1))
    with pytest.raises(TypeError, match=r"takes plain tensors, got an nn.Parameter"):
        step(params, pf.sgd(0.1).init(params))


def test_a_tied_weight_is_excluded_by_either_name() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert pf.weight_mask(net, exclude="1")["0.weight"] is False
