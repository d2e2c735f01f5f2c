"""Whole runs: their outputs, what determines them, own view types, equality over storages."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mvssl.cli.train import body
from mvssl.config.recipe import Recipe
from mvssl.models.encoder import OnlineNetwork
from mvssl.recipes.files import load_recipe
from mvssl.runs import checkpoint
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_jsonl
from pipelines.batch import ViewBatch
from pipelines.loader import Loader
from pipelines.order import Order, Ranks
from pipelines.storage import open_source, split_paths
from tests.samples.tiny_runs import STEPS, crash_at, metrics, train


def test_a_run_writes_the_files_named_in_the_readme(finished: Path, images: Path, tiny_recipe: Recipe) -> None:
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
    exported = load_file(folder.backbone)
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


OWN_VIEW = """
base = "demo"
epochs = 1
batch_size = 8
task_weights = {quarter = 0.5}
backbone = {name = "test_resnet"}
projector = {hidden = [32], out = 16}
predictor = {hidden = [32], out = 16}
evaluation = {every_epochs = 0}

[[add_views]]
name = "quarter"
task = "quarter"
size = 24
area = [0.05, 0.25]
blur = 0.0
"""


def test_a_view_type_from_a_toml_file_has_a_predictor_and_a_loss(images: Path, tmp_path: Path) -> None:
    """A new view type needs no code."""
    path, out = tmp_path / "quarter.toml", tmp_path / "run"
    path.write_text(OWN_VIEW)
    options = ["--data", str(images), "--out", str(out), "--device", "cpu", "--log-every", "1"]
    assert body([str(path), *options]) == 0

    bank = OnlineNetwork(load_recipe(path)).predictors
    assert set(bank.to_mlps()) == {"global", "local", "cutout", "quarter"}

    rows = [row for row in read_jsonl(out / "metrics.jsonl") if row["kind"] == "train"]
    assert len(rows) == 4
    for row in rows:
        parts = {task: row[f"loss/{task}"] for task in ("global", "local", "cutout", "quarter")}
        assert all(0 < value < 4 and math.isfinite(value) for value in parts.values())
        whole = parts["global"] + parts["local"] + parts["cutout"] + 0.5 * parts["quarter"]
        assert math.isclose(row["loss"], whole, rel_tol=1e-5)
    config = json.loads((out / "config.json").read_text())["recipe"]
    assert [view["name"] for view in config["views"]][-1] == "quarter"


def batches(path: Path, recipe: Recipe, ranks: Ranks) -> list[ViewBatch]:
    source = open_source(split_paths(path)[0])
    order = Order(num_images=len(source), batch_size=8, seed=recipe.seed)
    loader = Loader(source, recipe.views, order, ranks=ranks)
    try:
        return list(loader.epoch(1, first_step=1))
    finally:
        loader.close()
        source.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_are_the_same_from_all_storages(forms: dict[str, Path], tiny_recipe: Recipe, rank: int) -> None:
    """Images, labels and views, from the middle of a later epoch, on each of two ranks."""
    expected = batches(forms["folder"], tiny_recipe, ranks=Ranks(rank=rank, size=2))
    assert len(expected) == 3
    for form in ("shards", "beton"):
        for batch, other in zip(
            expected, batches(forms[form], tiny_recipe, ranks=Ranks(rank=rank, size=2)), strict=True
        ):
            assert torch.equal(batch.index, other.index), form
            assert torch.equal(batch.labels, other.labels), form
            assert all(torch.equal(a, b) for a, b in zip(batch.views, other.views, strict=True)), form


def test_losses_and_weights_are_the_same_from_all_storages(
    forms: dict[str, Path], tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """kNN accuracies too: metrics.jsonl has the same bytes."""
    recipe = dataclasses.replace(
        tiny_recipe, epochs=1, batch_size=16, optimizer=dataclasses.replace(tiny_recipe.optimizer, warmup_epochs=0)
    )
    found = {}
    for form, data in forms.items():
        result = train(recipe, data, tmp_path / form, log_every=1)
        assert result.steps == 2
        found[form] = metrics(tmp_path / form), load_file(tmp_path / form / "backbone.safetensors")
    rows, weights = found["folder"]
    assert rows.count(b'"loss') >= 2
    for form in ("shards", "beton"):
        assert found[form][0] == rows
        assert found[form][1].keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in found[form][1].items())


def test_a_run_on_shards_resumes_on_beton(
    forms: dict[str, Path], finished: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """Both formats have the same fingerprint, so that each resumes the other's run, even in mid-epoch."""
    with crash_at(6):
        train(tiny_recipe, forms["shards"], tmp_path / "run", save_every_steps=5)
    train(tiny_recipe, forms["beton"], tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == metrics(finished)
