"""Links, quantizers and schedules are values: they print, compare, hash, pickle, replace."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

import parq_fn as pf
from parq_fn import schedules

NAMES = (
    {n: getattr(pf, n) for n in pf.__all__}
    | vars(schedules)
    | {"tensor": torch.tensor, "torch": torch, "hard": pf.proxmaps.hard, "AdamW": torch.optim.AdamW}
)
VALUES = [
    pf.lsbq(2),
    pf.lsbq(0, "optimal", center=True),
    pf.uniform(3, scale="max"),
    pf.max_uniform(2),
    pf.asymmetric(8),
    pf.ternary_uniform(center=True),
    pf.lloyd_max(4, symmetric=False),
    pf.integer(4),
    pf.integer(8, scale="mean"),
    pf.affine(4),
    pf.gaussian(2),
    pf.codebook((-1, 0.5)),
    pf.codebook.nf4,
    pf.codebook.fp4,
    pf.codebook.iq4_nl,
    pf.mxfp4(),
    pf.nvfp4(),
    pf.stored(pf.uniform(4), torch.float16),
    pf.stored(pf.codebook.nf4, "e8m0"),
    pf.centered(pf.integer(4)),
    pf.per_tensor(),
    pf.per_channel(),
    pf.per_block(32),
    schedules.constant(0.1),
    schedules.linear(0.0, 1.0, 0, 10),
    schedules.cosine(0.0, 1.0, 0, 10),
    schedules.exponential(1.0, 0.1, 0, 10),
    schedules.polynomial(1.0, 0.1, 0, 10, power=2.0),
    schedules.piecewise((0.1, 0.01), (5,)),
    schedules.join((schedules.constant(0.1), schedules.linear(1.0, 0.0, 0, 5)), (3,)),
    schedules.warmup(schedules.constant(0.1), 5),
    schedules.inverse_slope(0, 10, steepness=20),
    schedules.anneal_decay(0.1, schedules.inverse_slope(0, 10), 0.5),
    pf.identity(),
    pf.freeze(),
    pf.scale(2.0),
    pf.scale_by_schedule(schedules.constant(2.0)),
    pf.scale_by_learning_rate(0.1),
    pf.add_decayed_weights(1e-4),
    pf.trace(0.9, nesterov=True),
    pf.scale_by_adam(amsgrad=True),
    pf.clip(1.0),
    pf.clip_by_global_norm(1.0),
    pf.sgd(0.1, momentum=0.9, weight_decay=0.0001),
    pf.adam(0.001),
    pf.adamw(schedules.constant(0.1), weight_decay=0.05),
    pf.hard_prox(pf.lsbq(1)),
    pf.parq_prox(
        pf.lsbq(2), anneal_start=100, anneal_end=20000, granularity=pf.per_channel(), steepness=20
    ),
    pf.soft_prox(pf.lsbq(2), anneal_start=1, anneal_end=2, power=2.0),
    pf.binary_relax_prox(pf.lsbq(2), anneal_start=1, anneal_end=5, warmup=3),
    pf.proxquant_prox(pf.lsbq(2), anneal_start=1, anneal_end=2, strength=0.1),
    pf.custom_prox(pf.lsbq(2), pf.proxmaps.hard, 0.0, start=5),
    pf.chain(pf.clip(1.0), pf.sgd(0.1)),
    pf.named_chain(base=pf.sgd(0.1), prox=pf.hard_prox(pf.lsbq(1))),
    pf.masked(pf.scale(2.0), "*.weight"),
    pf.partition({"a": pf.scale(2.0), "b": pf.freeze()}, {"x": "a", "*": "b"}),
    pf.accumulate(pf.sgd(0.1), 4),
    pf.apply_if_finite(pf.adam()),
    pf.apply_if_finite(pf.adam(), limit=3),
    pf.scale_by_lion(b2=0.9),
    pf.lion(0.001, weight_decay=0.1),
    pf.muon(0.02, nesterov=False),
    pf.add_noise(0.1, seed=3),
    pf.as_link(torch.optim.AdamW, lr=0.1, betas=(0.5, 0.9)),
    pf.averaged(pf.sgd(0.1), 0.99),
    pf.schedule_free(pf.sgd(0.1), 0.5),
    pf.lookahead(pf.sgd(0.1), 5, 0.25),
    pf.monitor_flips(pf.hard_prox(pf.lsbq(1))),
    pf.conditionally(pf.clip(1.0), schedules.piecewise((1.0, 0.0), (5,))),
    pf.sgd(torch.tensor(0.5)),
]


@pytest.mark.parametrize("made", VALUES, ids=lambda v: type(v).__name__)
class TestValue:
    def test_prints_as_the_call_that_made_it(self, made) -> None:
        assert eval(repr(made), NAMES) == made

    def test_pickles_and_copies(self, made) -> None:
        again = pickle.loads(pickle.dumps(made))
        assert again == made
        assert repr(again) == repr(made)
        assert copy.deepcopy(made) == made

    def test_is_frozen_and_replaces(self, made) -> None:
        assert dataclasses.replace(made) == made
        for field in dataclasses.fields(made):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(made, field.name, None)

    def test_differs_from_every_other(self, made) -> None:
        assert sum(made == other for other in VALUES) == 1

    def test_hashes_where_its_fields_do(self, made) -> None:
        if isinstance(made, pf.partition):
            with pytest.raises(TypeError, match="unhashable"):
                hash(made)
        elif isinstance(made, pf.sgd) and isinstance(made.learning_rate, torch.Tensor):
            with pytest.raises(TypeError, match="field 'learning_rate' holds a tensor"):
                hash(made)
        else:
            assert hash(made) == hash(pickle.loads(pickle.dumps(made)))


def test_the_printed_form_of_the_design() -> None:
    transform = pf.chain(
        pf.sgd(0.1, momentum=0.9, weight_decay=1e-4),
        pf.parq_prox(pf.lsbq(bits=2), anneal_start=100, anneal_end=20_000, steepness=20),
    )
    assert repr(transform) == (
        "chain(sgd(0.1, momentum=0.9, weight_decay=0.0001), "
        "parq_prox(lsbq(2), anneal_start=100, anneal_end=20000, steepness=20))"
    )


def test_replace_is_checked() -> None:
    with pytest.raises(ValueError, match=r"bits must lie in 0\.\.8, got 9"):
        dataclasses.replace(pf.lsbq(2), bits=9)


def test_equality_of_tensor_fields() -> None:
    assert pf.sgd(torch.tensor(0.1)) == pf.sgd(torch.tensor(0.1))
    assert pf.sgd(torch.tensor(0.1)) != pf.sgd(torch.tensor(0.2))
    assert pf.sgd(torch.tensor(0.5)) != pf.sgd(0.5)


def test_everything_public_is_listed_sorted() -> None:
    assert pf.__all__ == sorted(pf.__all__)
    assert all(hasattr(pf, name) for name in pf.__all__)


# Found by attack, each with the input that showed it.


def test_a_subclass_with_an_init_of_its_own_compares_by_its_attributes() -> None:
    class shifted(pf.Link):
        def __init__(self, by):
            self.by = by

    assert shifted(1) != shifted(2)
    assert shifted(1) == shifted(1)
    assert hash(shifted(1)) == hash(shifted(1))
    assert repr(shifted(1)) == "shifted(by=1)"


def test_values_that_hold_tensors_anywhere_are_unhashable() -> None:
    schedule = pf.schedules.piecewise((torch.tensor(1.0), 0.5), (3,))
    with pytest.raises(TypeError, match="field 'values' holds a tensor"):
        hash(schedule)
