"""mvssl-train doctor: what of this machine a run can use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from mvssl.trying.doctor import examine

_COLOURS = {"ok": "green", "slower": "yellow", "missing": "red"}


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Look at this machine: what works, what is missing, and the command that mends it.

    Attributes:
        data: images whose disk is timed.
        json: print the findings as JSON.
    """

    data: Path | None = None
    json: bool = False


def doctor(arguments: Sequence[str], console: Console) -> int:
    """Run the command; the exit code is 1 if something is missing that a run here needs."""
    asked = tyro.cli(DoctorArguments, prog="mvssl-train doctor", args=list(arguments))
    findings = examine(asked.data)
    if asked.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        table = Table(box=None, pad_edge=False)
        for column in ("", "state", "found", "to mend it"):
            table.add_column(column, overflow="fold")
        for finding in findings:
            state = f"[{_COLOURS[finding.state]}]{finding.state}[/]"
            table.add_row(finding.name, state, finding.found, finding.remedy)
        console.print(table)
    return int(any(finding.state == "missing" for finding in findings))
