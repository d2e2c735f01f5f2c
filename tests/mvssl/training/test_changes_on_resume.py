"""What may change when a run is resumed: how steps are executed, micro-batches, precision, evaluation and names."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mvssl
from mvssl.cli import train as train_cli
from mvssl.config.recipe import Backbone, Head, Optimizer, Recipe
from mvssl.config.serialize import to_dict
from mvssl.evaluate.online_knn import evaluate_online
from mvssl.runs.changes import Computed, describe_changes
from mvssl.runs.folder import RunFolder
from mvssl.runs.jsonl import read_jsonl
from mvssl.training import loop
from mvssl.training.step import TrainStep
from pipelines.runtime import InputError
from tests.samples.ranks import results, run_ranks
from tests.samples.tiny_runs import STEPS, crash_at, make_step, metrics, train

CRASH = 6
EXACT = ("kind", "step", "epoch", "lr", "target_decay")


@pytest.fixture(scope="module")
def crashed(images: Path, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny recipe that crashed after `CRASH` steps; copied before it is resumed."""
    out = tmp_path_factory.mktemp("crashed") / "run"
    with crash_at(CRASH):
        train(tiny_recipe, images, out, save_every_steps=1)
    return out


@pytest.fixture
def run(crashed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(crashed, tmp_path / "run", symlinks=True))


@pytest.fixture(scope="module")
def no_batchnorm(tiny_recipe: Recipe) -> Recipe:
    """The tiny recipe without BatchNorm, whose numbers do not depend on micro-batches."""
    head = Head(hidden=(32,), out=16, norm="layer")
    return replace(tiny_recipe, backbone=Backbone(name="test_vit"), projector=head, predictor=head)


def rows(out: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(out / "metrics.jsonl"))


def log(out: Path) -> str:
    return (out / "train.log").read_text()


def config(out: Path) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads((out / "config.json").read_text())
    return plain


def assert_close(ours: Path, expected: Path) -> None:
    """The same metrics up to rounding, which BatchNorm over 8 images enlarges from step to step."""
    assert [row.keys() for row in rows(ours)] == [row.keys() for row in rows(expected)]
    for mine, theirs in zip(rows(ours), rows(expected), strict=True):
        for name, value in theirs.items():
            if name in EXACT:
                assert mine[name] == value
            elif name.startswith("loss"):
                rel = 1e-4 if theirs["step"] <= CRASH + 2 else 5e-3
                assert mine[name] == pytest.approx(value, rel=rel), (theirs["step"], name)


@pytest.mark.parametrize(
    "options",
    [
        {"step_mode": "per-view"},
        {"channels_last": False, "cuda_graph": "off"},
        pytest.param({"compile": "on"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_how_steps_are_executed_may_change(
    finished: Path,
    run: Path,
    images: Path,
    tiny_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    real: Any = torch.compile  # a fast backend
    monkeypatch.setattr(torch, "compile", lambda function, **given: real(function, **given | {"backend": "eager"}))
    begun, before = metrics(run), config(run)
    train(tiny_recipe, images, run, resume=True, **options)
    assert metrics(run).startswith(begun)
    assert_close(run, finished)
    assert config(run) == before


def test_a_run_whose_recipe_had_them_resumes_by_its_old_recipe_file(
    finished: Path, run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = config(run)
    del plain["checksum"]
    old = plain["recipe"] | {"step_mode": "per-view", "compile": "off", "channels_last": False}
    (run / "config.json").write_text(json.dumps(plain | {"recipe": old}))
    recipe = tmp_path / "old.json"
    recipe.write_text(json.dumps(old))
    command(monkeypatch, str(recipe), "--data", images, "--out", run, "--device", "cpu", "--resume", "--log-every", 3)
    assert_close(run, finished)


def test_another_number_of_micro_batches_says_what_it_does_to_batchnorm(
    run: Path, images: Path, tiny_recipe: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = metrics(run)
    split = replace(tiny_recipe, accumulate=2)
    train(split, images, run, resume=True)
    said = (
        "accumulate is 2 instead of 1: BatchNorm statistics are over micro-batches of 4 images from step 6 on instead "
        "of 8"
    )
    assert said in log(run)
    assert said in capsys.readouterr().out
    assert metrics(run).startswith(begun)
    assert rows(run)[-1]["step"] == STEPS
    assert config(run)["recipe"] == to_dict(split)
    assert config(run)["options"]["changes"] == [{"step": 6, "field": "accumulate", "was": 1, "now": 2}]
    assert RunFolder(run).recipe() == split


def test_without_batchnorm_micro_batches_change_no_numbers(images: Path, no_batchnorm: Recipe, tmp_path: Path) -> None:
    train(no_batchnorm, images, tmp_path / "whole")
    with crash_at(CRASH):
        train(no_batchnorm, images, tmp_path / "run", save_every_steps=1)
    train(replace(no_batchnorm, accumulate=4), images, tmp_path / "run", resume=True, step_mode="per-view")
    assert_close(tmp_path / "run", tmp_path / "whole")
    assert "accumulate is 4 instead of 1 from step 6 on: the numbers differ by rounding" in log(tmp_path / "run")


def test_another_precision_differs_by_rounding(images: Path, no_batchnorm: Recipe, tmp_path: Path) -> None:
    """And the state of the loss scale is that of the precision: none on the CPU."""
    train(no_batchnorm, images, tmp_path / "whole")
    with crash_at(CRASH):
        train(no_batchnorm, images, tmp_path / "run", save_every_steps=1)
    train(replace(no_batchnorm, precision="bf16"), images, tmp_path / "run", resume=True)
    losses = [[row["loss"] for row in rows(tmp_path / out) if row["kind"] == "train"] for out in ("run", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]
    told = "precision: from step 6 on bf16 instead of fp32: the numbers differ by rounding"
    assert told in log(tmp_path / "run")
    assert config(tmp_path / "run")["options"]["changes"] == [
        {"step": 6, "field": "precision", "was": "auto", "now": "bf16"}
    ]


def test_auto_is_the_precision_that_it_was(run: Path, images: Path, tiny_recipe: Recipe, finished: Path) -> None:
    train(replace(tiny_recipe, precision="fp32"), images, run, resume=True)
    assert metrics(run) == metrics(finished)
    assert "precision is 'fp32' from step 6 on, which is fp32 as before" in log(run)


def test_auto_on_another_device_is_another_precision(tiny_recipe: Recipe) -> None:
    """A run begun on a GPU goes on on the CPU with the same recipe."""
    before = Computed(recipe=tiny_recipe, precision="bf16", ranks=1)
    assert describe_changes(before, replace(before, precision="fp32"), step=4, batchnorm=True) == [
        "precision: from step 4 on fp32 instead of bf16: the numbers differ by rounding"
    ]


def test_another_evaluation_says_what_can_be_compared(run: Path, images: Path, tiny_recipe: Recipe) -> None:
    evaluation = replace(tiny_recipe.evaluation, crop=28, k=(3,), every_epochs=2)
    train(replace(tiny_recipe, evaluation=evaluation), images, run, resume=True)
    assert "evaluation.crop is 28 instead of 32 from step 6 on: kNN and probe from here on are not comparable" in log(
        run
    )
    assert (
        "evaluation.k is [3] instead of [5, 1] from step 6 on: kNN is comparable with earlier values of the same"
        in log(run)
    )
    assert "evaluation.every_epochs is 2 instead of 1 from step 6 on\n" in log(run)
    knn = [row for row in rows(run) if row["kind"] == "knn"]
    assert [row["step"] for row in knn] == [4, 8, 12]
    assert ["top1_k3" in row for row in knn] == [False, True, True]
    fields = [change["field"] for change in config(run)["options"]["changes"]]
    assert sorted(fields) == ["evaluation.crop", "evaluation.every_epochs", "evaluation.k"]


def test_an_interrupted_evaluation_is_not_made_up_for_without_evaluations(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return evaluate_online(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_online", interrupted)
        with pytest.raises(mvssl.Interrupted):
            train(tiny_recipe, images, tmp_path / "run")
    none = replace(tiny_recipe, evaluation=replace(tiny_recipe.evaluation, every_epochs=0))
    assert train(none, images, tmp_path / "run", resume=True).knn == {}
    assert {row["kind"] for row in rows(tmp_path / "run")} == {"train"}


def test_a_run_keeps_its_names(finished: Path, run: Path, images: Path, tiny_recipe: Recipe) -> None:
    renamed = tuple(replace(view, name=f"v{v}") for v, view in enumerate(tiny_recipe.views))
    train(replace(tiny_recipe, name="another", views=renamed), images, run, resume=True)
    assert metrics(run) == metrics(finished)
    assert RunFolder(run).recipe() == tiny_recipe
    assert "the run keeps the names that it was started with: demo" in log(run)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 5, "accumulate": 2}, r"another recipe \(seed: 0 -> 5\): .*accumulate, precision and evaluation may"),
        ({"order_window": 64}, r"\(order_window: 32768 -> 64\)"),
        ({"batch_size": 4}, r"\(batch_size: 8 -> 4\)"),
        ({"task_weights": {"local": 0.5}}, r"\(task_weights.local: '\(absent\)' -> 0.5\)"),
        ({"optimizer": Optimizer(base_lr=2.0, warmup_epochs=1), "name": "x"}, r"\(optimizer.base_lr: 3.0 -> 2.0\)"),
        ({"epochs": 5, "accumulate": 2}, r"was started for 3 epochs and not 5"),
    ],
)
def test_what_determines_the_numbers_may_not_change(
    run: Path, images: Path, tiny_recipe: Recipe, changes: dict[str, Any], told: str
) -> None:
    before = config(run)
    with pytest.raises(InputError, match=told):
        train(replace(tiny_recipe, **changes), images, run, resume=True)
    assert config(run) == before


def test_micro_batches_that_do_not_divide_the_batch_leave_the_run_as_it_is(
    run: Path, images: Path, tiny_recipe: Recipe
) -> None:
    before = config(run)
    with pytest.raises(InputError, match=r"at least 16 on 1 ranks with 8 micro-batches.*--accumulate 1 or 2 or 4"):
        train(replace(tiny_recipe, accumulate=8), images, run, resume=True)
    assert config(run) == before


def test_a_run_without_a_checkpoint_starts_again_with_the_changes(
    images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    split = replace(tiny_recipe, accumulate=2)
    train(split, images, tmp_path / "whole")
    with crash_at(2):
        train(tiny_recipe, images, tmp_path / "run")
    train(split, images, tmp_path / "run", resume=True)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert "accumulate is 2 instead of 1: no checkpoint was saved, so the run starts again with it" in log(
        tmp_path / "run"
    )
    assert RunFolder(tmp_path / "run").recipe() == split


def test_changes_that_no_checkpoint_holds_are_taken_back(
    finished: Path, run: Path, images: Path, tiny_recipe: Recipe
) -> None:
    with crash_at(CRASH + 1):
        train(replace(tiny_recipe, accumulate=2), images, run, resume=True)
    assert config(run)["recipe"]["accumulate"] == 2
    train(tiny_recipe, images, run, resume=True)
    assert metrics(run) == metrics(finished)
    assert "changes" not in config(run)["options"]
    assert config(run)["recipe"]["accumulate"] == 1


def test_each_change_is_recorded_with_its_step(run: Path, images: Path, tiny_recipe: Recipe) -> None:
    with crash_at(9):
        train(replace(tiny_recipe, accumulate=2), images, run, resume=True, save_every_steps=1)
    longer = replace(tiny_recipe, epochs=5, accumulate=4)
    train(longer, images, run, resume=True, extend=True)
    options = config(run)["options"]
    assert options["earlier_epochs"] == [3]
    assert [(change["step"], change["was"], change["now"]) for change in options["changes"]] == [(6, 1, 2), (9, 2, 4)]
    assert "extended from 3 to 5 epochs" in log(run)
    assert "micro-batches of 2 images from step 9 on instead of 4" in log(run)
    assert rows(run)[-1]["step"] == 20
    assert "From step 9 on accumulate is 4 instead of 2." in (run / "report.html").read_text()


def test_a_finished_run_has_nothing_to_change(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))
    before = config(out)
    train(replace(tiny_recipe, accumulate=2), images, out, resume=True)
    assert (metrics(out), config(out)) == (metrics(finished), before)
    assert "the run is finished, so that changes of its recipe have no effect" in log(out)


def resumed(recipe: Recipe, data: Path, out: Path) -> None:
    """Called on a rank."""
    train(recipe, data, out, resume=True)


@pytest.mark.slow
def test_ranks_count_as_micro_batches(run: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Two ranks halve the images of BatchNorm; two micro-batches of one process instead of them change nothing."""
    out = tmp_path / "ranks"
    shutil.copytree(run, out, symlinks=True)
    results(run_ranks(resumed, 2, replace(tiny_recipe, accumulate=2), images, out))
    assert "BatchNorm statistics are over micro-batches of 2 images from step 6 on instead of 8" in log(out)
    assert config(out)["options"]["changes"] == [{"step": 6, "field": "accumulate", "was": 1, "now": 2}]
    one = Computed(recipe=tiny_recipe, precision="fp32", ranks=2)
    two = replace(one, recipe=replace(tiny_recipe, accumulate=2), ranks=1)
    assert describe_changes(one, two, step=6, batchnorm=True) == [
        "accumulate is 2 instead of 1 from step 6 on: the numbers differ by rounding"
    ]
    assert describe_changes(one, replace(one, ranks=4), step=6, batchnorm=True) == [
        "4 processes instead of 2: BatchNorm statistics are over micro-batches of 2 images from step 6 on instead of 4"
    ]
    (alone,) = describe_changes(one, replace(one, ranks=1), step=6, batchnorm=True)
    assert alone.startswith("1 process instead of 2: ")
    synchronised = replace(one, recipe=replace(tiny_recipe, sync_batchnorm="both"))
    assert describe_changes(synchronised, replace(synchronised, ranks=4), step=6, batchnorm=True) == []


def test_the_loss_scale_begins_afresh_where_there_was_none(tiny_recipe: Recipe) -> None:
    """fp16's scaler, here on the CPU: its state is loaded from fp16 steps alone, and ignored by the others."""
    plain, scaled = (make_step(tiny_recipe, total=12) for _ in range(2))
    scaled.scaler = torch.amp.grad_scaler.GradScaler("cpu", enabled=True, init_scale=2.0**12)
    scaled.load_state_dict(plain.state_dict())
    assert scaled.scaler.get_scale() == 2.0**12
    other = make_step(tiny_recipe, total=12)
    other.scaler = torch.amp.grad_scaler.GradScaler("cpu", enabled=True)
    other.load_state_dict(scaled.state_dict())
    assert other.scaler.get_scale() == 2.0**12
    plain.load_state_dict(scaled.state_dict())
    assert not plain.scaler.is_enabled()


# The advice of errors can be followed.


@contextmanager
def small_gpu(*, views: int, images: int) -> Iterator[None]:
    """Memory is full in steps whose forward takes more views of more images than these, on the CPU."""
    original = TrainStep.__call__

    def limited(self: TrainStep, batch: list[torch.Tensor], number: int) -> Any:
        joint = len(batch) if self.execution.step_mode == "joint" else 1
        if number >= 4 and joint > views and len(batch[0]) // self.recipe.accumulate > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", limited)
        yield


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """The exit code of mvssl-train."""
    monkeypatch.setattr(sys, "argv", ["mvssl-train", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        train_cli.main()
    return int(left.value.code or 0)


@pytest.mark.parametrize("option", ["--step-mode", "--accumulate"])
@pytest.mark.parametrize("dry", [False, True])
def test_the_advice_of_a_full_memory_works(
    images: Path,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    dry: bool,
) -> None:
    """Word for word, added to the command that failed: for a run that is saved, and before there is one."""
    (tmp_path / "recipe.json").write_text(json.dumps(to_dict(tiny_recipe)))
    words: list[object] = [tmp_path / "recipe.json", "--data", images, "--out", tmp_path / "run", "--device", "cpu"]
    words += ["--dry-run"] if dry else []
    limit = 0 if dry else 4
    with small_gpu(views=1, images=4):
        if dry:
            monkeypatch.setattr("mvssl.training.preflight.FIRST", 6)
        assert command(monkeypatch, *words) == 1
        said = " ".join(capsys.readouterr().err.split())
        advice = re.findall(r"--[a-z-]+(?: [a-z0-9-]+(?=,))?", said.split("memory is full")[1].split("lower")[0])
        chosen = [each for each in advice if each == "--resume" or each.startswith(option)]
        assert ("--resume" in chosen) is not dry
        assert len(chosen) == (1 if dry else 2), said
        assert command(monkeypatch, *words, *(word for each in chosen for word in each.split())) == 0
    assert (tmp_path / "run").exists() is not dry
    if not dry:
        assert rows(tmp_path / "run")[-1]["step"] == STEPS > limit


def not_compiling(recipe: Recipe, data: Path, out: Path, options: dict[str, Any]) -> None:
    """A run where no code compiles; called on a rank."""

    def backend(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    real: Any = torch.compile
    pytest.MonkeyPatch().setattr(  # never undone: the process is the rank's own
        torch, "compile", lambda function, **given: real(function, **given | {"backend": backend})
    )
    train(recipe, data, out, **options)


@pytest.mark.slow
def test_the_advice_of_a_failed_compilation_on_ranks_works(images: Path, no_batchnorm: Recipe, tmp_path: Path) -> None:
    recipe = replace(no_batchnorm, epochs=1, optimizer=replace(no_batchnorm.optimizer, warmup_epochs=0))
    for outcome in run_ranks(not_compiling, 2, recipe, images, tmp_path / "run", {"compile": "on"}):
        assert outcome.error == "InputError", outcome.message
        assert "use --compile off, and --resume if the run folder exists" in outcome.message
    results(run_ranks(not_compiling, 2, recipe, images, tmp_path / "run", {"compile": "off", "resume": True}))
    assert rows(tmp_path / "run")[-1]["step"] == 4


def test_a_full_memory_in_the_first_step_leaves_a_run_that_resumes(
    images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    original = TrainStep.__call__

    def full(self: TrainStep, batch: list[torch.Tensor], number: int) -> Any:
        if self.execution.step_mode == "joint":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, batch, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", full)
        with pytest.raises(InputError, match=r"continue with --resume and --checkpointing, .* or --step-mode per-view"):
            train(tiny_recipe, images, tmp_path / "run")
        train(tiny_recipe, images, tmp_path / "run", resume=True, step_mode="per-view")
    assert rows(tmp_path / "run")[-1]["step"] == STEPS
