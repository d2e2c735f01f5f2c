"""Training with `--cache`: bit-identical, each image decoded once, also when resumed with another cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pipelines.loading.fetch
from mvssl.config.options import RunOptions
from mvssl.config.recipe import Recipe
from mvssl.runs.jsonl import read_jsonl
from mvssl.training.loop import Loop
from pipelines.loading.fetch import Fetcher
from pipelines.runtime import InputError
from tests.samples.data_faults import copy_of
from tests.samples.tiny_runs import CrashError, metrics, train


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of images in each decode call."""
    counts: list[int] = []
    decode = pipelines.loading.fetch.Fetcher._decode

    def counting(self: Fetcher, indices: Sequence[int], read: Any) -> Any:
        counts.append(len(indices))
        return decode(self, indices, read)

    monkeypatch.setattr(pipelines.loading.fetch.Fetcher, "_decode", counting)
    return counts


@pytest.mark.parametrize("form", ["folder", "shards", "beton"])
def test_a_cached_run_is_the_same_and_decodes_each_image_once(
    forms: dict[str, Path], finished: Path, tiny_recipe: Recipe, tmp_path: Path, decoded: list[int], form: str
) -> None:
    train(tiny_recipe, forms[form], tmp_path / "run", cache="host")
    assert metrics(tmp_path / "run") == metrics(finished)
    assert sum(decoded) == 36 + 12  # train and val, over three epochs and three evaluations
    log = (tmp_path / "run" / "train.log").read_text()
    assert "of pixels in host memory" in log
    assert log.count("cache: 100 % of the images are cached") == 2


def test_a_run_that_is_resumed_with_another_cache_is_the_same(
    images: Path, finished: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, out = Loop.save, tmp_path / "run"

    def save_and_crash(loop: Loop) -> None:
        save(loop)
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "save", save_and_crash)
        with pytest.raises(CrashError):
            train(tiny_recipe, images, out)
    train(tiny_recipe, images, out, resume=True, cache="auto")
    assert metrics(out) == metrics(finished)


def test_bad_and_odd_images_are_treated_as_without_a_cache(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    data = copy_of(images, tmp_path)
    victims = sorted((data / "train").rglob("*.jpg"))
    victims[3].write_bytes(b"no image")
    victims[9].write_bytes(victims[9].read_bytes()[:200])
    upright = np.zeros((30, 50, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    Image.fromarray(upright).save(victims[20], exif=exif)
    Image.fromarray(upright[..., 0]).save(victims[21], format="WEBP")
    plain, cached = tmp_path / "plain", tmp_path / "cached"
    train(tiny_recipe, data, plain)
    train(tiny_recipe, data, cached, cache="host")
    assert metrics(cached) == metrics(plain)
    named = [line for line in (cached / "train.log").read_text().splitlines() if "takes its place" in line]
    assert len(named) == 2


def test_invalid_choices_are_refused(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cache is 'device' but must be off, host or auto on a cpu device"):
        train(replace(tiny_recipe, epochs=1), images, tmp_path / "run", cache="device")
    with pytest.raises(InputError, match=r"RunOptions.cache is 'disk' but must be one of off, host, device, auto"):
        RunOptions(cache="disk")  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("choice", ["device", "host"])
def test_on_a_gpu_a_cached_run_is_the_same(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, decoded: list[int], choice: Any
) -> None:
    options: dict[str, Any] = {"device": "cuda", "decoder": "pillow", "compile": "off"}
    recipe = replace(tiny_recipe, precision="fp32")
    train(recipe, images, tmp_path / "plain", **options)
    decoded.clear()
    train(recipe, images, tmp_path / "cached", cache=choice, **options)
    assert sum(decoded) == 36 + 12
    ours, theirs = (
        [row["loss"] for row in read_jsonl(tmp_path / run / "metrics.jsonl") if row["kind"] == "train"]
        for run in ("cached", "plain")
    )
    assert ours == pytest.approx(theirs, abs=2e-3)
