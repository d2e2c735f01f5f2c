"""`mvssl.train` takes a recipe by name and fields as keywords, and says in a sentence what else it was given."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mvssl
from mvssl.config.options import RunOptions
from mvssl.config.recipe import Recipe
from mvssl.recipes.small_scale import demo
from mvssl.training.arguments import recipe_and_options
from pipelines import adapt_views
from pipelines.runtime import InputError

PLACES = {"data": "photos", "out": "runs/first"}


def called(recipe: object = "demo", *unnamed: object, **settings: Any) -> tuple[Recipe, RunOptions]:
    return recipe_and_options(recipe, unnamed, PLACES | settings)[:2]


def test_a_recipe_by_name_or_file_is_that_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('base = "demo"\nseed = 7\n')
    assert called("demo")[0] == called(demo())[0] == demo()
    assert called(tmp_path / "mine.toml")[0] == called(str(tmp_path / "mine.toml"))[0]
    assert called(tmp_path / "mine.toml")[0] == dataclasses.replace(demo(), seed=7)


def test_fields_of_recipe_and_options_are_keywords(caplog: pytest.LogCaptureFixture) -> None:
    base = demo()
    recipe, options = called(
        base,
        batch_size=np.int64(16),
        views=base.views[:2],
        evaluation={"k": (5,)},
        optimizer=dataclasses.replace(base.optimizer, momentum=0.5),
        device=torch.device("cpu"),
        val="val",
        log=("csv",),
    )
    assert recipe == dataclasses.replace(
        base,
        batch_size=16,
        views=base.views[:2],
        task_weights={name: weight for name, weight in base.task_weights.items() if name == "global"},
        evaluation=dataclasses.replace(base.evaluation, k=(5,)),
        optimizer=dataclasses.replace(base.optimizer, momentum=0.5),
    )
    expected = RunOptions(data=Path("photos"), out=Path("runs/first"), device="cpu", val=Path("val"), log=("csv",))
    assert options == expected
    assert not caplog.records


def test_a_view_preset_is_a_keyword_and_fields_of_views_stay_possible() -> None:
    recipe, _ = called(view_preset="microscopy", batch_size=8)
    assert recipe == dataclasses.replace(demo(), views=adapt_views(demo().views, "microscopy"), batch_size=8)
    assert called(view_preset=None)[0] == demo()


def test_fewer_epochs_shorten_the_warm_up_as_the_command_does() -> None:
    base = dataclasses.replace(demo(), epochs=10, optimizer=dataclasses.replace(demo().optimizer, warmup_epochs=4))
    recipe, _, notes = recipe_and_options(base, (), PLACES | {"epochs": 5})
    assert recipe.optimizer.warmup_epochs == 2
    assert [note[:36] for note in notes] == ["warm-up: 2 epochs instead of 4, in p"]
    assert called(base, epochs=20)[0].optimizer.warmup_epochs == 4
    assert called(base, epochs=5, optimizer={"warmup_epochs": 3})[0].optimizer.warmup_epochs == 3
    assert called(base, epochs=5, optimizer__warmup_epochs=3)[0].optimizer.warmup_epochs == 3


def test_fields_within_fields_have_two_underscores_or_a_dot(caplog: pytest.LogCaptureFixture) -> None:
    base = demo()
    recipe, options = called(
        base,
        optimizer__base_lr=0.25,
        optimizer={"momentum": 0.5},
        backbone__name="resnet18",
        task_weights__local=2.0,
        limits__pixels=10**6,
        **{"evaluation.resize": 48, "evaluation.crop": 40},
    )
    assert recipe == dataclasses.replace(
        base,
        optimizer=dataclasses.replace(base.optimizer, base_lr=0.25, momentum=0.5),
        backbone=dataclasses.replace(base.backbone, name="resnet18"),
        task_weights=base.task_weights | {"local": 2.0},
        evaluation=dataclasses.replace(base.evaluation, resize=48, crop=40),
    )
    assert options.limits.pixels == 10**6


def test_fields_of_views_are_named_by_number_or_name() -> None:
    views = demo().views
    changed = (
        dataclasses.replace(views[0], size=40, area=(0.5, 1.0)),
        views[1],
        dataclasses.replace(views[2], size=24),
    )
    for settings in (
        {"views__0__size": 40, "views.0.area": (0.5, 1), "views__local_1__size": 24},
        {"views": {0: {"size": 40, "area": (0.5, 1)}, "local_1": {"size": 24}}},
        {"views": {"2": {"size": 24}}, "views__global_1": {"size": 40, "area": (0.5, 1)}},
    ):
        assert called(**settings)[0] == dataclasses.replace(demo(), views=(*changed, *views[3:]))
    preset = adapt_views(views, "aerial")
    both = called(view_preset="aerial", views__0__size=40)[0].views
    assert both == (dataclasses.replace(preset[0], size=40), *preset[1:])


@pytest.mark.parametrize(
    ("arguments", "settings", "words"),
    [
        ((), {}, "data is missing: give a folder of images"),
        ((), {"data": "none-here", "out": "run"}, "none-here does not exist: give a folder of images"),
        ((["a.jpg"],), {}, r"recipe is \['a.jpg'\] but must be a Recipe"),
        ((3,), PLACES, "recipe is 3 but must be"),
        (("",), PLACES, "recipe is '' but must be"),
        ((demo,), PLACES, r"recipe is <function .* but must be a Recipe.*: call it, demo\(\)"),
        (("dmo",), PLACES, "recipe is 'dmo' but there is no recipe of that name: did you mean 'demo'"),
        (("demo", "photos", "runs/first"), {}, "was given 3 arguments without a name but must be given one"),
        (("demo",), {}, "data is missing: give a folder of images"),
        (("demo",), {"data": "photos"}, "out is missing: give the run folder"),
        (("demo",), PLACES | {"data": 3}, "data is 3 but must be a path, a list of paths"),
        (("demo",), PLACES | {"data": []}, "data is an empty list but must hold images"),
        (("demo",), PLACES | {"data": iter("ab")}, "gives images in its own order only, but must have a length"),
        (("demo",), PLACES | {"data": {"test": "x"}}, "data is a dict of test but must have the split train"),
        (("demo",), PLACES | {"data": ""}, "data is '' but must be a path"),
        (("demo",), PLACES | {"out": 3}, "out is 3 but must be a path"),
        (("demo",), PLACES | {"out": "a\0b"}, r"out is 'a\\x00b' but must be a path that a disk can hold \(emb"),
        (("demo",), PLACES | {"out": "x" * 300}, "out is 'x.* hold .File name too long.: choose another name"),
        (("x" * 5000,), PLACES, "recipe is 'x.* but there is no recipe of that name"),
        (("demo",), PLACES | {"optimizer": {1: 2}}, "recipe.optimizer has the unknown field '1'"),
        (("demo",), PLACES | {"val": 3}, "val is 3 but must be a path, a list"),
        (("demo",), PLACES | {"optimizer__base_rl": 3}, "optimizer has the unknown field 'base_rl'.*mean 'base_lr'"),
        (("demo",), PLACES | {"optimzer__base_lr": 3}, "which is no field of a field.*did you mean optimizer__base_lr"),
        (("demo",), PLACES | {"epochs__x": 3}, "given epochs__x, which is no field of a field"),
        (
            ("demo",),
            PLACES | {"optimizer": {"base_lr": 1.0}, "optimizer__base_lr": 2.0},
            "given base_lr of optimizer twice",
        ),
        (("demo",), PLACES | {"epoch": 3}, "was given epoch, which is no field .*: did you mean epochs"),
        (("demo",), PLACES | {"base_lr": 3}, 'write optimizer={"base_lr": ...}'),
        (("demo",), PLACES | {"view_preset": "micro"}, "view_preset is 'micro' but must be one of .* 'microscopy'"),
        (("demo",), PLACES | {"view_preset": 3}, "view_preset is 3 but must be one of microscopy, "),
        (("demo",), PLACES | {"view_preset": "aerial", "views": []}, "view_preset and views are both given"),
        (
            ("demo",),
            PLACES | {"views__9__size": 24},
            "views has the entry '9' but as a table may only have 0 to 4 or global_1",
        ),
        (("demo",), PLACES | {"views__0__are": 1}, "recipe.views.0. has the unknown field 'are'.*did you mean 'area'"),
        (("demo",), PLACES | {"views__0__area__x": 1}, "no field of a field .*: take one of views__0__name"),
        (("demo",), PLACES | {"views": {0: {"size": 8}}, "views__0__size": 16}, "given size of views 0 twice"),
        (("demo",), PLACES | {"views": [], "views__0__size": 16}, "given both views and views__0__size"),
        (
            ("demo",),
            PLACES | {"optimizer__base_lr": 1.0, "optimizer.base_lr": 2.0},
            "given base_lr of optimizer twice",
        ),
        (("demo",), PLACES | {"lr": 1.0}, "given lr, which is no field .*: did you mean optimizer__base_lr"),
        (("demo",), PLACES | {"workers": 3}, "take one of name, method, "),
        (("demo",), PLACES | {"epochs": "3"}, "epochs is '3' but must be a whole number"),
        (("demo",), PLACES | {"epochs": 2.5}, "epochs is 2.5 but must be a whole number"),
        (("demo",), PLACES | {"optimizer": "sgd"}, "optimizer is 'sgd' but must be a table of Optimizer's fields"),
        (("demo",), PLACES | {"resume": "yes"}, "resume is 'yes' but must be true or false"),
        (("demo",), PLACES | {"log": "csv"}, "log is 'csv' but must be a list"),
        (("demo",), PLACES | {"seed": object()}, "seed is <object .* but must be a whole number"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple[Any, ...], settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        mvssl.train(*arguments, **settings)


def test_it_trains(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    result = mvssl.train(tiny_recipe, data=str(images), out=tmp_path / "run", epochs=1, log=["none"], device="cpu")
    assert result.steps == 4
