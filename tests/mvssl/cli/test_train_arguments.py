"""mvssl-train: short help, options in errors, a warm-up that fits a short run, batch size auto."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mvssl.cli import train as train_cli
from mvssl.cli.help import COMMON, with_option
from mvssl.cli.train import LookAhead, fit_warmup, look_ahead
from mvssl.config.options import Execution
from mvssl.config.recipe import Recipe
from mvssl.monitor.console import TrainingProgress
from mvssl.recipes import all_recipes, get_recipe
from mvssl.runs.jsonl import read_jsonl
from mvssl.training.memory import largest_batch, with_largest_batch
from pipelines import adapt_views
from pipelines.runtime import InputError, invalid
from tests.samples.tiny_runs import train


@pytest.mark.parametrize("name", sorted(all_recipes()))
def test_one_epoch_of_any_recipe(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = all_recipes()[name]()
    parsed = train_cli.parse([name, "--epochs", "1"]).recipe
    said = capsys.readouterr().err
    assert parsed.optimizer.warmup_epochs == pytest.approx(recipe.optimizer.warmup_epochs / recipe.epochs)
    assert replace(parsed, optimizer=recipe.optimizer, epochs=recipe.epochs) == recipe
    assert ("warm-up: " in said) == (recipe.optimizer.warmup_epochs > 0)


@pytest.mark.parametrize(
    ("words", "warmup"),
    [
        ([], 10),
        (["--epochs", "50"], 2.5),
        (["--epochs=50"], 2.5),
        (["--epochs", "400"], 10),
        (["--epochs", "50", "--optimizer.warmup-epochs", "7"], 7),
        (["--epochs", "50", "--optimizer.warmup_epochs=7"], 7),
    ],
)
def test_the_warm_up_goes_with_a_shorter_run(words: list[str], warmup: float) -> None:
    parsed = train_cli.parse(["byol_resnet50_200ep", *words])
    assert parsed.recipe.optimizer.warmup_epochs == warmup


def test_a_resumed_run_keeps_its_warm_up(tiny_recipe: Recipe, images: Path, tmp_path: Path) -> None:
    begun = replace(tiny_recipe, optimizer=replace(tiny_recipe.optimizer, warmup_epochs=0.5))
    train(begun, images, tmp_path / "run")
    recipe, said = fit_warmup(tiny_recipe, LookAhead(resumes=tmp_path / "run", epochs=2))
    assert (recipe.optimizer.warmup_epochs, said) == (0.5, "")
    recipe, said = fit_warmup(tiny_recipe, LookAhead(resumes=tmp_path / "none", epochs=1))
    assert recipe.optimizer.warmup_epochs == pytest.approx(1 / 3)
    assert "in proportion to the run" in said


@pytest.mark.parametrize("words", [["--batch-size", "auto"], ["--batch-size=auto"], ["--batch_size=auto"]])
def test_options_that_are_read_ahead(words: list[str]) -> None:
    rest = ["--optimizer.warmup_epochs=2", "--seed", "auto", "--resume", "--out", "run", "--data"]
    ahead = look_ahead([*rest[:3], *words, "--epochs", "3", *rest[3:]])
    assert ahead == LookAhead(
        epochs=3,
        warmup=True,
        resumes=Path("run"),
        automatic_batch=True,
        rest=(*rest[:3], "--epochs", "3", *rest[3:]),
    )
    assert look_ahead(["--batch-size", "64"]).rest == ("--batch-size", "64")
    assert look_ahead(["--resume", "--no-resume", "--out", "run"]).resumes is None
    assert look_ahead(["--epochs", "3", "--help-all"]) == LookAhead(epochs=3, rest=("--help",))
    assert look_ahead(["-h"]).short_help


@pytest.mark.parametrize("words", [["--view-preset", "aerial"], ["--view-preset=aerial"], ["--view_preset", "aerial"]])
def test_a_view_preset_adapts_any_recipe(words: list[str]) -> None:
    parsed = train_cli.parse(["demo", *words, "--views.1.rotate", "-15", "30", "--views.2.quarter-turns", "0.5"])
    views = list(adapt_views(get_recipe("demo").views, "aerial"))
    views[1] = replace(views[1], rotate=(-15.0, 30.0))
    views[2] = replace(views[2], quarter_turns=0.5)
    assert parsed.recipe.views == tuple(views)
    with pytest.raises(InputError, match=r"view_preset is 'areal' but must be one of .*: did you mean 'aerial'\.$"):
        train_cli.parse(["demo", "--view-preset", "areal"])


@pytest.mark.parametrize("words", [["--resume=1"], ["--epochs"], ["--epochs", "three"], ["--out"], ["--batch-size"]])
def test_wrong_usage_is_reported_by_the_full_parser(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train_cli.parse(["demo", *words])
    assert exit_info.value.code == 2
    assert "mvssl-train demo --help" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("Optimizer.base_lr", "Optimizer.base_lr (--optimizer.base-lr) is 0"),
        ("Recipe.batch_size", "Recipe.batch_size (--batch-size) is 0"),
        ("Head.hidden", "Head.hidden (--projector.hidden or --predictor.hidden) is 0"),
        ("ViewSpec('local').size", "ViewSpec('local').size (--views.N.size) is 0"),
        ("Order.window", "Order.window is 0"),
    ],
)
def test_errors_name_the_option(field: str, expected: str) -> None:
    assert str(with_option(invalid(field, 0, "more", "give more"))).startswith(expected)
    assert str(with_option(InputError("data is missing"))) == "data is missing"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--views.0.rotate", "400"],
            "ViewSpec('global_1').rotate is 400.0 but must be degrees from 0 to 360, a range",
        ),
        (["--views.1.rotate", "20", "-20"], "ViewSpec('global_2').rotate is (20.0, -20.0) but must be degrees"),
        (["--views.0.rotate-fill", "1", "2", "256"], "rotate_fill is (1.0, 2.0, 256.0) but must be a number from 0"),
        (["--views.0.quarter-turns", "2"], "ViewSpec('global_1').quarter_turns is 2.0 but must be between 0 and 1"),
        (["--optimizer.base-lr", "-1"], "Optimizer.base_lr is -1.0 but must be a number above 0: give a positive"),
    ],
    ids=str,
)
def test_a_refused_value_is_one_sentence(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train_cli.parse(["demo", *words])
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert line.endswith(".")


def test_an_error_of_the_recipe_names_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"^Optimizer\.warmup_epochs \(--optimizer\.warmup-epochs\) is 2 but must be"):
        train_cli.parse(["demo", "--epochs", "1", "--optimizer.warmup-epochs", "2"])


def test_short_help_is_short_and_its_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert train_cli.body(["byol_resnet50_200ep", "--help"]) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 75
    common = [option for options in COMMON.values() for option in options]
    assert 18 <= len(common) <= 26
    assert all(each.option in shown and each.about for each in common)
    assert "[200]" in shown
    assert "--help-all" in shown
    with pytest.raises(SystemExit):
        train_cli.body(["byol_resnet50_200ep", "--help-all"])
    everything = capsys.readouterr().out
    assert all(each.option in everything for each in common)


@pytest.mark.parametrize("most_that_fits", [32, 33, 63, 64, 1000, 4096, 5000, 70_000])
def test_the_largest_batch_is_found_in_few_trials(most_that_fits: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= most_that_fits

    found = largest_batch(fits, most=8000)
    assert found == min(most_that_fits // 32 * 32, 8000)
    assert len(tried) <= 17
    assert all(size % 32 == 0 and size <= 8000 for size in tried)


def test_batches_that_fit_nowhere_and_processors_without_memory_of_their_own(images: Path) -> None:
    with pytest.raises(InputError, match=r"not even 32 images fit .* take .*--step-mode per-view"):
        largest_batch(lambda size: False)
    with pytest.raises(InputError, match=r"^batch_size is 'auto', which measures a GPU's memory, but .* on the CPU"):
        train_cli.parse(["demo", "--data", str(images), "--batch-size", "auto", "--device", "cpu"])


def test_the_largest_batch_is_that_of_all_processes(monkeypatch: pytest.MonkeyPatch, tiny_recipe: Recipe) -> None:
    monkeypatch.setattr("mvssl.training.memory.fits_on", lambda recipe, execution, device: lambda size: size <= 100)
    found, said = with_largest_batch(tiny_recipe, Execution(), torch.device("cuda"), processes=4, images=10_000)
    assert found == replace(tiny_recipe, batch_size=384)
    assert f"batch size: 384, the largest that fits (96 a process); the learning rate is {3.0 * 384 / 256:.4g}" in said


def test_a_resumed_run_keeps_its_batch(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["demo", "--batch-size=auto", "--resume", "--out", str(finished)]
    assert train_cli.parse(words).recipe.batch_size == 8
    assert "batch size: 8, that of the resumed run" in capsys.readouterr().err


def test_a_result_has_its_curves_as_arrays(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    result = train(tiny_recipe, images, tmp_path / "run")
    curves = result.curves()
    rows = list(read_jsonl(tmp_path / "run/metrics.jsonl"))
    steps, losses = curves["loss/global"]
    assert steps.tolist() == [row["step"] for row in rows if row["kind"] == "train"]
    assert losses.tolist() == [row["loss/global"] for row in rows if row["kind"] == "train"]
    assert curves["knn/top1"][1].tolist() == [row["top1"] for row in rows if row["kind"] == "knn"]
    assert "kind" not in curves


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_shows_progress_in_place_if_it_can(widgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if widgets else None)
    console = Console(force_jupyter=True, quiet=True)
    display = TrainingProgress(console, steps=3, done=0)
    assert display.live == widgets
    display.close()
