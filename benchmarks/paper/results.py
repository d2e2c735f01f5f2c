"""The comparison's results: a JSON line a cell, from which it resumes on any machine."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.results import measured_by, read_results, write_result
from benchmarks.paper.cells import TUNING_SEED, Cell, Point, Setting, grid
from pipelines.runtime import InputError

Row = dict[str, Any]


def cosine(part: str, pair: str, mark: Mapping[str, Any]) -> float | None:
    """The cosine of two views' gradients in the encoder or predictor at a checkpoint, if it has one."""
    found: float | None = mark["cosine"][part].get(pair)
    return found


class Results:
    """The finished cells.

    Attributes:
        setting: the size of all runs.
        rows: measurements of each finished cell.
        tuned: name and results of another setting whose points are taken; None tunes here.
    """

    def __init__(self, setting: Setting, rows: Iterable[Row] = (), *, tuned: tuple[str, Results] | None = None) -> None:
        """Take the rows of files."""
        self.setting = setting
        self.tuned = tuned
        self.rows: dict[Cell, Row] = {Cell(**row["cell"]): row for row in rows}

    @classmethod
    def read(cls, path: Path, setting: Setting, *, tuned: tuple[str, Results] | None = None) -> Results:
        """Read a .jsonl file, or all .json and .jsonl files of a folder; neither need exist. `tuned` as the attribute.

        Raises:
            InputError: a result is damaged, or of a cell of another size.
        """
        rows: list[Row] = []
        wanted = dataclasses.asdict(setting)
        for file in sorted(path.glob("*.json*")) if path.is_dir() else [path] if path.exists() else []:
            try:
                own = read_results(file)
                differ = {name for row in own for name in wanted if row["setting"][name] != wanted[name]}
                rows += [row for row in own if Cell(**row["cell"])]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{file} does not hold results of cells ({type(error).__name__}: {error}): remove what is broken, "
                    "and its cell is run again."
                ) from error
            if differ:
                raise InputError(
                    f"{file} is of another setting ({', '.join(sorted(differ))} differ): give another --out, or "
                    "delete it."
                )
        return cls(setting, rows, tuned=tuned)

    def add(self, cell: Cell, point: Point, measured: Mapping[str, Any], *, out: Path, command: str) -> Row:
        """Add the measurements of a cell, here and in the file `out` (or cells.jsonl in a folder of that name)."""
        row: Row = {
            "benchmark": "paper_small",
            "cell": dataclasses.asdict(cell),
            "point": dataclasses.asdict(point),
            "setting": dataclasses.asdict(self.setting),
            **self._origin(cell),
            **measured,
            **measured_by(command),
        }
        write_result(out if out.suffix == ".jsonl" else out / "cells.jsonl", row)
        self.rows[cell] = row
        return row

    def point(self, cell: Cell) -> Point | None:
        """The point of a cell: its own, or the one that tuning chose; None while tuning is unfinished.

        Of points with equal accuracy the first wins. From another setting's tuning the name of the point is taken.
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
        """kNN accuracy on the tuning images of a cell's arm by the name of the point, as far as it is done."""
        tried = {}
        for point in grid(cell.method, cell.optimizer, self.setting):
            tuned = dataclasses.replace(cell, variant=cell.arm, seed=TUNING_SEED, point=point.name)
            if tuned in self.rows:
                tried[point.name] = float(self.rows[tuned]["tuning_knn"])
        return tried

    def _origin(self, cell: Cell) -> Row:
        """The origin of a cell's point, if it is not from this setting's own tuning."""
        if self.tuned is None or cell.point is not None:
            return {}
        name, results = self.tuned
        return {"point_from": {"results": name, "tuning_knn": results.tuning(cell)}}

    def done(self, cell: Cell) -> bool:
        """Whether a cell has a result that counts: one at the point that tuning chooses today."""
        row, point = self.rows.get(cell), self.point(cell)
        return row is not None and (point is None or row["point"] == dataclasses.asdict(point))

    def ready(self, cells: Sequence[Cell]) -> Iterator[tuple[Cell, Point]]:
        """Cells that are not done and can be run now, in order."""
        for cell in cells:
            if not self.done(cell) and (point := self.point(cell)) is not None:
                yield cell, point

    def runs(self, method: str, variant: str, optimizer: str) -> list[Row]:
        """Finished runs of a cell of the table that count, by seed, without those that diverged."""
        found = {
            cell.seed: row
            for cell, row in self.rows.items()
            if (cell.method, cell.variant, cell.optimizer, cell.point) == (method, variant, optimizer, None)
            and "diverged" not in row
            and self.done(cell)
        }
        return [found[seed] for seed in sorted(found)]
