"""Bit-exact resumption after crashes, signals and damage, and starts from the weights of another run."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import mvssl
from mvssl.config.recipe import Optimizer, Recipe
from mvssl.evaluate.online_knn import evaluate_online
from mvssl.runs import checkpoint
from mvssl.runs.jsonl import last_knn, read_jsonl
from mvssl.runs.summary import read_summary
from mvssl.training import loop
from mvssl.training.step import TrainStep
from pipelines.runtime import InputError
from tests.samples.tiny_runs import STEPS, CrashError, crash_at, metrics, train


@pytest.mark.slow
@pytest.mark.parametrize("crash", [1, 4, 6, 11])
def test_resume_after_a_crash_is_bitwise_the_uninterrupted_run(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, crash: int
) -> None:
    out = tmp_path / "run"
    with crash_at(crash):
        train(tiny_recipe, images, out, save_every_steps=1)
    assert checkpoint.load(out / "checkpoints" / "last").meta["step"] == crash
    train(tiny_recipe, images, out, resume=True)
    assert metrics(out) == metrics(finished)
    ours, theirs = (checkpoint.load(run / "checkpoints" / "last").state["step"] for run in (out, finished))
    for network in ("online", "target"):
        assert ours[network].keys() == theirs[network].keys()
        assert all(torch.equal(ours[network][name], theirs[network][name]) for name in ours[network])


def test_what_a_killed_run_wrote_beyond_its_checkpoint_is_cut_off(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """Checkpoints at epochs only: the metrics of steps 5 and 6 are written, cut off on resuming, and written again."""
    out = tmp_path / "run"
    with crash_at(7):
        train(tiny_recipe, images, out)
    assert [row["step"] for row in read_jsonl(out / "metrics.jsonl")][-1] == 6
    train(tiny_recipe, images, out, resume=True)
    assert metrics(out) == metrics(finished)


def test_an_evaluation_interrupted_by_a_signal_is_repeated_after_resuming(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return evaluate_online(*arguments, **options)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_online", interrupted)
        with pytest.raises(mvssl.Interrupted, match="SIGTERM came after step 4 of 12"):
            train(tiny_recipe, images, out)
    assert {row["kind"] for row in read_jsonl(out / "metrics.jsonl")} == {"train"}
    assert checkpoint.load(out / "checkpoints" / "last").meta["evaluated"] is False
    stopped = read_summary(out / "summary.json")
    assert stopped is not None
    assert (stopped.step, stopped.total_steps, stopped.stopped_by) == (4, 12, "SIGTERM")
    train(tiny_recipe, images, out, resume=True)
    assert metrics(out) == metrics(finished)


def test_an_error_in_the_evaluation_does_not_lose_the_epoch(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise CrashError

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_online", failing)
        with pytest.raises(CrashError):
            train(tiny_recipe, images, out)
    assert checkpoint.load(out / "checkpoints" / "last").meta["step"] == 4
    train(tiny_recipe, images, out, resume=True)
    assert metrics(out) == metrics(finished)


def test_resume_before_the_first_checkpoint_starts_again(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with crash_at(2):
        train(tiny_recipe, images, out)
    train(tiny_recipe, images, out, resume=True)
    assert metrics(out) == metrics(finished)


def test_resume_is_exact_with_drop_path_and_another_logging_interval(
    images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """Drop path samples from torch's generator, which must give the same numbers in the resumed run."""
    backbone = mvssl.Backbone(name="test_vit", drop_path=0.5)
    recipe = dataclasses.replace(tiny_recipe, backbone=backbone, evaluation=mvssl.Evaluation(every_epochs=0))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(recipe, images, whole, log_every=4)
    with crash_at(6):
        train(recipe, images, broken, log_every=1, save_every_steps=5)
    train(recipe, images, broken, log_every=4, resume=True)
    ours, theirs = (checkpoint.load(run / "checkpoints" / "last").state["step"]["online"] for run in (broken, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    last_ours, last_theirs = (list(read_jsonl(run / "metrics.jsonl"))[-1] for run in (broken, whole))
    assert last_ours == last_theirs


def test_resuming_a_finished_run_changes_nothing(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    (out / "backbone.safetensors").unlink()  # a kill between checkpoint and export
    result = train(tiny_recipe, images, out, resume=True)
    assert result.steps == STEPS
    assert result.knn == last_knn(finished / "metrics.jsonl")
    ours, theirs = (safetensors.torch.load_file(run / "backbone.safetensors") for run in (out, finished))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(out) == metrics(finished)


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
    with pytest.raises(InputError, match="started with other images"):
        train(tiny_recipe, other, finished, resume=True)


def test_a_damaged_checkpoint_is_reported_and_an_earlier_one_resumes(
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
    assert metrics(out) == metrics(finished)
    assert checkpoint.load(out / "checkpoints" / "last").meta["step"] == STEPS


def test_init_from_loads_weights_and_starts_at_step_zero(
    finished: Path,
    images: Path,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
    said = "projector, predictors of global, local, cutout"
    assert said in (tmp_path / "a" / "train.log").read_text()
    assert said in " ".join(capsys.readouterr().out.split())
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
