"""TensorBoard, CSV tables and Weights & Biases."""

from __future__ import annotations

import csv
import errno
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from mvssl.config.options import RunOptions
from mvssl.config.recipe import Recipe
from mvssl.monitor.loggers import CsvLogger, MetricLoggers
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_jsonl
from pipelines.runtime import InputError
from tests.samples.tiny_runs import metrics, train


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


def test_what_cannot_be_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    for names in (("csv", "none"), (), ("mlflow",)):
        with pytest.raises(InputError, match=r"^RunOptions\.log is .* must be `none`, or any of tensorboard, csv"):
            RunOptions(log=names)  # type: ignore[arg-type]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="log names wandb, which is not installed: pip install wandb"):
        RunOptions(log=("wandb",))


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
