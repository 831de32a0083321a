"""The least-squares levels against brute force, a plain dynamic program, and their own laws."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import parq_fn as pf
from parq_fn.quantizers import kmeans_1d
from parq_fn.quantizers.kmeans_1d import (
    _at,
    _best_cuts,
    _candidate_cuts,
    _cuts_op,
    _dynamic_program,
    _prefix,
    least_squares_levels,
)
from tests.helpers import sampled

F64 = torch.float64
LONG = 4500  # beyond what is solved exactly whatever exact_up_to says

# the exact and the approximate branch
BRANCHES = pytest.mark.parametrize("limit", [LONG, 0])


def rand(*shape: int, seed: int = 0) -> Tensor:
    """Gaussian rows scaled to max |x| = 1."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return x / x.abs().amax(-1, keepdim=True)


def squared_error(x: Tensor, levels: Tensor) -> Tensor:
    """[r]: summed squared distance to the nearest of sorted levels."""
    x, levels = x.double(), levels.double()
    nearest = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, x)
    return (x - levels.gather(1, nearest)).square().sum(1)


def brute_force(x: list[float], k: int) -> float:
    """Least error over all partitions of the sorted values into min(k, n) nonempty runs."""
    values = np.sort(np.asarray(x, dtype=np.float64))
    n = len(values)
    return min(
        sum(((run - run.mean()) ** 2).sum() for run in np.split(values, cuts))
        for cuts in combinations(range(1, n), min(k, n) - 1)
    )


def plain_program(x: np.ndarray, k: int) -> tuple[float, np.ndarray]:
    """Least error and levels by the O(k n^2) dynamic program, n >= k."""
    values = np.sort(x)
    n = len(values)
    y = values - values.mean()
    s, q = (np.concatenate(([0.0], np.cumsum(v))) for v in (y, y * y))
    error = np.full(n + 1, np.inf)
    error[0] = 0.0
    starts = np.zeros((k, n + 1), dtype=np.int64)
    for j in range(k):
        new = np.full(n + 1, np.inf)
        for i in range(j + 1, n + 1):
            run = q[i] - q[:i] - (s[i] - s[:i]) ** 2 / np.arange(i, 0, -1)
            starts[j, i] = np.argmin(error[:i] + run)
            new[i] = (error[:i] + run)[starts[j, i]]
        error = new
    end, levels = n, []
    for j in reversed(range(k)):
        start = starts[j, end]
        levels.append(values[start:end].mean())
        end = start
    return float(error[n]), np.array(levels[::-1])


ties = st.integers(-3, 3).map(lambda v: v / 3)
reals = st.floats(-1, 1, allow_nan=False, width=32)
outliers = st.sampled_from([-1.0, 1.0, 1e-3, -1e-3, 2e-3, 0.0])
rows = st.one_of(*(st.lists(v, min_size=1, max_size=10) for v in (ties, reals, outliers)))


@pytest.mark.slow
@given(rows, st.integers(1, 4))
@hypothesis_settings(deadline=None, max_examples=150)
def test_equals_brute_force(row: list[float], k: int) -> None:
    x = torch.tensor([row], dtype=F64)
    levels = least_squares_levels(x, k)
    assert levels.shape == (1, k)
    assert (levels.diff() >= 0).all()
    assert squared_error(x, levels).item() == pytest.approx(brute_force(row, k), abs=1e-12)


@given(
    st.integers(8, 300),
    st.integers(2, 8),
    st.sampled_from([1, 3]),
    st.sampled_from([None, 4, 20]),
    st.integers(0, 2**20),
)
@hypothesis_settings(deadline=None, max_examples=20)
def test_equals_the_plain_program(n: int, k: int, power: int, grid: int | None, seed: int) -> None:
    x = rand(1, n, seed=seed) ** power
    x = x if grid is None else (x * grid).round() / grid
    least, levels = plain_program(x[0].numpy(), k)
    found = least_squares_levels(x, k)
    assert squared_error(x, found).item() == pytest.approx(least, abs=1e-11)
    if grid is None:
        np.testing.assert_allclose(found[0].numpy(), levels, atol=1e-11)


def test_equals_the_plain_program_at_the_largest_exact_size() -> None:
    x = rand(1, 4096)
    least, levels = plain_program(x[0].numpy(), 4)
    found = least_squares_levels(x, 4)
    assert squared_error(x, found).item() == pytest.approx(least, rel=1e-11)
    np.testing.assert_allclose(found[0].numpy(), levels, atol=1e-11)


def samples(n: int) -> dict[str, Tensor]:
    """Rows [1, n] of many shapes, scaled to max |x| = 1."""
    g = np.random.default_rng(0)
    gauss = g.standard_normal(n)
    out = gauss.copy()
    out[:3] = 300, -1000, 5000
    rows = {
        "gaussian": gauss,
        "laplace": g.laplace(size=n),
        "cauchy": g.standard_cauchy(n),
        "student": g.standard_t(3, n),
        "bimodal": np.where(gauss > 0.3, 5 + g.standard_normal(n) / 10, gauss - 5),
        "outliers": out,
        "uniform": g.random(n),
        "two scales": np.where(g.random(n) < 0.01, gauss, gauss / 1000),
        "mostly zero": np.where(g.random(n) < 0.95, 0, gauss),
        "lattice": (gauss * 30).round(),
        "wide lattice": (g.standard_cauchy(n) * 5).round(),
        "log-normal": np.exp(3 * gauss),
    }
    return {name: torch.tensor(v / np.abs(v).max()).float()[None] for name, v in rows.items()}


@pytest.mark.rare
def test_long_rows_are_near_optimal() -> None:
    rows = samples(20_000)
    x = torch.cat(list(rows.values()))
    for k in (2, 8, 16):
        least = squared_error(x, least_squares_levels(x, k, exact_up_to=x.shape[1]))
        error = squared_error(x, least_squares_levels(x, k))
        bad = (error > 1.005 * least + 1e-12).tolist()
        assert not [name for name, b in zip(rows, bad, strict=True) if b], k


@pytest.mark.rare
def test_long_rows_are_near_optimal_with_many_levels() -> None:
    x = samples(5000)["gaussian"]
    least = squared_error(x, least_squares_levels(x, 256, exact_up_to=5000))
    assert squared_error(x, least_squares_levels(x, 256)) <= 1.005 * least


def test_candidate_cuts_are_dense_as_the_cube_root_of_the_data() -> None:
    n, m = 1 << 16, 1000
    values = -torch.log1p(-(torch.arange(n, dtype=F64) + 0.5) / n)[None]  # exponential, spread out
    cuts = _candidate_cuts(values, m)
    assert cuts.shape == (1, m + 1)
    assert cuts[0, 0] == 0
    assert cuts[0, -1] == n
    assert bool((cuts.diff() >= 0).all())
    at = values[0, cuts[0, 1:-1]]  # of density p^(1/3) = e^(-x / 3)
    share = torch.arange(1, m, dtype=F64) / m
    whole = 1 - torch.exp(-values.amax() / 3)
    assert (1 - torch.exp(-at / 3) - share * whole).abs().max() < 0.05


def test_a_wide_gap_takes_one_candidate_cut() -> None:
    values = torch.cat([rand(1, 5000) / 10, torch.tensor([[200.0, 500.0]], dtype=F64)], 1)
    cuts = _candidate_cuts(values.sort().values, 1000)[0]
    assert len(cuts.unique()) > 900


@pytest.mark.parametrize("run", [2, 16, 256])
def test_sums_kept_at_some_values_alone_give_those_at_all(run: int) -> None:
    values = torch.cat([rand(2, 5003), rand(1, 5003) ** 5]).sort().values
    index = torch.cat([torch.arange(0, 5004, 7), torch.tensor([256, 5002, 5003])]).expand(3, -1)
    every, some = _at(_prefix(values, 1), index), _at(_prefix(values, run), index)
    torch.testing.assert_close(some, every, rtol=0, atol=1e-11)
    assert torch.equal(_candidate_cuts(values, 1000, run), _candidate_cuts(values, 1000))


@pytest.mark.rare
def test_a_very_long_row_is_solved_as_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat(list(samples(20_000).values()))
    for k in (2, 8):
        long = least_squares_levels(x, k)
        monkeypatch.setattr(kmeans_1d, "_CHUNK", 10_000)
        very_long = least_squares_levels(x, k)
        monkeypatch.undo()
        torch.testing.assert_close(
            squared_error(x, very_long), squared_error(x, long), rtol=1e-4, atol=1e-12
        )


def test_long_rows_are_polished(monkeypatch: pytest.MonkeyPatch) -> None:
    """What 192 candidates alone give is off by more than 0.3 % here."""
    rows = torch.randn(4, 6000, generator=torch.Generator().manual_seed(0), dtype=F64)
    rows = torch.stack([rows[0], rows[1].pow(3), rows[2].abs().log(), rows[3].abs()])
    x = rows / rows.abs().amax(1, keepdim=True)
    least = squared_error(x, least_squares_levels(x, 24, exact_up_to=6000))
    monkeypatch.setattr(kmeans_1d, "_CANDIDATES", 192)
    assert bool((squared_error(x, least_squares_levels(x, 24)) <= 1.001 * least).all())


def test_the_operator_s_fake_and_batching_are_its_own() -> None:
    table = _prefix(rand(5, 12).sort().values, 1).table
    torch.library.opcheck(_cuts_op, (table, 3), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize(("k", "distortion"), [(4, 0.1175), (8, 0.03454), (16, 0.00950)])
def test_a_million_gaussians(k: int, distortion: float) -> None:
    """Max (1960), "Quantizing for minimum distortion", table I."""
    x = torch.randn(1, 1_000_000, generator=torch.Generator().manual_seed(1))
    scale = x.abs().max()
    levels = least_squares_levels(x / scale, k) * scale
    assert levels.dtype == torch.float32
    assert squared_error(x, levels).item() / x.numel() == pytest.approx(distortion, rel=0.01)


@pytest.mark.rare
@BRANCHES
def test_rows_are_independent(limit: int) -> None:
    zeros = torch.zeros(1, LONG, dtype=F64)
    x = torch.cat([rand(9, LONG), rand(9, LONG, seed=1) ** 5, zeros])
    together = least_squares_levels(x, 7, exact_up_to=limit)
    alone = [least_squares_levels(row[None], 7, exact_up_to=limit) for row in x]
    assert torch.equal(together, torch.cat(alone))


def test_chunks_are_independent() -> None:
    x = rand(70, 2000)
    together = least_squares_levels(x, 3)
    assert torch.equal(together, torch.cat([least_squares_levels(row[None], 3) for row in x]))


@BRANCHES
def test_order_of_entries_does_not_matter(limit: int) -> None:
    x = rand(3, LONG)
    shuffled = x[:, torch.randperm(LONG, generator=torch.Generator().manual_seed(0))]
    expected = least_squares_levels(x, 5, exact_up_to=limit)
    assert torch.equal(least_squares_levels(shuffled, 5, exact_up_to=limit), expected)


@BRANCHES
def test_vmap_equals_a_loop(limit: int) -> None:
    x = rand(4, 3, LONG)

    def levels(t: Tensor) -> Tensor:
        return least_squares_levels(t, 6, exact_up_to=limit)

    assert torch.equal(torch.vmap(levels)(x), torch.stack([levels(t) for t in x]))


def test_cuts_by_vmap_over_any_axis() -> None:
    tables = torch.randn(3, 2, 3, 9, dtype=F64).cumsum(-1)
    expected = torch.stack([_best_cuts(table, 3) for table in tables])
    for axis in (0, 1, 2, -1):
        cuts = torch.vmap(lambda t: _best_cuts(t, 3), in_dims=axis)(tables.movedim(0, axis))
        assert torch.equal(cuts, expected)


def test_a_level_has_the_derivative_of_its_run_s_mean() -> None:
    x = torch.tensor([[-1.0, 0.5, -0.8, 0.6, 0.7]], dtype=F64)

    def low(t: Tensor) -> Tensor:
        return least_squares_levels(t, 2)[0, 0]

    expected = torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.0]], dtype=F64)
    torch.testing.assert_close(torch.func.grad(low)(x), expected)
    (slope,) = torch.autograd.grad(low(x.requires_grad_()), x)
    torch.testing.assert_close(slope, expected)


@BRANCHES
@pytest.mark.parametrize("axis", [1, 2])
def test_vmap_takes_any_axis(limit: int, axis: int) -> None:
    x = rand(3, 2, LONG)

    def levels(t: Tensor) -> Tensor:
        return least_squares_levels(t, 3, exact_up_to=limit)

    moved = x.movedim(0, axis)
    assert torch.equal(torch.vmap(levels, in_dims=axis)(moved), torch.stack([*map(levels, x)]))


@pytest.mark.rare
def test_exact_as_far_as_asked() -> None:
    x = rand(1, 5000) ** 3
    _, levels = plain_program(x[0].numpy(), 12)
    found = least_squares_levels(x, 12, exact_up_to=5000)
    np.testing.assert_allclose(found[0].numpy(), levels, atol=1e-11)
    x = samples(20_000)["gaussian"].double()
    least, near = (
        squared_error(x, least_squares_levels(x, 16, exact_up_to=n)).item()
        for n in (20_000, 19_999)
    )
    assert least < near * (1 - 1e-7)


def test_the_program_runs_where_its_table_is() -> None:
    cuts = _dynamic_program(torch.zeros(2, 3, 50, dtype=F64, device="meta"), 4)
    assert cuts.device.type == "meta"
    assert cuts.shape == (2, 5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.rare
@pytest.mark.parametrize(
    ("backend", "n", "k", "limit"),
    sampled([("inductor", 4, 3, LONG), ("aot_eager", 40, 4, LONG), ("aot_eager", LONG, 2, 0)], 1),
)
def test_compiles_whole(backend: str, n: int, k: int, limit: int) -> None:
    x = rand(2, n)

    def levels(t: Tensor) -> Tensor:
        return least_squares_levels(t, k, exact_up_to=limit)

    compiled = torch.compile(levels, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), levels(x), rtol=0, atol=1e-12)


@BRANCHES
def test_float32_follows_float64(limit: int) -> None:
    x = rand(5, LONG).float()
    single = least_squares_levels(x, 8, exact_up_to=limit)
    assert single.dtype == torch.float32
    # same entries, same float64 sums: only the result is rounded
    assert torch.equal(single, least_squares_levels(x.double(), 8, exact_up_to=limit).float())


@pytest.mark.parametrize("n", [1, 2, 3, 60])
def test_more_levels_than_values_reproduces_them(n: int) -> None:
    x = rand(2, n)
    levels = least_squares_levels(x, n + 5)
    assert levels.isfinite().all()
    assert (levels.diff(dim=1) >= 0).all()
    assert torch.equal(squared_error(x, levels), torch.zeros(2, dtype=F64))


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.3])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7), (1, 5000)])
def test_a_constant_row_gives_the_constant(value: float, shape: tuple[int, int]) -> None:
    x = torch.full(shape, value)
    for k in (1, 2, 3, 16):
        assert torch.equal(least_squares_levels(x, k), torch.full((shape[0], k), value))


@BRANCHES
def test_no_more_distinct_values_than_levels_gives_no_error(limit: int) -> None:
    x = (rand(3, LONG) * 10).round() / 10
    levels = least_squares_levels(x, 24, exact_up_to=limit)
    assert squared_error(x, levels).max().item() <= 1e-28


def test_one_level_is_the_mean() -> None:
    x = rand(4, 321)
    torch.testing.assert_close(least_squares_levels(x, 1), x.mean(1, keepdim=True))


def test_an_outlier_on_either_side_costs_no_precision() -> None:
    bulk = rand(1, 200) * 1e-6
    ends = torch.tensor([[-1.0, 1.0]], dtype=F64)
    levels = least_squares_levels(torch.cat((bulk, ends), 1), 7)
    least, _ = plain_program(bulk[0].numpy() * 1e6, 5)
    assert squared_error(bulk, levels).item() * 1e12 == pytest.approx(least, rel=1e-3)


@BRANCHES
def test_input_is_unchanged_and_result_repeats(limit: int) -> None:
    x = rand(3, LONG)
    before = x.clone()
    first = least_squares_levels(x, 5, exact_up_to=limit)
    assert torch.equal(x, before)
    assert torch.equal(first, least_squares_levels(x, 5, exact_up_to=limit))


# Found by attack, each with the input that showed it.


@pytest.mark.slow
def test_long_rows_of_ties_are_within_half_a_percent() -> None:
    """Ties crowd a few values; with too few candidate cuts the rest got none (2% off)."""
    ties = torch.arange(58.0).repeat_interleave(200) * 0.6
    x = torch.cat([ties, 58 * 0.6 + 1 + torch.arange(2000.0)])[None].double()
    x = x / x.max()
    ours, best = (least_squares_levels(x, 128, exact_up_to=n) for n in (4096, x.shape[1]))
    errors = [float((x - pf.proxmaps.hard(x, q)).square().sum()) for q in (ours, best)]
    assert errors[0] <= 1.005 * errors[1]
