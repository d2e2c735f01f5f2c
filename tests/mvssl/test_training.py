"""Whole runs: what they leave, exact resumption, and what goes wrong with a sentence."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from PIL import Image

import mvssl
import mvssl.monitor.jsonl
from mvssl import checkpoint, trainer
from mvssl.evaluate.online import evaluate_knn
from mvssl.monitor.jsonl import read_jsonl
from mvssl.recipe import Optimizer, Recipe
from mvssl.run_folder import RunFolder
from mvssl.step import TrainStep
from pipelines.errors import InputError

STEPS = 12  # 3 epochs of 4 steps, see conftest


class CrashError(Exception):
    """A crash in the middle of a run."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the training step number `step` (from 0) crash."""
    original = TrainStep.__call__

    def crashing(self: TrainStep, views: list[torch.Tensor], number: int) -> Any:
        if number == step:
            raise CrashError
        return original(self, views, number)

    monkeypatch.setattr(TrainStep, "__call__", crashing)


def train(recipe: Recipe, data: Path, out: Path, **options: Any) -> mvssl.TrainResult:
    return mvssl.train(recipe, data=data, out=out, device="cpu", **{"log_every": 3, **options})


@pytest.fixture(scope="module")
def finished(images: Path, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One uninterrupted run of the tiny recipe."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(tiny_recipe, images, out)
    return out


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


@pytest.mark.parametrize("crash", [1, 4, 6, 11])
def test_resume_after_a_crash_is_bitwise_the_uninterrupted_run(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_at(patch, crash)
        with pytest.raises(CrashError):
            train(tiny_recipe, images, out, save_every_steps=1)
    assert checkpoint.load(out / "checkpoints" / "last").meta["step"] == crash
    train(tiny_recipe, images, out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    ours, theirs = (checkpoint.load(run / "checkpoints" / "last").state["step"] for run in (out, finished))
    for network in ("online", "target"):
        assert ours[network].keys() == theirs[network].keys()
        assert all(torch.equal(ours[network][name], theirs[network][name]) for name in ours[network])


def test_what_a_killed_run_wrote_beyond_its_checkpoint_is_cut_off(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints at epochs only: the metrics of steps 5 and 6 are written, lost with the crash, and written again."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_at(patch, 7)
        with pytest.raises(CrashError):
            train(tiny_recipe, images, out)
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")][-1] == 6
    train(tiny_recipe, images, out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_a_signal_in_mid_evaluation_leaves_it_for_the_resumption(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> dict[int, float]:
        signal.raise_signal(signal.SIGTERM)
        return evaluate_knn(*arguments, **options)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate_knn", interrupted)
        with pytest.raises(mvssl.Interrupted, match="SIGTERM came after step 4 of 12"):
            train(tiny_recipe, images, out)
    assert {row["kind"] for row in read_jsonl(out / "metrics.jsonl")} == {"train"}
    assert checkpoint.load(out / "checkpoints" / "last").meta["evaluated"] is False
    train(tiny_recipe, images, out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_an_error_in_the_evaluation_does_not_lose_the_epoch(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> dict[int, float]:
        raise CrashError

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate_knn", failing)
        with pytest.raises(CrashError):
            train(tiny_recipe, images, out)
    assert checkpoint.load(out / "checkpoints" / "last").meta["step"] == 4
    train(tiny_recipe, images, out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_resume_before_the_first_checkpoint_begins_at_the_beginning(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_at(patch, 2)
        with pytest.raises(CrashError):
            train(tiny_recipe, images, out)
    train(tiny_recipe, images, out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_resume_is_exact_with_drop_path_and_another_logging_interval(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drop path draws from torch's generator, whose state must come back with the rest."""
    backbone = mvssl.Backbone(name="test_vit", drop_path=0.5)
    recipe = dataclasses.replace(tiny_recipe, backbone=backbone, evaluation=mvssl.Evaluation(every_epochs=0))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe, images, whole, log_every=4)
    with monkeypatch.context() as patch:
        crash_at(patch, 6)
        with pytest.raises(CrashError):
            train(recipe, images, broken, log_every=1, save_every_steps=5)
    train(recipe, images, broken, log_every=4, resume=True)
    ours, theirs = (checkpoint.load(run / "checkpoints" / "last").state["step"]["online"] for run in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    last_ours, last_theirs = (list(read_jsonl(run / "metrics.jsonl"))[-1] for run in (broken, whole))
    assert last_ours == last_theirs


def test_weights_that_are_not_finite_are_never_saved(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of the step that makes them is still finite."""
    original = TrainStep.__call__

    def poisoned(self: TrainStep, views: list[torch.Tensor], number: int) -> Any:
        output = original(self, views, number)
        if number == 7:
            with torch.no_grad():
                next(self.online.parameters()).fill_(float("inf"))
        return output

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    out = tmp_path / "run"
    with pytest.raises(mvssl.Diverged, match="Step 8 made weights that are not finite"):
        train(tiny_recipe, images, out)
    saved = checkpoint.load(out / "checkpoints" / "last")
    assert saved.meta["step"] == 4
    assert all(tensor.isfinite().all() for tensor in safetensors.torch.load_file(out / "backbone.safetensors").values())


def test_resuming_a_finished_run_changes_nothing(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    (out / "backbone.safetensors").unlink()  # a kill between checkpoint and export
    result = train(tiny_recipe, images, out, resume=True)
    assert result.steps == STEPS
    assert result.knn == mvssl.monitor.jsonl.last_knn(finished / "metrics.jsonl")
    ours, theirs = (safetensors.torch.load_file(run / "backbone.safetensors") for run in (out, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert (out / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_the_seed_changes_the_run(finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    train(dataclasses.replace(tiny_recipe, seed=1, epochs=1), images, tmp_path / "run")
    first = next(read_jsonl(tmp_path / "run" / "metrics.jsonl"))
    assert first["loss"] != next(read_jsonl(finished / "metrics.jsonl"))["loss"]


def test_resume_with_another_recipe_names_the_fields(finished: Path, images: Path, tiny_recipe: Recipe) -> None:
    other = dataclasses.replace(tiny_recipe, epochs=5, optimizer=Optimizer(base_lr=2.0, warmup_epochs=1))
    before = (finished / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"another recipe \(optimizer\.base_lr: 3\.0 -> 2\.0; epochs: 3 -> 5\)"):
        train(other, images, finished, resume=True)
    assert (finished / "config.json").read_bytes() == before


def test_resume_with_other_data_is_refused(finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(images, other)
    next((other / "train" / "class_0").iterdir()).unlink()
    with pytest.raises(InputError, match="begun with other images"):
        train(tiny_recipe, other, finished, resume=True)


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
    assert (out / "note.txt").read_text() == "by hand"  # not ours, so not deleted


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


def test_an_out_that_cannot_be_written_is_a_sentence(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"out is .* but cannot be written \(Not a directory\)"):
        train(tiny_recipe, images, tmp_path / "file" / "run")


def test_nan_stops_the_run_and_says_what_led_there(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, seen = TrainStep.__call__, {}

    def poisoned(self: TrainStep, views: list[torch.Tensor], number: int) -> Any:
        if number == 6:
            with torch.no_grad():
                next(self.online.projector.parameters()).fill_(float("nan"))
        output = original(self, views, number)
        seen[number] = output.loss.item()
        return output

    monkeypatch.setattr(TrainStep, "__call__", poisoned)
    out = tmp_path / "run"
    with pytest.raises(mvssl.Diverged, match=r"loss or gradient of step 7 is not finite.*failure\.json.*base-lr"):
        train(tiny_recipe, images, out, log_every=5)
    report = json.loads((out / "failure.json").read_text())
    assert report["step"] == 7
    assert len(report["keys"]) == tiny_recipe.batch_size
    assert all((images / "train" / key).is_file() for key in report["keys"])
    saved = checkpoint.load(out / "checkpoints" / "last")
    assert saved.meta["step"] == 4
    assert all(tensor.isfinite().all() for tensor in saved.state["step"]["online"].values())


def test_a_full_disk_keeps_the_last_checkpoint(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = torch.save, []

    def filling(state: Any, file: Any) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        original(state, file)

    monkeypatch.setattr(torch, "save", filling)
    with pytest.raises(InputError, match=r"step 8 could not be written.*No space left"):
        train(tiny_recipe, images, tmp_path / "run")
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last").meta["step"] == 4


def test_a_damaged_checkpoint_is_a_sentence_and_nothing_is_lost(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    state = out / "checkpoints" / "last" / "state.pt"
    state.write_bytes(state.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"damaged.*ln -sfn step-00000008"):
        train(tiny_recipe, images, out, resume=True)
    (out / "checkpoints" / "last").unlink()
    (out / "checkpoints" / "last").symlink_to("step-00000008")
    train(tiny_recipe, images, out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert checkpoint.load(out / "checkpoints" / "last").meta["step"] == STEPS


def test_init_from_takes_weights_and_begins_at_step_zero(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[str, torch.Tensor] = {}
    original = TrainStep.__call__

    def spying(self: TrainStep, views: list[torch.Tensor], number: int) -> Any:
        if number == 0:
            first.update({name: tensor.clone() for name, tensor in self.online.state_dict().items()})
        return original(self, views, number)

    monkeypatch.setattr(TrainStep, "__call__", spying)
    recipe = dataclasses.replace(tiny_recipe, epochs=1)
    saved = checkpoint.load(finished / "checkpoints" / "last").state["step"]["online"]
    train(recipe, images, tmp_path / "a", init_from=finished)
    assert all(torch.equal(first[name], saved[name]) for name in saved)
    train(recipe, images, tmp_path / "b", init_from=finished / "backbone.safetensors")
    assert all(torch.equal(first[name], saved[name]) for name in saved if name.startswith("backbone."))
    assert next(row["step"] for row in read_jsonl(tmp_path / "b" / "metrics.jsonl")) == 3
    wider = dataclasses.replace(recipe, projector=dataclasses.replace(recipe.projector, hidden=(48,)))
    with pytest.raises(InputError, match="do not fit the recipe"):
        train(wider, images, tmp_path / "c", init_from=finished / "checkpoints" / "last")
    with pytest.raises(InputError, match="there is nothing of that name"):
        train(recipe, images, tmp_path / "c", init_from=tmp_path / "misspelt")
    assert not (tmp_path / "c").exists()


def test_unlabelled_images_train_without_knn(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in (images / "train").rglob("*.jpg"):
        shutil.copy(path, flat / f"{path.parent.name}_{path.name}")
    result = train(dataclasses.replace(tiny_recipe, epochs=1), flat, tmp_path / "run")
    assert result.knn == {}
    assert {row["kind"] for row in read_jsonl(tmp_path / "run" / "metrics.jsonl")} == {"train"}
    assert "no kNN" in (tmp_path / "run" / "train.log").read_text()


def test_a_bad_image_is_named_and_replaced(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(images, data)
    victim = data / "train" / "class_1" / "003.jpg"
    victim.write_bytes(victim.read_bytes()[:200])
    train(dataclasses.replace(tiny_recipe, epochs=2), data, tmp_path / "run")
    log = (tmp_path / "run" / "train.log").read_text()
    assert "class_1/003.jpg" in log
    assert checkpoint.load(tmp_path / "run" / "checkpoints" / "last").meta["step"] == 8


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
