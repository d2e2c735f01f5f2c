"""Result files: one result as JSON, or the results of one experiment as JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvssl.runs.environment import environment
from pipelines.files import write_whole

Result = Mapping[str, Any]
RESULTS = Path(__file__).resolve().parents[1] / "results"


def measured_by(command: str) -> dict[str, Any]:
    """The end of every result: machine, versions and the command that repeats it."""
    return {"environment": environment() | {"command": command}}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The results in a .jsonl file, or the one in a .json file.

    Raises:
        ValueError: it is not JSON, or a result is not an object; the message continues "FILE ...".
    """
    try:
        text = path.read_text(encoding="utf-8")
        rows = [json.loads(part) for part in (text.splitlines() if path.suffix == ".jsonl" else [text])]
    except ValueError as error:
        raise ValueError(f"cannot be read as JSON ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("does not hold a JSON object")
    return rows


def write_result(path: Path | None, result: Result) -> None:
    """Write a result: alone into a .json file; into a .jsonl file in place of the one of the same measurement.

    Readers and kills find the old file or the new one. None writes nothing.
    """
    if path is None:
        return
    text = json.dumps(result, indent=2) + "\n"
    if path.suffix == ".jsonl":
        rows = {_measurement(row): row for row in (read_results(path) if path.exists() else [])}
        rows[_measurement(result)] = dict(result)
        text = "".join(json.dumps(row) + "\n" for row in rows.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)


def _measurement(result: Result) -> str:
    """What a result is of: a cell of the paper's comparison, or whatever its command measures."""
    return json.dumps(result["cell"] if "cell" in result else result["environment"]["command"], sort_keys=True)
