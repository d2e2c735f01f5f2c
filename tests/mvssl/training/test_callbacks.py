"""Callbacks are told of steps, epochs and saves; they may end a run, and their faults lose nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mvssl
from mvssl.config.recipe import Recipe
from mvssl.training.callbacks import hooks_of
from pipelines.runtime import InputError
from tests.samples.tiny_runs import metrics, train


class Recorder:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []
        self.losses: dict[int, dict[str, float]] = {}

    def on_step_end(self, state: mvssl.TrainState) -> None:
        self.told.append(("step", state.step, state.epoch, state.logged, state.metrics.get("loss")))
        self.losses[state.step] = state.losses()

    def on_epoch_end(self, state: mvssl.TrainState) -> None:
        self.told.append(("epoch", state.step, state.epoch, round(state.metrics["knn/top1"], 6)))

    def on_save(self, state: mvssl.TrainState) -> None:
        assert state.checkpoint is not None
        self.told.append(("save", state.step, json.loads((state.checkpoint / "checkpoint.json").read_text())["step"]))


def test_a_change_of_the_working_directory_changes_nothing(
    images: Path, tiny_recipe: Recipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = Path(os.path.relpath(images))
    result = train(tiny_recipe, data, Path("run"), callbacks=lambda state: os.chdir("/"))
    assert Path.cwd() == Path("/")
    assert metrics(tmp_path / "run") == metrics(finished)
    assert result.out == tmp_path / "run"
    assert result.curves()["loss"][0][-1] == 12
    shutil.rmtree(result.out)
    with pytest.raises(InputError, match=r"run has no metrics\.jsonl any more: put the run folder back"):
        result.curves()


def test_what_callbacks_are_told(images: Path, tiny_recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    recorder, steps = Recorder(), []
    out = tmp_path / "run"
    result = train(
        tiny_recipe, images, out, callbacks=[recorder, lambda state: steps.append((state.steps, state.epochs))]
    )
    assert metrics(out) == metrics(finished), "callbacks change no numbers"
    rows = [json.loads(line) for line in metrics(out).splitlines()]
    loss = {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}
    top1 = {row["step"]: row["top1"] for row in rows if row["kind"] == "knn"}
    expected: list[tuple[Any, ...]] = []
    for step in range(1, 13):
        latest = max((logged for logged in loss if logged <= step), default=None)
        expected.append(("step", step, (step - 1) // 4, step in loss, None if latest is None else loss[latest]))
        if step % 4 == 0:
            expected.append(("epoch", step, step // 4 - 1, round(top1[step], 6)))
            expected.append(("save", step, step))
    assert recorder.told == expected
    assert steps == [(12, 3)] * 12
    assert set(recorder.losses[1]) == {"global", "local", "cutout"}
    means = {step: sum(recorder.losses[n]["local"] for n in range(step - 2, step + 1)) / 3 for step in (3,)}
    assert means[3] == pytest.approx(next(row["loss/local"] for row in rows if row["step"] == 3), rel=1e-5)
    assert result.stopped_by is None


async def waits(state: mvssl.TrainState) -> bool:
    return True


def yields(self: object, state: mvssl.TrainState) -> Iterator[bool]:
    yield True


@pytest.mark.parametrize("answer", [np.True_, torch.tensor(True)])
def test_true_of_other_libraries_ends_a_run_and_gradients_stay_on(
    answer: Any, images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    def evaluates(state: mvssl.TrainState) -> Any:
        torch.set_grad_enabled(False)
        return answer if state.step == 2 else 1

    result = train(tiny_recipe, images, tmp_path / "run", callbacks=evaluates)
    assert (result.steps, result.stopped_by) == (2, "evaluates")
    assert torch.is_grad_enabled()


def test_a_callback_that_exits_loses_nothing_and_checkpoints_are_loaded(
    images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    found: list[mvssl.FrozenBackbone] = []

    class Exits:
        def on_save(self, state: mvssl.TrainState) -> None:
            assert state.checkpoint is not None
            found.append(mvssl.load_backbone(state.checkpoint))
            raise SystemExit(mvssl.InputError("a sentence."))

    with pytest.raises(mvssl.CallbackFailed, match=r"raised SystemExit: a sentence at step 4: everything is saved"):
        train(tiny_recipe, images, tmp_path / "run", callbacks=Exits())
    assert "step 4" in found[0].about
    again = mvssl.load_backbone(tmp_path / "run", checkpoint=4)
    assert all(torch.equal(one, other) for one, other in zip(found[0].parameters(), again.parameters(), strict=True))
    with pytest.raises(mvssl.InputError, match="checkpoint is '7' but must be one of"):
        mvssl.load_backbone(tmp_path / "run", checkpoint=7)


@pytest.mark.parametrize("how", ["returns True", "raises StopTraining"])
def test_a_callback_ends_a_run_that_can_be_resumed(
    how: str, images: Path, tiny_recipe: Recipe, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Patience:
        def on_epoch_end(self, state: mvssl.TrainState) -> bool:
            if state.epoch == 1 and how == "raises StopTraining":
                raise mvssl.StopTraining("no better for one epoch")
            return state.epoch == 1

    out = tmp_path / "run"
    result = train(tiny_recipe, images, out, callbacks=Patience())
    assert (result.steps, result.stopped_by) == (8, "Patience.on_epoch_end")
    printed = capsys.readouterr().out
    assert "the callback Patience.on_epoch_end ends the run at step 8" in printed
    assert ("no better for one epoch" in printed) == (how == "raises StopTraining")
    assert json.loads((out / "summary.json").read_text())["stopped_by"] == "Patience.on_epoch_end"
    assert train(tiny_recipe, images, out, resume=True).steps == 12
    assert metrics(out) == metrics(finished)


@pytest.mark.parametrize(("event", "step"), [("on_step_end", 2), ("on_epoch_end", 4), ("on_save", 4), ("on_save", 12)])
def test_a_callback_that_raises_loses_nothing(
    event: str, step: int, images: Path, tiny_recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    def fails(state: mvssl.TrainState) -> None:
        if state.step >= step:
            raise KeyError("top5")

    out = tmp_path / "run"
    words = (
        rf"The callback callbacks\['{event}'\] raised KeyError: 'top5' at step {step}: everything is saved in .*run;"
    )
    with pytest.raises(mvssl.CallbackFailed, match=words) as caught:
        train(tiny_recipe, images, out, callbacks={event: fails})
    assert isinstance(caught.value.__cause__, KeyError)
    if event != "on_step_end":
        assert (out / "checkpoints" / f"step-{step:08d}").exists()
        return
    assert train(tiny_recipe, images, out, resume=True).steps == 12
    assert metrics(out) == metrics(finished)


def test_a_stop_at_the_last_step_is_the_end(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(tiny_recipe, epochs=1, evaluation=replace(tiny_recipe.evaluation, every_epochs=0))
    result = train(recipe, images, tmp_path / "run", callbacks=lambda state: state.step == 4)
    assert (result.steps, result.stopped_by) == (4, None)


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        (3, "callbacks is 3 but must be an object with one of on_step_end"),
        (Recorder, r"callbacks is the class Recorder but must be an object: write Recorder\(\)"),
        ([Recorder(), "loss"], r"callbacks\[1\] is 'loss' but must be an object with one of"),
        ({"on_stepend": print}, "callbacks has 'on_stepend': .* did you mean on_step_end"),
        ({"on_save": 3}, "callbacks has 'on_save': 3 but must be"),
        (type("Mine", (), {"on_epoch_ends": print})(), "did you mean on_epoch_end for on_epoch_ends"),
        (type("Mine", (), {"on_save": None})(), "make its on_save a function"),
        (waits, r"callbacks has waits, which is async but must be a plain function: write it with def"),
        ([type("Mine", (), {"on_save": yields})()], r"callbacks\[0\] has Mine.on_save, which is a generator but"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks: Any, words: str) -> None:
    with pytest.raises(mvssl.InputError, match=words):
        mvssl.train("demo", data="photos", out="run", callbacks=callbacks)


def test_hooks_in_the_order_given() -> None:
    hooks = hooks_of((Recorder(), print, {"on_save": print}))
    assert [hook.name for hook in hooks["on_step_end"]] == ["Recorder.on_step_end", "print"]
    assert [hook.name for hook in hooks["on_save"]] == ["Recorder.on_save", "callbacks[2]['on_save']"]
    assert not any(hooks_of(None).values())
