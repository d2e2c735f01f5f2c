"""Logs a run to MLflow: one MLflow run for one run folder, however often it is resumed."""

from __future__ import annotations

import importlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mvssl.config.options import RunOptions
from mvssl.config.serialize import flatten, to_dict
from mvssl.runs.checked_json import write_json
from mvssl.runs.folder import RunFolder
from mvssl.runs.summary import read_summary
from pipelines.files import read_json
from pipelines.names import visible
from pipelines.runtime import InputError

logger = logging.getLogger("mvssl")

_NOT_IN_KEYS = re.compile(r"[^\w\-. /:]", re.ASCII)  # what MLflow refuses in names of metrics and parameters
_KEY, _VALUE, _TAG = 250, 6000, 5000  # characters
_BATCH = 100  # parameters in one request
_OPTIONS = ("data", "val", "init_from", "device", "step_mode", "compile", "checkpointing")
_ARTIFACTS = ("config.json", "environment.json", "summary.json", "views.png", "losses.png", "report.html")
_DEFAULTS = {
    # MLflow's own defaults hold a training for minutes when its server is gone.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_ALLOW_FILE_STORE": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class MlflowLogger:
    """Logs to the server or store of MLFLOW_TRACKING_URI, else into RUN/mlruns.

    The experiment is that of MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, else "mvssl". Parameters are the recipe's
    fields, by dotted names. RUN/mlflow.json holds the id of the run there, which a resumed run continues; steps that a
    killed run had logged beyond its last checkpoint are not logged twice. Small files are uploaded at the end.

    Raises:
        ImportError: MLflow is not installed.
        Exception: of MLflow, if it cannot be reached.
    """

    def __init__(self, folder: RunFolder, options: RunOptions, first_step: int) -> None:
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        entities: Any = importlib.import_module("mlflow.entities")
        tracking: Any = importlib.import_module("mlflow.tracking")
        self._metric, self._param = entities.Metric, entities.Param
        self._folder = folder
        self._uri = os.environ.get("MLFLOW_TRACKING_URI") or local_store(folder)
        self._client = tracking.MlflowClient(tracking_uri=self._uri)
        if self._uri == local_store(folder):  # MLflow makes it once in a process, and --overwrite may delete it
            (folder.path / "mlruns" / ".trash").mkdir(parents=True, exist_ok=True)
        self._logged: dict[str, int] | None = None  # last step of each metric, of a run that is continued
        found = self._earlier() if first_step else None
        if found is None:
            self._run = self._start(options)
        else:
            self._run, self._logged = found, {}
            self._client.update_run(self._run, status="RUNNING")
        self._log_parameters(folder)
        logger.info("MLflow: run %s in %s", self._run, self._uri)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the metrics of a step."""
        now = int(1000 * time.time())
        rows = [
            self._metric(key, float(value), now, step)
            for key, value in ((_metric_key(name), value) for name, value in metrics.items())
            if step > self._last_step(key)
        ]
        if rows:
            self._client.log_batch(self._run, metrics=rows)

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """Upload the small files of the run, and say how it ended."""
        for name in _ARTIFACTS:
            path = self._folder.path / name
            if path.is_file():
                self._client.log_artifact(self._run, str(path))
        self._client.set_terminated(self._run, status=self._status())

    def _earlier(self) -> str | None:
        """The id of this run in MLflow; None if it has none there, which is said."""
        try:
            held = read_json(self._folder.mlflow)
            identity, uri = str(held["run"]), str(held["uri"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged (%s): a new MLflow run is begun", self._folder.mlflow, error)
            return None
        try:
            self._client.get_run(identity)
        except Exception as error:
            logger.warning("MLflow has no run %s of %s (%s): a new one is begun", identity, uri, _first_line(error))
            return None
        return identity

    def _start(self, options: RunOptions) -> str:
        """Create the run; its id."""
        tags = {"mvssl.out": visible(str(self._folder.path.resolve()), _TAG)}
        if options.notes is not None:
            tags["mlflow.note.content"] = visible(options.notes, _TAG)
        if options.tags:
            tags["mvssl.tags"] = visible(", ".join(options.tags), _TAG)
        name = visible(options.run_name or self._folder.path.resolve().name)
        run: str = self._client.create_run(self._experiment(), run_name=name, tags=tags).info.run_id
        write_json(self._folder.mlflow, {"run": run, "uri": self._uri})
        return run

    def _experiment(self) -> str:
        """The id of the experiment, which is created if need be."""
        identity = os.environ.get("MLFLOW_EXPERIMENT_ID")
        if identity:
            return identity
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "mvssl"
        found = self._client.get_experiment_by_name(name)
        created: str = self._client.create_experiment(name) if found is None else found.experiment_id
        return created

    def _log_parameters(self, folder: RunFolder) -> None:
        """Log the recipe; of a continued run what is new, and as tags what has changed, for parameters never do."""
        known = self._client.get_run(self._run).data.params if self._logged is not None else {}
        given = folder.options()
        values = dict(flatten(to_dict(folder.recipe()))) | {f"options.{name}": given.get(name) for name in _OPTIONS}
        texts = {_key(name): visible(str(value), _VALUE) for name, value in values.items()}
        for key, text in texts.items():
            if key in known and known[key] != text:
                self._client.set_tag(self._run, f"changed.{key}", text)
        for some in _batches([self._param(key, text) for key, text in texts.items() if key not in known]):
            self._client.log_batch(self._run, params=some)

    def _last_step(self, key: str) -> int:
        """The last step of a metric that was logged before this part of the run; -1 if there is none."""
        if self._logged is None:
            return -1
        if key not in self._logged:
            history = self._client.get_metric_history(self._run, key)
            self._logged[key] = max((each.step for each in history), default=-1)
        return self._logged[key]

    def _status(self) -> str:
        """How the run ended, in MLflow's words."""
        try:
            summary = read_summary(self._folder.summary)
        except InputError:
            summary = None
        if summary is None or summary.stopped_by == "divergence":
            return "FAILED"
        return "FINISHED" if summary.stopped_by is None and summary.step >= summary.total_steps else "KILLED"


def local_store(folder: RunFolder) -> str:
    """The address of the store in a run's folder: files, which MLflow reads with MLFLOW_ALLOW_FILE_STORE=true."""
    return (folder.path.resolve() / "mlruns").as_uri()


def _key(name: str) -> str:
    """A name that MLflow takes."""
    return _NOT_IN_KEYS.sub("_", visible(name, _KEY))


def _metric_key(name: str) -> str:
    """A metric such as train/loss/global as train/loss.global: a store of files cannot have train/loss beside it."""
    kind, slash, rest = name.partition("/")
    return _key(kind + slash + rest.replace("/", "."))


def _batches(values: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), _BATCH):
        yield values[start : start + _BATCH]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
