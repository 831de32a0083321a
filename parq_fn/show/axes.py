"""Axes in one style, and how their figures are saved.

Text and axes are of a grey that reads on white and on black, and the background is left clear.
matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY = "#767676"  # 4.5 : 1 on white, 4.6 : 1 on black
#: Curves: colours that colour-blind readers tell apart (Okabe and Ito; the last from ColorBrewer),
#: at 3 : 1 or more on white and on black, each with a line style of its own.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#B65F93", "#A6761D")
STYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = "osD^v"


def new_axes() -> Axes:
    try:
        from matplotlib.figure import Figure
        from matplotlib.pyplot import subplots
    except ImportError:
        raise ImportError("plots need matplotlib: pip install 'parq_fn[examples]'") from None
    figure: Figure
    figure, ax = subplots(figsize=(6.4, 3.8), layout="constrained")
    figure.patch.set_alpha(0)
    return ax


def dressed(ax: Axes, title: str | None = None, x: str = "", y: str = "") -> Axes:
    """Axes of your own in the style of the others, with a title and labels where they have none."""
    ax.patch.set_alpha(0)
    if title is not None and not ax.get_title():
        ax.set_title(title, fontsize="medium")
    ax.title.set_color(GREY)
    if not ax.get_xlabel():
        ax.set_xlabel(x)
    if not ax.get_ylabel():
        ax.set_ylabel(y)
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set_color(GREY)
    ax.tick_params(colors=GREY, which="both")
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)
    if len(ax.get_legend_handles_labels()[1]):
        ax.legend(frameon=False, labelcolor=GREY, fontsize="small", handlelength=3.2)
    return ax


def next_style(ax: Axes) -> tuple[str, Any, str]:
    """Colour, line style and marker of the next labelled curve."""
    i = len(ax.get_legend_handles_labels()[1])
    turn = i // len(COLORS)  # then the styles meet other colours
    return COLORS[i % len(COLORS)], STYLES[(i + turn) % len(STYLES)], MARKERS[i % len(MARKERS)]


def save(ax: Axes, stem: str | Path, formats: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Saves the figure of the Axes as stem.svg and stem.png; the files made.

    The same figure gives the same bytes.
    """
    from matplotlib import rc_context

    made = []
    with rc_context({"svg.hashsalt": "parq_fn", "svg.fonttype": "path"}):
        for form in formats:
            made.append(Path(f"{stem}.{form}"))
            meta = {"Date": None} if form == "svg" else {}
            figure: Any = ax.figure
            figure.savefig(made[-1], dpi=160, transparent=True, metadata=meta)
    return made
