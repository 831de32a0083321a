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
from parq_fn.foundation.value import value
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


def isotonic(u: Tensor, levels: Tensor) -> Tensor:
    """The projection onto ascending rows: max over a <= i of min over b >= i of mean(u[a..b])."""
    n = u.shape[-1]
    if n == 0:
        return u + 0.0
    sums = torch.nn.functional.pad(u.double().cumsum(-1), (1, 0))
    i = torch.arange(n)
    size = i - i[:, None] + 1
    means = (sums[..., None, 1:] - sums[..., :-1, None]) / size.clamp(min=1)
    least = means.masked_fill(size < 1, torch.inf).flip(-1).cummin(-1).values.flip(-1)
    return least.masked_fill(size < 1, -torch.inf).amax(-2).to(u.dtype)


def in_l1_ball(u: Tensor, levels: Tensor) -> Tensor:
    """The projection onto rows with |w_1| + ... + |w_n| <= 1."""
    size = u.double().abs()
    above = (torch.nn.functional.pad(size, (0, 1)).sort(-1, descending=True).values).cumsum(-1) - 1
    count = torch.arange(1, above.shape[-1] + 1)
    threshold = (above / count).amax(-1, keepdim=True).clamp(min=0)
    return (u.sign() * (size - threshold).clamp(min=0)).to(u.dtype)


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
        claiming(mean_removed, coefficients=None, elementwise=False, idempotent=True),
        claiming(isotonic, coefficients=None, elementwise=False, idempotent=True),
        claiming(in_l1_ball, coefficients=None, elementwise=False, idempotent=True),
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
    ids=[
        "soft_threshold",
        "ridge",
        "block_soft_threshold",
        "mean_removed",
        "isotonic",
        "in_l1_ball",
        "largest_kept",
    ],
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


def wrong_below_a_thousandth(u: Tensor, levels: Tensor, c: float) -> Tensor:
    return soft_threshold(u, levels, c if c >= 1e-3 else 0.0)


def falls_in_a_narrow_interval(u: Tensor, levels: Tensor, c: float) -> Tensor:
    return torch.where((u > 0.5) & (u < 0.501), ridge(u, levels, c) - 0.01, ridge(u, levels, c))


def falls_in_a_narrow_shell(u: Tensor, levels: Tensor, c: float) -> Tensor:
    norm = u.norm(dim=-1, keepdim=True)
    return torch.where((norm > 1) & (norm < 1.01), -u, u)


def only_in(dtype: torch.dtype, right: Any, wrong: Any) -> Any:
    """The one map in that dtype and the other elsewhere."""
    return lambda u, q, *c: (wrong if u.dtype == dtype else right)(u, q, *c)


MONOTONE = {"growth": None, "firmly_nonexpansive": False, "lipschitz": None, "continuous": False}


@pytest.mark.rare
@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (claiming(wrong_below_a_thousandth, regularizer=penalty), "is_prox"),
        (claiming(falls_in_a_narrow_interval, **MONOTONE), "monotone"),
        (claiming(falls_in_a_narrow_shell, **MONOTONE, elementwise=False), "monotone"),
        (claiming(only_in(torch.bfloat16, soft_threshold, ridge)), "narrow"),
        (claiming(only_in(torch.float32, soft_threshold, ridge)), "narrow"),
        (
            claiming(
                only_in(torch.bfloat16, mean_removed, lambda u, q: u + 0.0),
                coefficients=None,
                elementwise=False,
            ),
            "narrow",
        ),
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


def down(step: Any) -> Tensor:
    return 1 - (torch.as_tensor(step).double() / 10).clamp(0, 1)


def between_steps(step: Any) -> Tensor:
    t = torch.as_tensor(step).double()
    return torch.where((t > 4.2) & (t < 4.4), 0.9, down(step))


def of_python_floats(step: Any) -> Tensor:
    return down(step) / 2 if isinstance(step, float) else down(step)


def of_int32(step: Any) -> Tensor:
    return down(step) / 2 if torch.as_tensor(step).dtype == torch.int32 else down(step)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        (between_steps, "monotone"),
        (of_python_floats, "same_for_all_steps"),
        (of_int32, "same_for_all_steps"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_steps_of_every_kind_and_between_whole_ones_are_looked_at(wrong: Any, name: str) -> None:
    with pytest.raises(Violation) as info:
        check_schedule(wrong, start=0, end=10, laws={name}, max_examples=60)
    assert info.value.law.name == name


@pytest.mark.slow
@pytest.mark.parametrize("center", [-3.0, -0.2, 1.3, 5.0])
def test_an_inverse_slope_keeps_its_laws_with_a_center_outside(center: float) -> None:
    check_schedule(pq.inverse_slope(0, 100, 10.0, center), max_examples=40)


def test_firmness_comes_before_its_consequences() -> None:
    names = [law.name for law in laws.for_proxmap(maps.par)]
    for later in ("monotone", "continuous", "lipschitz"):
        assert names.index("firmly_nonexpansive") < names.index(later)


def test_coupled_weights_are_told_first_where_a_map_declares_elementwise() -> None:
    with pytest.raises(Violation) as info:
        check_proxmap(claiming(block_soft_threshold, regularizer=of_rows), max_examples=40)
    assert info.value.law.name == "elementwise"


def test_a_violation_of_long_rows_shows_a_few_numbers_and_the_entry() -> None:
    law = laws.named("proxmap", "fixes_levels")
    q = torch.arange(100.0).double().reshape(2, 50)
    with pytest.raises(Violation) as info:
        law.check(lambda u, q, c: u + (u == 70), any_levels=q, any_c=None, dtype=torch.float64)
    lines = str(info.value).splitlines()
    assert max(map(len, lines)) < 200
    assert "    any_levels at [1, 20] = 70.0" in lines
    assert any("7.0, ... 42 more], [50.0," in line for line in lines)
    assert any("attribute `inputs`" in line for line in lines)


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


def test_an_operation_that_vmap_runs_as_a_loop_is_no_warning(recwarn) -> None:
    """torch.quantile in an own quantizer: it passed, below sixty warnings."""

    @value
    class quartiles(pq.Quantizer):
        num_levels = 3

        def qparams(self, x: Tensor) -> Tensor:
            shares = torch.tensor([0.25, 0.5, 0.75], dtype=x.dtype)
            return torch.quantile(x, shares, dim=-1).movedim(0, -1)

    check_quantizer(quartiles(), max_examples=3)
    assert not [w for w in recwarn if "performance drop" in str(w.message)]
