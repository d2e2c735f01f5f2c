"""Whole runs: what they leave and what decides them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from mvssl.config.recipe import Recipe
from mvssl.monitor.loggers import read_jsonl
from mvssl.runs import checkpoint
from mvssl.runs.folder import RunFolder
from tests.samples.tiny_runs import STEPS, train


def test_a_run_leaves_what_the_readme_says(finished: Path, images: Path, tiny_recipe: Recipe) -> None:
    folder = RunFolder(finished)
    assert folder.recipe() == tiny_recipe
    assert json.loads(folder.environment.read_text())["packages"]["torch"] == torch.__version__.split("+")[0]
    rows = list(read_jsonl(folder.metrics))
    train_rows = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in train_rows] == [3, 4, 6, 8, 9, 12]  # every 3 steps and at each epoch's end
    for row in train_rows:
        tasks = [row[f"loss/{task}"] for task in ("global", "local", "cutout")]
        assert row["loss"] == pytest.approx(sum(tasks), rel=1e-6)  # BYOL's weights are 1
        assert all(0.0 <= loss <= 4.0 for loss in tasks)  # 2 - 2 cos
        assert 0.0 <= row["target_decay"] <= 1.0
        assert row["embedding_std"] > 0
        assert row["effective_rank"] >= 1
    knn = [row for row in rows if row["kind"] == "knn"]
    assert [row["epoch"] for row in knn] == [0, 1, 2]
    assert all(0.0 <= row["top1"] <= 1.0 and row["top1"] == row["top1_k5"] for row in knn)
    speeds = list(read_jsonl(folder.throughput))
    assert all(0.0 <= row["data_wait"] <= 1.0 and row["images_per_second"] > 0 for row in speeds)
    assert "Training demo" in folder.log.read_text()
    for picture in (folder.views, folder.losses):
        with Image.open(picture) as image:
            assert min(image.size) > 100
    saved = checkpoint.load(folder.last)
    assert saved.meta["step"] == STEPS
    exported = safetensors.torch.load_file(folder.backbone)
    for name, tensor in exported.items():
        assert torch.equal(tensor, saved.state["step"]["online"][f"backbone.{name}"])
    assert list(folder.tensorboard.glob("events*"))


def test_the_seed_changes_the_run(finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    train(dataclasses.replace(tiny_recipe, seed=1, epochs=1), images, tmp_path / "run")
    first = next(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert first["loss"] != next(read_jsonl(finished / "metrics.jsonl"))["loss"]


def test_unlabelled_images_train_without_knn(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (images / "train").rglob("*.jpg"):
        shutil.copy(path, flat / f"{path.parent.name}_{path.name}")
    result = train(dataclasses.replace(tiny_recipe, epochs=1), flat, tmp_path / "run")
    assert result.knn == {}
    assert {row["kind"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")} == {"train"}
    assert "no kNN" in (tmp_path / "run" / "train.log").read_text()
