"""bench_start: three kinds of starts that train alike, and a result after each."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_start
from benchmarks.bench_start import PHASES, STARTS, parse, start
from benchmarks.report import tables
from mvssl.config.options import Execution
from pipelines.runtime import InputError
from tests.benchmarks.conftest import Bench


@pytest.mark.slow
def test_a_start_takes_real_steps_in_a_process_of_its_own(tiny_recipe_file: Path, tmp_path: Path) -> None:
    own = parse(["--recipe", str(tiny_recipe_file), "--compile", "off"])
    one, other = (start(own.recipe, own.execution, "cpu", tmp_path) for _ in range(2))
    assert one["losses"] == other["losses"]
    assert one["losses"][0] == one["losses"][1] != one["losses"][2], "they train, the first one at a rate of 0"
    assert one["training_after"] == pytest.approx(one["imports"] + one["build"] + one["first_step"])
    assert all(one[phase] > 0 for phase in PHASES)


@pytest.mark.slow
def test_a_failed_start_reports_its_last_words(tiny_recipe_file: Path, tmp_path: Path) -> None:
    own = parse(["--recipe", str(tiny_recipe_file), "--precision", "fp16"]).recipe
    with pytest.raises(InputError, match=r"a start failed with exit code 1: .*fp16"):
        start(own, Execution(), "cpu", tmp_path)


def test_starts_share_a_cache_and_each_is_saved(
    tiny_recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Bench
) -> None:
    caches: list[tuple[str, Path]] = []
    partial: list[Any] = []
    out = tmp_path / "results" / "out.json"

    def made_up(own: Any, execution: Execution, device: str, cache: Path) -> dict[str, Any]:
        assert cache.is_dir()
        caches.append((execution.compile, cache))
        if out.exists():
            partial.append(json.loads(out.read_text())["partial"])
        return {phase: float(len(caches)) for phase in PHASES} | {"losses": [1.0]}

    monkeypatch.setattr(bench_start, "start", made_up)
    result, said = bench(bench_start, "--recipe", tiny_recipe_file, "--repeats", "3")
    assert [compiles for compiles, _ in caches] == ["on", "on", "off"] * 3
    folders = [cache for _, cache in caches]
    assert folders[0] == folders[1] != folders[3] == folders[4], "a first start finds nothing compiled"
    assert not any(folder.exists() for folder in folders)
    assert partial == [True] * 8
    assert not result["partial"]
    assert {kind: own["first_step"] for kind, own in result["starts"].items()} == dict(
        zip(STARTS, (4.0, 5.0, 6.0), strict=True)
    )
    assert "trial 2 of 3, compiled, second start: training after 5.0 s" in said
    lines = tables.start({"start_cpu": result})
    assert "| CPU | not compiled | 6.00 | 6.00 | 6.00 | 6.00 | 6.00 |" in lines


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="repeats is 0"):
        dataclasses.replace(parse(["--recipe", "demo"]), repeats=0)
