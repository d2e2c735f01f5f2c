"""Images and disks that fail during a run: it continues, or stops with one error message and resumes exactly."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvssl.config.recipe import Recipe
from mvssl.runs import checkpoint
from mvssl.runs.jsonl import read_jsonl
from pipelines.runtime import InputError
from pipelines.storage import open_source
from tests.samples.data_faults import (
    DAMAGED,
    FORMS,
    SAVED,
    Victim,
    before_batch,
    before_second_evaluation,
    copy_of,
    disk,
    last_step,
    log,
    victims,
    write_forms,
)
from tests.samples.tiny_runs import STEPS, metrics, train

NOISE = np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8).tobytes()
ODD = ("cmyk", "deep")


@pytest.fixture(scope="module")
def odd_forms(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data sets with a CMYK JPEG and a 16-bit PNG among the training images."""
    base = tmp_path_factory.mktemp("odd")
    data = copy_of(images, base)
    y, x = np.mgrid[0:40, 0:48]
    cmyk = np.stack([x * 5, y * 6, 255 - x * 5, y * 2], -1).astype(np.uint8)
    Image.frombytes("CMYK", (48, 40), cmyk.tobytes()).save(data / "train" / "class_0" / "cmyk.jpg", quality=95)
    Image.fromarray((x * 1300 + y).astype(np.uint16)).save(data / "train" / "class_1" / "deep.png")
    return write_forms(data, base)


@pytest.mark.parametrize("form", FORMS)
def test_images_that_break_are_named_and_replaced_and_odd_ones_are_used(
    odd_forms: dict[str, Path], tiny_recipe: Recipe, tmp_path: Path, form: str
) -> None:
    data, out = copy_of(odd_forms[form], tmp_path), tmp_path / "run"
    noise, cut, empty, *deleted = bad = victims(data, tiny_recipe, 4 if form == "folder" else 3, spared=ODD)

    def damage() -> None:
        noise.overwrite(NOISE)
        cut.overwrite(cut.image[:300])
        empty.overwrite(b"")
        for victim in deleted:
            victim.path.unlink()

    with before_batch(damage) as prepared:
        train(tiny_recipe, data, out, prefetch=1)
    assert last_step(out) == STEPS
    lines = log(out).splitlines()
    for victim in bad:
        named = [line for line in lines if f"Image {victim.key} cannot be decoded (" in line]
        assert len([line for line in named if "the next image of the order takes its place" in line]) == 1, victim.key
        assert len([line for line in named if "left out of the evaluation" in line]) == 2, victim.key
    assert any(f"{len(bad)} images could not be decoded and were replaced, e.g. " in line for line in lines)
    assert [len(batch) for batch in prepared] == [tiny_recipe.batch_size] * STEPS
    assert not {victim.index for victim in bad} & {index for batch in prepared[DAMAGED:] for index in batch}
    source = open_source(odd_forms[form] / "train")
    used = {Path(source.key(index)).stem for batch in prepared for index in batch}
    assert used >= set(ODD)
    assert not [line for line in lines if "cannot be decoded" in line and any(name in line for name in ODD)]
    losses = [row["loss"] for row in read_jsonl(out / "metrics.jsonl") if row["kind"] == "train"]
    assert len(losses) == 6
    assert all(math.isfinite(loss) for loss in losses)


class Failure:
    """Reads of all training images, or of one, fail from `begin` on."""

    def __init__(self, number: int, victim: Victim | None = None) -> None:
        self._error = (number, os.strerror(number))
        self._place = None if victim is None else (victim.path, victim.offset)
        self._active = False

    def begin(self) -> None:
        self._active = True

    def __call__(self, path: Path, offset: int) -> None:
        if self._active and "train" in path.parts and self._place in (None, (path, offset)):
            raise OSError(*self._error)


@pytest.mark.parametrize("form", ["folder", "shards"])
def test_an_image_on_a_bad_sector_is_named_and_replaced(
    forms: dict[str, Path], tiny_recipe: Recipe, tmp_path: Path, form: str
) -> None:
    (victim,) = victims(forms[form], tiny_recipe)
    failure, out = Failure(errno.EIO, victim), tmp_path / "run"
    with disk(failure), before_batch(failure.begin) as prepared:
        train(tiny_recipe, forms[form], out, prefetch=1)
    assert last_step(out) == STEPS
    assert f"Image {victim.key} cannot be decoded (it cannot be read: Input/output error): the next image" in log(out)
    assert f"1 image could not be decoded and was replaced, e.g. {victim.key}" in log(out)
    assert [len(batch) for batch in prepared] == [tiny_recipe.batch_size] * STEPS
    assert victim.index not in {index for batch in prepared[DAMAGED:] for index in batch}


def test_a_disk_that_fails_stops_the_run(
    forms: dict[str, Path], finished: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    failure, out = Failure(errno.EIO), tmp_path / "run"
    sentence = (
        r"8 of the 8 images of a batch cannot be decoded, .*\(it cannot be read: Input/output error\).*: check the"
    )
    with disk(failure), before_batch(failure.begin), pytest.raises(InputError, match=sentence):
        train(tiny_recipe, forms["beton"], out, prefetch=1)
    assert last_step(out) == SAVED
    train(tiny_recipe, forms["beton"], out, resume=True)
    assert metrics(out) == metrics(finished)


def test_a_disk_that_is_unmounted_stops_the_run(
    images: Path, finished: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    data, out = copy_of(images, tmp_path), tmp_path / "run"

    def unmount() -> None:
        data.rename(tmp_path / "disk")
        data.mkdir()

    sentence = r"8 of the 8 images of a batch cannot be decoded, .*\(it cannot be read: No such file.*: check the data"
    with before_batch(unmount), pytest.raises(InputError, match=sentence):
        train(tiny_recipe, data, out, prefetch=1)
    assert last_step(out) == SAVED
    with pytest.raises(InputError, match=f"{data} holds no images"):
        train(tiny_recipe, data, out, resume=True)
    data.rmdir()
    (tmp_path / "disk").rename(data)
    train(tiny_recipe, data, out, resume=True)
    assert metrics(out) == metrics(finished)


def test_no_accuracy_is_logged_for_the_few_images_that_a_failing_disk_leaves(
    images: Path, finished: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """It would stay in metrics.jsonl for good."""
    data, out, gone = copy_of(images, tmp_path), tmp_path / "run", ("class_0", "class_1")

    def damage() -> None:
        for name in gone:
            (data / "train" / name).rename(tmp_path / name)

    sentence = r"24 of the 36 images of .*train cannot be decoded, too many to evaluate the others: check the data"
    with before_second_evaluation(damage), pytest.raises(InputError, match=sentence):
        train(tiny_recipe, data, out)
    saved = checkpoint.load(out / "checkpoints" / "last").meta
    assert (saved["step"], saved["evaluated"]) == (8, False)
    for name in gone:
        (tmp_path / name).rename(data / "train" / name)
    train(tiny_recipe, data, out, resume=True)
    assert metrics(out) == metrics(finished)


def test_too_many_open_files_stop_the_run_and_no_image_is_blamed(
    images: Path, finished: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    failure, out = Failure(errno.EMFILE, *victims(images, tiny_recipe)), tmp_path / "run"
    with (
        disk(failure),
        before_batch(failure.begin),
        pytest.raises(OSError, match="Too many open files") as caught,
    ):
        train(tiny_recipe, images, out, prefetch=1)
    assert caught.value.errno == errno.EMFILE
    assert caught.value.__notes__ == [f"while preparing batch 2 of epoch 1 of {images / 'train'}"]
    assert "cannot be decoded" not in log(out)
    assert last_step(out) == SAVED
    train(tiny_recipe, images, out, resume=True)
    assert metrics(out) == metrics(finished)
