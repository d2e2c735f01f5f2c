"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    """A table whose first `words` columns are words and whose others are numbers; short rows end in blank cells."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    padded = [[*row, *[""] * (len(heads) - len(row))] for row in rows]
    return [_line(heads), f"|{'|'.join(rule)}|", *map(_line, padded)]


def _line(cells: Sequence[str]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in (cell.replace("|", "\\|") for cell in cells)) + "|"
