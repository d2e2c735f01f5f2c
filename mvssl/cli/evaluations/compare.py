"""mvssl-eval compare: several runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from mvssl.evaluate.compare import plot, summarise
from pipelines.runtime import InputError


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Results and curves of several runs, as a table and a plot.

    Attributes:
        runs: run folders, or folders of results (--out of mvssl-eval).
        out: the picture to write; one that is there is replaced.
    """

    runs: tyro.conf.Positional[tuple[Path, ...]]
    out: Path = Path("compare.png")

    def __post_init__(self) -> None:
        if not self.runs:
            raise InputError("runs are missing: name one or more run folders.")
        if self.out.suffix != ".png":
            raise InputError(f"out is {str(self.out)!r} but must end in .png: the plot is a picture of that kind.")


def run(arguments: Sequence[str]) -> None:
    """Print the table and draw the plot."""
    asked = tyro.cli(CompareArguments, prog="mvssl-eval compare", args=list(arguments))
    summaries = [summary for path in asked.runs for summary in summarise(path)]
    console = Console()
    measured = list(dict.fromkeys(name for summary in summaries for name in summary.results))
    table = Table(title="top-1 % (95 % interval)", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for summary in summaries:
        table.add_column(summary.name, justify="right")
    table.add_row("what", *(summary.about for summary in summaries))
    table.add_row("steps", *(f"{summary.steps:,}" if summary.steps else "" for summary in summaries))
    knn = [summary.curves.get("knn", ([], []))[1] for summary in summaries]
    if any(knn):
        table.add_row("kNN while training", *(f"{values[-1]:.2f}" if values else "" for values in knn))
    for name in measured:
        cells = [summary.results.get(name) for summary in summaries]
        table.add_row(
            name,
            *(
                "" if cell is None else f"{100 * cell[0]:.2f} ({100 * cell[1]:.1f} to {100 * cell[2]:.1f})"
                for cell in cells
            ),
        )
    console.print(table)
    plot(summaries, asked.out)
    console.print(f"Plot: {asked.out}", highlight=False, markup=False, soft_wrap=True)
