"""What values and states show in a notebook, and states in a terminal.

Values are shown as the call that made them, with small pictures: a schedule its curve, a
quantizer its levels on the normal distribution, a prox link its coefficient over time and its
map. Pictures take the colour of the text around them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import singledispatch
from html import escape
from typing import Any

import optree
import torch
from torch import Tensor

from parq_fn.foundation.columns import columns
from parq_fn.foundation.scalar import is_number
from parq_fn.foundation.value import show, shown_by
from parq_fn.quantizers import Quantizer
from parq_fn.schedules import Schedule
from parq_fn.transforms.chain import Composite
from parq_fn.transforms.prox_link import Prox
from parq_fn.transforms.transformation import children_of

WIDTH, HEIGHT, EDGE = 220, 90, 14


@shown_by
def html(shown: Any) -> str:
    """A value or state as HTML: `html_of` or `table`."""
    return table(shown)._repr_html_() if isinstance(shown, tuple) else html_of(shown)


def html_of(value: Any) -> str:
    """A value as HTML: its call, its pictures, and what it is made of."""
    return f'<div style="line-height:1.5"><code>{escape(show(value))}</code>{_inside(value)}</div>'


def _inside(value: Any) -> str:
    pictures = "".join(_drawn(value))
    parts = "".join(
        f"<li><code>{escape(name)}</code> {html_of(part)}</li>"
        for name, part in parts_of(value).items()
    )
    below = f'<ul style="margin:0">{parts}</ul>' if parts else ""
    return (f"<div>{pictures}</div>" if pictures else "") + below


def _drawn(value: Any) -> list[str]:
    try:
        return list(pictures_of(value))
    except Exception:  # a value of the user's own must show itself, whatever its methods do
        return []


def parts_of(value: Any) -> dict[str, Any]:
    """The transformations that one is made of, by name; a Composite is shown by its call alone."""
    return {} if isinstance(value, Composite) else children_of(value)


@singledispatch
def pictures_of(value: Any) -> Iterator[str]:
    """The pictures of a value, as SVG; none of most."""
    del value
    yield from ()


@pictures_of.register
def _(value: Schedule) -> Iterator[str]:
    step = _steps_to(horizon(value))
    yield curve(step, value(step), "step", "value")


@pictures_of.register
def _(value: Quantizer) -> Iterator[str]:
    sample = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    x = torch.linspace(-3, 3, 121)
    density = (-x.square() / 2).exp() / (2 * torch.pi) ** 0.5
    ticks = value(sample[None])[0].tolist()
    yield curve(x, density, "weight", "levels on N(0, 1)", ticks)


@pictures_of.register
def _(value: Prox) -> Iterator[str]:
    end = horizon(value)
    step = _steps_to(end)
    coefficients = torch.stack([value.coefficient(t) for t in step]).double()
    finite = coefficients[coefficients.isfinite()]
    changes = len(finite) > 1 and bool((finite != finite[0]).any())
    if changes:
        yield curve(step, coefficients, "step", "coefficient")
    levels = torch.linspace(-1.0, 1.0, 4, dtype=torch.float64)[None]
    u = torch.linspace(-1.4, 1.4, 141, dtype=torch.float64)[None]
    begin = min(_steps_of(value), default=0.0)
    middle = int(begin + 0.6 * (end / 1.1 - begin)) if changes else 0
    w = value.proxmap(u, levels, value.coefficient(torch.tensor(middle)))[0]
    name = f"w at step {middle}" if changes else "w"
    yield curve(u[0], w, "u", name, ticks=levels[0].tolist(), jumps=True)


def _steps_to(end: int) -> Tensor:
    return torch.tensor(sorted({round(i * end / 110) for i in range(111)}))


def horizon(schedule: Any) -> int:
    """A step somewhat past the last that a schedule or prox link names; 100 where it names none.

    >>> from parq_fn.schedules import linear
    >>> horizon(linear(1.0, 0.0, 10, 200))
    220
    """
    named = list(_steps_of(schedule))
    return max(1, int(1.1 * max(named))) if named else 100


_STEPS = ("anneal_start", "anneal_end", "start_step", "end_step", "boundaries", "steps")


def _steps_of(value: Any) -> Iterator[float]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _steps_of(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            got = getattr(value, field.name)
            if field.name in _STEPS:
                yield from (float(v) for v in torch.as_tensor(got).flatten())
            elif not is_number(got):
                yield from _steps_of(got)


def curve(
    x: Tensor,
    y: Tensor,
    x_name: str,
    y_name: str,
    ticks: Sequence[float] = (),
    jumps: bool = False,
) -> str:
    """y over x as a small SVG: the ends of both axes as numbers, ticks on the lower edge; with
    jumps the curve is broken at them."""
    x, y = x.double(), y.double().expand(x.shape)
    finite = y.isfinite()
    if not finite.any():
        return ""
    low, high = float(y[finite].min()), float(y[finite].max())
    left, right = float(x.min()), float(x.max())
    across, up = WIDTH - 2 * EDGE, HEIGHT - 2 * EDGE - 10

    def place(a: float, b: float) -> tuple[float, float]:
        h = (a - left) / (right - left or 1.0)
        v = (b - low) / (high - low or 1.0)
        return EDGE + across * h, EDGE + up * (1 - v)

    runs: list[list[str]] = [[]]
    last: float | None = None
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        jump = jumps and last is not None and abs(b - last) > 0.12 * (high - low)
        if b != b or abs(b) == float("inf") or jump:
            runs.append([])
        if abs(b) < float("inf"):
            runs[-1].append("{:.1f},{:.1f}".format(*place(a, b)))
            last = b
    lines = "".join(
        f'<polyline points="{" ".join(run)}" fill="none" stroke="currentColor" stroke-width="1.6"/>'
        for run in runs
        if len(run) > 1
    )
    base = EDGE + up + 3
    marks = "".join(
        f'<line x1="{h:.1f}" x2="{h:.1f}" y1="{base - 5}" y2="{base + 2}" stroke="#D55E00"'
        ' stroke-width="2"/>'
        for h, _ in (place(tick, low) for tick in ticks if left <= tick <= right)
    )
    return (
        f'<svg role="img" aria-label="{escape(y_name)} over {escape(x_name)}" width="{WIDTH}"'
        f' height="{HEIGHT}" font-size="9" fill="currentColor">'
        f'<text x="{EDGE}" y="9">{escape(y_name)}: {low:.3g} to {high:.3g}</text>{lines}{marks}'
        f'<text x="{EDGE}" y="{HEIGHT - 3}">{left:.4g}</text>'
        f'<text x="{WIDTH // 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x_name)}</text>'
        f'<text x="{WIDTH - EDGE}" y="{HEIGHT - 3}" text-anchor="end">{right:.4g}</text></svg>'
    )


# States


class StateTable:
    """A state as a table, a row a tensor; prints in a terminal, shows in a notebook.

    rows: (path, shape, dtype, range of values) of each tensor.
    """

    def __init__(self, rows: list[tuple[str, str, str, str]]) -> None:
        self.rows = rows

    def __repr__(self) -> str:
        rows = [("state", "shape", "dtype", "value"), *self.rows]
        return columns(rows, range(4))

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("state", "shape", "dtype", "value"))
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def table(state: Any) -> StateTable:
    """The tensors of a state, each by the path to it, with its range.

    >>> from parq_fn import hard_prox, lsbq
    >>> table(hard_prox(lsbq(1)).init({"w": torch.ones(2, 3)}))
    state      shape  dtype    value
    count      []     int64    0
    slope      []     float64  0
    lr_sum     []     float64  0
    qparams.w  [1]    float32  0 .. 0
    """
    rows = []
    for accessor, leaf in zip(optree.tree_accessors(state), optree.tree_leaves(state), strict=True):
        path = ".".join(str(getattr(entry, "field", entry.entry)) for entry in accessor)
        kind = str(getattr(leaf, "dtype", type(leaf).__name__)).removeprefix("torch.")
        rows.append((path, str(list(getattr(leaf, "shape", []))), kind, _range(leaf)))
    return StateTable(rows)


def _range(leaf: Any) -> str:
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    if not leaf.numel():
        return "empty"
    if leaf.is_meta or leaf.is_complex() or leaf.layout != torch.strided:
        return "-"
    values = leaf.detach()
    known = values[~values.isnan()] if leaf.is_floating_point() else values
    odd = f", {values.numel() - known.numel()} NaN" if known.numel() < values.numel() else ""
    if not known.numel():
        return odd.removeprefix(", ")
    low, high = (_number(known.min()), _number(known.max()))
    return (low if leaf.dim() == 0 else f"{low} .. {high}") + odd


def _number(value: Tensor) -> str:
    return f"{float(value):.6g}" if value.is_floating_point() else str(value.item())
