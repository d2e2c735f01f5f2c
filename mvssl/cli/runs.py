"""mvssl-train runs: a table of the runs below a folder."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from mvssl.runs.listing import SORTS, RunState, expand, find_runs, run_state
from pipelines.names import cell, say, say_table, visible
from pipelines.progress import rate
from pipelines.runtime import parse_arguments

TIME = "The end of --time"  # as `mvssl.training.shutdown` writes it, which imports torch
_COLOURS = {
    "running": "cyan",
    "finished": "green",
    "stopped": "yellow",
    "resumable": "yellow",
    "no checkpoint": "yellow",
}
_NAMES = ("run", "recipe", "data")  # cut in a narrow terminal, whole in a pipe
_NAMED = 3  # folders in a note, and notes
_NUMBERS = ("epochs", "loss", "kNN", "images/s")


@dataclass(frozen=True, kw_only=True)
class RunsArguments:
    """List the runs below folders: how far each came, its last loss and kNN accuracy, its speed and its state.

    Attributes:
        folders: to search, five folders deep; patterns such as 'runs/*' are expanded.
        sort: newest and oldest by the time of the last line written; kNN, epochs and speed with the highest first, loss
            with the lowest.
        json: print a list of objects, one per run, with all that is known of it.
    """

    folders: tyro.conf.Positional[tuple[Path, ...]] = (Path(),)
    sort: Literal["newest", "oldest", "name", "recipe", "state", "epochs", "loss", "knn", "speed"] = "newest"
    json: bool = False


def runs(arguments: Sequence[str], console: Console) -> int:
    """Run the command; returns the exit code."""
    asked = parse_arguments(RunsArguments, prog="mvssl-train runs", args=arguments)
    folders = asked.folders or (Path(),)
    found = {folder: find_runs(folder) for folder in expand(folders)}
    roots = {path.resolve(): (root, path) for root, each in found.items() for path in each.runs}
    states = [(root, run_state(path)) for root, path in roots.values()]
    states.sort(key=lambda each: SORTS[asked.sort](each[1]))
    if asked.json:
        print(json.dumps([state.plain() for _, state in states], indent=2))
    elif states:
        say_table(console, _table(states))
        say(console, *(f"{state.path}: {state.reason}" for _, state in states if state.reason))
    else:
        say(console, f"no runs below {', '.join(map(str, folders))}")
    for note in notes_on({path: reason for each in found.values() for path, reason in each.others.items()}, "no run"):
        print(visible(note), file=sys.stderr)
    return 0


def notes_on(left_out: Mapping[Path, str], what: str) -> list[str]:
    """Notes on folders that are `what`: one for each reason, with its first folders, and a few reasons at most."""
    reasons: dict[str, list[Path]] = {}
    for path, reason in left_out.items():
        reasons.setdefault(reason, []).append(path)
    notes = []
    for reason, paths in list(reasons.items())[:_NAMED]:
        first, more = ", ".join(map(str, paths[:_NAMED])), len(paths) - _NAMED
        named = f"{first} and {more:,} more" if more > 0 else first
        notes.append(f"note: {named} {'is' if len(paths) == 1 else 'are'} {what}: {reason}")
    if more := sum(map(len, list(reasons.values())[_NAMED:])):
        notes.append(f"note: {more:,} more {'is' if more == 1 else 'are'} {what} for other reasons")
    return notes


def _table(states: Sequence[tuple[Path, RunState]]) -> Table:
    """The runs, each with the folder that was searched, which names are relative to."""
    table = Table(box=None, pad_edge=False, header_style="bold", collapse_padding=True)
    for name in (*_NAMES, *_NUMBERS, "state"):
        right = name in _NUMBERS
        table.add_column(name, justify="right" if right else "left", no_wrap=name not in _NAMES, overflow="ellipsis")
    for root, run in states:
        relative = "" if run.path == root else str(run.path.relative_to(root))
        data = "" if run.data is None else Path(run.data).name or run.data
        names = [cell(text) for text in (relative or run.path.resolve().name, run.recipe or "", data)]
        for text in names:
            text.no_wrap = True
        state, colour = describe_state(run), _COLOURS.get(run.state, "red")
        table.add_row(*names, *_numbers(run), cell(state, style=colour))
    return table


def _numbers(run: RunState) -> list[str]:
    """The columns of numbers; "" for what is not known."""
    done = "?" if run.epochs_done is None else f"{math.floor(10 * run.epochs_done) / 10:g}"
    return [
        "" if run.epochs is None else f"{done}/{run.epochs}",
        "" if run.loss is None else f"{run.loss:.4g}",
        "" if run.knn is None else f"{100 * run.knn:.1f} %",
        "" if run.images_per_second is None else rate(run.images_per_second),
    ]


def describe_state(run: RunState) -> str:
    """The state in words, such as "stopped: SIGINT"."""
    if run.state != "stopped":
        return run.state
    return f"stopped: {run.stopped_by if run.stopped_by != TIME else '--time'}"
