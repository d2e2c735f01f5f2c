"""How evaluations print what they found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_accuracy_table(
    console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], path: Path
) -> None:
    """Print a table of numbers and where they are kept."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in heads:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"Kept in {path}", highlight=False, markup=False, soft_wrap=True)


def accuracy_cells(results: dict[str, Any]) -> list[str]:
    """Top-1 with its 95 % interval, and top-5, in per cent."""
    low, high = results["top1_interval_95"]
    top5 = "" if results["top5"] is None else f"{100 * results['top5']:.2f}"
    return [f"{100 * results['top1']:.2f}", f"{100 * low:.1f} to {100 * high:.1f}", top5]
