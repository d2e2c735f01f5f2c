"""Generated parts of a Markdown file, between the invisible lines `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.runtime import InputError

_BEGIN = re.compile(r"\s*<!--\s*table:\s*(.*?)\s*-->\s*")
_END = re.compile(r"\s*<!--\s*end\s*-->\s*")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One generated part.

    Attributes:
        name: of the table.
        first, last: its lines are lines[first:last], without the markers.
    """

    name: str
    first: int
    last: int


def fill(text: str, tables: Mapping[str, Sequence[str]], *, file: str) -> str:
    """The text with each table's lines between its markers, and a blank line to each side of them.

    Args:
        text: of a Markdown file.
        tables: lines of every table that the file has.
        file: its name, for messages.

    Raises:
        InputError: a marker is missing, or names a table that there is not.
    """
    lines = text.split("\n")
    for block in reversed(_blocks(lines, tables, file)):
        lines[block.first : block.last] = ["", *tables[block.name], ""]
    return "\n".join(lines)


def stale(text: str, tables: Mapping[str, Sequence[str]], *, file: str) -> list[str]:
    """Names of the tables that `fill` would change; arguments and errors are its own."""
    lines = text.split("\n")
    blocks = _blocks(lines, tables, file)
    return [block.name for block in blocks if lines[block.first : block.last] != ["", *tables[block.name], ""]]


def _blocks(lines: Sequence[str], tables: Mapping[str, Sequence[str]], file: str) -> list[Block]:
    """The generated parts in their order, after a check that every table has one and that each has both markers."""
    blocks: list[Block] = []
    begun: tuple[str, int] | None = None
    for number, line in enumerate(lines, start=1):
        begin = _BEGIN.fullmatch(line)
        if begun is not None and begin is not None:
            raise _no_end(file, *begun)
        if begin is not None:
            if begin[1] not in tables:
                raise InputError(
                    f"{file}, line {number} has a marker of the table {begin[1]!r}, but the tables there are "
                    f"{', '.join(tables)}: correct the name, or take the marker out."
                )
            begun = begin[1], number
        elif _END.fullmatch(line):
            if begun is None:
                raise InputError(
                    f"{file}, line {number} has an <!-- end --> without a table before it: put <!-- table: NAME --> "
                    "above the table, or take the line out."
                )
            blocks.append(Block(name=begun[0], first=begun[1], last=number - 1))
            begun = None
    if begun is not None:
        raise _no_end(file, *begun)
    for name in tables:
        if name not in {block.name for block in blocks}:
            raise InputError(
                f"{file} has no marker of the table {name!r}: put a line <!-- table: {name} --> and a line "
                "<!-- end --> where it belongs."
            )
    return blocks


def _no_end(file: str, name: str, number: int) -> InputError:
    return InputError(f"{file}, line {number}: the table {name!r} has no end: put a line <!-- end --> below it.")
