"""Write the tables of measured numbers in README.md and benchmarks/ from the JSON files in benchmarks/results.

    python -m benchmarks.tables            # rewrites what stands between the markers, and nothing else
    python -m benchmarks.tables --check    # changes nothing; ends with 1 if a table is not what the results say

Run it after a result was added or measured again. A table stands between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.paper import tables as paper_tables
from benchmarks.report import (
    accuracy_tables,
    compile_tables,
    loader_tables,
    result_tables,
    step_tables,
    view_tables,
)
from benchmarks.report.markers import fill, stale
from benchmarks.report.origins import MADE_BY, Results
from pipelines.runtime import InputError, run_cli

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
COMMAND = "python -m benchmarks.tables"
TABLES: dict[str, dict[str, Callable[[Results], list[str]]]] = {
    "README.md": {"headlines": result_tables.headlines},
    "mvssl/evaluate/README.md": {"evaluation": accuracy_tables.evaluation},
    "benchmarks/MEASURED.md": {
        "views": view_tables.views,
        "loader": loader_tables.loader,
        "loader-cold": loader_tables.loader_cold,
        "lock": loader_tables.lock,
        "train": step_tables.train,
        "step": step_tables.step,
        "start": step_tables.start,
        "linear": accuracy_tables.linear,
    },
    "benchmarks/PAPER.md": {
        "paper": paper_tables.accuracies,
        "paper-differences": paper_tables.differences,
        "paper-points": paper_tables.points,
        "paper-signs": paper_tables.signs,
        "paper-tuning": paper_tables.tuning,
        "paper-power": paper_tables.power,
    },
    "benchmarks/COMPILED.md": {
        "compiled-steps": compile_tables.steps,
        "compiled-kernels": compile_tables.kernels,
        "compiled-resources": compile_tables.resources,
    },
    "benchmarks/README.md": {
        "overview": result_tables.overview,
        "views-details": view_tables.views_details,
        "kernels": view_tables.kernels,
    },
}
"""For each file its tables: what makes the lines of each from the results."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write the tables of measured numbers in the READMEs.

    Attributes:
        check: change nothing and end with 1 if a table differs.
    """

    check: bool = False


def load(root: Path) -> Results:
    """All results of the tree at `root`, by the name of their file without suffix.

    A folder is one result, whose "cells" are its files.

    Raises:
        InputError: a file is not JSON, or not what a benchmark writes.
    """
    results: dict[str, Any] = {}
    for path in sorted((root / RESULTS).iterdir()):
        cells = sorted(path.glob("*.json"))
        if path.suffix == ".json":
            results[path.stem] = _read(path)
        elif cells:
            rows = [_read(cell) for cell in cells]
            about = rows[0]["environment"] | {"command": MADE_BY.get(path.name, "")}
            results[path.name] = {"cells": rows, "environment": about}
    return results


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(path.name, f"cannot be read as JSON ({error})") from error
    if not isinstance(result, dict):
        raise _broken(path.name, "does not hold a JSON object")
    return result


def render(results: Results) -> dict[str, dict[str, list[str]]]:
    """The lines of every table, by file and name.

    Raises:
        InputError: a result lacks what a table shows.
    """
    return {
        file: {name: _lines(name, make, results) for name, make in tables.items()} for file, tables in TABLES.items()
    }


def update(root: Path, *, check: bool) -> dict[str, list[str]]:
    """Bring the tables of the tree at `root` up to date; nothing is written if anything is wrong.

    Args:
        root: of the repository.
        check: write nothing.

    Returns:
        For each file with tables that were not up to date their names.

    Raises:
        InputError: a result or a marker is missing or broken; or, with `check`, a table is not up to date.
    """
    changed: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for file, tables in render(load(root)).items():
        text = (root / file).read_text(encoding="utf-8")
        names = stale(text, tables, file=file)
        if names:
            changed[file], texts[file] = names, fill(text, tables, file=file)
    if check and changed:
        where = "; ".join(f"{', '.join(names)} in {file}" for file, names in changed.items())
        raise InputError(f"Tables are not what {RESULTS} says ({where}): run {COMMAND}.")
    for file, text in texts.items():
        (root / file).write_text(text, encoding="utf-8")
    return changed


def _lines(name: str, make: Callable[[Results], list[str]], results: Results) -> list[str]:
    try:
        return make(results)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        for result in results:
            problem = _problem(make, {result: results[result]})
            if problem is not None:
                raise _broken(f"{result}.json", f"does not hold what the table {name!r} shows ({problem})") from error
        raise


def _problem(make: Callable[[Results], list[str]], results: Results) -> str | None:
    """What is wrong with these results, if it is they that are wrong."""
    try:
        make(results)
    except KeyError as error:
        return f"it lacks {error}"
    except (TypeError, AttributeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _broken(file: str, problem: str) -> InputError:
    made_by = MADE_BY.get(file.removesuffix(".json"))
    again = f", or measure it again with {made_by}" if made_by else ", or take it out"
    return InputError(f"{RESULTS}/{file} {problem}: restore it with git checkout{again}.")


def body() -> int:
    """Run the command; returns the exit code."""
    arguments = tyro.cli(Arguments, prog=COMMAND)
    changed = update(ROOT, check=arguments.check)
    for file, names in changed.items():
        print(f"Wrote {', '.join(names)} in {file}.")
    if not changed:
        print("All tables are what the results say.")
    return 0


if __name__ == "__main__":
    run_cli(body)
