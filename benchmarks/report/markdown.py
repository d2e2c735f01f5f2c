"""Markdown: tables, numbers in their cells, and the generated parts of a file between markers.

A generated part lies between the invisible lines `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from pipelines.runtime import InputError

DIGITS = 3
_BEGIN = re.compile(r"\s*<!--\s*table:\s*(.*?)\s*-->\s*")
_END = re.compile(r"\s*<!--\s*end\s*-->\s*")


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> list[str]:
    """A table whose first `words` columns are words and whose others are numbers; short rows end in blank cells."""
    rule = ["---"] * words + ["---:"] * (len(heads) - words)
    padded = [[*row, *[""] * (len(heads) - len(row))] for row in rows]
    return [_line(heads), f"|{'|'.join(rule)}|", *map(_line, padded)]


def _line(cells: Sequence[str]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in (cell.replace("|", "\\|") for cell in cells)) + "|"


def significant(value: float | None) -> str:
    """A number with three significant digits and commas between thousands: 1,740, 34.1 and 0.735; blank for None."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    exponent = 0 if value == 0 else int(f"{value:.{DIGITS - 1}e}".partition("e")[2])  # of the rounded number
    decimals = DIGITS - 1 - exponent
    return f"{round(value, decimals):,.{max(0, decimals)}f}" if value else "0"


def with_spread(value: float, spread: Mapping[str, float]) -> str:
    """A median and, if it is of several trials, the smallest and the largest: 348 (271-369), with an en dash."""
    if spread["n"] < 2:
        return significant(value)
    return f"{significant(value)} ({significant(spread['min'])}\N{EN DASH}{significant(spread['max'])})"


def percent(fraction: float) -> str:
    """A fraction in [0, 1] in percent with one decimal."""
    return f"{100 * fraction:.1f} %"


def scientific(value: float) -> str:
    """A small number with one significant digit: 6e-6."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digit, _, exponent = f"{value:.0e}".partition("e")
    return f"{digit}e{int(exponent)}"


def fill(text: str, tables: Mapping[str, Sequence[str]], *, file: str) -> tuple[str, list[str]]:
    """The text with each table's lines between its markers, and the names of the tables that changed.

    Args:
        text: of a Markdown file.
        tables: lines of every table of the file.
        file: its name, for messages.

    Raises:
        InputError: a marker is missing or names no table.
    """
    lines = text.split("\n")
    changed: list[str] = []
    for name, first, last in reversed(_parts(lines, tables, file)):
        wanted = ["", *tables[name], ""]
        if lines[first:last] != wanted:
            changed.insert(0, name)
            lines[first:last] = wanted
    return "\n".join(lines), changed


def _parts(lines: Sequence[str], tables: Mapping[str, Sequence[str]], file: str) -> list[tuple[str, int, int]]:
    """Name, first line and end of every generated part, in their order and without the markers."""
    parts: list[tuple[str, int, int]] = []
    begun: tuple[str, int] | None = None
    for number, line in enumerate([*lines, ""], start=1):
        begin = _BEGIN.fullmatch(line)
        if begun is not None and (begin is not None or number > len(lines)):
            raise InputError(
                f"{file}, line {begun[1]}: the table {begun[0]!r} has no end: put a line <!-- end --> below it."
            )
        if begin is not None:
            if begin[1] not in tables:
                raise InputError(
                    f"{file}, line {number} has a marker of the table {begin[1]!r}, but the tables there are "
                    f"{', '.join(tables)}: correct the name, or remove the marker."
                )
            begun = begin[1], number
        elif _END.fullmatch(line):
            if begun is None:
                raise InputError(
                    f"{file}, line {number} has an <!-- end --> without a table before it: put <!-- table: NAME --> "
                    "above the table, or remove the line."
                )
            parts.append((*begun, number - 1))
            begun = None
    for name in tables.keys() - {name for name, *_ in parts}:
        raise InputError(
            f"{file} has no marker of the table {name!r}: put a line <!-- table: {name} --> and a line "
            "<!-- end --> where it belongs."
        )
    return parts
