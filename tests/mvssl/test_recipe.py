"""Recipes check themselves, travel through JSON, and say what differs."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

import mvssl
from mvssl.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.recipes import all_recipes, get_recipe
from mvssl.serialize import differences, from_dict, to_dict
from pipelines.errors import InputError
from pipelines.views.presets import paper_views


@pytest.mark.parametrize("name", sorted(all_recipes()))
def test_every_recipe_builds_and_survives_json(name: str) -> None:
    recipe = get_recipe(name)
    assert recipe.name == name
    again = from_dict(json.loads(json.dumps(to_dict(recipe))))
    assert again == recipe
    about = all_recipes()[name].__doc__ or ""
    for word in ("Source:", "Cost:", "Command:"):
        assert word in about, f"the docstring of {name} lacks {word}"


def test_recipes_are_attributes_of_the_package() -> None:
    assert mvssl.recipes.byol_resnet50_200ep().batch_size == 1024
    with pytest.raises(AttributeError, match="byol_resnet50_200ep"):
        _ = mvssl.recipes.byol_resnet51


def test_byol_resnet50_200ep_is_the_published_one() -> None:
    """Numbers typed from SPEC sections 2, 3 and 5, not taken from the code."""
    recipe = mvssl.recipes.byol_resnet50_200ep()
    assert [(v.name, v.task, v.size, v.area) for v in recipe.views] == [
        ("global_1", "global", 224, (0.25, 1.0)),
        ("global_2", "global", 224, (0.25, 1.0)),
        ("local_1", "local", 96, (0.08, 0.25)),
        ("local_2", "local", 96, (0.08, 0.25)),
        ("cutout_1", "cutout", 224, (0.25, 1.0)),
    ]
    assert [v.blur for v in recipe.views] == [1.0, 0.1, 0.5, 0.5, 0.5]
    assert [v.solarize for v in recipe.views] == [0.0, 0.2, 0.0, 0.0, 0.0]
    assert all(v.jitter == (0.4, 0.4, 0.2, 0.1) and v.jitter_p == 0.8 and v.grayscale == 0.2 for v in recipe.views)
    assert [v.is_target for v in recipe.views] == [True, True, False, False, False]
    assert recipe.views[4].cutout == (0.2, 0.4)
    assert recipe.learning_rate == pytest.approx(1.6)
    assert recipe.optimizer.weight_decay == 1.5e-6
    assert recipe.target_decay == 0.996
    assert recipe.projector == Head(hidden=(4096,), out=256, output_norm=False)


def test_byol_resnet50_800ep_differs_where_the_paper_says() -> None:
    short, long = mvssl.recipes.byol_resnet50_200ep(), mvssl.recipes.byol_resnet50_800ep()
    assert long.epochs == 800
    assert [v.task for v in long.views] == ["global"] * 2 + ["local"] * 4 + ["cutout"]
    assert dataclasses.replace(long, name=short.name, views=short.views, epochs=200) == short


def test_unknown_recipe_offers_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"byol_resnet50_20ep.*did you mean 'byol_resnet50_200ep'"):
        get_recipe("byol_resnet50_20ep")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda r: dataclasses.replace(r, batch_size=1), "batch_size is 1 but must be at least 2"),
        (lambda r: dataclasses.replace(r, epochs=0), "epochs is 0"),
        (lambda r: dataclasses.replace(r, precision="fp8"), "precision is 'fp8'"),
        (lambda r: dataclasses.replace(r, predictors="both"), "predictors is 'both'"),
        (lambda r: dataclasses.replace(r, target_decay=1.5), "target_decay is 1.5"),
        (lambda r: dataclasses.replace(r, epochs=5), "warmup_epochs is 10"),
        (lambda r: dataclasses.replace(r, predictor=Head(out=64)), "must be the same"),
        (lambda r: dataclasses.replace(r, task_weights={"lokal": 1.0}), "task_weights is 'lokal'"),
        (lambda r: dataclasses.replace(r, task_weights={"local": float("nan")}), "task_weights"),
        (lambda r: dataclasses.replace(r, seed=-1), "seed is -1"),
        (lambda r: dataclasses.replace(r, views=()), "views is empty"),
        (lambda r: dataclasses.replace(r, views=paper_views()[2:]), "no target to predict"),
        (lambda r: Optimizer(base_lr=0.0), "base_lr is 0.0"),
        (lambda r: Optimizer(base_lr=float("inf")), "base_lr is inf"),
        (lambda r: Optimizer(weight_decay=-1.0), "weight_decay is -1.0"),
        (lambda r: Optimizer(kind="adam"), "kind is 'adam'"),
        (lambda r: Optimizer(clip_grad_norm=0.0), "clip_grad_norm is 0.0"),
        (lambda r: Head(hidden=(0,)), "hidden"),
        (lambda r: Backbone(drop_path=1.0), "drop_path is 1.0"),
        (lambda r: Evaluation(crop=300), "crop is 300"),
        (lambda r: Evaluation(k=()), r"k is \(\)"),
    ],
)
def test_bad_values_are_refused_with_field_and_value(make: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(mvssl.recipes.byol_resnet50_200ep())


def test_from_dict_names_unknown_and_missing_fields() -> None:
    plain = to_dict(mvssl.recipes.demo())
    plain["optimizer"]["speed"] = 3
    with pytest.raises(InputError, match=r"recipe\.optimizer has the unknown field 'speed'"):
        from_dict(plain)
    plain = to_dict(mvssl.recipes.demo())
    del plain["views"]
    with pytest.raises(InputError, match="views"):
        from_dict(plain)


def test_differences_name_every_changed_field_and_no_other() -> None:
    old = mvssl.recipes.demo()
    view = dataclasses.replace(old.views[2], flip=0.25)
    new = dataclasses.replace(old, epochs=old.epochs + 1, views=(*old.views[:2], view, *old.views[3:]))
    assert differences(to_dict(old), to_dict(new)) == [
        "views.2.flip: 0.5 -> 0.25",
        f"epochs: {old.epochs} -> {old.epochs + 1}",
    ]
    assert differences(to_dict(old), to_dict(old)) == []
    assert isinstance(old, Recipe)
