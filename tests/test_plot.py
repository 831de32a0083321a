"""Figures hold the operators' own values, and read on white, on black and without colour."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb
from torch import Tensor, nn

import parq_fn as pf
from parq_fn import plot, proxmaps, schedules
from parq_fn.quantizers import relative_error

LEVELS = torch.tensor([-1.0, -0.3, 0.2, 1.0], dtype=torch.float64)
PROX = pf.hard_prox(pf.lsbq(2), granularity=pf.per_channel())
WEIGHTS = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))


def trained() -> tuple[Any, Any, dict[str, Tensor]]:
    params = {"a": WEIGHTS[:, :40].clone(), "bias": torch.ones(2), "b": WEIGHTS[:, 40:60].clone()}
    transform = pf.chain(pf.sgd(0.1), pf.masked(pf.hard_prox(pf.lsbq(1)), ["a", "b"]))
    zeros = {name: torch.zeros_like(p) for name, p in params.items()}
    _, state = transform.update(zeros, transform.init(params), params)
    return transform, state, params


DRAWN: dict[str, Callable[..., Any]] = {
    "proxmap": lambda **o: plot.proxmap(proxmaps.parq, LEVELS, [1.0, 0.5, 0.1], **o),
    "hard": lambda **o: plot.proxmap(proxmaps.hard, LEVELS, **o),
    "one_level": lambda **o: plot.proxmap(proxmaps.hard, [0.5], **o),
    "regularizer": lambda **o: plot.regularizer(proxmaps.parq_regularizer, LEVELS, [1.0, 0.1], **o),
    "schedule": lambda **o: plot.schedule(pf.inverse_slope(5, 40), **o),
    "levels": lambda **o: plot.levels(WEIGHTS[:1], pf.lsbq(2)(WEIGHTS[:1]), **o),
    "latent_vs_weight": lambda **o: plot.latent_vs_weight(*trained(), **o),
    "trajectory": lambda **o: plot.trajectory(
        WEIGHTS, levels=torch.zeros(2, 3), steps=[0, 10], **o
    ),
    "error_vs_bits": lambda **o: plot.error_vs_bits(WEIGHTS, **o),
    "budget": lambda **o: plot.budget(pf.sensitivity(nn.Linear(9, 4), PROX, bits=(1, 2)), **o),
}


@pytest.fixture(autouse=True)
def _no_show(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plt, "show", lambda *_: pytest.fail("show was called"))
    yield
    plt.close("all")


@pytest.mark.parametrize("name", DRAWN)
def test_draws_on_the_axes_given_or_on_new_ones(name: str) -> None:
    _, ax = plt.subplots()
    assert DRAWN[name](ax=ax) is ax
    new = DRAWN[name]()
    assert new is not ax
    for each in (ax, new):
        assert each.get_title()
        assert each.get_xlabel()
        assert each.get_ylabel()
        assert each.patch.get_alpha() == 0


def contrast(one: str, other: str) -> float:
    """The ratio of WCAG 2."""

    def luminance(color: str) -> float:
        r, g, b = (
            c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)
        )
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_and_curves_read_on_white_and_on_black() -> None:
    for ground in ("white", "black"):
        assert contrast(plot.GREY, ground) >= 4.5
        for color in plot.COLORS:
            assert contrast(color, ground) >= 3, (color, ground)


@pytest.mark.parametrize("name", DRAWN)
def test_text_is_grey_and_curves_differ_in_style_too(name: str) -> None:
    ax = DRAWN[name]()
    texts = [ax.title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels()]
    legend = ax.get_legend()
    texts += legend.get_texts() if legend else []
    assert {to_hex(text.get_color()) for text in texts} == {plot.GREY}
    lines = [line for line in ax.lines if not line.get_label().startswith("_")]
    marks = [(str(line.get_linestyle()), str(line.get_marker())) for line in lines]
    assert len(set(marks)) == len(marks)


@pytest.mark.parametrize(
    "map", [proxmaps.parq, proxmaps.soft, proxmaps.binary_relax, proxmaps.proxquant]
)
def test_prox_maps_are_drawn_through_their_values(map: Any) -> None:
    ax = plot.proxmap(map, LEVELS, [0.5, 0.2])
    lines = [line for line in ax.lines if not line.get_label().startswith("_")]
    for c, line in zip((0.5, 0.2), lines, strict=True):
        x, y = (torch.as_tensor(np.asarray(data)) for data in line.get_data())
        known = y.isfinite()
        w = map(x[None], LEVELS[None], torch.tensor(c, dtype=x.dtype))[0]
        assert torch.equal(y[known], w[known])
        assert known.double().mean() > 0.99
        for level in LEVELS:
            assert level in x


def test_a_jump_is_a_gap() -> None:
    (line,) = (a for a in plot.proxmap(proxmaps.hard, LEVELS).lines if a.get_label() == "hard")
    y = torch.as_tensor(np.asarray(line.get_ydata()))
    assert int(y.isnan().sum()) == 3
    assert set(y[y.isfinite()].tolist()) == set(LEVELS.tolist())


@pytest.mark.parametrize("levels", [[-1.0, -1.0, 1.0, 1.0], [-1.0, 0.0, 0.003, 1.0]])
@pytest.mark.parametrize("s", [1.0, 0.5, 0.001])
def test_a_continuous_map_is_drawn_whole_however_close_its_levels(levels: Any, s: float) -> None:
    ax = plot.proxmap(proxmaps.parq, levels, [s])
    (line,) = (a for a in ax.lines if a.get_label().startswith("parq"))
    assert np.isfinite(np.asarray(line.get_ydata())).all()


def test_small_jumps_are_gaps_too() -> None:
    ax = plot.proxmap(proxmaps.binary_relax, LEVELS, 0.01)
    (line,) = (a for a in ax.lines if a.get_label().startswith("binary"))
    assert int(np.isnan(np.asarray(line.get_ydata())).sum()) == 3


def test_each_row_of_levels_has_its_marks_once() -> None:
    def guides(ax: Any) -> int:
        return sum(line.get_label().startswith("_") for line in ax.lines)

    ax = plot.proxmap(proxmaps.hard, LEVELS)
    first = guides(ax)
    assert guides(plot.proxmap(proxmaps.clip, LEVELS, ax=ax)) == first
    assert guides(plot.proxmap(proxmaps.clip, LEVELS + 0.1, ax=ax)) == 2 * first
    _, busy = plt.subplots()
    busy.plot([0, 1], [0, 1], label="other")
    assert guides(plot.proxmap(proxmaps.hard, LEVELS, ax=busy)) == first


def test_other_weights_need_other_axes() -> None:
    ax = plot.levels(WEIGHTS[:1], [0.0])
    with pytest.raises(ValueError, match="hold the histogram of other weights"):
        plot.levels(WEIGHTS[1:], [0.0], ax=ax)


def test_what_needs_a_gradient_or_is_narrow_is_drawn() -> None:
    weight = torch.ones((), requires_grad=True)
    plot.proxmap(lambda u, q: proxmaps.hard(u, q) * weight, LEVELS.bfloat16())
    ax = plot.schedule(lambda step: step.bfloat16() * weight.bfloat16(), 0, 9)
    assert ax.lines[0].get_label() == "<lambda>"
    plot.levels(WEIGHTS[:1].requires_grad_(), [0.0, 1.0])
    WEIGHTS.requires_grad_(False)
    plot.trajectory(WEIGHTS, levels=[[0.0, 1.0], [0.5, 1.0]])


def test_regularizers_are_drawn_where_they_are_finite() -> None:
    ax = plot.regularizer(proxmaps.parq_regularizer, LEVELS, [0.5])
    (line,) = (a for a in ax.lines if a.get_label().startswith("parq"))
    w, h = (torch.as_tensor(np.asarray(data)) for data in line.get_data())
    inside = (w >= -1) & (w <= 1)
    assert torch.equal(h.isfinite(), inside)
    own = proxmaps.parq_regularizer(w[None], LEVELS[None], torch.tensor(0.5, dtype=w.dtype))
    assert torch.equal(h[inside], own[0][inside])


def test_schedules_reach_past_the_last_step_that_they_name() -> None:
    for schedule, end in (
        (pf.inverse_slope(5, 40), 44),
        (schedules.join([schedules.constant(1.0), schedules.linear(1, 0, 0, 10)], [200]), 220),
        (schedules.warmup(schedules.cosine(1, 0, 0, 300), 10), 330),
        (schedules.constant(0.1), 100),
    ):
        (line,) = plot.schedule(schedule).lines
        step, value = (torch.as_tensor(np.asarray(data)) for data in line.get_data())
        assert step[-1] == end
        assert torch.equal(value, schedule(step))
    with pytest.raises(ValueError, match="start < end, got start=9, end=3"):
        plot.schedule(schedules.constant(0.1), 9, 3)


def test_levels_stand_where_they_are_and_tell_their_error() -> None:
    row = WEIGHTS[:1]
    ax = plot.levels(row, pf.lsbq(2)(row), label="greedy")
    plot.levels(row, pf.lloyd_max(2)(row), ax=ax)
    for line, quantizer in zip(ax.lines, (pf.lsbq(2), pf.lloyd_max(2)), strict=True):
        x = torch.as_tensor(np.asarray(line.get_xdata()))
        torch.testing.assert_close(x, quantizer(row.double())[0])
        assert f"{100 * relative_error(row, quantizer):.2f} %" in line.get_label()
    area = sum(patch.get_width() * patch.get_height() for patch in ax.patches)
    assert area == pytest.approx(1.0)


def test_latents_against_weights_a_mark_a_layer() -> None:
    transform, state, params = trained()
    ax = plot.latent_vs_weight(transform, state, params)
    weights = transform.weights(state, params)
    lines = {line.get_label(): line for line in ax.lines if line.get_label()[0] != "_"}
    assert set(lines) == {"a", "b"}
    for name, line in lines.items():
        u, order = params[name].flatten().sort()
        assert np.array_equal(line.get_xdata(), u.double().numpy())
        assert np.array_equal(line.get_ydata(), weights[name].flatten()[order].double().numpy())
    with pytest.raises(KeyError, match=r"no leaves named .*'c'.* the leaves are: a, b, bias"):
        plot.latent_vs_weight(transform, state, params, names=["c"])


def test_trajectories_and_errors() -> None:
    history = [WEIGHTS[0], WEIGHTS[1]]
    lines = plot.trajectory(history, steps=[3, 7], count=1000).lines
    ends = torch.tensor([line.get_ydata()[-1] for line in lines if len(line.get_ydata())])
    assert len(ends) == 300
    assert torch.equal(ends, WEIGHTS[1].double().sort().values.to(ends))
    with pytest.raises(ValueError, match="history has 2 rows, steps 3"):
        plot.trajectory(history, steps=[1, 2, 3])
    (line,) = plot.error_vs_bits(WEIGHTS, {"greedy": pf.lsbq}, bits=(1, 3)).lines
    assert list(line.get_ydata()) == [relative_error(WEIGHTS, pf.lsbq(b)) for b in (1, 3)]


def test_levels_of_several_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one row of levels, .* got shape \(2, 4\)"):
        plot.proxmap(proxmaps.hard, torch.ones(2, 4))


@pytest.mark.slow
def test_the_same_figure_gives_the_same_files(tmp_path: Path) -> None:
    kept = []
    for _ in range(2):
        files = plot.save(DRAWN["proxmap"](), tmp_path / "figure")
        assert [file.suffix for file in files] == [".svg", ".png"]
        kept.append([file.read_bytes() for file in files])
    assert kept[0] == kept[1]


@pytest.mark.rare
def test_matplotlib_is_imported_when_something_is_drawn_and_asked_for_by_name() -> None:
    code = """
import sys
import parq_fn as pf
from parq_fn import plot, display
pf.lsbq(2)._repr_html_()
assert "matplotlib" not in sys.modules
sys.modules["matplotlib"] = sys.modules["matplotlib.figure"] = None
try:
    plot.schedule(pf.inverse_slope(0, 9))
except ImportError as error:
    assert "pip install 'parq_fn[examples]'" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
