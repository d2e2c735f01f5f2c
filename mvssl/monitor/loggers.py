"""Where a run's numbers go besides its own files. A new place is one class with `write` and `close`, named here.

Append-only JSON lines that can be cut back to where a checkpoint was made.

TensorBoard event files, where the package is installed.

Weights & Biases, where `--log wandb` asks for it; offline without an account.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mvssl.config.options import RunOptions
from mvssl.runs.folder import RunFolder
from pipelines.runtime import InputError


class JsonLines:
    """A file of one JSON object a line; each line is on its way to the disk when `write` returns."""

    def __init__(self, path: Path, *, keep_bytes: int = 0) -> None:
        """Open `path`, keep its first `keep_bytes` bytes and append behind them.

        Raises:
            InputError: the file is shorter than that.
        """
        self.path = path
        size = path.stat().st_size if path.exists() else 0
        if size < keep_bytes:
            raise InputError(
                f"{path} has {size} bytes but had {keep_bytes} when the checkpoint was made: put it back, or begin "
                "a new run with --init-from."
            )
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(keep_bytes)
        self._file.seek(0, os.SEEK_END)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object."""
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Wait until all lines are on the disk and return the file's size in bytes."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def complete_bytes(path: Path) -> int:
    """Size of the file up to its last whole line; 0 if there is no file."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSON lines file; a last line that a kill cut short is left out."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def last_knn(metrics: Path) -> dict[int, float]:
    """Accuracy for each k of the last kNN evaluation in a metrics file; empty if there is none."""
    rows = [row for row in read_jsonl(metrics) if row["kind"] == "knn"] if metrics.exists() else []
    prefix = "top1_k"
    return {int(k.removeprefix(prefix)): value for row in rows[-1:] for k, value in row.items() if k.startswith(prefix)}


class NoWriter:
    """Writes nothing: TensorBoard is not installed."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Drop the scalars."""

    def close(self) -> None:
        """Nothing to close."""


class TensorBoardWriter:
    """Writes event files into a folder."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # fails where tensorboard is missing

        # purge_step hides what a run killed after its last checkpoint had written beyond it.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


def make_tensorboard_writer(folder: Path, *, first_step: int) -> TensorBoardWriter | NoWriter:
    """A TensorBoard writer, or one that writes nothing where TensorBoard is not installed."""
    try:
        return TensorBoardWriter(folder, first_step=first_step)
    except ImportError:
        return NoWriter()


_log = logging.getLogger("mvssl")


class WandbWriter:
    """Writes to a run of Weights & Biases: online with an account (WANDB_API_KEY or wandb login), else into RUN/wandb.

    A resumed run goes on in the same one. What goes wrong there never ends the training.
    """

    def __init__(self, folder: RunFolder, options: RunOptions, *, first_step: int) -> None:
        wandb = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_account() else "offline")
        # The same run has the same name there wherever it is resumed.
        identity = hashlib.sha256(folder.environment.read_bytes()).hexdigest()[:16]
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "mvssl"),
                name=options.run_name or folder.path.name,
                id=identity,
                resume="allow",
                notes=options.notes,
                tags=list(options.tags) or None,
                config=json.loads(folder.config.read_text())["recipe"],
                dir=str(folder.path),
                mode=mode,
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:  # whatever fails there, the run is worth more
            _log.warning("Weights & Biases cannot be used (%s): this run is not logged there.", _first_line(error))
            return
        where = self._run.url if mode == "online" else f"offline; wandb sync {Path(self._run.dir).parent} uploads it"
        _log.info("Weights & Biases: %s", where)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of a step."""
        if self._run is None:
            return
        try:
            self._run.log(dict(scalars), step=step)
        except Exception as error:
            _log.warning("Weights & Biases takes no more numbers (%s).", _first_line(error))
            self._run = None

    def close(self) -> None:
        """Wait until what was written is there."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                _log.warning("Weights & Biases did not end well (%s).", _first_line(error))


def _has_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "api.wandb.ai" in netrc.read_text()
    except OSError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


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
