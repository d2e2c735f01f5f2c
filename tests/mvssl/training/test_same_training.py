"""The same images as a folder, as shards and as .beton: the same batches, views and losses, bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mvssl.config.recipe import Recipe
from pipelines.batch import ViewBatch
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.storage import open_source, split_paths
from tests.samples.tiny_runs import CrashError, crash_at, train
from tools.convert import Convert, convert


@pytest.fixture(scope="module")
def forms(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("forms")
    convert(Convert(src=images, dst=base / "shards", shard_size=0.02))
    convert(Convert(src=images, dst=base / "beton", format="beton", shard_size=0.02))
    return {"folder": images, "shards": base / "shards", "beton": base / "beton"}


def batches(path: Path, recipe: Recipe, **options: int) -> list[ViewBatch]:
    source = open_source(split_paths(path)[0])
    loader = Loader(source, recipe.views, Order(num_images=len(source), batch_size=8, seed=recipe.seed), **options)
    try:
        return list(loader.epoch(1, first_step=1))
    finally:
        loader.close()
        source.close()


@pytest.mark.parametrize("rank", [0, 1])
def test_batches_and_views(forms: dict[str, Path], tiny_recipe: Recipe, rank: int) -> None:
    """From the middle of a later epoch, each of two ranks."""
    expected = batches(forms["folder"], tiny_recipe, rank=rank, world_size=2)
    assert len(expected) == 3
    for form in ("shards", "beton"):
        for batch, other in zip(expected, batches(forms[form], tiny_recipe, rank=rank, world_size=2), strict=True):
            assert torch.equal(batch.index, other.index), form
            assert torch.equal(batch.labels, other.labels), form
            assert all(torch.equal(a, b) for a, b in zip(batch.views, other.views, strict=True)), form


def test_losses_and_weights_of_two_steps(forms: dict[str, Path], tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Also the kNN on val: metrics.jsonl has the same bytes."""
    recipe = dataclasses.replace(
        tiny_recipe, epochs=1, batch_size=16, optimizer=dataclasses.replace(tiny_recipe.optimizer, warmup_epochs=0)
    )
    found = {}
    for form, data in forms.items():
        result = train(recipe, data, tmp_path / form, log_every=1)
        assert result.steps == 2
        metrics = (tmp_path / form / "metrics.jsonl").read_bytes()
        found[form] = (metrics, load_file(tmp_path / form / "backbone.safetensors"))
    metrics, weights = found["folder"]
    assert metrics.count(b'"loss') >= 2
    for form in ("shards", "beton"):
        assert found[form][0] == metrics
        assert found[form][1].keys() == weights.keys()
        assert all(torch.equal(tensor, weights[name]) for name, tensor in found[form][1].items())


def test_run_on_shards_goes_on_with_beton(
    forms: dict[str, Path], finished: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both forms of the same conversion have one fingerprint, so either resumes the other's run, mid-epoch too."""
    crash_at(monkeypatch, 6)
    with pytest.raises(CrashError):
        train(tiny_recipe, forms["shards"], tmp_path / "run", save_every_steps=5)
    monkeypatch.undo()
    train(tiny_recipe, forms["beton"], tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
