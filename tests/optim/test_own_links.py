"""Groups of QuantOptimizer: links of their own, bits, blocks and axes, and what is refused."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, load_checkpoint, save_checkpoint
from parq_fn.optim.digest import digest
from parq_fn.transforms.prox_state import in_rows
from tests.helpers import copies, equal

HARD = pf.hard_prox(pf.uniform(2), period=2)
PARQ = pf.parq_prox(pf.lsbq(2), anneal_start=1, anneal_end=6, granularity=pf.per_channel())


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


def built(*groups: dict[str, Any], prox: pf.Prox | None = None, **options: Any) -> QuantOptimizer:
    return QuantOptimizer(torch.optim.AdamW(list(groups), lr=0.05), prox, **options)


def train(optimizer: torch.optim.Optimizer, steps: int = 8) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(steps):
        for i, p in enumerate(params):
            p.grad = torch.sin(p.detach() + i)
        optimizer.step()
    return params


# Links of their own


def test_each_group_is_trained_by_its_own_link_and_the_others_by_the_optimizers() -> None:
    shapes = (4, 6), (4, 6), (4, 6), (4, 6)
    a, b, c, d = parameters(*shapes)
    together = train(
        built(
            {"params": [a], "prox": HARD},
            {"params": [b], "prox": PARQ, "quant_bits": 1},
            {"params": [c], "quant_bits": 3},
            {"params": [d]},
            prox=pf.soft_prox(pf.uniform(2), anneal_start=0, anneal_end=5),
        )
    )
    a, b, c, d = parameters(*shapes)
    apart = [
        built({"params": [a], "quant_bits": 2}, prox=HARD),
        built({"params": [b], "quant_bits": 1}, prox=PARQ),
        built(
            {"params": [c], "quant_bits": 3},
            prox=pf.soft_prox(pf.uniform(3), anneal_start=0, anneal_end=5),
        ),
        torch.optim.AdamW([d], lr=0.05),
    ]
    for _ in range(8):
        for i, (optimizer, p) in enumerate(zip(apart, (a, b, c, d), strict=True)):
            p.grad = torch.sin(p.detach() + i)
            optimizer.step()
    assert equal(together, [a, b, c, d])


def test_a_link_leaves_its_group_and_shows_there_what_it_is() -> None:
    a, b = parameters((4, 6), (4, 6))
    optimizer = built({"params": [a], "prox": HARD, "quant_bits": 3}, {"params": [b]})
    optimizer.add_param_group({"params": parameters((2, 2)), "prox": PARQ})
    shown = [group.get("quant_prox") for group in optimizer.param_groups]
    assert shown == [repr(HARD), None, repr(PARQ)]
    for group in (*optimizer.param_groups, *optimizer.state_dict()["param_groups"]):
        assert not any(isinstance(value, pf.Prox) for value in group.values())
        assert "prox" not in group
    assert optimizer.link(optimizer.param_groups[0]) == pf.hard_prox(pf.uniform(3), period=2)
    assert optimizer.link(optimizer.param_groups[2]) == PARQ
    for group in (optimizer.param_groups[1], {"params": [a], "quant_bits": 2}):
        with pytest.raises(ValueError, match="expected one of its quantized param_groups"):
            optimizer.link(group)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_the_links_of_groups(copied: Any) -> None:
    optimizer = built({"params": parameters((4, 6)), "prox": HARD}, {"params": []})
    train(optimizer, 3)
    other = copied(optimizer)
    assert other.link(other.param_groups[0]) == HARD
    assert equal(train(optimizer, 3), train(other, 3))


def test_a_normal_map_is_its_groups_alone() -> None:
    def run(gamma: float | None) -> list[Tensor]:
        one, other = (pf.hard_prox(pf.lsbq(2), period=1, normal_map=g) for g in (gamma, None))
        a, b = parameters((4, 6), (4, 6))
        return copies(train(built({"params": [a], "prox": one}, {"params": [b], "prox": other})))

    pulled, free = run(2.0), run(None)
    assert not torch.equal(pulled[0], free[0])
    assert torch.equal(pulled[1], free[1])


def test_annealed_weight_decay_is_asked_of_every_link() -> None:
    with pytest.raises(ValueError, match="which parq_prox has and hard_prox has not"):
        built({"params": parameters((2, 2)), "prox": HARD}, anneal_weight_decay=0.5)
    built({"params": parameters((2, 2)), "prox": PARQ}, anneal_weight_decay=0.5)


# Axes


@pytest.mark.parametrize(
    ("shape", "settings", "link", "granularity"),
    [
        ((4, 6), {"quant_axis": 1}, HARD, pf.per_channel(axis=1)),
        ((3, 4, 6), {"quant_axis": (0, 1)}, PARQ, pf.per_channel(axis=(0, 1))),
        ((4, 6), {"quant_axis": 1, "quant_block_size": 2}, HARD, pf.per_block(2, along=0)),
        ((4, 6), {"quant_axis": -1, "quant_block_size": 2}, HARD, pf.per_block(2, along=0)),
        ((3, 4, 6), {"quant_axis": (0, 1), "quant_block_size": 3}, HARD, pf.per_block(3, along=2)),
        ((4, 2, 3, 3), {"quant_axis": 0, "quant_block_size": 9}, HARD, pf.per_block(9, (1, 2, 3))),
    ],
)
def test_an_axis_stands_in_for_the_links(
    shape: Any, settings: dict[str, Any], link: pf.Prox, granularity: Any
) -> None:
    (p,) = parameters(shape)
    optimizer = built({"params": [p], "quant_bits": 2, **settings}, prox=link)
    assert optimizer.link(optimizer.param_groups[0]).granularity == granularity
    assert len(in_rows(optimizer.state[p]["qparams"])) == granularity.shape(p)[0]
    train(optimizer)
    rows = granularity.rows(p.detach())
    levels = in_rows(optimizer.levels(p))
    assert (rows.unsqueeze(-1) == levels.unsqueeze(-2)).any(-1).all()


def test_an_axis_that_was_saved_otherwise_is_refused() -> None:
    one, other = (
        built({"params": parameters((4, 4)), "quant_bits": 2, "quant_axis": axis}, prox=HARD)
        for axis in (0, 1)
    )
    with pytest.raises(ValueError, match="has quant_axis=0 in group 0, the optimizer 1"):
        other.load_state_dict(one.state_dict())


def test_blocks_along_an_axis_of_weights_of_several_ranks_are_refused() -> None:
    group = {"params": parameters((4, 6), (2, 4, 6)), "quant_bits": 2, "quant_axis": 0}
    with pytest.raises(
        ValueError, match=r"has parameters of \[2, 3\] dimensions, expected as many"
    ):
        built({**group, "quant_block_size": 2}, prox=HARD)
    with pytest.raises(ValueError, match=r"quant_axis=\(0, 1\) leaves no dimension of 2"):
        built({"params": parameters((4, 6)), "prox": HARD, "quant_axis": (0, 1),
               "quant_block_size": 2})  # fmt: skip


# Nothing quantized, and what is refused


@pytest.mark.parametrize("prox", [None, HARD])
@pytest.mark.parametrize("bits", [16, 32])
def test_with_16_bits_and_more_it_is_the_base_alone(prox: pf.Prox | None, bits: int) -> None:
    a, b = parameters((4, 6), (4, 6))
    group = {"params": [a], "quant_bits": bits}
    wrapped = train(built(group, {"params": [b], "quant_bits": 16, "prox": PARQ}, prox=prox))
    a, b = parameters((4, 6), (4, 6))
    assert equal(wrapped, train(torch.optim.AdamW([a, b], lr=0.05)))


def test_without_a_link_it_is_the_base_alone() -> None:
    wrapped = train(built({"params": parameters((4, 6))}))
    assert equal(wrapped, train(torch.optim.AdamW(parameters((4, 6)), lr=0.05)))


@pytest.mark.parametrize(
    ("group", "prox", "error", "message"),
    [
        ({"quant_bits": 2}, None, ValueError, "group 0 has quant_bits=2 and no prox link; give"),
        ({"quantizer": pf.lsbq(2)}, HARD, ValueError, "group 0 has quantizer; expected quant_bits"),
        ({"quant_scale": 1.0}, HARD, ValueError, "group 0 has quant_scale; expected quant_bits"),
        ({"granularity": 1}, HARD, ValueError, "group 0 has granularity; expected quant_bits"),
        ({"prox_link": HARD}, None, ValueError, "group 0 has prox_link; expected quant_bits"),
        (
            {"prox": pf.lsbq(2)},
            None,
            TypeError,
            r"group 0 has prox=lsbq\(2\), expected a prox link",
        ),
        ({"quant_prox": repr(HARD)}, HARD, ValueError, 'give the prox link itself, under "prox"'),
        ({"quant_axis": "out"}, HARD, ValueError, "quant_axis='out', expected a dimension or a"),
        ({"quant_axis": ()}, HARD, ValueError, r"quant_axis=\(\), expected a dimension or a"),
        ({"quant_axis": True}, HARD, ValueError, "quant_axis=True, expected a dimension or a"),
        ({}, HARD, ValueError, "no group has quant_bits below 16"),
    ],
)
def test_groups_that_mean_nothing_are_refused(
    group: dict[str, Any], prox: pf.Prox | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        built({"params": parameters((2, 2)), **group}, prox=prox)


class Named(torch.optim.SGD):
    """Has a setting that looks like ours."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr)
        self.defaults["quantile"] = 0.5
        for group in self.param_groups:
            group["quantile"] = 0.5


def test_settings_of_the_base_may_have_any_name() -> None:
    base = Named([{"params": parameters((2, 2)), "quant_bits": 2}])
    train(QuantOptimizer(base, HARD), 2)


def test_a_group_that_is_refused_gets_its_link_back() -> None:
    optimizer = built({"params": parameters((4, 6)), "prox": HARD})
    group = {"params": parameters((4, 5)), "prox": PARQ, "quant_block_size": 2}
    with pytest.raises(ValueError, match="block size 2 does not divide"):
        optimizer.add_param_group(group)
    assert group["prox"] is PARQ
    assert "quant_prox" not in group
    assert len(optimizer.param_groups) == 1
    group = {"params": parameters((4, 6)), "prox": PARQ}
    optimizer.add_param_group(group)
    assert optimizer.link(optimizer.param_groups[1]) == PARQ


# Resuming with another link


OTHERS = {
    "quantizer": pf.hard_prox(pf.uniform(2, scale="max"), period=2),
    "map": pf.soft_prox(pf.uniform(2), anneal_start=0, anneal_end=5),
    "option": pf.hard_prox(pf.uniform(2), period=3),
}


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("changed", OTHERS)
def test_a_state_of_another_link_is_refused_and_changes_nothing(changed: str, own: bool) -> None:
    def build(link: pf.Prox) -> QuantOptimizer:
        group = {"params": parameters((4, 6))}
        if own:
            return built({**group, "prox": link})
        return built({**group, "quant_bits": 2}, prox=link)

    one, other = build(HARD), build(OTHERS[changed])
    train(one, 3)
    train(other, 2)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"'0 of group 0': it was trained with another prox link"):
        other.load_state_dict(one.state_dict())
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(torch.equal(got, after["state"][0][key]) for key, got in before["state"][0].items())
    saved = copy.deepcopy(one.state_dict())
    del saved["state"][0]["link"]  # unknown, as of earlier versions
    other.load_state_dict(saved)
    (p,) = other.state
    assert torch.equal(other.state[p]["link"], before["state"][0]["link"])


def test_the_same_link_in_another_process_has_the_same_digest() -> None:
    """Objects print where they lie in memory, tensors not in full."""

    def link(rate: float) -> pf.Prox:
        schedule = partial(pf.schedules.linear(0.0, 1.0, 0, 5))
        return pf.custom_prox(
            pf.lsbq(2), pf.proxmaps.soft, schedule, learning_rate=torch.tensor(rate)
        )

    assert digest(link(0.123456)) == digest(link(0.123456))
    assert digest(link(0.123456)) != digest(link(0.1234567))


def scheduled(schedule: Any, **options: Any) -> pf.Prox:
    return pf.custom_prox(pf.lsbq(2), pf.proxmaps.soft, schedule, **options)


def by(granularity: pf.quantizers.Granularity) -> pf.Prox:
    return pf.hard_prox(pf.lsbq(2), granularity=granularity)


def pulled(gamma: Any) -> pf.Prox:
    return pf.hard_prox(pf.lsbq(2), normal_map=gamma)


EQUAL = [
    (scheduled(pf.schedules.linear(0, 1, 0, 5)), scheduled(pf.schedules.linear(0.0, 1.0, 0, 5.0))),
    (pf.hard_prox(pf.lsbq(2), period=2), pf.hard_prox(pf.lsbq(2), period=np.int64(2))),
    (pf.hard_prox(pf.lsbq(np.int64(2))), pf.hard_prox(pf.lsbq(2))),
    (by(pf.per_channel((0,))), by(pf.per_channel())),
    (scheduled(lambda t: 1 - 0.125 * t), scheduled(lambda count: 1 - count / 8)),
    (pulled(torch.tensor(1.0)), pulled(1)),
]


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_links_of_equal_numbers_have_the_same_digest(one: pf.Prox, other: pf.Prox) -> None:
    assert digest(one) == digest(other)


def test_tensors_count_by_their_elements_however_they_print() -> None:
    link = pulled(torch.tensor(1 / 3))
    before = digest(link)
    torch.set_printoptions(precision=1)
    try:
        assert digest(link) == before
    finally:
        torch.set_printoptions(profile="default")
    assert digest(pulled(torch.tensor(0.3333))) != before


OTHER = [
    (scheduled(lambda t: 1 - 0.1 * t), scheduled(lambda t: 1 - 0.11 * t)),
    (scheduled(lambda t: 1 - 0.1 * t), scheduled(lambda t: 1 - 0.1 * t.clamp(max=50))),
    (scheduled(lambda t: 1.0), scheduled(pf.schedules.linear(0, 1, 0, 5))),
    (pf.hard_prox(pf.lsbq(2), period=1), pf.hard_prox(pf.lsbq(2), period=2)),
    (by(pf.per_channel()), by(pf.per_tensor())),
    (pf.hard_prox(pf.uniform(2)), pf.hard_prox(pf.lsbq(2))),
    (pf.hard_prox(pf.lsbq(2)), pulled(1.0)),
    (pf.hard_prox(pf.lsbq(2)), pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=5)),
    (pf.hard_prox(pf.codebook((0.0, 1.0))), pf.hard_prox(pf.codebook((0.0, 1.5)))),
]


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_links_that_differ_have_digests_that_differ(one: pf.Prox, other: pf.Prox) -> None:
    assert digest(one) != digest(other)


def test_a_link_with_an_object_that_holds_itself_has_a_digest() -> None:
    class Slope:
        def __init__(self) -> None:
            self.own = self

        def __call__(self, count: Tensor) -> Tensor:
            return 1.0 / (1 + count)

    assert digest(scheduled(Slope())) == digest(scheduled(Slope()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_checkpoints_with_links_of_groups_and_from_before_there_were_digests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(link: pf.Prox) -> tuple[nn.Linear, QuantOptimizer]:
        torch.manual_seed(1)
        net = nn.Linear(6, 4)
        return net, built({"params": [net.weight], "prox": link}, {"params": [net.bias]})

    net, optimizer = build(HARD)
    train(optimizer, 3)
    save_checkpoint(tmp_path / "now", net, optimizer)
    with monkeypatch.context() as patch:
        state_dict = optimizer.state_dict

        def earlier() -> dict[str, Any]:
            saved = state_dict()
            for entries in saved["state"].values():
                entries.pop("link", None)
            return saved

        patch.setattr(optimizer, "state_dict", earlier)
        save_checkpoint(tmp_path / "earlier", net, optimizer)
    for name in ("now", "earlier"):
        other, again = build(HARD)
        load_checkpoint(tmp_path / name, other, again)
        state = optimizer.state[net.weight]
        assert all(torch.equal(again.state[other.weight][key], got) for key, got in state.items())


def test_links_of_before_learning_have_the_digest_that_saved_states_hold() -> None:
    """What states of a version without `pull` and `learn` hold of these links."""
    assert int(digest(pf.hard_prox(pf.lsbq(2)))) == 1282151156692655453
    annealed = pf.parq_prox(pf.uniform(4), anneal_start=1, anneal_end=5)
    assert int(digest(annealed)) == 43363476232745351
    shares = pf.parq_prox(pf.uniform(4), anneal_start=0.1, anneal_end=0.5, total_steps=10)
    assert int(digest(shares)) == int(digest(annealed))
    learned = pf.hard_prox(pf.lsbq(2), learn=pf.sgd(0.1))
    assert int(digest(learned)) != int(digest(pf.hard_prox(pf.lsbq(2), learn=pf.sgd(0.2))))
