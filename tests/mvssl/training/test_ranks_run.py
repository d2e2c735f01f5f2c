"""Whole runs on several gloo ranks: they match one process, stop together and resume on any number of ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mvssl.config.recipe import Backbone, Head, Recipe
from mvssl.config.serialize import to_dict
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_jsonl
from mvssl.training.step import TrainStep
from pipelines.batch import ViewBatch
from pipelines.loader import Loader
from pipelines.runtime import InputError
from tests.samples.ranks import Outcome, results, run_ranks
from tests.samples.tiny_runs import STEPS, train

STOP = 5  # the step after which a signal or a NaN comes, on rank 1 alone


@pytest.fixture(scope="module")
def recipe(tiny_recipe: Recipe) -> Recipe:
    """The tiny recipe without BatchNorm: its numbers hardly depend on the number of ranks."""
    return replace(
        tiny_recipe,
        backbone=Backbone(name="test_vit"),
        projector=Head(hidden=(32,), out=16, norm="layer"),
        predictor=Head(hidden=(32,), out=16, norm="layer"),
    )


def metrics(out: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(out / "metrics.jsonl"))


def trained(recipe: Recipe, data: Path, out: Path, options: dict[str, Any]) -> dict[int, float]:
    """kNN accuracy of a run; called on a rank."""
    return train(recipe, data, out, **options).knn


def interrupted(recipe: Recipe, data: Path, out: Path) -> None:
    """A run whose rank 1 gets SIGTERM during a step; called on a rank."""
    original = TrainStep.__call__

    def signalled(self: TrainStep, views: list[torch.Tensor], number: int) -> Any:
        if number == STOP - 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, views, number)

    pytest.MonkeyPatch().setattr(TrainStep, "__call__", signalled)  # never undone: the process is the rank's own
    train(recipe, data, out)


def poisoned(recipe: Recipe, data: Path, out: Path) -> None:
    """A run whose rank 1 gets a NaN in a view; called on a rank."""
    original = Loader._consume

    def broken(self: Loader, *arguments: Any) -> Any:
        for number, batch in enumerate(original(self, *arguments)):
            if number == 1 and arguments[0] == 1 and os.environ["RANK"] == "1":
                batch.views[0][0] = float("nan")
            yield ViewBatch(views=batch.views, index=batch.index, labels=batch.labels)

    pytest.MonkeyPatch().setattr(Loader, "_consume", broken)  # never undone: the process is the rank's own
    train(recipe, data, out)


def test_two_ranks_train_what_one_process_does(recipe: Recipe, images: Path, tmp_path: Path) -> None:
    single = train(recipe, images, tmp_path / "one").knn
    for knn in results(run_ranks(trained, 2, recipe, images, tmp_path / "two", {})):
        assert knn.keys() == single.keys()
        assert all(abs(knn[k] - single[k]) <= 1 / 12 + 1e-9 for k in knn)  # one of the 12 validation images may change
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert [(row["kind"], row["step"]) for row in two] == [(row["kind"], row["step"]) for row in one]
    for ours, expected in zip(two, one, strict=True):
        if expected["kind"] == "train":
            for name in ("loss", "loss/global", "loss/local", "loss/cutout", "lr", "target_decay", "grad_norm"):
                assert ours[name] == pytest.approx(expected[name], rel=2e-4), name
    assert (tmp_path / "two" / "backbone.safetensors").exists()
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


def test_a_signal_to_one_rank_stops_all_and_any_number_of_ranks_resumes(
    recipe: Recipe, images: Path, tmp_path: Path
) -> None:
    # Stochastic depth is seeded by (seed, step, rank): resuming on two ranks is bit-identical to the uninterrupted run.
    recipe = replace(recipe, backbone=Backbone(name="test_vit", drop_path=0.2))
    whole, out = tmp_path / "whole", tmp_path / "run"
    results(run_ranks(trained, 2, recipe, images, whole, {}))
    for rank in run_ranks(interrupted, 2, recipe, images, out):
        assert rank.error == "Interrupted", rank.message
        assert f"SIGTERM came after step {STOP} of {STEPS}" in rank.message
    saved = json.loads((out / "checkpoints" / "last" / "checkpoint.json").read_text())
    assert saved["step"] == STOP
    for ranks in (1, 2, 4):
        again = tmp_path / f"again{ranks}"
        shutil.copytree(out, again, symlinks=True)
        if ranks == 1:
            train(recipe, images, again, resume=True)
        else:
            results(run_ranks(trained, ranks, recipe, images, again, {"resume": True}))
        assert metrics(again)[-1]["step"] == STEPS
        assert metrics(again)[0] == metrics(whole)[0]
    assert (tmp_path / "again2" / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_nan_on_one_rank_stops_all(recipe: Recipe, images: Path, tmp_path: Path) -> None:
    outcomes: list[Outcome] = run_ranks(poisoned, 2, recipe, images, tmp_path / "run")
    for rank in outcomes:
        assert rank.error == "Diverged", rank.message
        assert "step 6 is not finite" in rank.message
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert failure["step"] == 6
    assert len(set(failure["index"])) == len(failure["keys"]) == recipe.batch_size  # of both ranks
    saved = json.loads((tmp_path / "run" / "checkpoints" / "last" / "checkpoint.json").read_text())
    assert saved["step"] == 4  # the end of the first epoch, untouched


def test_torchrun_with_the_command(recipe: Recipe, images: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(replace(recipe, epochs=1))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mvssl.cli.train", str(tmp_path / "recipe.json"), "--data", str(images), "--device", "cpu"]
    command += ["--out", str(tmp_path / "run"), "--log-every", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr
    assert "batch 8 (4 on each of 2 processes)" in done.stdout
    assert done.stdout.count("Training demo") == 1
    assert [row["step"] for row in metrics(tmp_path / "run") if row["kind"] == "train"] == [2, 4]
    again = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    assert again.returncode != 0
    assert again.stderr.count("which already holds a run") == 1  # by one process only


@pytest.mark.slow
def test_ranks_whose_torchrun_is_killed_save_and_end(recipe: Recipe, images: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(replace(recipe, epochs=500))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "mvssl.cli.train", str(tmp_path / "recipe.json"), "--data", str(images), "--device", "cpu"]
    command += ["--out", str(tmp_path / "run"), "--log-every", "1", "--save-every-epochs", "0"]
    torchrun = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    folder = RunFolder(tmp_path / "run")
    deadline = time.monotonic() + 120
    while not (folder.metrics.exists() and folder.metrics.read_bytes().count(b"\n") > 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    torchrun.kill()
    torchrun.wait()
    while True:
        try:
            with folder.claim():
                break
        except InputError:  # rank 0 still holds it
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert "SIGTERM came after step" in folder.log.read_text()
    assert folder.has_checkpoint()
