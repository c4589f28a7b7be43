"""Text tables with aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1, totals: int = 0) -> str:
    """Align the cells of `rows` in columns, with a ruler below the first row, the head.

    >>> print(aligned([["model", "MB"], ["mlp", "0.1"], ["vit", "12.5"], ["both", "12.6"]], totals=1))
    model    MB
    -----------
    mlp     0.1
    vit    12.5
    -----------
    both   12.6

    Args:
        rows: the head, then the body; every row has the same number of cells. Widths are counted in characters.
        left: the number of columns that are aligned left; the others are aligned right.
        totals: the number of rows at the end that a second ruler separates from the body.

    Returns: the lines joined by newlines, all of the same length; "" for no rows.

    Raises: ValueError if the rows differ in the number of cells.
    """
    if not rows:
        return ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [cell.ljust(width) for cell, width in zip(row[:left], widths, strict=False)]
        numbers = [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(words + numbers))
    ruler = "-" * len(lines[0])
    lines.insert(1, ruler)
    if totals:
        lines.insert(-totals, ruler)
    return "\n".join(lines)
