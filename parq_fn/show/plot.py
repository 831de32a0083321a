"""Figures: what the operators do, and what training did.

Each function draws on the Axes it is given, or on new ones, and returns them; none calls show.
Called again on the same Axes it adds a curve in the next colour and line style, of which there
are five, so that so many curves are told apart without colour. Text and axes are of a grey that
reads on white and on black, and the background is left clear.

matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from parq_fn.allocation import allocate, check_table
from parq_fn.foundation.tree import names_of, tree_leaves
from parq_fn.foundation.value import show
from parq_fn.proxmaps.levels import nearest
from parq_fn.quantizers import Quantizer, lloyd_max, lsbq, relative_error, uniform
from parq_fn.sensitivities import Sensitivity, cost_of
from parq_fn.show.axes import COLORS as COLORS
from parq_fn.show.axes import GREY as GREY
from parq_fn.show.axes import MARKERS as MARKERS
from parq_fn.show.axes import STYLES as STYLES
from parq_fn.show.axes import dressed as dressed
from parq_fn.show.axes import new_axes, next_style
from parq_fn.show.axes import save as save
from parq_fn.show.display import horizon
from parq_fn.transforms.transformation import Transformation

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def _row(levels: Tensor | Sequence[float]) -> Tensor:
    """One row of levels, [1, k] in float64."""
    q = _plain(torch.as_tensor(levels))
    if q.dim() == 2 and len(q) == 1:
        q = q[0]
    if q.dim() != 1 or not len(q):
        raise ValueError(f"expected one row of levels, [k] or [1, k], got shape {tuple(q.shape)}")
    return q[None].sort().values


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to(device="cpu", dtype=torch.float64)


def _around(q: Tensor, points: int) -> Tensor:
    """[1, points] weights with room at both ends: levels, midpoints and what follows these."""
    room = max(0.35 * float(q.max() - q.min()), 0.5 * float(q.abs().max()), 1e-6)
    even = torch.linspace(float(q.min()) - room, float(q.max()) + room, points, dtype=q.dtype)
    middles = 0.5 * q[0, 1:] + 0.5 * q[0, :-1]
    after = middles.nextafter(torch.tensor(torch.inf, dtype=q.dtype))
    return torch.cat([even, q[0], middles, after]).sort().values[None]


def _curves(
    ax: Axes,
    function: Callable[..., Tensor],
    x: Tensor,
    q: Tensor,
    coefficients: float | Sequence[float] | None,
    symbol: str,
) -> None:
    name = show(function)
    if coefficients is not None and not isinstance(coefficients, Sequence):
        coefficients = [float(coefficients)]
    for coefficient in [None] if coefficients is None else coefficients:
        color, style, _ = next_style(ax)
        if coefficient is None:
            y, label = function(x, q), name
        else:
            given = torch.tensor(float(coefficient), dtype=q.dtype)
            y, label = function(x, q, given), f"{name}, {symbol} = {coefficient:g}"
        ax.plot(*_with_gaps(x[0], _plain(y)[0]), color=color, ls=style, lw=1.8, label=label)


def _with_gaps(x: Tensor, y: Tensor) -> tuple[Any, Any]:
    """x and y with NaN where y jumps between neighbouring floats: a line would pretend a slope."""
    span = float(y[y.isfinite()].max() - y[y.isfinite()].min()) if y.isfinite().any() else 0.0
    close = x.diff() <= 4 * torch.finfo(x.dtype).eps * x.abs().max()
    jumps = (close & (y.diff().abs() > 1e-6 * span)).nonzero().flatten() + 1
    parts_x, parts_y = x.tensor_split(jumps), y.tensor_split(jumps)
    nan = torch.full((1,), torch.nan, dtype=x.dtype)
    joined = [torch.cat([part for p in parts for part in (p, nan)]) for parts in (parts_x, parts_y)]
    return joined[0][:-1].numpy(), joined[1][:-1].numpy()


def _guides(ax: Axes, q: Tensor, draw: Callable[[], None]) -> None:
    """Draws the marks of a row of levels once an Axes."""
    drawn: list[list[float]] = ax.__dict__.setdefault("_parq_fn_levels", [])
    if q[0].tolist() not in drawn:
        drawn.append(q[0].tolist())
        draw()


def proxmap(
    map: Callable[..., Tensor],
    levels: Tensor | Sequence[float],
    coefficients: float | Sequence[float] | None = None,
    *,
    symbol: str = "coefficient",
    points: int = 2001,
    ax: Axes | None = None,
) -> Axes:
    """The curves w = map(u, levels, c), one for each coefficient c.

    map: a prox map.
    levels: one row, [k] or [1, k]; they are drawn as horizontal lines, midpoints between them as
    ticks on top, the identity as a thin line.
    coefficients: a number or several; None for a map that takes none, such as hard.
    symbol: of the coefficient, for the legend.
    points: of each curve.
    ax: matplotlib's Axes to draw on; new ones by default.

    >>> from parq_fn import plot, proxmaps
    >>> plot.proxmap(proxmaps.parq, [-1.0, 0.0, 1.0], [1.0, 0.5, 0.1]).get_xlabel()
    'latent weight u'
    """
    q = _row(levels)
    ax = new_axes() if ax is None else ax
    x = _around(q, points)

    def guides() -> None:
        ax.plot(x[0], x[0], color=GREY, lw=0.7, alpha=0.7)
        for level in q[0]:
            ax.axhline(float(level), color=GREY, lw=0.5, alpha=0.5)
        middles = (0.5 * q[0, 1:] + 0.5 * q[0, :-1]).tolist()
        ax.plot(middles, [1] * len(middles), "|", color=GREY, transform=ax.get_xaxis_transform())

    _guides(ax, q, guides)
    _curves(ax, map, x, q, coefficients, symbol)
    return dressed(ax, "Prox map", "latent weight u", "weight w")


def regularizer(
    function: Callable[..., Tensor],
    levels: Tensor | Sequence[float],
    coefficients: float | Sequence[float] | None = None,
    *,
    symbol: str = "coefficient",
    points: int = 2001,
    ax: Axes | None = None,
) -> Axes:
    """The curves h(w; levels, c) of a regularizer, one for each coefficient c; levels as ticks.

    Where it is infinite nothing is drawn.
    """
    q = _row(levels)
    ax = new_axes() if ax is None else ax

    def guides() -> None:
        ends = [0.0] * q.shape[1]
        ax.plot(q[0], ends, "|", color=GREY, ms=10, transform=ax.get_xaxis_transform())

    def finite(w: Tensor, *rest: Tensor) -> Tensor:
        value = function(w, *rest)
        return torch.where(value.isfinite(), value, torch.nan)

    finite.__name__ = show(function).removesuffix("_regularizer")
    _guides(ax, q, guides)
    _curves(ax, finite, _around(q, points), q, coefficients, symbol)
    return dressed(ax, "Regularizer", "weight w", "h(w)")


def schedule(
    schedule: Callable[[Tensor], Tensor],
    start: int = 0,
    end: int | None = None,
    *,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A schedule's value at the steps from start to end, by default past the last it names.

    >>> from parq_fn import inverse_slope, plot
    >>> ax = plot.schedule(inverse_slope(10, 50), label="steepness 10")
    >>> plot.schedule(inverse_slope(10, 50, 40.0), label="steepness 40", ax=ax) is ax
    True
    """
    end = horizon(schedule) if end is None else end
    if end <= start:
        raise ValueError(f"expected start < end, got start={start}, end={end}")
    ax = new_axes() if ax is None else ax
    color, style, _ = next_style(ax)
    step = torch.arange(start, end + 1)
    value = _plain(torch.as_tensor(schedule(step))).expand(step.shape)
    name = show(schedule) if label is None else label
    ax.plot(step.numpy(), value.numpy(), color=color, ls=style, lw=1.8, label=name)
    return dressed(ax, "Schedule", "step", "value")


def levels(
    weights: Tensor,
    levels: Tensor | Sequence[float],
    *,
    bins: int = 120,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """The histogram of weights, as a density, with their levels, whose heights are in proportion
    to the share of weights next to them, and the relative squared error of rounding.

    levels: one row, [k] or [1, k].
    bins: of the histogram.
    label: of these levels, for the legend.
    ax: matplotlib's Axes to draw on; new ones by default.
    weights: of one row, any shape. Called again on its Axes, with the same weights, it adds
    other levels at the same scale; ValueError for other weights.
    """
    q = _row(levels)
    x = _plain(weights).reshape(1, -1)
    ax = new_axes() if ax is None else ax
    color, style, marker = next_style(ax)
    rounded = nearest(x, q)
    error = float((x - rounded).square().sum() / x.square().sum())
    share = (rounded[0, :, None] == q[0]).to(x.dtype).mean(0)
    if "_parq_fn_histogram" not in ax.__dict__:
        density: Any = ax.hist(x[0].numpy(), bins=bins, density=True, color=GREY, alpha=0.35)[0]
        ax.__dict__["_parq_fn_histogram"] = x, float(density.max()) / float(share.max())
    drawn, scale = ax.__dict__["_parq_fn_histogram"]
    if not torch.equal(drawn, x):
        raise ValueError("these Axes hold the histogram of other weights; draw on new ones")
    height = scale * share.numpy()
    text = f"{'levels' if label is None else label}, error {100 * error:.2f} %"
    size = max(4, 11 - 3 * len(ax.get_legend_handles_labels()[1]))  # later ones lie inside
    ax.vlines(q[0].numpy(), 0, height, color=color, ls=style, lw=1.4)
    ax.plot(q[0].numpy(), height, marker, color=color, mfc="none", mew=1.6, ms=size, label=text)
    return dressed(ax, "Levels", "weight", "density")


def latent_vs_weight(
    transformation: Transformation,
    state: Any,
    params: Any,
    *,
    names: Sequence[str] | None = None,
    points: int = 2000,
    ax: Axes | None = None,
) -> Axes:
    """Each weight against its latent, a mark a layer; on the identity nothing is quantized yet.

    transformation, state, params: of the training; params are the latent weights.
    names: of the leaves, by default the first five matrices and kernels, or vectors if there are
    none.
    points: a layer of more weights is drawn at evenly spaced places of its sorted latent.
    ax: matplotlib's Axes to draw on; new ones by default.
    Raises KeyError for an unknown name.
    """
    latents = dict(zip(names_of(params), tree_leaves(params), strict=True))
    weights = dict(zip(latents, tree_leaves(transformation.weights(state, params)), strict=True))
    if names is None:
        matrices = [name for name, leaf in latents.items() if leaf.dim() > 1]
        names = (matrices or list(latents))[: len(MARKERS)]
    unknown = [name for name in names if name not in latents]
    if unknown:
        raise KeyError(f"no leaves named {unknown}; the leaves are: {', '.join(latents)}")
    ax = new_axes() if ax is None else ax
    for name in names:
        color, _, marker = next_style(ax)
        u = _plain(latents[name]).flatten()
        order = u.argsort()
        order = order[torch.linspace(0, len(order) - 1, min(points, len(order))).round().long()]
        w = _plain(weights[name]).flatten()
        places = u[order].numpy(), w[order].numpy()
        ax.plot(*places, marker, color=color, ms=3, alpha=0.7, mew=0, label=name)
    ends = ax.get_xlim()
    ax.plot(ends, ends, color=GREY, lw=0.7, alpha=0.7)
    return dressed(ax, "Latents and weights", "latent weight u", "weight w")


def trajectory(
    history: Tensor | Sequence[Tensor],
    *,
    steps: Sequence[int] | None = None,
    levels: Tensor | Sequence[Any] | None = None,
    count: int = 60,
    ax: Axes | None = None,
) -> Axes:
    """Weights over time, each a line; with levels those too.

    history: [t, n], or t tensors of one shape.
    count: of many weights so many are drawn, evenly spaced in their last order.
    steps: of the rows, 0 to t - 1 by default.
    levels: [t, k], t rows of levels, or one row [k] for all times.
    ax: matplotlib's Axes to draw on; new ones by default.
    """
    rows = torch.stack([_plain(row).flatten() for row in history])
    time = list(range(len(rows))) if steps is None else list(steps)
    if len(time) != len(rows):
        raise ValueError(f"history has {len(rows)} rows, steps {len(time)}")
    order = rows[-1].argsort()
    order = order[torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()]
    ax = new_axes() if ax is None else ax
    color, _, _ = next_style(ax)
    ax.plot(time, rows[:, order].numpy(), color=color, lw=0.7, alpha=0.6)
    ax.plot([], [], color=color, lw=0.7, label="weights")
    if levels is not None:
        color, style, _ = next_style(ax)
        given = [_plain(torch.as_tensor(row)).flatten() for row in levels]
        same = all(row.numel() == 1 for row in given) and len(given) != len(rows)
        q = torch.cat(given).expand(len(rows), -1) if same else torch.stack(given)
        ax.plot(time, q.numpy(), color=color, lw=1.4, ls=style)
        ax.plot([], [], color=color, lw=1.4, ls=style, label="levels")
    return dressed(ax, "Weights over time", "step", "weight w")


_QUANTIZERS: dict[str, Callable[[int], Quantizer]] = {
    "uniform": uniform,
    "greedy LSBQ": lsbq,
    "alternating LSBQ": lambda bits: lsbq(bits, "alternating"),
    "Lloyd-Max": lloyd_max,
}


def error_vs_bits(
    weights: Tensor,
    quantizers: Mapping[str, Callable[[int], Quantizer]] | None = None,
    *,
    bits: Sequence[int] = (1, 2, 3, 4),
    ax: Axes | None = None,
) -> Axes:
    """The relative squared error of rounding to the levels of quantizers, by bits.

    weights: rows [r, n], or anything that is taken as one row.
    quantizers: {label: bits -> quantizer}; by default uniform, two of LSBQ, and Lloyd-Max.
    bits: of which the error is drawn.
    ax: matplotlib's Axes to draw on; new ones by default.
    """
    x = _plain(weights)
    x = x if x.dim() == 2 else x.reshape(1, -1)
    ax = new_axes() if ax is None else ax
    for name, of_bits in (_QUANTIZERS if quantizers is None else quantizers).items():
        color, style, marker = next_style(ax)
        errors = [relative_error(x, of_bits(b)) for b in bits]
        ax.plot(list(bits), errors, color=color, ls=style, marker=marker, lw=1.6, label=name)
    ax.set_yscale("log")
    ax.set_xticks(list(bits))
    return dressed(ax, "Error of rounding", "bits", "relative squared error")


def budget(
    table: Sensitivity,
    bits_per_weight: Sequence[float] | None = None,
    *,
    ax: Axes | None = None,
) -> Axes:
    """The least cost by bits a weight, as `allocate` finds it, beside the same bits for all.

    table: what `sensitivity` gives.
    bits_per_weight: at which the curve is found; by default 25 from the least to the most.
    ax: matplotlib's Axes to draw on; new ones by default.
    """
    check_table("budget", table)
    numel = sum(table.numel.values()) or 1
    alike: dict[int, tuple[float, float]] = {}
    for bits in [cost.bits for cost in next(iter(table.values()))]:
        own = [cost for costs in table.values() for cost in costs if cost.bits == bits]
        if len(own) == len(table):
            alike[bits] = (
                sum(cost.size for cost in own) / numel,
                sum(cost_of(name, c, table) for name, c in zip(table, own, strict=True)),
            )
    if bits_per_weight is None:
        ends = [[cost.size for cost in costs] for costs in table.values()]
        low, high = (sum(map(end, ends)) / numel for end in (min, max))
        bits_per_weight = [*(low + (high - low) * i / 24 for i in range(24)), high]
    found = [allocate(table, b) for b in bits_per_weight]
    ax = new_axes() if ax is None else ax
    color, style, _ = next_style(ax)
    x, y = [own.bits_per_weight for own in found], [own.cost for own in found]
    ax.plot(
        x, y, color=color, ls=style, lw=1.6, drawstyle="steps-post", label="bits where they matter"
    )
    color, _, marker = next_style(ax)
    x, y = (list(column) for column in zip(*alike.values(), strict=True)) if alike else ([], [])
    ax.plot(x, y, color=color, ls="", marker=marker, label="the same bits for all")
    asked = next(iter(table.values()))[0].change is not None
    what = "change of the loss, summed" if asked else "relative error, times weights"
    return dressed(ax, "What bits cost", "bits a weight, with the numbers of rows", what)
