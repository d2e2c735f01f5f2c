"""Errors of a run are explained, and no data is lost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import mvssl
from mvssl.config.recipe import Recipe
from mvssl.runs import checkpoint
from mvssl.training.step import TrainStep
from pipelines.runtime import InputError
from tests.samples.tiny_runs import train


def test_weights_that_are_not_finite_are_never_saved(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of that step is still finite."""
    original = TrainStep.__call__

    def poisoned(self: TrainStep, views: list[torch.Tensor], number: int) -> Any:
        output = original(self, views, number)
        if number == 7:
            with torch.no_grad():
                next(self.online.parameters()).fill_(float("inf"))
        return output

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    out = tmp_path / "run"
    with pytest.raises(mvssl.Diverged, match="The weights after step 8 are not finite"):
        train(tiny_recipe, images, out)
    saved = checkpoint.load(out / "checkpoints" / "last")
    assert saved.meta["step"] == 4
    assert all(tensor.isfinite().all() for tensor in safetensors.torch.load_file(out / "backbone.safetensors").values())


def test_an_existing_run_is_refused_then_overwritten(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe, out = dataclasses.replace(tiny_recipe, epochs=1), tmp_path / "run"
    train(recipe, images, out)
    (out / "note.txt").write_text("by hand")
    (out / "checkpoints" / "last" / "mark").write_text("of the first run")
    with pytest.raises(InputError, match=r"already holds a run: add --resume .* --overwrite"):
        train(recipe, images, out)
    assert (out / "checkpoints" / "last" / "mark").exists()
    train(recipe, images, out, overwrite=True)
    assert not (out / "checkpoints" / "last" / "mark").exists()
    assert (out / "note.txt").read_text() == "by hand"  # not written by the run, so not deleted


def test_a_folder_that_is_no_run_is_never_deleted(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    precious = tmp_path / "thesis.tex"
    precious.write_text("five years")
    with pytest.raises(InputError, match="no run folder, so it is left alone"):
        train(tiny_recipe, images, tmp_path, overwrite=True)
    assert precious.read_text() == "five years"


def test_another_programs_config_is_no_run(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "weights.bin").write_text("precious")
    with pytest.raises(InputError, match="no run folder, so it is left alone"):
        train(tiny_recipe, images, tmp_path, overwrite=True)
    assert (tmp_path / "weights.bin").exists()


def test_an_out_that_cannot_be_written_is_explained(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"out is .* but cannot be written \(Not a directory\)"):
        train(tiny_recipe, images, tmp_path / "file" / "run")


def test_nan_stops_the_run_and_reports_the_batch(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = TrainStep.__call__

    def poisoned(self: TrainStep, views: list[torch.Tensor], number: int) -> Any:
        if number == 6:
            with torch.no_grad():
                next(self.online.projector.parameters()).fill_(float("nan"))
        return original(self, views, number)

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    out = tmp_path / "run"
    with pytest.raises(mvssl.Diverged, match=r"loss or gradient of step 7 is not finite.*failure\.json.*base-lr"):
        train(tiny_recipe, images, out, log_every=5)
    report = json.loads((out / "failure.json").read_text())
    assert report["step"] == 7
    assert json.loads((out / "summary.json").read_text())["stopped_by"] == "divergence"
    assert len(report["keys"]) == tiny_recipe.batch_size
    assert all((images / "train" / key).is_file() for key in report["keys"])
    saved = checkpoint.load(out / "checkpoints" / "last")
    assert saved.meta["step"] == 4
    assert all(tensor.isfinite().all() for tensor in saved.state["step"]["online"].values())


def test_a_full_disk_keeps_the_last_checkpoint(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.save
    calls: list[None] = []

    def filling(state: Any, file: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", filling)
    with pytest.raises(InputError, match=r"step 8 could not be written.*No space left"):
        train(tiny_recipe, images, tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last").meta["step"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 64}, "batch_size is 64 but the data set has only 36 images"),
        ({"method": "byl"}, "byl"),
        ({"backbone": mvssl.Backbone(name="resnet1")}, "resnet1"),
        ({"evaluation": mvssl.Evaluation(k=(50,), resize=32, crop=32)}, "at most 36"),
    ],
)
def test_recipes_that_do_not_fit_are_refused_before_anything_is_written(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(dataclasses.replace(tiny_recipe, **change), images, tmp_path / "run")
    assert not (tmp_path / "run").exists()
