"""Which checkpoint is kept as the best one, and runs that stop because their embeddings have collapsed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import mvssl
from mvssl.cli import eval as eval_cli
from mvssl.cli import export as export_cli
from mvssl.cli.train import body
from mvssl.config.evaluation import BackboneSource
from mvssl.config.recipe import Recipe
from mvssl.evaluate.online_knn import OnlineAccuracy
from mvssl.monitor.report import render
from mvssl.runs import checkpoint
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_metrics
from mvssl.runs.results import read_result
from mvssl.runs.summary import read_summary
from mvssl.training import loop
from mvssl.training.step import TrainStep
from mvssl.weights.load import load_backbone
from pipelines.runtime import InputError
from tests.samples.tiny_runs import crash_at, metrics, train


@contextmanager
def accuracies(knn: Sequence[float], probe: Sequence[float]) -> Iterator[None]:
    """The evaluations after epochs 1, 2, ... give these, told apart by the step that the backbone has seen."""

    def evaluate(session: Any, backbone: Any, *rest: Any, **options: Any) -> OnlineAccuracy:
        epoch = evaluate.runs[-1].step // 4 - 1  # type: ignore[attr-defined]
        return OnlineAccuracy(knn={5: knn[epoch], 1: 0.0}, probe=probe[epoch])

    original = loop.Loop.evaluate

    def noting(self: loop.Loop) -> None:
        evaluate.runs = [self]  # type: ignore[attr-defined]
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate_online", evaluate)
        patch.setattr(loop.Loop, "evaluate", noting)
        yield


def best_of(out: Path) -> int:
    step: int = checkpoint.load(out / "checkpoints" / "best").meta["step"]
    return step


def steps_of(out: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


def test_the_best_evaluation_is_kept(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with accuracies(knn=[0.9, 0.5, 0.9], probe=[0.1, 0.3, 0.2]):
        result = train(tiny_recipe, images, tmp_path / "knn", keep_checkpoints=1)
        assert (result.best_step, best_of(tmp_path / "knn"), steps_of(tmp_path / "knn")) == (4, 4, [4, 12])
        assert result.probe == 0.2
        assert result.curves()["probe/top1"][1].tolist() == [0.1, 0.3, 0.2]
        result = train(tiny_recipe, images, tmp_path / "probe", keep_checkpoints=1, keep_best="probe")
        assert (result.best_step, best_of(tmp_path / "probe"), steps_of(tmp_path / "probe")) == (8, 8, [8, 12])
        result = train(tiny_recipe, images, tmp_path / "none", keep_checkpoints=1, keep_best="none")
        assert (result.best_step, steps_of(tmp_path / "none")) == (None, [12])
        assert not (tmp_path / "none" / "checkpoints" / "best").is_symlink()
    log = (tmp_path / "knn" / "train.log").read_text()
    assert log.count("the best kNN so far, kept as checkpoints/best") == 1
    probed = (tmp_path / "probe" / "train.log").read_text()
    assert probed.count("the best linear probe so far, kept as checkpoints/best") == 2
    assert "kNN after epoch 2: top-1 50.00 % (k=5), top-1 0.00 % (k=1); linear probe: top-1 30.00 %" in log
    page = render(RunFolder(tmp_path / "probe"))
    assert "best checkpoint<b>step 8, kNN 50.00 %, probe 30.00 %" in page
    assert "linear probe" in page


def test_a_best_evaluation_is_saved_even_if_no_save_is_due(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with accuracies(knn=[0.5, 0.9, 0.8], probe=[0.0] * 3):
        train(tiny_recipe, images, tmp_path / "run", save_every_epochs=0)
    assert (best_of(tmp_path / "run"), steps_of(tmp_path / "run")) == (8, [8, 12])


def test_the_best_one_survives_crashes_and_another_choice(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with accuracies(knn=[0.9, 0.5, 0.3], probe=[0.1, 0.2, 0.4]):
        train(tiny_recipe, images, tmp_path / "whole", keep_checkpoints=1)
        out = tmp_path / "run"
        with crash_at(6):
            train(tiny_recipe, images, out, keep_checkpoints=1)
        (out / "checkpoints" / "best").unlink()  # killed before it was linked
        with crash_at(10):
            train(tiny_recipe, images, out, keep_checkpoints=1, resume=True)
        assert (best_of(out), steps_of(out)) == (4, [4, 8])
        train(tiny_recipe, images, out, keep_checkpoints=1, resume=True)
        assert metrics(out) == metrics(tmp_path / "whole")
        assert (best_of(out), steps_of(out)) == (4, [4, 12])
        result = train(tiny_recipe, images, out, keep_checkpoints=1, keep_best="probe", resume=True)  # finished
        assert (result.best_step, best_of(out)) == (12, 12)


def test_other_commands_take_the_best_checkpoint(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with accuracies(knn=[0.9, 0.5, 0.3], probe=[0.0] * 3):
        train(tiny_recipe, images, out)
    state = checkpoint.load(out / "checkpoints" / "step-00000004").state["step"]["online"]
    for name in ("best", "4"):
        loaded = load_backbone(BackboneSource(run=out, checkpoint=name))
        assert loaded.about == "online network, step 4"
        tensors = loaded.backbone.state_dict()
        assert all(torch.equal(tensor, state[f"backbone.{key}"]) for key, tensor in tensors.items())
    exported = str(tmp_path / "best.safetensors")
    assert export_cli.body(["--run", str(out), "--checkpoint", "best", "--out", exported]) == 0
    assert eval_cli.body(["knn", "--run", str(out)]) == 0
    assert eval_cli.body(["knn", "--run", str(out), "--checkpoint", "best"]) == 0
    assert eval_cli.body(["knn", "--run", str(out), "--checkpoint", "8"]) == 0
    found = {path.name: read_result(path)["identity"] for path in (out / "eval").glob("knn-*.json")}
    assert set(found) == {"knn-online.json", "knn-online-best.json", "knn-online-step-00000008.json"}
    assert "step 4" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"^checkpoint is 'newest' but must be one of last, best, 4, 8, 12: choose"):
        load_backbone(BackboneSource(run=out, checkpoint="newest"))
    with pytest.raises(InputError, match="checkpoint is 'best' but needs a run"):
        BackboneSource(weights=tmp_path / "best.safetensors", checkpoint="best")


@contextmanager
def collapsing(first: int = 0) -> Iterator[None]:
    """From step `first` on all images have one embedding."""
    original = TrainStep.__call__

    def collapsed(self: TrainStep, views: list[torch.Tensor], number: int) -> Any:
        output = original(self, views, number)
        return dataclasses.replace(output, embedding=torch.ones_like(output.embedding)) if number >= first else output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", collapsed)
        yield


@pytest.fixture
def unlabelled(tiny_recipe: Recipe) -> Recipe:
    return dataclasses.replace(tiny_recipe, evaluation=mvssl.Evaluation(every_epochs=0))


def test_a_run_whose_embeddings_stay_collapsed_stops_saved(images: Path, unlabelled: Recipe, tmp_path: Path) -> None:
    """A warm-up of 4 steps, log points at every step, collapse from step 3 on: 4 + 5 steps."""
    out, options = tmp_path / "run", {"log_every": 1, "collapse_patience": 5}
    said = (
        r"^The embeddings have collapsed: their standard deviation is 0\.000 of the even spread but must be at least "
        r"0\.1, and has not been at any log point since step 3, so nearly all .*--optimizer\.base-lr or a longer "
        r"--optimizer\.warmup-epochs; everything is saved in .*--resume --on-collapse warn trains on from step 9 of 12"
    )
    with collapsing(first=2):
        with pytest.raises(mvssl.Collapsed, match=said):
            train(unlabelled, images, out, **options)
        stopped = read_summary(out / "summary.json")
        assert stopped is not None
        assert (stopped.step, stopped.stopped_by) == (9, "collapse")
        assert checkpoint.load(out / "checkpoints" / "last").meta["step"] == 9
        assert "This run was stopped at step 9: its embeddings had collapsed" in " ".join(
            render(RunFolder(out)).split()
        )
        with pytest.raises(mvssl.Collapsed, match="since step 3, so"):  # at once
            train(unlabelled, images, out, **options, resume=True)
        assert [row["step"] for row in read_metrics(out / "metrics.jsonl")] == list(range(1, 10))
        interrupted = tmp_path / "interrupted"
        with crash_at(7):
            train(unlabelled, images, interrupted, **options, save_every_steps=3)
        with pytest.raises(mvssl.Collapsed, match=said):  # where it would have stopped without the crash
            train(unlabelled, images, interrupted, **options, resume=True)
        assert metrics(interrupted) == metrics(out)
        result = train(unlabelled, images, out, **options, resume=True, on_collapse="warn")
    assert result.steps == 12
    train(unlabelled, images, tmp_path / "well", **options)
    assert read_summary(tmp_path / "well" / "summary.json").stopped_by is None


def test_by_default_a_short_run_is_warned_and_not_stopped(images: Path, unlabelled: Recipe, tmp_path: Path) -> None:
    with collapsing():
        assert train(unlabelled, images, tmp_path / "run", log_every=1).steps == 12
    assert "The embeddings are collapsing" in (tmp_path / "run" / "train.log").read_text()


def test_a_run_whose_evaluations_improve_is_not_stopped(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with collapsing(), accuracies(knn=[0.5, 0.6, 0.7], probe=[0.0] * 3):
        assert train(tiny_recipe, images, tmp_path / "better", log_every=1, collapse_patience=4).steps == 12
    with collapsing(), accuracies(knn=[0.5, 0.5, 0.5], probe=[0.0] * 3), pytest.raises(mvssl.Collapsed):
        train(tiny_recipe, images, tmp_path / "same", log_every=1, collapse_patience=4)


def test_the_command_exits_with_1(images: Path, tmp_path: Path) -> None:
    common = ("--data", str(images), "--out", str(tmp_path / "run"), "--device", "cpu", "--epochs", "2")
    few = ("--batch-size", "4", "--optimizer.warmup-epochs", "0", "--log-every", "1", "--evaluation.every-epochs", "0")
    with collapsing(), pytest.raises(mvssl.Collapsed, match="everything is saved") as failure:
        body(["laptop", *common, *few, "--collapse-patience", "3"])
    assert isinstance(failure.value, InputError)  # for which run_cli prints the message and exits with 1
    assert os.readlink(tmp_path / "run" / "checkpoints" / "last") == "step-00000004"
