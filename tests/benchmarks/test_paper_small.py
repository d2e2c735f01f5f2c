"""The paper's comparison gives all cells one budget and goes on where it was."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from benchmarks import paper_small
from benchmarks.paper_cells import METHODS, SETTINGS, VARIANTS, Cell, make_recipe
from benchmarks.paper_small import Arguments, measure, write_lists
from mvssl.recipe import Recipe
from mvssl.runs.options import RunOptions
from mvssl.training.trainer import TrainResult
from pipelines.errors import InputError
from pipelines.views.spec import tasks

TINY = dataclasses.replace(SETTINGS["cpu"], classes=2, per_class=12, epochs=1, batch_size=8)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for name in ("a", "b"):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(folder / f"{n:02d}.jpg")
    return tmp_path / "data"


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_all_cells_have_one_budget_and_differ_where_they_should(setting: paper_small.Setting) -> None:
    for method, variant in product(METHODS, VARIANTS):
        recipe = make_recipe(Cell(method=method, variant=variant, seed=3), setting)
        assert (recipe.method, recipe.seed) == (method, 3)
        assert (recipe.epochs, recipe.batch_size) == (setting.epochs, setting.batch_size)
        assert recipe.backbone.name == "resnet18"
        assert recipe.optimizer.base_lr == setting.base_lr
        assert recipe.predictors == ("shared" if variant == "shared" else "per-view")
        names = {"two-view": ("global",), "per-view + cutout": ("global", "local", "cutout")}
        assert tasks(recipe.views) == names.get(variant, ("global", "local"))
        # SPEC section 4: sums of terms and tasks, for SimSiam means.
        total = sum(recipe.task_weights.values())
        assert total == pytest.approx(1.0 if method == "simsiam" else max(2.0, len(tasks(recipe.views))))
    shared, per_view = (make_recipe(Cell(method="byol", variant=v, seed=0), setting) for v in ("shared", "per-view"))
    assert dataclasses.replace(shared, name=per_view.name, predictors="per-view") == per_view


def test_it_goes_on_where_it_was(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper_small, "METHODS", ("simsiam",))
    monkeypatch.setattr(paper_small, "VARIANTS", ("two-view", "shared"))
    monkeypatch.setitem(SETTINGS, "cpu", TINY)
    arguments = Arguments(data=data, runs=tmp_path / "runs", seeds=(0,), device="cpu")
    first = measure(arguments, data, Console(quiet=True))
    assert [(row["method"], row["variant"]) for row in first["rows"]] == [
        ("simsiam", "two-view"),
        ("simsiam", "shared"),
    ]
    assert all(row["steps"] == 3 and 0 <= row["knn_k20"] <= 1 for row in first["rows"])

    trained = []
    run = paper_small.run

    def noted(recipe: Recipe, options: RunOptions, *, console: Console) -> TrainResult:
        trained.append(recipe.name)
        return run(recipe, options, console=console)

    monkeypatch.setattr(paper_small, "run", noted)
    (tmp_path / "runs" / "simsiam-shared-seed0.json").unlink()
    again = measure(arguments, data, Console(quiet=True))
    assert trained == ["simsiam-shared-seed0"]  # the other is kept; this one's run is finished and only read
    assert [row["knn_k20"] for row in again["rows"]] == [row["knn_k20"] for row in first["rows"]]
    monkeypatch.setitem(SETTINGS, "cpu", dataclasses.replace(TINY, epochs=2))
    with pytest.raises(InputError, match="holds a run of another setting"):
        measure(arguments, data, Console(quiet=True))


def test_data_that_does_not_fit_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a folder with train/ and val/"):
        write_lists(tmp_path, tmp_path / "runs", TINY)
    with pytest.raises(InputError, match="has 2 classes but the setting needs 3"):
        write_lists(data, tmp_path / "runs", dataclasses.replace(TINY, classes=3))
    with pytest.raises(InputError, match="has 12 images but the setting needs 13"):
        write_lists(data, tmp_path / "runs", dataclasses.replace(TINY, per_class=13))
