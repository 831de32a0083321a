"""Several prox links in one training, by rules: 2 bits by block in the body, 4 bits by channel in
the embedding. Either adapter, the functional loop, checkpoints and shards give the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

import parq_fn as pf
from parq_fn.optim import (
    FlipCounter,
    QuantOptimizer,
    TransformOptimizer,
    load_checkpoint,
    param_groups,
    prox_partition,
    save_checkpoint,
    share_on_levels,
)
from tests.optim.helpers import check_same
from tests.processes import on_processes

SPAN: dict[str, Any] = {"anneal_start": 1, "anneal_end": 7, "period": 2}
BODY = pf.parq_prox(pf.lsbq(3), **SPAN, granularity=pf.per_block(4))
LOOKUP = pf.parq_prox(pf.integer(4), **SPAN, granularity=pf.per_channel())
RULES = {"embed": LOOKUP, "head": None, "*": 2}
RATE, MOMENTUM = 0.5, 0.9
#: {parameter: (levels at most, in a row of so many of its weights)}.
HOW = {"embed.weight": (16, 8), "up.weight": (4, 4), "turned.weight": (4, 4), "down.weight": (4, 4)}


class Net(nn.Module):
    """A language model in small, with a layer whose weight is [in, out, taps]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 12)
        self.norm = nn.LayerNorm(12)
        self.turned = nn.ConvTranspose1d(12, 8, 1)
        self.down = nn.Linear(8, 8, bias=False)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.up(self.embed(tokens)).tanh())
        out: Tensor = self.head(self.down(self.turned(x.mT).mT))
        return out


def loss_of(logits: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(10) % 7)


TOKENS = torch.arange(10).reshape(2, 5)


def quantized(net: Net, **options: Any) -> QuantOptimizer:
    base = torch.optim.SGD(param_groups(net, RULES), lr=RATE, momentum=MOMENTUM)
    return QuantOptimizer(base, BODY, **options)


def chained(net: Net) -> pf.Transformation:
    return pf.chain(pf.sgd(RATE, MOMENTUM), prox_partition(param_groups(net, RULES), BODY))


def transformed(net: Net) -> TransformOptimizer:
    return TransformOptimizer(net.named_parameters(), chained(net))


ADAPTERS: dict[str, Any] = {"QuantOptimizer": quantized, "TransformOptimizer": transformed}


def train(net: Net, optimizer: Any, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net(TOKENS)).backward()
        optimizer.step()


def functional_loop(steps: int) -> dict[str, Tensor]:
    net = Net()
    (apply, params), transform = pf.functional(net), chained(net)
    step = pf.value_and_grad(lambda weights: loss_of(apply(weights, TOKENS)), transform)
    state = transform.init(params)
    for _ in range(steps):
        _, grads = step(params, state)
        updates, state = transform.update(grads, state, params)
        params = pf.apply_updates(params, updates)
    weights: dict[str, Tensor] = transform.weights(state, params)
    return weights


@pytest.mark.parametrize("steps", [3, 8])
def test_a_chain_by_partition_trains_as_the_optimizer_of_the_same_rules(steps: int) -> None:
    own, weights = Net(), functional_loop(steps)
    train(own, optimizer := quantized(own), steps)
    other = Net()
    train(other, again := transformed(other), steps)
    for name, p in own.named_parameters():
        assert torch.equal(weights[name], p), name
        assert torch.equal(other.get_parameter(name), p), name
        link = optimizer.prox_of(p)
        assert link == again.prox_of(other.get_parameter(name)), name
        assert (name in HOW) is (link is not None)
        if link is not None:
            most, size = HOW[name]
            rows = link.granularity.rows(p.detach())
            assert rows.shape[1] == size
            assert steps < 8 or max(row.unique().numel() for row in rows) <= most


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_state_dict_goes_on_to_the_bit(adapter: str) -> None:
    straight, stopped, resumed = Net(), Net(), Net()
    one, two, three = (ADAPTERS[adapter](net) for net in (straight, stopped, resumed))
    train(straight, one, 8)
    train(stopped, two, 4)
    train(resumed, three, 1)
    resumed.load_state_dict(stopped.state_dict())
    three.load_state_dict(two.state_dict())
    train(resumed, three, 4)
    check_same(straight, one, resumed, three, adapter)


def test_a_state_of_other_rules_is_refused_by_name() -> None:
    """By bits, which groups say, and by links, which a digest tells apart."""
    one = quantized(Net())
    for rules, match in (
        (RULES | {"*": 3}, "quant_bits=2 .* the optimizer 3"),
        (RULES | {"embed": BODY}, "'embed.weight': it was trained with another prox link"),
    ):
        other = QuantOptimizer(torch.optim.SGD(param_groups(Net(), rules), lr=RATE), BODY)
        with pytest.raises(ValueError, match=match):
            other.load_state_dict(one.state_dict())


# On two ranks


def on_two_ranks(folder: str) -> None:
    for adapter, build in ADAPTERS.items():
        straight = Net()
        its = build(straight)
        net, optimizer = begun(build)
        flips = [FlipCounter(one) for one in (its, optimizer)]
        for _ in range(2):
            train(straight, its, 2)
            train(net, optimizer, 2)
            one, other = (counter() for counter in flips)
            assert one == other
            assert share_on_levels(its) == share_on_levels(optimizer)
        assert one > 0
        check_same(straight, its, net, optimizer, adapter)
        ours, theirs = Path(folder) / f"ours-{adapter}", Path(folder) / f"theirs-{adapter}"
        save_checkpoint(ours, net, optimizer)
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        model, state = get_state_dict(net, optimizer, options=flat)
        dcp.save({"model": model, "optimizer": state}, checkpoint_id=theirs)
        train(straight, its, 4)

        net, optimizer = begun(build)
        load_checkpoint(ours, net, optimizer)
        train(net, optimizer, 4)
        check_same(straight, its, net, optimizer, (adapter, "ours"))

        net, optimizer = begun(build)
        model, state = get_state_dict(net, optimizer, options=flat)
        dcp.load({"model": model, "optimizer": state}, checkpoint_id=theirs)
        states = {"model_state_dict": model, "optim_state_dict": state}
        set_state_dict(net, optimizer, **states, options=flat)
        train(net, optimizer, 4)
        check_same(straight, its, net, optimizer, (adapter, "theirs"))


def begun(build: Any) -> tuple[Net, Any]:
    net = Net()
    for part in (net.up, net.turned, net):
        fully_shard(part)
    return net, build(net)


@pytest.mark.slow  # two processes
def test_shards_and_their_checkpoints_equal_one_process(tmp_path: Path) -> None:
    on_processes(on_two_ranks, 2, tmp_path, str(tmp_path))


# What prox_partition refuses

ONE = torch.ones(2, 2)


@pytest.mark.parametrize(
    ("groups", "prox", "error", "match"),
    [
        ([{"params": [torch.ones(2, 2)], "quant_bits": 2}], BODY, ValueError, "without names"),
        ([{"params": [("a", ONE), ONE], "quant_bits": 2}], BODY, ValueError, "without names"),
        ([{"params": [("a", torch.ones(2, 2))]}], BODY, ValueError, "no group is quantized"),
        (param_groups(Net(), RULES), None, ValueError, "quant_bits=2 .*give prox_partition one"),
        (param_groups(Net(), RULES), pf.lsbq(2), TypeError, "expected a prox link such as"),
        (
            [{"params": [("a", torch.ones(2, 2))], "prox": BODY, "quant_size": 3}],
            None,
            ValueError,
            "prox_partition: group 0 has quant_size",
        ),
    ],
)
def test_groups_that_say_nothing_are_refused(
    groups: Any, prox: Any, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        prox_partition(groups, prox)


def test_a_parameter_that_no_group_has_is_refused_by_name() -> None:
    link = prox_partition(param_groups(Net(), RULES), BODY)
    with pytest.raises(ValueError, match=r"'other' .*: embed\.weight, up\.weight"):
        link.init({"embed.weight": torch.ones(11, 8), "other": torch.ones(2)})
