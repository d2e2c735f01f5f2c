"""bench_train trains with a tiny recipe, and its result is complete."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from benchmarks import bench_train
from benchmarks.bench_train import measure, parse
from benchmarks.implementations.training import OURS, OURS_SYNTHETIC, PLAIN, PLAIN_SYNTHETIC
from pipelines.runtime import InputError
from tests.benchmarks.conftest import Bench


@pytest.mark.slow
def test_command_writes_a_complete_result(folder: Path, tiny_recipe_file: Path, bench: Bench) -> None:
    sizes = ["--batch-size", "4", "--steps", "3", "--repeats", "1", "--workers", "2"]
    result, _ = bench(bench_train, folder, "--recipe", tiny_recipe_file, "--decoder", "pillow", *sizes)
    assert (result["benchmark"], result["device"], result["views_per_image"]) == ("train", "cpu", 5)
    assert (result["recipe"]["backbone"]["name"], result["recipe"]["batch_size"]) == ("test_resnet", 4)
    rows = result["contenders"]
    assert set(rows) == {OURS, OURS_SYNTHETIC, PLAIN, PLAIN_SYNTHETIC}
    for name, row in rows.items():
        assert row["views_per_second"] == pytest.approx(5 * row["images_per_second"])
        assert 0 <= row["data_wait"] <= 1
        assert row["steps"] == (4 if name == PLAIN else 3)  # whole rounds of two workers
        assert row["peak_memory_mib"]["pss"] > 50 or sys.platform != "linux"
    assert set(rows[OURS]["stage_seconds"]) == {"storage", "decode", "views"}
    assert (rows[OURS]["decoder"], rows[OURS]["bad"], rows[PLAIN]["workers"]) == ("pillow", 0, 2)
    for ratio, one, other in (
        ("loaded_over_synthetic", OURS, OURS_SYNTHETIC),
        ("plain_loaded_over_synthetic", PLAIN, PLAIN_SYNTHETIC),
        ("times_plain_with_dataloader", OURS, PLAIN),
        ("step_times_plain_step", OURS_SYNTHETIC, PLAIN_SYNTHETIC),
    ):
        expected = rows[one]["images_per_second"] / rows[other]["images_per_second"]
        assert result[ratio]["median"] == pytest.approx(expected)
    assert (result["left_out"], result["failed"]) == ({}, {})


def test_any_field_of_the_recipe_can_be_overridden() -> None:
    arguments = parse(["photos", "--recipe", "laptop", "--batch-size", "16", "--views.0.size", "96", "--steps", "7"])
    assert (arguments.data, arguments.recipe.name, arguments.steps) == (Path("photos"), "laptop", 7)
    assert (arguments.recipe.batch_size, arguments.recipe.views[0].size) == (16, 96)
    assert parse(["photos"]).recipe.name == "byol_resnet50_200ep"
    assert parse(["photos", "--recipe=demo"]).recipe.name == "demo"


def test_invalid_arguments_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="only 12 images"):
        measure(parse([str(folder)]), command="")
    with pytest.raises(InputError, match="laptpo"):
        parse(["photos", "--recipe", "laptpo"])
    with pytest.raises(InputError, match="steps is 0"):
        dataclasses.replace(parse(["photos"]), steps=0)
