"""Optimizers of other people as the base: they train wrapped as alone, are resumed to the bit, or
are refused by name. `bases.py` has one for each thing that torch's own do not do."""

from __future__ import annotations

import copy
import io
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import parq_fn as pf
from parq_fn.optim import QuantOptimizer, load_checkpoint, save_checkpoint
from tests.optim import bases
from tests.optim.adapters import LATE, ones_for, parameters
from tests.optim.bases import BASES

MID = pf.parq_prox(pf.lsbq(2), anneal_start=1, anneal_end=9, period=2)


class Net(nn.Module):
    """A weight, a weight of zeros, a vector, and one that gets no gradient."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        drawn = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        self.weight, self.zeros = nn.Parameter(drawn), nn.Parameter(torch.zeros(4, 4) + seed)
        self.bias, self.idle = nn.Parameter(drawn[0].clone()), nn.Parameter(drawn.clone())


def groups_of(net: Net, bits: int | None = 2) -> list[dict[str, Any]]:
    more = {} if bits is None else {"quant_bits": bits}
    return [{"params": [net.weight, net.zeros, net.idle], **more}, {"params": [net.bias]}]


def trained(net: Net, optimizer: Any, steps: int, first: int = 0) -> list[Tensor]:
    if hasattr(optimizer, "train"):
        optimizer.train()
    for step in range(first, first + steps):
        for i, p in enumerate((net.weight, net.zeros, net.bias)):
            drawn = torch.Generator().manual_seed(10 * step + i)
            p.grad = torch.randn(p.shape, generator=drawn)
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


def seed_all() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002 # the global generator


def check_equal(one: list[Tensor], other: list[Tensor]) -> None:
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b), (a, b)


@pytest.mark.parametrize("bits", [2, 16])
@pytest.mark.parametrize("base", BASES)
def test_a_base_trains_wrapped_as_it_trains_alone(base: str, bits: int) -> None:
    alone, net = Net(), Net()
    seed_all()
    expected = trained(alone, BASES[base](groups_of(alone, None)), 5)
    seed_all()
    optimizer = QuantOptimizer(BASES[base](groups_of(net, bits)), LATE)
    check_equal(expected, trained(net, optimizer, 5))


def by_state_dict(net: Net, optimizer: Any, make: Callable[[Net], Any], _: Path) -> Any:
    file, other = io.BytesIO(), Net(1)
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=False)
    fresh = make(other)
    fresh.load_state_dict(state)
    other.load_state_dict(weights)
    return other, fresh


def by_checkpoint(net: Net, optimizer: Any, make: Callable[[Net], Any], folder: Path) -> Any:
    other = Net(1)
    save_checkpoint(folder, net, optimizer)
    fresh = make(other)
    load_checkpoint(folder, other, fresh)
    return other, fresh


def by_pickle(net: Net, optimizer: Any, make: Any, _: Path) -> Any:
    return pickle.loads(pickle.dumps((net, optimizer)))


def by_deepcopy(net: Net, optimizer: Any, make: Any, _: Path) -> Any:
    return copy.deepcopy((net, optimizer))


WAYS = {
    "state_dict": by_state_dict,
    "checkpoint": by_checkpoint,
    "pickle": by_pickle,
    "deepcopy": by_deepcopy,
}

#: What a base alone loses on that way, too, or torch cannot do.
LOST = {
    ("Draws", "state_dict"): "torch saves no generator of an optimizer's own",
    ("Draws", "checkpoint"): "torch saves no generator of an optimizer's own",
    ("Draws", "pickle"): "an iterator beside the generator cannot be pickled",
    ("KeepsCodes", "deepcopy"): "torch copies no tensors of such classes",
    ("KeepsCodes", "pickle"): "torch pickles no tensors of such classes",
    ("KeepsCodes", "state_dict"): "torch pickles no tensors of such classes",
    ("KeepsCodes", "checkpoint"): "torch saves no tensors of such classes",
}


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize(
    ("base", "way"), [(base, way) for base in BASES for way in WAYS if (base, way) not in LOST]
)
def test_a_base_is_resumed_to_the_bit(base: str, way: str, before: int, tmp_path: Path) -> None:
    def make(net: Net) -> QuantOptimizer:
        return QuantOptimizer(BASES[base](groups_of(net)), MID)

    net = Net()
    seed_all()
    optimizer = make(net)
    trained(net, optimizer, before)
    drawn = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    other, fresh = WAYS[way](net, optimizer, make, tmp_path / "last")
    random.setstate(drawn[0])
    np.random.set_state(drawn[1])  # noqa: NPY002
    torch.set_rng_state(drawn[2])
    resumed = trained(other, fresh, 4, before)
    random.setstate(drawn[0])
    np.random.set_state(drawn[1])  # noqa: NPY002
    torch.set_rng_state(drawn[2])
    check_equal(trained(net, optimizer, 4, before), resumed)


def test_codes_of_a_loaded_state_are_copies() -> None:
    net, other = Net(), Net(1)
    optimizer = QuantOptimizer(bases.KeepsCodes(groups_of(net)), MID)
    fresh = QuantOptimizer(bases.KeepsCodes(groups_of(other)), MID)
    trained(net, optimizer, 3)
    fresh.load_state_dict(optimizer.state_dict())
    other.load_state_dict(net.state_dict())
    kept = optimizer.state[net.weight]["momentum"].decoded().clone()
    resumed = trained(other, fresh, 2, 3)
    assert torch.equal(optimizer.state[net.weight]["momentum"].decoded(), kept)
    check_equal(trained(net, optimizer, 2, 3), resumed)


@pytest.mark.parametrize("base", ["Tallies", "TalliesAtOnce", "SavesMore"])
def test_a_state_without_what_the_base_keeps_besides_is_refused(base: str) -> None:
    net, other = Net(), Net(1)
    optimizer = QuantOptimizer(BASES[base](groups_of(net)), MID)
    trained(net, optimizer, 2)
    state = optimizer.state_dict()
    del state["param_groups"][0]["base_state"]
    fresh = QuantOptimizer(BASES[base](groups_of(other)), MID)
    trained(other, fresh, 1)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=f"(steps|warmup), which {base} keeps besides the entries"):
        fresh.load_state_dict(state)
    assert str(fresh.state_dict()) == str(before)


def test_a_state_of_the_base_alone_brings_what_it_keeps_besides() -> None:
    for base in ("Tallies", "SavesMore"):
        net, other = Net(), Net(1)
        alone = BASES[base](groups_of(net, None))
        trained(net, alone, 3)
        fresh = QuantOptimizer(BASES[base](groups_of(other)), LATE)
        other.load_state_dict(net.state_dict())
        fresh.load_state_dict(alone.state_dict())
        check_equal(trained(net, alone, 3, 3), trained(other, fresh, 3, 3))


def test_what_the_base_refuses_to_load_changes_nothing() -> None:
    net, other = Net(), Net(1)
    optimizer = QuantOptimizer(bases.SavesMore(groups_of(net)), MID)
    trained(net, optimizer, 2)
    state = optimizer.state_dict()
    state["param_groups"][0]["base_state"] = {"warmup": {}}
    fresh = QuantOptimizer(bases.SavesMore(groups_of(other)), MID)
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(ValueError, match=r"SavesMore\.load_state_dict raised KeyError: 'count'"):
        fresh.load_state_dict(state)
    assert str(fresh.state_dict()) == str(before)
    assert fresh.base.count == 0


def test_entries_of_another_shape_are_refused_where_the_base_does_not_vary_them() -> None:
    (a,) = parameters(1)
    optimizer = QuantOptimizer(bases.Prodigal([{"params": [a], "quant_bits": 2}]), MID)
    ones_for(a)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["p0"] = torch.tensor(0.0)
    optimizer.load_state_dict(state)
    state["state"][0]["latent"] = torch.tensor(0.0)
    with pytest.raises(ValueError, match=r"latent has shape \(\), expected \(4, 4\)"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("base", BASES)
def test_wrapping_draws_from_no_global_generator(base: str) -> None:
    net = Net()
    made = BASES[base](groups_of(net))
    seed_all()
    expected = random.random(), np.random.random(), torch.rand(3)  # noqa: NPY002
    seed_all()
    QuantOptimizer(made, MID)
    got = random.random(), np.random.random(), torch.rand(3)  # noqa: NPY002
    assert got[:2] == expected[:2]
    assert torch.equal(got[2], expected[2])


# Bases with train() and eval()


def test_modes_of_a_base_reach_latents_and_other_parameters() -> None:
    alone, net = Net(), Net()
    base = bases.HasModes(groups_of(alone, None))
    optimizer = QuantOptimizer(bases.HasModes(groups_of(net)), LATE)
    for _ in range(2):
        trained(alone, base, 3)
        trained(net, optimizer, 3)
        for mode in ("eval", "eval", "train", "eval"):
            getattr(base, mode)()
            getattr(optimizer, mode)()
            check_equal(list(alone.parameters()), list(net.parameters()))


def test_in_eval_weights_are_those_of_the_latents_there_and_on_levels_at_the_end() -> None:
    net = Net()
    prox = pf.parq_prox(pf.lsbq(2), anneal_start=0, anneal_end=3, period=1)
    optimizer = QuantOptimizer(bases.HasModes(groups_of(net)), prox)
    trained(net, optimizer, 6)
    before, latent = net.weight.clone(), optimizer.state[net.weight]["latent"].clone()
    optimizer.eval()
    levels = optimizer.levels(net.weight)
    assert torch.isin(net.weight, levels).all()
    moved = optimizer.state[net.weight]["latent"]
    assert not torch.equal(moved, latent)
    assert torch.equal(net.weight, pf.proxmaps.hard(moved.reshape(1, -1), levels[None]).view(4, 4))
    optimizer.train()
    torch.testing.assert_close(optimizer.state[net.weight]["latent"], latent)
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize("way", WAYS)
def test_a_save_in_either_mode_loses_nothing(way: str, tmp_path: Path) -> None:
    def make(net: Net) -> QuantOptimizer:
        return QuantOptimizer(bases.HasModes(groups_of(net)), MID)

    net = Net()
    optimizer = make(net)
    trained(net, optimizer, 3)
    optimizer.eval()
    other, fresh = WAYS[way](net, optimizer, make, tmp_path / "last")
    check_equal(list(net.parameters()), list(other.parameters()))
    check_equal(trained(net, optimizer, 3, 3), trained(other, fresh, 3, 3))


def test_modes_change_nothing_before_the_first_step_or_without_them() -> None:
    for base in (bases.HasModes, torch.optim.AdamW):
        net = Net()
        optimizer = QuantOptimizer(base(groups_of(net), lr=0.1), MID)
        before = [p.clone() for p in net.parameters()]
        optimizer.train()
        optimizer.eval()
        optimizer.train(False)
        check_equal(before, list(net.parameters()))


def test_inside_rounded_modes_are_refused_where_they_move_weights() -> None:
    """Programs that evaluate a model call eval() of its optimizer too."""
    for base in (bases.HasModes, torch.optim.AdamW):
        optimizer = QuantOptimizer(base(groups_of(Net()), lr=0.1), MID)
        with optimizer.rounded():
            if base is torch.optim.AdamW:
                optimizer.eval()
            else:
                with pytest.raises(RuntimeError, match=r"train or eval .*leave the block"):
                    optimizer.eval()


# Bases that are refused


def test_optimizers_around_others_are_refused_by_name() -> None:
    for kind in (bases.Around, bases.AroundNothingOfTorchs):
        inner = torch.optim.AdamW(groups_of(Net()), lr=0.1)
        with pytest.raises(TypeError, match=f"{kind.__name__} is around another optimizer, AdamW"):
            QuantOptimizer(kind(inner), LATE)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Borrows has the param_groups or the state of another"):
        QuantOptimizer(bases.Borrows(groups_of(Net())), LATE)


def test_optimizers_of_deepspeed_are_refused_by_name() -> None:
    """They are no subclasses of torch's, and hold what the groups of the inner one were flattened
    to; accelerate has a wrapper of its own around them."""
    runtime = {"__module__": "deepspeed.runtime.base_optimizer"}
    own = type("ZeROOptimizer", (), runtime)
    zero: Any = type("DeepSpeedZeroOptimizer", (own,), {"param_groups": [], **runtime})()
    zero.optimizer = torch.optim.AdamW(groups_of(Net()), lr=0.1)
    engine = type("DeepSpeedEngine", (nn.Module,), runtime)()
    for got in (zero, engine, bases.AroundNothingOfTorchs(zero)):
        with pytest.raises(TypeError, match=f"{type(got).__name__} is .*DeepSpeed's.*fully_shard"):
            QuantOptimizer(got, LATE)
    fused = type("FusedAdam", (bases.Plain,), {"__module__": "deepspeed.ops.adam.fused_adam"})
    QuantOptimizer(fused(groups_of(Net())), LATE)  # an optimizer as torch's are


@pytest.mark.parametrize(
    ("kind", "attribute"), [(bases.KeepsParameters, "mine"), (bases.KeepsTheModule, "model")]
)
def test_bases_with_parameters_of_their_own_are_refused_where_these_are_quantized(
    kind: Any, attribute: str
) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__} keeps parameter '0 of group 0' in its "):
        QuantOptimizer(kind(groups_of(Net())), LATE)
    QuantOptimizer(kind(groups_of(Net(), 16)), LATE)


def test_a_base_whose_step_raises_is_refused_by_name_where_a_latent_is_moved() -> None:
    with pytest.raises(ValueError, match=r"NeedsAClosure cannot be wrapped.*raised RuntimeError"):
        QuantOptimizer(bases.NeedsAClosure(groups_of(Net())), LATE)
    QuantOptimizer(bases.NeedsAClosure(groups_of(Net(), 16)), LATE)
