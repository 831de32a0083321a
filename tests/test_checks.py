"""Hyperparameters are checked where they enter: numbers of any library, tensors, what is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import parq_fn as pf


@pytest.mark.parametrize(
    "build",
    [
        lambda: pf.parq_prox(pf.lsbq(2), anneal_start=np.int64(9), anneal_end=np.int64(3)),
        lambda: pf.hard_prox(pf.lsbq(1), period=np.int64(0)),
        lambda: pf.sgd(np.float32(-1)),
        lambda: pf.accumulate(pf.sgd(0.1), np.int64(0)),
        lambda: pf.lsbq(0, multiplier=np.float32(-1)),
    ],
)
def test_numpy_scalars_are_checked_like_numbers(build) -> None:
    with pytest.raises(ValueError, match=r"must"):
        build()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: pf.sgd(torch.tensor(-0.1)), r"learning_rate must lie in \[0, inf\), got -0.1"),
        (lambda: pf.sgd(torch.ones(3)), r"0-d tensor, got shape \(3,\); vmap over it"),
        (lambda: pf.sgd(float("inf")), r"learning_rate must lie in \[0, inf\), got inf"),
        (lambda: pf.adam(float("nan")), r"learning_rate must lie in \[0, inf\), got nan"),
        (
            lambda: pf.parq_prox(pf.lsbq(1), anneal_start=torch.tensor(9), anneal_end=3),
            "parq_prox: anneal_start must come before anneal_end, got anneal_start=9, anneal_end=3",
        ),
        (
            lambda: pf.parq_prox(pf.lsbq(1), anneal_start=0, anneal_end=1, steepness=float("inf")),
            r"steepness must lie in \(0, inf\), got inf",
        ),
        (lambda: pf.schedules.exponential(1e-300, -1e-300, 0, 1), "one sign"),
        (lambda: pf.schedules.constant(float("nan")), "constant: value must lie in"),
    ],
)
def test_what_can_be_read_of_a_hyperparameter_is_checked(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "build",
    [
        lambda: pf.sgd("0.1"),
        lambda: pf.sgd(None),
        lambda: pf.adamw(True),
        lambda: pf.clip(None),
        lambda: pf.hard_prox(pf.lsbq(1), period=float("nan")),
        lambda: pf.hard_prox(pf.lsbq(1), period="3"),
        lambda: pf.hard_prox(pf.lsbq(1), period=None),
        lambda: pf.per_block("32"),
        lambda: pf.per_block(32.0),
        lambda: pf.accumulate(pf.sgd(1.0), True),
    ],
)
def test_what_is_no_number_is_named(build) -> None:
    with pytest.raises(TypeError, match=r"must be a (whole )?number.*, got"):
        build()


def test_numpy_bits_are_whole_numbers() -> None:
    assert pf.lsbq(np.int64(2)) == pf.lsbq(2)
