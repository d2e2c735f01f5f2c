"""A run on images of 12 bits: as on those of 8, resumed and evaluated with the range that it was trained with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvssl.config.recipe import Recipe
from mvssl.evaluate.session import ComputeOptions, EvalOptions, open_session
from mvssl.weights.load import BackboneSource
from pipelines.conversion.command import Convert, convert
from pipelines.runtime import InputError
from pipelines.storage.image_facts import facts_of
from tests.samples.tiny_runs import metrics, train


@pytest.fixture(scope="module")
def deep(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images as gray PNGs, of 8 bits in plain/ and of 12 bits in files of 16 in deep/."""
    base = tmp_path_factory.mktemp("deep")
    rng = np.random.default_rng(0)
    for path in images.rglob("*.jpg"):
        gray = np.asarray(Image.open(path).convert("L"))
        wide = (gray.astype(np.uint16) << 4) + rng.integers(0, 16, gray.shape, dtype=np.uint16)
        for folder, values in (("plain", gray), ("deep", wide)):
            to = (base / folder / path.relative_to(images)).with_suffix(".png")
            to.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(to)
    return base


@pytest.fixture(scope="module")
def run(deep: Path, tiny_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train(tiny_recipe, deep / "deep", out, value_range="0..4095")
    return out


def test_numbers_are_those_of_8_bits(run: Path, deep: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    train(tiny_recipe, deep / "plain", tmp_path / "plain")
    assert metrics(run) == metrics(tmp_path / "plain")
    convert(Convert(src=deep / "deep", dst=tmp_path / "shards"))
    train(tiny_recipe, tmp_path / "shards", tmp_path / "converted")  # the range is that of the data
    assert metrics(run) == metrics(tmp_path / "converted")
    for out in (run, tmp_path / "converted"):
        assert json.loads((out / "config.json").read_text())["options"]["value_range"] == "0..4095"


def test_without_a_range_nothing_is_trained(deep: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"value_range is not stated but must be .*: add --value-range 0\.\.4095, or conv"
    ):
        train(tiny_recipe, deep / "deep", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"value_range is '4095' but must be MIN\.\.MAX"):
        train(tiny_recipe, deep / "deep", tmp_path / "run", value_range="4095")


def test_a_resumed_run_keeps_its_range(run: Path, deep: Path, tiny_recipe: Recipe) -> None:
    train(tiny_recipe, deep / "deep", run, resume=True)
    train(tiny_recipe, deep / "deep", run, resume=True, value_range="0..4095")
    with pytest.raises(InputError, match=r"value_range is '0\.\.1023' but the run in .* was started with '0\.\.4095'"):
        train(tiny_recipe, deep / "deep", run, resume=True, value_range="0..1023")


def test_a_run_without_a_range_is_not_resumed_with_one(deep: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    train(tiny_recipe, deep / "plain", tmp_path / "run")
    with pytest.raises(InputError, match="was started without one: leave --value-range out"):
        train(tiny_recipe, deep / "plain", tmp_path / "run", resume=True, value_range="0..4095")
    train(tiny_recipe, deep / "plain", tmp_path / "run", resume=True, value_range="0..65535")  # what none means


def test_splits_that_were_converted_with_different_ranges_are_refused(
    deep: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    convert(Convert(src=deep / "deep" / "train", dst=tmp_path / "train"))
    convert(Convert(src=deep / "deep" / "val", dst=tmp_path / "val", value_range="0..8191"))
    with pytest.raises(InputError, match=r"whose values 0\.\.8191 become 0\.\.255, but those of .*train are 0\.\.4095"):
        train(tiny_recipe, tmp_path / "train", tmp_path / "run", val=tmp_path / "val")


def test_an_evaluation_takes_the_range_of_the_run_unless_one_is_stated(run: Path, tmp_path: Path) -> None:
    for stated, expected in ((None, "0..4095"), ("0..2047", "0..2047")):
        compute, options = ComputeOptions(device="cpu", value_range=stated), EvalOptions(out=tmp_path / expected)
        with open_session(BackboneSource(run=run), options, compute) as session:
            assert session.val is not None
            assert str(facts_of(session.train).value_range) == str(facts_of(session.val).value_range) == expected
            assert session.identity("knn")["train"] == f"{session.train.fingerprint} {expected}"
