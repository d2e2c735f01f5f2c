"""`mvssl.train` on data given in Python: the numbers of the same images in a folder, resumed and checked alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import Dataset

import mvssl
from mvssl.config.recipe import Recipe
from tests.samples.ranks import results, run_ranks
from tests.samples.tiny_runs import crash_at, metrics


class Pictures(Dataset[Any]):
    """The decoded images of a folder, as (image, class name)."""

    def __init__(self, folder: Path, change: Callable[[int, Any], Any] = lambda n, image: image) -> None:
        self.paths = sorted(folder.rglob("*.jpg"))
        self.change = change

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, n: int) -> Any:
        return self.change(n, Image.open(self.paths[n]).convert("RGB")), self.paths[n].parent.name


def run(recipe: Recipe, data: Any, out: Path, **settings: Any) -> mvssl.TrainResult:
    return mvssl.train(recipe, data=data, out=out, device="cpu", log_every=3, log=["none"], **settings)


def test_a_dataset_trains_as_its_folder_does(images: Path, tiny_recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    result = run(
        tiny_recipe, Pictures(images / "train"), tmp_path / "run", val=Pictures(images / "val"), optimizer__momentum=0.9
    )
    assert metrics(tmp_path / "run") == metrics(finished)
    assert "knn/top1" in result.curves()
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config["options"]["data"] is None
    log = (tmp_path / "run/train.log").read_text()
    assert "36 images of 3 classes (class_0 12, class_1 12, class_2 12) in Pictures with 36 items" in log


def test_a_crashed_run_resumes_with_the_same_dataset_only(
    images: Path, tiny_recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    folder, val, out = images / "train", images / "val", tmp_path / "run"
    with crash_at(6):
        run(tiny_recipe, Pictures(folder), out, val=val)
    for change, words in (
        (lambda n, image: image.rotate(90) if n == 35 else image, "1 image with other pixels"),
        (
            lambda n, image: np.asarray(image)[:, :, ::-1],
            r"8 images with other pixels \(item 0, item 5, item 10, \.\.\.",
        ),
    ):
        with pytest.raises(mvssl.InputError, match=f"the run was started with other images .{words}"):
            run(tiny_recipe, Pictures(folder, change), out, val=val, resume=True)
    relabelled = [(image, "x") for image, _ in Pictures(folder)]  # type: ignore[attr-defined]
    with pytest.raises(mvssl.InputError, match="36 images with another label"):
        run(tiny_recipe, relabelled, out, val=val, resume=True)
    fewer = list(Pictures(folder))[:-3]  # type: ignore[call-overload]
    with pytest.raises(mvssl.InputError, match="3 images fewer"):
        run(tiny_recipe, fewer, out, val=val, resume=True)
    run(tiny_recipe, list(Pictures(folder)), out, val=val, resume=True)  # type: ignore[call-overload]
    assert metrics(out) == metrics(finished)


def test_a_list_of_the_files_of_a_folder_resumes_its_run(
    images: Path, tiny_recipe: Recipe, finished: Path, tmp_path: Path
) -> None:
    with crash_at(6):
        run(tiny_recipe, images, tmp_path / "run")
    pairs = [(path, path.parent.name) for path in sorted((images / "train").rglob("*.jpg"))]
    run(tiny_recipe, pairs, tmp_path / "run", val=[images / "val"], resume=True)
    assert metrics(tmp_path / "run") == metrics(finished)


def test_bad_items_are_replaced_and_counted(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    def change(n: int, image: Any) -> Any:
        if n == 4:
            raise ValueError("no such frame")
        return None if n == 20 else image

    dataset = Pictures(images / "train", change)
    run(tiny_recipe, dataset, tmp_path / "run", epochs=2, evaluation__every_epochs=0)
    bad = json.loads((tmp_path / "run/summary.json").read_text())["bad_images"]
    assert set(bad) == {"item 4", "item 20"}
    assert "the dataset raised ValueError: no such frame" in bad["item 4"]


def test_the_first_line_of_a_run_names_what_is_trained(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_recipe, images, tmp_path / "run", epochs=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert "Training demo" in lines[0]
    assert "36 images" in lines[0]
    assert any("warm-up: 0.666667 epochs instead of 1" in line for line in lines[1:])


def ranks_on_a_dataset(recipe: Recipe, images: Path, out: Path) -> tuple[int, str | None, list[int]]:
    """On each rank: the steps, what stopped the run, and the steps that its callback has seen."""
    seen: list[int] = []

    def stop_at_three(state: mvssl.TrainState) -> bool:
        seen.append(state.step)
        return state.step == 3

    result = run(recipe, Pictures(images / "train"), out, callbacks=stop_at_three)
    return result.steps, result.stopped_by, seen


def test_ranks_train_on_a_dataset_of_their_own_and_stop_together(
    images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = replace(tiny_recipe, evaluation=replace(tiny_recipe.evaluation, every_epochs=0))
    first, second = results(run_ranks(ranks_on_a_dataset, 2, recipe, images, tmp_path / "run"))
    assert first == (3, "stop_at_three", [1, 2, 3])
    assert second == (3, "stop_at_three", [])


@pytest.mark.parametrize(
    ("own", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_of_openmp_soon_sleep_unless_the_user_says_how_they_wait(own: dict[str, str], expected: str) -> None:
    code = "import os, mvssl; mvssl.Recipe; print(os.environ.get('GOMP_SPINCOUNT'))"
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=plain | own, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == expected
