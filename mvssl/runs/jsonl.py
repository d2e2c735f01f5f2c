"""JSON Lines files such as metrics.jsonl: append-only, and cut back to a checkpoint when a run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.runtime import InputError


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
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON Lines file, without a last line that a kill cut short."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def last_knn(metrics: Path) -> dict[int, float]:
    """Top-1 accuracy for each k of the last kNN evaluation in metrics.jsonl; empty if there is none."""
    rows = [row for row in read_jsonl(metrics) if row["kind"] == "knn"] if metrics.exists() else []
    prefix = "top1_k"
    return {int(k.removeprefix(prefix)): value for row in rows[-1:] for k, value in row.items() if k.startswith(prefix)}
