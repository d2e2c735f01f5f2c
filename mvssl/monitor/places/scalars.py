"""Where a run's numbers go besides its own files. A new place is one class with `write` and `close`, named here."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mvssl.monitor.places.tensorboard import make_tensorboard_writer
from mvssl.monitor.places.wandb import WandbWriter
from mvssl.runs.folder import RunFolder
from mvssl.runs.options import RunOptions


class ScalarWriter(Protocol):
    """Takes the numbers of a log point."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step, whose names are KIND/NAME."""

    def close(self) -> None:
        """Flush and close."""


class ScalarWriters:
    """Several writers as one."""

    def __init__(self, writers: Sequence[ScalarWriter]) -> None:
        self.writers = tuple(writers)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Give the scalars of a step to all."""
        for writer in self.writers:
            writer.write(step, scalars)

    def close(self) -> None:
        """Close all."""
        for writer in self.writers:
            writer.close()


class CsvWriter:
    """A table of each kind, KIND.csv: the step, then the numbers in the order of their first appearance."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Rows that a killed run wrote beyond `first_step` are cut off."""
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._columns: dict[str, list[str]] = {}
        for path in folder.glob("*.csv"):
            with path.open(newline="") as file:
                head, *rows = list(csv.reader(file)) or [["step"]]
            kept = [row for row in rows if len(row) == len(head) and int(row[0]) <= first_step]
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([head, *kept])
            self._columns[path.stem] = head

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Append a row to the table of each kind."""
        rows: dict[str, dict[str, float]] = {}
        for name, value in scalars.items():
            kind, _, column = name.partition("/")
            rows.setdefault(kind, {})[column] = value
        for kind, row in rows.items():
            path = self._folder / f"{kind}.csv"
            new = [name for name in row if name not in self._columns.get(kind, ())]
            if new:
                self._widen(path, kind, new)
            with path.open("a", newline="") as file:
                csv.writer(file).writerow([step, *(row.get(name, "") for name in self._columns[kind][1:])])

    def close(self) -> None:
        """Nothing is held open."""

    def _widen(self, path: Path, kind: str, new: Sequence[str]) -> None:
        """Add columns, which are empty in the rows so far."""
        rows: list[list[str]] = []
        if path.exists():
            with path.open(newline="") as file:
                rows = list(csv.reader(file))[1:]
        self._columns[kind] = [*self._columns.get(kind, ["step"]), *new]
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([self._columns[kind], *([*row, *[""] * len(new)] for row in rows)])


def make_scalar_writers(folder: RunFolder, options: RunOptions, *, first_step: int) -> ScalarWriters:
    """The writers that `log` names."""
    writers: list[ScalarWriter] = []
    if "tensorboard" in options.log:
        writers.append(make_tensorboard_writer(folder.tensorboard, first_step=first_step))
    if "csv" in options.log:
        writers.append(CsvWriter(folder.csv, first_step=first_step))
    if "wandb" in options.log:
        writers.append(WandbWriter(folder, options, first_step=first_step))
    return ScalarWriters(writers)
