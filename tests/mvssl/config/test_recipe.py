"""Recipes validate themselves, survive JSON, and have the numbers of the paper."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, cast

import pytest

import mvssl
from mvssl.config.recipe import Backbone, Evaluation, Head, Optimizer, Recipe
from mvssl.config.serialize import changed_fields, from_dict, to_dict
from mvssl.models.view_batching import task_pairs
from mvssl.recipes import PUBLISHED, all_recipes, get_recipe
from pipelines.runtime import InputError
from pipelines.views.presets import byol_views, mocov3_views, paper_views, simsiam_views
from pipelines.views.spec import ViewSpec


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
    """Numbers typed from PAPER.md sections 2, 3 and 5, not taken from the code."""
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


LARS = Optimizer(
    kind="lars", momentum=0.9, eta=0.001, base_lr=0.4, weight_decay=1.5e-6, warmup_epochs=10, final_lr_factor=0.001
)
SGD = Optimizer(
    kind="sgd",
    momentum=0.9,
    base_lr=0.05,
    weight_decay=1e-4,
    warmup_epochs=0,
    final_lr_factor=0.001,
    constant_predictor_lr=True,
    lr_schedule="epoch",
)
ADAMW = Optimizer(
    kind="adamw",
    betas=(0.9, 0.98),
    base_lr=3e-4,
    weight_decay=0.1,
    warmup_epochs=10,
    final_lr_factor=0.001,
    clip_grad_norm=0.5,
)
SMALL, SMALL_NORM = Head(hidden=(4096,), out=256), Head(hidden=(4096,), out=256, output_norm=True)
DEEP = Head(hidden=(4096, 4096), out=256)
VITS, VITB = (
    Backbone(name=f"vit_{size}_patch16_224", drop_path=0.1, init="release", pos_embed="release")
    for size in ("small", "base")
)
R50 = Backbone(name="resnet50", drop_path=0.0, init="release")
THIRDS = {"global": 1 / 3, "local": 1 / 3, "cutout": 1 / 3}


@pytest.mark.parametrize(
    ("name", "method", "backbone", "heads", "optimizer", "batch", "decay", "temperature", "weights", "published"),
    [
        ("byol_resnet50_200ep", "byol", R50, (SMALL, SMALL), LARS, 1024, 0.996, None, {}, 75.6),
        ("byol_vits16_200ep", "byol", VITS, (DEEP, SMALL), ADAMW, 1024, 0.998, None, {}, 74.5),
        ("byol_vitb16_200ep", "byol", VITB, (DEEP, SMALL), ADAMW, 1024, 0.998, None, {}, 78.3),
        (
            "simsiam_resnet50_200ep",
            "simsiam",
            R50,
            (Head(hidden=(2048, 2048), out=2048, output_norm=True), Head(hidden=(512,), out=2048)),
            SGD,
            512,
            None,
            None,
            THIRDS,
            74.7,
        ),
        ("mocov3_resnet50_200ep", "mocov3", R50, (SMALL_NORM, SMALL_NORM), LARS, 1024, 0.996, 1.0, {}, 75.7),
    ],
)
def test_the_papers_recipes(
    name: str,
    method: str,
    backbone: Backbone,
    heads: tuple[Head, Head],
    optimizer: Optimizer,
    batch: int,
    decay: float | None,
    temperature: float | None,
    weights: dict[str, float],
    published: float,
) -> None:
    """Numbers typed from PAPER.md sections 1, 3, 4 and 5, not taken from the code; views as tested above."""
    recipe = get_recipe(name)
    assert (recipe.method, recipe.backbone) == (method, backbone)
    assert (recipe.projector, recipe.predictor) == heads
    assert recipe.optimizer == optimizer
    assert (recipe.epochs, recipe.batch_size, recipe.accumulate) == (200, batch, 1)
    assert decay is None or recipe.target_decay == decay
    assert recipe.temperature == temperature
    assert recipe.task_weights == weights
    assert recipe.views == mvssl.recipes.byol_resnet50_200ep().views
    assert (recipe.predictors, recipe.sync_batchnorm) == ("per-view", "none")
    assert PUBLISHED[name] == published


def test_effective_learning_rates() -> None:
    rates = {name: get_recipe(name).learning_rate for name in all_recipes() if name.endswith("_200ep")}
    assert rates == pytest.approx(
        {
            "byol_resnet50_200ep": 1.6,
            "byol_vitb16_200ep": 1.2e-3,
            "byol_vits16_200ep": 1.2e-3,
            "mocov3_resnet50_200ep": 1.6,
            "simsiam_resnet50_200ep": 0.1,
        }
    )


METHODS = ["byol", "simsiam", "mocov3"]


@pytest.mark.parametrize("method", METHODS)
def test_the_shared_control_differs_in_the_predictors_only(method: str) -> None:
    own = get_recipe(f"{method}_resnet50_200ep")
    shared = get_recipe(f"{method}_resnet50_200ep_shared")
    assert shared.predictors == "shared"
    assert dataclasses.replace(shared, name=own.name, predictors="per-view") == own


@pytest.mark.parametrize(
    ("method", "views", "weight"),
    [("byol", byol_views(), 2.0), ("simsiam", simsiam_views(), 1.0), ("mocov3", mocov3_views(), 2.0)],
)
def test_the_two_view_baseline_differs_in_views_and_weight_only(
    method: str, views: tuple[ViewSpec, ViewSpec], weight: float
) -> None:
    multi = get_recipe(f"{method}_resnet50_200ep")
    two = get_recipe(f"{method}_resnet50_200ep_two_view")
    assert (two.views, two.task_weights) == (views, {"global": weight})
    assert dataclasses.replace(two, name=multi.name, views=multi.views, task_weights=multi.task_weights) == multi


def test_asymmetric_byol_predicts_view_2_from_view_1_twice() -> None:
    recipe, two = mvssl.recipes.byol_resnet50_200ep_asymmetric(), mvssl.recipes.byol_resnet50_200ep_two_view()
    assert task_pairs(recipe.views, recipe.task_weights) == (("global", 2.0, ((0, 1),)),)
    assert dataclasses.replace(recipe, name=two.name, views=two.views) == two


def test_small_recipes_keep_their_numbers() -> None:
    """The measured results were obtained with these."""
    demo, tiny = mvssl.recipes.demo(), mvssl.recipes.byol_resnet18_tiny_imagenet()
    assert (demo.epochs, demo.batch_size, demo.target_decay, demo.learning_rate) == (10, 64, 0.97, 2e-3)
    assert (tiny.epochs, tiny.batch_size, tiny.target_decay, tiny.learning_rate) == (7, 128, 0.99, 1e-3)
    assert [(v.size, v.blur_kernel) for v in tiny.views] == [(32, 5), (32, 5), (16, 5), (16, 5), (32, 5)]
    for method in ("simsiam", "mocov3"):
        other = get_recipe(f"{method}_resnet18_tiny_imagenet")
        assert (other.method, other.views, other.epochs, other.batch_size) == (method, tiny.views, 7, 128)


@pytest.mark.parametrize("name", sorted(all_recipes()))
def test_only_the_papers_recipes_claim_a_published_number(name: str) -> None:
    about = all_recipes()[name].__doc__ or ""
    published = {f"{method}_resnet50_200ep" for method in METHODS}
    published |= {"byol_resnet50_800ep", "byol_vits16_200ep", "byol_vitb16_200ep"}
    assert (name in PUBLISHED) == (name in published)
    assert ("2602.05845" in about) != ("no published accuracy" in " ".join(about.split()))


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
        (lambda r: Optimizer(kind=cast(Any, "adam")), "kind is 'adam'"),
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


def test_changed_fields_are_every_changed_field_and_no_other() -> None:
    old = mvssl.recipes.demo()
    view = dataclasses.replace(old.views[2], flip=0.25)
    new = dataclasses.replace(old, epochs=old.epochs + 1, views=(*old.views[:2], view, *old.views[3:]))
    assert changed_fields(to_dict(old), to_dict(new)) == {
        "views.2.flip": (0.5, 0.25),
        "epochs": (old.epochs, old.epochs + 1),
    }
    assert changed_fields(to_dict(old), to_dict(old)) == {}
    assert isinstance(old, Recipe)
