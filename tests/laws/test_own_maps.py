"""Maps of one's own: textbook proxes pass, of single weights and of rows; wrong ones are caught."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import parq_fn as pq
from parq_fn import proxmaps as maps
from parq_fn.foundation.checks import Interval
from parq_fn.foundation.traits import ProxTraits, declares, traits_of
from parq_fn.quantizers import Quantizer
from parq_fn.testing import (
    Violation,
    check_proxmap,
    check_quantizer,
    check_schedule,
    laws,
)

CONVEX = ProxTraits(
    coefficients=Interval(0.0, 10.0),
    elementwise=True,
    continuous=True,
    lipschitz=lambda _: 1.0,
    firmly_nonexpansive=True,
    growth=lambda _: 0.5,
)


def penalty(w: Tensor, levels: Tensor, c: float) -> Tensor:
    del levels
    return c * w.abs()


def square(w: Tensor, levels: Tensor, c: float) -> Tensor:
    del levels
    return c * w.square() / 2


def soft_threshold(u: Tensor, levels: Tensor, c: float) -> Tensor:
    """argmin_w (w - u)^2 / 2 + c |w|."""
    return u.sign() * (u.abs() - c).clamp(min=0)


def ridge(u: Tensor, levels: Tensor, c: float) -> Tensor:
    """argmin_w (w - u)^2 / 2 + c w^2 / 2."""
    return u / (1 + c)


def of_rows(w: Tensor, levels: Tensor, c: float) -> Tensor:
    """c |w|, one number a row."""
    return c * w.norm(dim=-1, keepdim=True)


def block_soft_threshold(u: Tensor, levels: Tensor, c: float) -> Tensor:
    """argmin_w |w - u|^2 / 2 + c |w|, |.| the norm of the row."""
    norm = u.norm(dim=-1, keepdim=True)
    return u * (1 - c / norm.clamp(min=1e-300)).clamp(min=0)


def mean_removed(u: Tensor, levels: Tensor) -> Tensor:
    """The projection onto rows of mean 0."""
    return u - u.mean(-1, keepdim=True)


def largest_kept(u: Tensor, levels: Tensor) -> Tensor:
    """The projection onto rows with one entry."""
    if not u.numel():
        return u + 0.0
    top = u.abs().max(-1, keepdim=True).indices
    return torch.zeros_like(u).scatter(-1, top, u.gather(-1, top))


def claiming(f: Any, **traits: Any) -> Any:
    """The function as a map with the traits of a convex prox and these."""

    def claimed(u: Tensor, levels: Tensor, *c: Any) -> Tensor:
        return f(u, levels, *c)

    return declares(replace(CONVEX, **traits))(claimed)


@pytest.mark.rare
@pytest.mark.parametrize(
    "right",
    [
        claiming(soft_threshold, regularizer=penalty, convex_function=penalty),
        claiming(ridge, regularizer=square, convex_function=square),
        claiming(
            block_soft_threshold, elementwise=False, regularizer=of_rows, convex_function=of_rows
        ),
        claiming(mean_removed, coefficients=None, elementwise=False, idempotent=False),
        claiming(
            largest_kept,
            coefficients=None,
            elementwise=False,
            continuous=False,
            lipschitz=None,
            firmly_nonexpansive=False,
            idempotent=True,
        ),
    ],
    ids=["soft_threshold", "ridge", "block_soft_threshold", "mean_removed", "largest_kept"],
)
def test_textbook_proxes_pass(right: Any) -> None:
    check_proxmap(right, max_examples=40)


def too_far(u: Tensor, levels: Tensor, c: float) -> Tensor:
    return soft_threshold(u, levels, c + 1e-3)


def jumps_too_late(u: Tensor, levels: Tensor, c: float) -> Tensor:
    """argmin_w (w - u)^2 / 2 + c 1[w != 0] jumps at sqrt(2 c)."""
    return torch.where(u.abs() > (2 * c) ** 0.5 + 1e-3, u, 0.0)


def counted(w: Tensor, levels: Tensor, c: float) -> Tensor:
    return c * (w != 0).double()


def of_squared_norm(u: Tensor, levels: Tensor, c: float) -> Tensor:
    square = u.square().sum(-1, keepdim=True)
    return u * (1 - c / square.clamp(min=1e-300)).clamp(min=0)


def block_too_far(u: Tensor, levels: Tensor, c: float) -> Tensor:
    return block_soft_threshold(u, levels, c + 1e-3)


@pytest.mark.rare
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (claiming(too_far, regularizer=penalty), "is_prox"),
        (claiming(too_far, convex_function=penalty), "is_convex_prox"),
        (claiming(too_far, convex_function=penalty), "moreau"),
        (
            claiming(
                jumps_too_late, coefficients=Interval(0.5, 4.0), growth=None, regularizer=counted
            ),
            "is_prox",
        ),
        (claiming(block_too_far, elementwise=False, regularizer=of_rows), "is_prox"),
        (claiming(block_too_far, elementwise=False, convex_function=of_rows), "is_convex_prox"),
        (claiming(of_squared_norm, elementwise=False), "firmly_nonexpansive"),
        (claiming(of_squared_norm, elementwise=False), "lipschitz"),
        (claiming(largest_kept, elementwise=False, coefficients=None), "continuous"),
        (claiming(lambda u, q: -u, elementwise=False, coefficients=None), "monotone"),
    ],
)
def test_wrong_proxes_are_caught(wrong: Any, name: str) -> None:
    with pytest.raises(Violation) as info:
        check_proxmap(wrong, laws={name}, max_examples=200)
    assert info.value.law.name == name


PARQ = traits_of(maps.parq)


def far_along_the_row(u: Tensor, levels: Tensor, s: Any) -> Tensor:
    w = maps.parq(u, levels, s)
    return torch.cat([w[..., :64], w[..., 64:] * 0 + levels[..., :1]], -1)


def of_many_levels(u: Tensor, levels: Tensor, s: Any) -> Tensor:
    return maps.parq(u, levels[..., :16].contiguous(), s)


def of_huge_latents(u: Tensor, levels: Tensor, s: Any) -> Tensor:
    return torch.where(u.abs() > 1e6, u, maps.parq(u, levels, s))


def of_small_coefficients(u: Tensor, levels: Tensor, s: Any) -> Tensor:
    return maps.parq(u, levels, s) if s > 1e-3 else maps.parq(u, levels, s) + 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (far_along_the_row, "elementwise"),
        (of_many_levels, "fixes_levels"),
        (of_huge_latents, "in_range"),
        (of_small_coefficients, "in_range"),
    ],
)
def test_faults_out_of_the_ordinary_are_caught(wrong: Any, name: str) -> None:
    with pytest.raises(Violation) as info:
        check_proxmap(declares(PARQ)(wrong), laws={name}, max_examples=100)
    assert info.value.law.name == name


class off_beyond_the_levels(Quantizer):
    """Its own `nearest` is right on the rows that levels were fitted to."""

    num_levels = 2

    def qparams(self, x: Tensor) -> Tensor:
        top = x.abs().amax(-1, keepdim=True)
        return torch.cat([-top, top], -1)

    def nearest(self, rows: Tensor, levels: Tensor) -> Tensor:
        beyond = rows > levels[..., -1:]
        return torch.where(beyond, levels[..., :1], super().nearest(rows, levels))


class of_long_rows(Quantizer):
    num_levels = 2

    def qparams(self, x: Tensor) -> Tensor:
        top = x[..., :64].abs().amax(-1, keepdim=True)
        return torch.cat([-top, top], -1)


def test_an_own_nearest_is_checked_on_weights_that_moved() -> None:
    with pytest.raises(Violation, match="breaks the law 'assigns_nearest'"):
        check_quantizer(off_beyond_the_levels(), max_examples=10)


def test_faults_of_quantizers_in_long_rows_are_caught() -> None:
    with pytest.raises(Violation, match="breaks the law 'permutation'"):
        check_quantizer(of_long_rows(), laws={"permutation"}, max_examples=100)


@pytest.mark.parametrize(("value", "name"), [(2.0, "in_range"), (torch.nan, "finite")])
def test_a_single_step_of_a_schedule_is_looked_at(value: float, name: str) -> None:
    right = pq.schedules.linear(1.0, 0.0, 0, 100)

    def wrong(step: Any) -> Tensor:
        t = torch.as_tensor(step)
        return torch.where(t == 83, value, right(t))

    with pytest.raises(Violation) as info:
        check_schedule(wrong, start=0, end=100, laws={name}, max_examples=3)
    assert info.value.law.name == name


@pytest.mark.slow
@pytest.mark.parametrize("center", [-3.0, -0.2, 1.3, 5.0])
def test_an_inverse_slope_keeps_its_laws_with_a_center_outside(center: float) -> None:
    check_schedule(pq.inverse_slope(0, 100, 10.0, center), max_examples=40)


def test_firmness_comes_before_its_consequences() -> None:
    names = [law.name for law in laws.for_proxmap(maps.par)]
    for later in ("monotone", "continuous", "lipschitz"):
        assert names.index("firmly_nonexpansive") < names.index(later)


def test_a_violation_shows_the_weight_and_the_better_one() -> None:
    with pytest.raises(Violation) as info:
        check_proxmap(claiming(too_far, regularizer=penalty), laws={"is_prox"}, max_examples=200)
    inputs = info.value.inputs
    assert inputs["f(u)"].shape == inputs["z"].shape == inputs["u"].shape
    assert "    f(u) = [[" in str(info.value)
    assert "    z = [[" in str(info.value)


def test_a_violation_shows_where_the_operator_raised() -> None:
    def broken(u: Tensor, levels: Tensor) -> Tensor:
        return u.reshape(3, -1, 7, 1)

    with pytest.raises(Violation) as info:
        check_proxmap(broken, max_examples=3)
    assert f"{__file__}:" in str(info.value)
    assert "in broken: return u.reshape(3, -1, 7, 1)" in str(info.value)
    assert info.value.__cause__ is info.value.error
