"""mvssl-train report: one page about a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from mvssl.monitor.pages.report import write_report
from mvssl.runs.folder import RunFolder
from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ReportArguments:
    """Write one self-contained HTML page about a run, finished or not.

    Attributes:
        run: the run folder.
        out: the page; by default RUN/report.html, which is written anew.
    """

    run: tyro.conf.Positional[Path]
    out: Path | None = None


def report(arguments: Sequence[str], console: Console) -> int:
    """Run the command; returns the exit code."""
    asked = tyro.cli(ReportArguments, prog="mvssl-train report", args=list(arguments))
    folder = RunFolder(asked.run)
    out = asked.out or folder.report
    if asked.out is not None and asked.out.suffix != ".html":
        raise InputError(f"out is {str(asked.out)!r} but must end in .html: the page is of that kind.")
    write_report(out, folder)
    console.print(f"Report: {out}", highlight=False, markup=False, soft_wrap=True)
    return 0
