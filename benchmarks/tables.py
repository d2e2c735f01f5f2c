"""Write the tables of measured numbers in README.md and benchmarks/ from the results in benchmarks/results.

    python -m benchmarks.tables            # rewrites the lines between the markers, and nothing else
    python -m benchmarks.tables --check    # changes nothing; ends with 1 if a table does not match the results

Run it after a new measurement. A table lies between `<!-- table: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paper import tables as paper
from benchmarks.report import compiled_tables
from benchmarks.report import data_tables as data
from benchmarks.report import tables as measured
from benchmarks.report.markdown import fill
from benchmarks.report.origins import FOLDER, Results, broken, file_of, load
from pipelines.runtime import InputError, parse_arguments, run_cli

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python -m benchmarks.tables"
TABLES: dict[str, dict[str, Callable[[Results], list[str]]]] = {
    "README.md": {"headlines": measured.headlines, "peers": data.peers},
    "mvssl/evaluate/README.md": {"evaluation": measured.evaluation},
    "mvssl/runs/RELIABILITY.md": {"faults": measured.faults, "memory": measured.memory},
    "benchmarks/MEASURED.md": {
        "views": data.views,
        "loader": data.loader,
        "peers-details": data.peers_details,
        "loader-cold": data.loader_cold,
        "lock": data.gil,
        "train": measured.train,
        "step": measured.step,
        "start": measured.start,
        "neighbour": measured.neighbour,
        "formats": data.formats,
        "remote": data.remote,
        "linear": measured.linear,
    },
    "benchmarks/PAPER_RESULTS.md": {
        "paper": paper.accuracies,
        "paper-differences": paper.differences,
        "paper-points": paper.points,
        "paper-signs": paper.signs,
        "paper-tuning": paper.tuning,
        "paper-power": paper.power,
    },
    "benchmarks/COMPILED.md": {
        "compiled-steps": compiled_tables.compiled_steps,
        "compiled-kernels": compiled_tables.compiled_kernels,
        "compiled-resources": compiled_tables.compiled_resources,
    },
    "benchmarks/README.md": {
        "overview": measured.overview,
        "views-details": data.views_details,
        "kernels": data.view_kernels,
    },
}
"""For each file its tables: functions from the results to lines."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Write the tables of measured numbers in the READMEs.

    Attributes:
        check: change nothing and end with 1 if a table differs.
    """

    check: bool = False


def render(results: Results) -> dict[str, dict[str, list[str]]]:
    """The lines of every table, by file and name.

    Raises:
        InputError: a result lacks a value of a table.
    """
    return {
        file: {name: _lines(name, make, results) for name, make in tables.items()} for file, tables in TABLES.items()
    }


def update(root: Path, *, check: bool) -> dict[str, list[str]]:
    """Bring the tables of the repository at `root` up to date; nothing is written if anything is wrong.

    Returns:
        For each file with tables that were not up to date their names.

    Raises:
        InputError: a result or a marker is missing or broken; or, with `check`, a table is not up to date.
    """
    changed: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    for file, tables in render(load(root)).items():
        text, names = fill((root / file).read_text(encoding="utf-8"), tables, file=file)
        if names:
            changed[file], texts[file] = names, text
    if check and changed:
        where = "; ".join(f"{', '.join(names)} in {file}" for file, names in changed.items())
        raise InputError(f"Tables do not match {FOLDER} ({where}): run {COMMAND}.")
    for file, text in texts.items():
        (root / file).write_text(text, encoding="utf-8")
    return changed


def _lines(name: str, make: Callable[[Results], list[str]], results: Results) -> list[str]:
    """The lines of one table; errors name the broken result."""
    try:
        return make(results)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        for result in results:
            problem = _problem(make, {result: results[result]})
            if problem is not None:
                problem = f"does not hold the values of the table {name!r} ({problem})"
                raise broken(file_of(results, result), problem) from error
        raise


def _problem(make: Callable[[Results], list[str]], results: Results) -> str | None:
    """What is wrong with these results, if anything."""
    try:
        make(results)
    except KeyError as error:
        return f"it lacks {error}"
    except (TypeError, AttributeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def body() -> int:
    """Run the command; returns the exit code."""
    arguments = parse_arguments(Arguments, prog=COMMAND)
    changed = update(ROOT, check=arguments.check)
    for file, names in changed.items():
        print(f"Wrote {', '.join(names)} in {file}.")
    if not changed:
        print("All tables match the results.")
    return 0


if __name__ == "__main__":
    run_cli(body)
