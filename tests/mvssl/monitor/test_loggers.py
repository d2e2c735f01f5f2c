"""TensorBoard, CSV tables, Weights & Biases and MLflow."""

from __future__ import annotations

import csv
import errno
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mvssl.config.options import RunOptions
from mvssl.config.recipe import Recipe
from mvssl.monitor import mlflow_logger
from mvssl.monitor.loggers import CsvLogger, MetricLoggers
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_jsonl
from pipelines.runtime import InputError
from tests.samples.tiny_runs import crash_at, metrics, train


def table(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_metrics_as_tables(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny_recipe, images, out, log=("csv",), notes="first & best", tags=("a", "b"), run_name="mine")
    assert not (out / "tensorboard").exists()
    options = RunFolder(out).options()
    assert (options["notes"], options["tags"], options["run_name"]) == ("first & best", ["a", "b"], "mine")
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if row["kind"] == "train"]
    head, *lines = table(out / "csv/train.csv")
    assert head[:2] == ["step", "loss"]
    assert [(int(line[0]), float(line[1])) for line in lines] == [(row["step"], row["loss"]) for row in rows]
    assert len(table(out / "csv/knn.csv")) == 4
    assert len(table(out / "csv/speed.csv")) == len(rows) + 1


def test_tables_are_cut_back_and_widened(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    logger = CsvLogger(folder, RunOptions(), 0)
    for step in (1, 2, 3):
        logger.write(step, {"train/a": step / 2, "speed/b": 1.0})
    again = CsvLogger(folder, RunOptions(), 2)
    again.write(3, {"train/a": 9.0, "train/new": 4.0})
    assert table(folder.csv / "train.csv") == [
        ["step", "a", "new"],
        ["1", "0.5", ""],
        ["2", "1.0", ""],
        ["3", "9.0", "4.0"],
    ]
    assert table(folder.csv / "speed.csv") == [["step", "b"], ["1", "1.0"], ["2", "1.0"]]


def test_weights_and_biases_offline(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    out = tmp_path / "run"
    train(tiny_recipe, images, out, log=("wandb",), tags=("tag",))
    (kept,) = (out / "wandb").glob("offline-run-*")
    assert sum(path.stat().st_size for path in kept.glob("*.wandb")) > 1000


def mlflow_client(uri: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    tracking: Any = pytest.importorskip("mlflow.tracking")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tracking.MlflowClient(tracking_uri=uri)


@pytest.fixture
def _no_mlflow_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    for name, value in mlflow_logger._DEFAULTS.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("_no_mlflow_settings")
def test_mlflow_has_the_recipe_and_all_metrics_of_a_run_that_was_killed_and_resumed(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, store = tmp_path / "run", (tmp_path / "store").as_uri()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "first tries")
    options: dict[str, Any] = {"log": ("mlflow",), "log_every": 1, "tags": ("a", "b"), "notes": "hello"}
    with crash_at(6):  # after step 6; the last checkpoint is that of step 4
        train(tiny_recipe, images, out, **options)
    client = mlflow_client(store, monkeypatch)
    experiment = client.get_experiment_by_name("first tries").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FAILED"
    train(replace(tiny_recipe, accumulate=2), images, out, resume=True, **options)
    (run,) = client.search_runs([experiment])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["optimizer.base_lr"] == "3.0"
    assert run.data.params["views.0.size"] == "32"
    assert run.data.params["options.data"] == str(images)
    assert (run.data.params["accumulate"], run.data.tags["changed.accumulate"]) == ("1", "2")
    assert (run.data.tags["mvssl.tags"], run.data.tags["mlflow.note.content"]) == ("a, b", "hello")
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if row["kind"] == "train"]
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [each.step for each in history] == [row["step"] for row in rows] == list(range(1, 13))  # each step once
    assert [each.value for each in history][:4] == [row["loss"] for row in rows][:4]
    assert len(client.get_metric_history(run.info.run_id, "train/loss.global")) == 12
    assert len(client.get_metric_history(run.info.run_id, "knn/top1_k5")) == 3
    names = {each.path for each in client.list_artifacts(run.info.run_id)}
    assert names >= {"config.json", "summary.json", "report.html", "views.png"}
    assert not (out / "mlruns").exists()


@pytest.mark.usefixtures("_no_mlflow_settings")
def test_mlflow_without_a_server_is_in_the_run_folder_and_one_that_fails_ends_nothing(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(tiny_recipe, epochs=1)
    train(recipe, images, tmp_path / "run", log=("mlflow",))
    train(recipe, images, tmp_path / "run", log=("mlflow",), overwrite=True)  # MLflow remembers a folder that is gone
    client = mlflow_client((tmp_path / "run" / "mlruns").as_uri(), monkeypatch)
    (run,) = client.search_runs([client.get_experiment_by_name("mvssl").experiment_id])
    assert run.data.metrics["train/loss"] > 0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    train(recipe, images, tmp_path / "other", log=("mlflow",))
    log = RunFolder(tmp_path / "other").log.read_text()
    assert log.count("logging to mlflow ends here, the training goes on: ") == 1
    assert metrics(tmp_path / "other") == metrics(tmp_path / "run")


def test_what_cannot_be_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in (("csv", "none"), (), ("neptune",)):
        with pytest.raises(InputError, match=r"^RunOptions\.log is .* must be `none`, or any of tensorboard, csv"):
            RunOptions(log=names)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="log names wandb, which is not installed: pip install wandb"):
        RunOptions(log=("wandb",))
    with pytest.raises(InputError, match=r"log names mlflow, which is not installed: pip install 'mvssl\[log\]'"):
        RunOptions(log=("mlflow",))


def test_without_tensorboard_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    folder = RunFolder(tmp_path)
    loggers = MetricLoggers(folder, RunOptions(log=("tensorboard", "csv")), first_step=0)
    loggers.write(1, {"train/loss": 1.0})
    loggers.close()
    assert not folder.tensorboard.exists()
    assert table(folder.csv / "train.csv") == [["step", "loss"], ["1", "1.0"]]


def test_a_logger_that_fails_is_switched_off_and_the_training_goes_on(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "run" / "csv"))

    monkeypatch.setattr(CsvLogger, "write", full)
    monkeypatch.setattr("torch.utils.tensorboard.writer.SummaryWriter.add_scalar", broken)
    train(tiny_recipe, images, tmp_path / "run", log=("csv", "tensorboard"))
    log = RunFolder(tmp_path / "run").log.read_text()
    assert log.count("logging to csv ends here, the training goes on: No space left on device") == 1
    assert "GB are free on the disk of" in log
    assert log.count("logging to tensorboard ends here, the training goes on: the queue is closed.") == 1
    assert metrics(tmp_path / "run") == metrics(finished)


def broken(*_: Any, **__: Any) -> None:
    raise RuntimeError("the queue is closed\nand more")
