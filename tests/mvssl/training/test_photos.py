"""The recipe photos is fitted to the images and the machine, keeps what is given, and resumes as it was fitted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mvssl
from mvssl.cli import train as train_cli
from mvssl.config.device import check_bf16_on_cpu
from mvssl.config.recipe import Backbone, Recipe
from mvssl.methods import get_method
from mvssl.models.backbones import build_backbone, feature_width
from mvssl.recipes import FITTED, Situation, all_recipes
from mvssl.recipes.own_images import fitting_sizes
from mvssl.runs.folder import RunFolder
from mvssl.training.fit_recipe import fit_recipe, short_side
from pipelines.runtime import InputError
from pipelines.storage import open_source

SMALL = ("--backbone.name", "test_resnet", "--projector.hidden", "32", "--predictor.hidden", "32")


def situation(images: int, side: int = 500, device: Any = "cpu", **more: Any) -> Situation:
    return Situation(**({"images": images, "short_side": side, "device": device, "cores": 2} | more))


def fit(images: int, side: int = 500, device: Any = "cpu", **more: Any) -> Recipe:
    all_recipes()
    return FITTED["photos"](situation(images, side, device, **more)).recipe


def test_views_are_no_larger_than_the_images_or_than_the_machine_computes() -> None:
    assert [fit(9_000, side, "cuda").views[0].size for side in (28, 64, 100, 224, 4000)] == [32, 64, 96, 224, 224]
    assert [fit(9_000, 4000, cores=cores).views[0].size for cores in (1, 2, 16, 64)] == [64, 64, 96, 128]
    assert [view.size for view in fit(9_000, 4000, "cuda").views] == [224, 224, 96, 96, 224]


def test_fewer_images_have_more_epochs_and_smaller_batches() -> None:
    for device in ("cpu", "cuda"):
        recipes = [fit(images, device=device) for images in (50, 400, 3_000, 40_000, 1_300_000)]
        for name in ("epochs", "batch_size"):
            values = [getattr(recipe, name) for recipe in recipes]
            assert values == sorted(values, reverse=name == "epochs"), name
        for images, recipe in zip((50, 400, 3_000), recipes, strict=False):
            assert images // recipe.batch_size >= 2
    assert fit(1_300_000).backbone.name == "resnet10_half"
    assert fit(1_300_000, cores=16).backbone.name == "resnet18"
    assert fit(1_300_000, device="cuda").backbone.name == "resnet50"


def test_what_is_given_is_kept_and_the_rest_fits_it() -> None:
    given = {"epochs": 7, "batch_size": "48", "backbone.name": "vit_small_patch16_224", "optimizer.kind": "sgd"}
    recipe = fit(5_000, device="cuda", given=given)
    assert (recipe.epochs, recipe.batch_size, recipe.backbone.name) == (7, 48, "vit_small_patch16_224")
    assert (recipe.optimizer.kind, recipe.backbone.drop_path) == ("sgd", 0.1)
    assert recipe.optimizer.warmup_epochs <= 7


def test_on_a_cpu_a_resnet_from_nothing_takes_what_learned_the_most_and_what_is_given_stays() -> None:
    recipe = fit(5_000)
    assert (recipe.method, recipe.temperature, recipe.optimizer.kind) == ("mocov3", 1.0, "lars")
    assert recipe.projector.output_norm
    assert recipe.predictor.output_norm
    assert fit(5_000, given={"batch_size": "32"}).learning_rate == pytest.approx(recipe.learning_rate / 2)
    assert fit(5_000, given={"batch_size": "1024"}).learning_rate == pytest.approx(recipe.learning_rate * 4)
    for method in ("byol", "simsiam", "mocov3"):
        for kind in ("lars", "adamw", "sgd"):
            given = fit(5_000, given={"method": method, "optimizer.kind": kind})
            assert (given.method, given.optimizer.kind) == (method, kind)
            get_method(method).make_loss(given)  # refuses a temperature that the method lacks or has not
    others: tuple[dict[str, str], ...] = ({"backbone.name": "vit_tiny_patch16_224"}, {"backbone.pretrained": "true"})
    for choice in others:
        assert (fit(5_000, given=choice).method, fit(5_000, given=choice).optimizer.kind) == ("byol", "adamw")
    assert fit(5_000, device="cuda").method == "byol"


def test_bf16_only_on_a_cpu_that_has_it_with_views_that_are_known_to_work() -> None:
    assert [fit(5_000, side, bf16=True).precision for side in (28, 64, 500)] == ["bf16"] * 3
    for recipe in (fit(5_000, side, bf16=True) for side in (28, 64, 500)):
        check_bf16_on_cpu(build_backbone(recipe.backbone), {view.size for view in recipe.views})
    assert fit(5_000).precision == "auto"
    given = ({"views.0.size": "32"}, {"backbone.name": "resnet18"}, {"backbone.pretrained": "true"})
    assert {fit(5_000, bf16=True, given=choice).precision for choice in given} == {"auto"}
    assert fit(5_000, device="cuda", bf16=True).precision == "auto"


def test_from_pretrained_weights_training_is_shorter_and_slower_to_change() -> None:
    nothing, known = (fit(5_000, device="cuda", given=given) for given in ({}, {"backbone.pretrained": "true"}))
    assert known.epochs < nothing.epochs
    assert known.optimizer.kind == "adamw"
    assert known.learning_rate == pytest.approx(1e-4)
    assert known.target_decay >= 0.99


@pytest.mark.parametrize(
    "name",
    ["resnet18", "vit_tiny_patch16_224", "vit_small_patch14_dinov2", "vit_tiny_r_s16_p8_224", "vit_small_patch32_224"],
)
@pytest.mark.parametrize("size", [64, 224])
def test_sizes_of_views_fit_the_backbone(name: str, size: int) -> None:
    both = fitting_sizes(name, size)
    assert both[1] <= both[0] <= max(size, 64)
    assert feature_width(build_backbone(Backbone(name=name)), both, name=name) > 0


def test_a_batch_is_halved_until_it_fits_but_not_a_given_one() -> None:
    def fits(recipe: Recipe) -> bool:
        return recipe.batch_size <= 128

    assert fit(600_000, device="cuda", fits=fits).batch_size == 128
    assert fit(600_000, device="cuda", fits=fits, given={"batch_size": "512"}).batch_size == 512
    assert fit(600_000, device="cuda", fits=lambda _: False).batch_size == 32
    assert fit(600_000, device="cuda", ranks=3).batch_size % 3 == 0


def test_few_images_get_advice_and_one_gets_a_recipe_too() -> None:
    notes = {images: FITTED["photos"](situation(images)).notes for images in (1, 3, 999, 1_000)}
    assert "1 image: few to learn from alone" in notes[1][-1]
    assert "--backbone.pretrained" in notes[999][-1]
    assert "few to learn" not in " ".join(notes[1_000])
    assert fit(1).batch_size == 2


def test_short_side_is_the_median_of_the_images_even_if_some_are_broken(tmp_path: Path) -> None:
    for number, (width, height) in enumerate([(50, 40), (90, 60), (200, 300), (10, 500)]):
        Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(tmp_path / f"{number}.png")
    (tmp_path / "9.jpg").write_bytes(b"no image")
    assert short_side(open_source(tmp_path)) == 50  # of 10, 40, 60 and 200
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no image")
    assert short_side(open_source(tmp_path / "broken")) == 224


def test_other_recipes_and_changed_objects_are_left_alone(images: Path) -> None:
    demo = mvssl.recipes.demo()
    assert fit_recipe(demo, {}, data=images) == (demo, ())
    photos = mvssl.recipes.photos()
    assert fit_recipe(photos, {}, data=None) == (photos, ())
    assert fit_recipe(photos, {}, data=images, device="cpu")[0].views[0].size == 32
    with pytest.raises(InputError, match="does not exist"):
        fit_recipe(photos, {}, data=images / "none")


def test_a_run_without_a_recipe_is_photos_and_resumes_by_itself(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, places = tmp_path / "run", ["--data", str(images), "--out", str(tmp_path / "run"), "--device", "cpu"]
    assert train_cli.body([*places, *SMALL, "--epochs", "2", "--log", "none"]) == 0
    log = (out / "train.log").read_text()
    assert "no recipe is named: photos is taken" in log
    assert "photos is fitted to 36 images (short side" in log
    assert "2 epochs, 72 image passes (given)" in log
    begun = RunFolder(out).recipe()
    assert (begun.name, begun.epochs, begun.backbone.name) == ("photos", 2, "test_resnet")
    metrics = (out / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    for command in (places, ["photos", *places]):  # finished: resuming needs no option and changes nothing
        assert train_cli.body([*command, "--resume"]) == 0
        assert (RunFolder(out).recipe(), (out / "metrics.jsonl").read_bytes()) == (begun, metrics)
    assert train_cli.body([*places, "--resume", "--extend", "--epochs", "3"]) == 0
    assert RunFolder(out).recipe() == dataclasses.replace(begun, epochs=3)
    with pytest.raises(InputError, match=r"was started with another recipe.*batch_size"):
        train_cli.body([*places, "--resume", "--batch-size", "8"])
    result = mvssl.train(data=images, out=out, resume=True, extend=True, epochs=4, device="cpu")
    assert (result.steps, RunFolder(out).recipe().epochs) == (8, 4)


def test_a_recipe_file_with_this_base_is_fitted_and_keeps_its_fields(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.toml").write_text('base = "photos"\nepochs = 5\n[optimizer]\nkind = "lars"\n')
    assert (
        train_cli.body([str(tmp_path / "mine.toml"), "--data", str(images), "--device", "cpu", "--print-config"]) == 0
    )
    shown = json.loads(capsys.readouterr().out)
    assert (shown["epochs"], shown["optimizer"]["kind"], shown["views"][0]["size"]) == (5, "lars", 32)
    assert shown["backbone"]["name"] == "resnet10_half"
