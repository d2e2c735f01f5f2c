"""The comparison's results: a JSON file a cell, from which it goes on, on whatever machine they are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring.command_line import write_result
from benchmarks.paper.cells import TUNING_SEED, Cell, Point, Setting, grid
from mvssl.runs.environment import environment
from pipelines.runtime import InputError

Row = dict[str, Any]


class Results:
    """What is done so far.

    Attributes:
        setting: the size of all runs.
        rows: what each finished cell's file holds.
        tuned: results of another setting, whose points are taken, and the name of their folder; None tunes here.
    """

    def __init__(self, setting: Setting, rows: Iterable[Row] = (), *, tuned: tuple[str, Results] | None = None) -> None:
        """Take the contents of files."""
        self.setting = setting
        self.tuned = tuned
        self.rows: dict[Cell, Row] = {Cell(**row["cell"]): row for row in rows}

    @classmethod
    def read(cls, folder: Path, setting: Setting, *, tuned: tuple[str, Results] | None = None) -> Results:
        """Read all files of a folder, which need not be there; `tuned` as the attribute.

        Raises:
            InputError: one is damaged, or of a cell of another size.
        """
        rows: list[Row] = []
        wanted = dataclasses.asdict(setting)
        for path in sorted(folder.glob("*.json")):
            try:
                row = json.loads(path.read_text())
                Cell(**row["cell"])
                differ = [name for name in wanted if row["setting"][name] != wanted[name]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{path} is no result of a cell ({type(error).__name__}: {error}): delete it, and the cell is run "
                    "anew."
                ) from error
            if differ:
                raise InputError(
                    f"{path} is of another setting ({', '.join(differ)} differ): give another --out, or delete it."
                )
            rows.append(row)
        return cls(setting, rows, tuned=tuned)

    def add(self, cell: Cell, point: Point, measured: Mapping[str, Any], *, folder: Path, command: str) -> Row:
        """Keep the measurements of a cell, here and in a file of the folder."""
        row: Row = {
            "benchmark": "paper_small",
            "cell": dataclasses.asdict(cell),
            "point": dataclasses.asdict(point),
            "setting": dataclasses.asdict(self.setting),
            **self._origin(cell),
            **measured,
            "environment": environment() | {"command": command},
        }
        write_result(folder / f"{cell.name}.json", row)
        self.rows[cell] = row
        return row

    def point(self, cell: Cell) -> Point | None:
        """What a cell is run with: its own point, or the one that tuning chose; None while that is not done.

        Of points with equal accuracy the first is taken. Of another setting's tuning the name of the point is taken.
        """
        points = grid(cell.method, cell.optimizer, self.setting)
        name = cell.point
        if name is None and self.tuned is not None:
            chosen = self.tuned[1].point(cell)
            if chosen is None:
                return None
            name = chosen.name
        if name is not None:
            return next(point for point in points if point.name == name)
        tried = self.tuning(cell)
        if len(tried) < len(points):
            return None
        return max(points, key=lambda point: tried[point.name])

    def tuning(self, cell: Cell) -> dict[str, float]:
        """kNN accuracy on the tuning images by the name of the point, of a cell's arm, as far as it is done."""
        tried = {}
        for point in grid(cell.method, cell.optimizer, self.setting):
            tuned = dataclasses.replace(cell, variant=cell.arm, seed=TUNING_SEED, point=point.name)
            if tuned in self.rows:
                tried[point.name] = float(self.rows[tuned]["tuning_knn"])
        return tried

    def _origin(self, cell: Cell) -> Row:
        """Where the point of a cell is from, if not from this setting's own tuning."""
        if self.tuned is None or cell.point is not None:
            return {}
        folder, results = self.tuned
        return {"point_from": {"results": folder, "tuning_knn": results.tuning(cell)}}

    def done(self, cell: Cell) -> bool:
        """Whether a cell has a result that counts: not of a point that tuning, with more tried, no longer chooses."""
        row, point = self.rows.get(cell), self.point(cell)
        return row is not None and (point is None or row["point"] == dataclasses.asdict(point))

    def ready(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Point]]:
        """Cells that are not done and can be run now, in order."""
        for cell in cells:
            if not self.done(cell) and (point := self.point(cell)) is not None:
                yield cell, point

    def runs(self, method: str, variant: str, optimizer: str) -> list[Row]:
        """Finished runs of a cell of the table that count, by seed; those that diverged left out."""
        found = {
            cell.seed: row
            for cell, row in self.rows.items()
            if (cell.method, cell.variant, cell.optimizer, cell.point) == (method, variant, optimizer, None)
            and "diverged" not in row
            and self.done(cell)
        }
        return [found[seed] for seed in sorted(found)]
