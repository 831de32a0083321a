"""Rows of cells as text in columns."""

from __future__ import annotations

from collections.abc import Container, Sequence


def columns(rows: Sequence[Sequence[str]], left: Container[int]) -> str:
    """The cells of rows of one length, each column as wide as its widest cell.

    left: the places of columns whose cells begin at the left; those of others end at the right.

    >>> print(columns([("name", "count"), ("a", "12")], {0}))
    name  count
    a        12
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i in left else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
