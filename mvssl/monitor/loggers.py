"""Loggers that take the metrics of each log point: TensorBoard, CSV tables, Weights & Biases, MLflow.

A new logger is a class like these and an entry in LOGGERS; `RunOptions.log` lists the names.
"""

from __future__ import annotations

import csv
import hashlib
import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mvssl.config.options import RunOptions
from mvssl.config.serialize import to_dict
from mvssl.monitor.mlflow_logger import MlflowLogger
from mvssl.runs.folder import RunFolder
from pipelines.files import LARGEST_JSON, read_regular
from pipelines.names import csv_text, shell_word, utf8, visible
from pipelines.runtime import describe_os_error

logger = logging.getLogger("mvssl")

_TAG = 64  # characters that W&B allows in a tag


class MetricLogger(Protocol):
    """Takes metrics. A logger is created with the run's folder and options, and the step that the run starts after."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log metrics, named KIND/NAME such as train/loss, of a step."""

    def flush(self) -> None:
        """Hand everything written so far to the operating system."""

    def close(self) -> None:
        """Flush and close."""


class TensorBoardLogger:
    """Writes event files into RUN/tensorboard.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: RunFolder, options: RunOptions, first_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter  # needs the package tensorboard

        # purge_step hides what a killed run wrote after its last checkpoint.
        self._writer = SummaryWriter(str(folder.tensorboard), purge_step=first_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step."""
        for name, value in metrics.items():
            self._writer.add_scalar(visible(name), value, step)

    def flush(self) -> None:
        """Write what is buffered into the event file."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class CsvLogger:
    """Writes one table per kind, RUN/csv/KIND.csv: the step, then the metrics in order of first appearance.

    Names of columns are written as `csv_text`.
    """

    def __init__(self, folder: RunFolder, options: RunOptions, first_step: int) -> None:
        self._folder = folder.csv
        self._folder.mkdir(parents=True, exist_ok=True)
        self._columns: dict[str, list[str]] = {}
        for path in self._folder.glob("*.csv"):
            with path.open(newline="", encoding="utf-8") as file:
                head, *rows = list(csv.reader(file)) or [["step"]]
            # A killed run may have written beyond its last checkpoint, and half a line.
            kept = [row for row in rows if len(row) == len(head) and int(row[0]) <= first_step]
            _write_table(path, [head, *kept])
            self._columns[path.stem] = head

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append a row to the table of each kind."""
        rows: dict[str, dict[str, float]] = {}
        for name, value in metrics.items():
            kind, _, column = name.partition("/")
            rows.setdefault(kind, {})[csv_text(column)] = value
        for kind, row in rows.items():
            path = self._folder / f"{kind}.csv"
            new = [name for name in row if name not in self._columns.get(kind, ())]
            if new:
                self._add_columns(path, kind, new)
            with path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow([step, *(row.get(name, "") for name in self._columns[kind][1:])])

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """No file is kept open."""

    def _add_columns(self, path: Path, kind: str, new: Sequence[str]) -> None:
        """Add columns, which stay empty in earlier rows."""
        rows: list[list[str]] = []
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))[1:]
        self._columns[kind] = [*self._columns.get(kind, ["step"]), *new]
        _write_table(path, [self._columns[kind], *([*row, *[""] * len(new)] for row in rows)])


class WandbLogger:
    """Logs to Weights & Biases, online with an account (WANDB_API_KEY or wandb login), else offline into RUN/wandb.

    A resumed run continues the same run there. Errors there never end the training.
    """

    def __init__(self, folder: RunFolder, options: RunOptions, first_step: int) -> None:
        wandb = importlib.import_module("wandb")
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_account() else "offline")
        # The id depends on the run alone, so that a resumed run is the same run there.
        identity = hashlib.sha256(read_regular(folder.environment, most=LARGEST_JSON)).hexdigest()[:16]
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "mvssl"),
                name=visible(options.run_name or folder.path.name),
                id=identity,
                resume="allow",
                notes=options.notes,
                tags=[visible(tag, _TAG) for tag in options.tags] or None,
                config=to_dict(folder.recipe()),
                dir=str(folder.path),
                mode=mode,
                settings=wandb.Settings(console="off", silent=True),
            )
        except Exception as error:
            logger.warning("Weights & Biases cannot be used (%s): this run is not logged there.", _first_line(error))
            return
        local = shell_word(str(Path(self._run.dir).parent))
        where = self._run.url if mode == "online" else f"offline; wandb sync {local} uploads it"
        logger.info("Weights & Biases: %s", where)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step, until the first error."""
        if self._run is None:
            return
        try:
            self._run.log({visible(name): value for name, value in metrics.items()}, step=step)
        except Exception as error:
            logger.warning("Logging to Weights & Biases failed (%s) and ends here.", _first_line(error))
            self._run = None

    def flush(self) -> None:
        """W&B writes in a process of its own."""

    def close(self) -> None:
        """Wait until everything is uploaded."""
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                logger.warning("Closing Weights & Biases failed (%s).", _first_line(error))


LOGGERS: Mapping[str, Callable[[RunFolder, RunOptions, int], MetricLogger]] = {
    "tensorboard": TensorBoardLogger,
    "csv": CsvLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
}


class MetricLoggers:
    """The loggers that `RunOptions.log` names, as one; one that fails is switched off with a warning.

    TensorBoard, which is on by default, is left out if it is not installed; `RunOptions` checks for wandb and mlflow.
    """

    def __init__(self, folder: RunFolder, options: RunOptions, *, first_step: int) -> None:
        self._loggers: dict[str, MetricLogger] = {}
        for name, make in LOGGERS.items():
            if name in options.log:
                if name != "csv" and utf8(os.path.abspath(folder.path)) != os.path.abspath(folder.path):
                    left_out = "%s is left out: it cannot write to %s, whose name is not UTF-8; metrics.jsonl has all"
                    logger.warning(left_out, name, utf8(str(folder.path)))
                    continue
                try:
                    self._loggers[name] = make(folder, options, first_step)
                except ImportError:
                    logger.debug("%s is not installed", name)
                except Exception as error:
                    _warn(name, error)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step to all."""
        self._each(lambda one: one.write(step, metrics))

    def flush(self) -> None:
        """Flush all."""
        self._each(lambda one: one.flush())

    def close(self) -> None:
        """Close all."""
        self._each(lambda one: one.close())

    def _each(self, work: Callable[[MetricLogger], None]) -> None:
        for name, one in list(self._loggers.items()):
            try:
                work(one)
            except Exception as error:
                _warn(name, error)
                del self._loggers[name]


def _warn(name: str, error: Exception) -> None:
    why = describe_os_error(error) if isinstance(error, OSError) else f"{_first_line(error)}."
    logger.warning("logging to %s ends here, the training goes on: %s", name, why)


def _write_table(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _has_wandb_account() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return "api.wandb.ai" in netrc.read_text()
    except OSError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
