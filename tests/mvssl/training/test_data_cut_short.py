"""Converted files truncated, deleted or replaced while they are read: an error message, no SIGBUS, exact resumption."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvssl.config.recipe import Recipe
from mvssl.runs import checkpoint
from pipelines.conversion.command import Convert, convert
from pipelines.runtime import InputError
from tests.samples.data_faults import (
    CONVERTED,
    SAVED,
    before_batch,
    before_second_evaluation,
    copy_of,
    last_step,
    log,
    victims,
    write_forms,
)
from tests.samples.tiny_runs import STEPS, metrics, train, write_images

LEFT = 5000  # bytes of a truncated file

# Loads each data set named on stdin; prints "loading" at the first batch and the error at the end.
LOADING = """
import sys
from pipelines.runtime import InputError
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.storage import open_source
from pipelines.views.spec import ViewSpec

for line in sys.stdin:
    source = open_source(line.strip())
    specs = [ViewSpec(name="a", task="global", size=16, blur=0.0, is_target=True)]
    loader = Loader(source, specs, Order(num_images=len(source), batch_size=16, seed=0))
    try:
        for epoch in range(1_000_000):
            for _ in loader.epoch(epoch, until=1_000_000):
                if loader.stats.batches == 1:
                    print("loading", flush=True)
    except InputError as error:
        print(error, flush=True)
    loader.close()
"""


@pytest.fixture(scope="module")
def other_forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same number of other images."""
    base = tmp_path_factory.mktemp("others")
    write_images(base / "images" / "train", classes=3, per_class=12, seed=3)
    write_images(base / "images" / "val", classes=3, per_class=4, seed=4)
    return write_forms(base / "images", base)


@pytest.mark.parametrize("form", CONVERTED)
def test_a_file_cut_short_stops_the_run(
    forms: dict[str, Path], finished: Path, tiny_recipe: Recipe, tmp_path: Path, form: str
) -> None:
    data, out = copy_of(forms[form], tmp_path), tmp_path / "run"
    (victim,) = victims(data, tiny_recipe)
    path, content, left = victim.path, victim.path.read_bytes(), victim.offset + len(victim.image) // 2
    sentence = (
        rf"^{path} was cut short to {left} of {len(content)} bytes: restore it from where it was copied, or .*\.$"
    )
    with before_batch(lambda: os.truncate(path, left)), pytest.raises(InputError, match=sentence):
        train(tiny_recipe, data, out, prefetch=1)
    assert f"stopped by InputError: {path} was cut short" in log(out)
    assert last_step(out) == SAVED
    with pytest.raises(InputError, match=rf"^{path} (has|was cut short to) {left} .*: restore it"):
        train(tiny_recipe, data, out, resume=True)
    path.write_bytes(content)
    train(tiny_recipe, data, out, resume=True)
    assert metrics(out) == metrics(finished)


def test_an_evaluation_stopped_by_a_truncated_file_is_repeated_after_resuming(
    forms: dict[str, Path], finished: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    data, out = copy_of(forms["shards"], tmp_path), tmp_path / "run"
    path = largest_file(data / "val")
    content = path.read_bytes()
    sentence = rf"^{path} was cut short to {LEFT} of {len(content)} bytes"
    with before_second_evaluation(lambda: os.truncate(path, LEFT)), pytest.raises(InputError, match=sentence):
        train(tiny_recipe, data, out)
    saved = checkpoint.load(out / "checkpoints" / "last").meta
    assert (saved["step"], saved["evaluated"]) == (8, False)
    path.write_bytes(content)
    train(tiny_recipe, data, out, resume=True)
    assert metrics(out) == metrics(finished)


@pytest.mark.parametrize(
    ("fate", "form", "sentence"),
    [
        ("deleted", "shards", "{path} is missing: restore it"),
        ("deleted", "beton", "{path} is missing: restore it"),
        ("replaced", "shards", "{path} has other contents than the manifest says .*: restore it"),
        ("replaced", "beton", "data is '{data}' but the run was started with other images"),
    ],
    ids=["deleted-shards", "deleted-beton", "replaced-shards", "replaced-beton"],
)
def test_a_deleted_or_replaced_file_is_read_to_the_end_of_the_run_and_missed_by_the_next(
    forms: dict[str, Path],
    other_forms: dict[str, Path],
    finished: Path,
    tiny_recipe: Recipe,
    tmp_path: Path,
    fate: str,
    form: str,
    sentence: str,
) -> None:
    data, out = copy_of(forms[form], tmp_path), tmp_path / "run"
    path = victims(data, tiny_recipe)[0].path

    def damage() -> None:
        if fate == "deleted":
            path.unlink()
        else:
            shutil.copy(other_forms[form] / "train" / path.name, tmp_path / "other")
            (tmp_path / "other").replace(path)

    with before_batch(damage):
        train(tiny_recipe, data, out, prefetch=1)
    assert metrics(out) == metrics(finished)
    with pytest.raises(InputError, match=sentence.format(path=path, data=data)):
        train(tiny_recipe, data, out, resume=True)
    assert last_step(out) == STEPS
    assert metrics(out) == metrics(finished)


def largest_file(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda file: file.stat().st_size)


@pytest.mark.parametrize("form", CONVERTED)
def test_a_file_may_be_cut_short_at_any_moment(tmp_path: Path, form: Any) -> None:
    """In another process: decoding from a mapped file that was truncated raises SIGBUS, which kills."""
    (tmp_path / "images").mkdir()
    for n, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (32, 400, 400, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(tmp_path / "images" / f"{n:02d}.jpg", quality=90)
    data = tmp_path / "data"
    convert(Convert(src=tmp_path / "images", dst=data, format=form))
    path = largest_file(data)
    content = path.read_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", LOADING], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as loading:
        assert loading.stdin is not None
        assert loading.stdout is not None
        for delay in (0.0, 0.011, 0.023, 0.05, 0.1):
            print(data, file=loading.stdin, flush=True)
            assert loading.stdout.readline() == "loading\n"
            time.sleep(delay)
            os.truncate(path, LEFT)
            said = loading.stdout.readline()
            assert said.startswith(f"{path} was cut short to {LEFT} of {len(content)} bytes: restore it"), said
            path.write_bytes(content)
    assert loading.returncode == 0
