"""JSON Lines files such as metrics.jsonl: append-only, and cut back to a checkpoint when a run resumes."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.files import check_nesting, open_regular, parse_json
from pipelines.runtime import InputError, shown

_LONGEST_LINE = 1 << 20  # bytes
_NUMBERS = {
    "train": ("step", "loss"),
    "knn": ("step", "top1"),
    "probe": ("step", "top1"),
}
"""Numbers that a row of each kind has."""
_SPEED = ("step", "seconds", "images_per_second", "data_wait", "memory_gib")


class JsonLines:
    """Appends one JSON object per line; each line has left the process when `write` returns."""

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        """Open `path`, keep its first `keep_bytes` bytes and append behind them.

        Raises:
            InputError: the file is shorter than that.
        """
        self.path = path
        size = path.stat().st_size if path.exists() else 0
        if size < keep_bytes:
            raise InputError(
                f"{path} has {size} bytes but had {keep_bytes} when the checkpoint was made: restore it, or begin a "
                "new run with --init-from."
            )
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(keep_bytes)
        self._file.seek(0, os.SEEK_END)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object; NaN and infinity, which JSON has not, raise ValueError."""
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Wait until all lines are on disk and return the file's size in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def complete_bytes(path: Path) -> int:
    """Size of the file up to its last complete line; 0 if there is no file."""
    if not path.exists():
        return 0
    with open_regular(path) as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _LONGEST_LINE)
            file.seek(start)
            last = file.read(end - start).rfind(b"\n")
            if last >= 0:
                return start + last + 1
            end = start
    return 0


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file, without a last line that a kill cut short.

    Raises:
        InputError: a line is no JSON object, or one of its values is neither a finite number nor a text nor null.
    """
    with open_regular(path) as file:
        for number in itertools.count(1):
            line = file.readline(_LONGEST_LINE)
            if not line.endswith(b"\n"):
                if len(line) == _LONGEST_LINE:
                    raise _damaged(path, number, f"it has more than {_LONGEST_LINE:,} bytes")
                return
            try:
                row = parse_json(line)
                check_nesting(row, numbers=True)
            except ValueError as error:
                raise _damaged(path, number, str(error)) from error
            if not isinstance(row, dict) or any(isinstance(value, (dict, list, bool)) for value in row.values()):
                raise _damaged(path, number, "it is no table of numbers")
            yield row


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics.jsonl; raises as `read_jsonl`, or if a row lacks a number that its kind has."""
    for number, row in enumerate(read_jsonl(path), start=1):
        kind = row.get("kind")
        if not isinstance(kind, str):
            raise _damaged(path, number, f"kind is {shown(kind)}")
        _check_numbers(path, number, row, _NUMBERS.get(kind, ("step",)))
        yield row


def read_throughput(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of throughput.jsonl; raises as `read_metrics`."""
    for number, row in enumerate(read_jsonl(path), start=1):
        _check_numbers(path, number, row, _SPEED)
        yield row


def _check_numbers(path: Path, number: int, row: Mapping[str, Any], needed: Sequence[str]) -> None:
    missing = [name for name in needed if not isinstance(row.get(name), (int, float))]
    texts = [name for name, value in row.items() if isinstance(value, str) and name != "kind"]
    for name in (*missing, *texts):
        raise _damaged(path, number, f"{name} is {shown(row.get(name))}")


def _damaged(path: Path, number: int, reason: str) -> InputError:
    return InputError(f"{path} is damaged (line {number}: {reason}): restore it, or delete the broken line.")


def values_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The metrics of a row of metrics.jsonl by name: loss, loss/global, knn/top1, ..."""
    prefix = "" if row["kind"] == "train" else f"{row['kind']}/"
    return {
        prefix + name: value
        for name, value in row.items()
        if name not in ("kind", "step", "epoch") and value is not None
    }


def last_knn(metrics: Path) -> dict[int, float]:
    """Top-1 accuracy for each k of the last kNN evaluation in metrics.jsonl; empty if there is none."""
    rows = [row for row in read_metrics(metrics) if row["kind"] == "knn"] if metrics.exists() else []
    prefix = "top1_k"
    return {
        int(number): value
        for row in rows[-1:]
        for name, value in row.items()
        if (number := name.removeprefix(prefix)) != name and number.isascii() and number.isdecimal()
    }


def accuracies(metrics: Path) -> dict[str, dict[int, float]]:
    """Top-1 accuracy in [0, 1] by kind of evaluation (knn and probe) and step, in metrics.jsonl."""
    found: dict[str, dict[int, float]] = {"knn": {}, "probe": {}}
    for row in read_metrics(metrics) if metrics.exists() else ():
        if row["kind"] in found:
            found[row["kind"]][row["step"]] = row["top1"]
    return found
