"""Run folders, checkpoints, converted data and features written before the packages were rearranged stay readable.

tests/samples/before was written at commit 6c13b40: `whole` is a run of three epochs, `stopped` the same run killed in
the third one, `shards` and `beton` its images converted.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mvssl
from mvssl.cli import eval as eval_cli
from mvssl.cli import features as features_cli
from mvssl.cli import train as train_cli
from mvssl.runs.folder import RunFolder
from pipelines.storage import open_source
from tests.samples.networks import NAME

BEFORE = Path(__file__).with_name("samples") / "before"


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """A copy that may be written to."""
    copy = Path(shutil.copytree(BEFORE, tmp_path / "before", symlinks=True))
    packed = copy / "beton/images.beton.gz"  # mostly zeros: FFCV's pages of 8 MB
    packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
    packed.unlink()
    return copy


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def leave(monkeypatch: pytest.MonkeyPatch, command: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code in (0, None)


def test_a_stopped_run_resumes_to_the_same_numbers(before: Path) -> None:
    run = before / "stopped"
    recipe = RunFolder(run).recipe()
    assert recipe.backbone.name == NAME
    mvssl.train(recipe, data=before / "data", out=run, device="cpu", log_every=1, resume=True)
    resumed, whole = rows(run / "metrics.jsonl"), rows(BEFORE / "whole/metrics.jsonl")
    assert [row.keys() for row in resumed] == [row.keys() for row in whole]
    for mine, theirs in zip(resumed, whole, strict=True):
        for key, value in theirs.items():
            expected = value if isinstance(value, str | int) else pytest.approx(value, rel=2e-3)  # other processors
            assert mine[key] == expected, (theirs["step"], key)


def test_an_old_run_resumes_with_its_steps_executed_otherwise(before: Path) -> None:
    """Step mode and memory format were fields of its recipe."""
    run = before / "stopped"
    recipe = RunFolder(run).recipe()
    assert {"step_mode", "compile", "channels_last"} <= json.loads((run / "config.json").read_text())["recipe"].keys()
    step, done = (json.loads((run / "checkpoints/last/checkpoint.json").read_text())[key] for key in ("step", "recipe"))
    assert done["step_mode"] == "joint"
    options: dict[str, Any] = {"step_mode": "per-view", "channels_last": False, "cuda_graph": "off"}
    split = replace(recipe, accumulate=2)
    mvssl.train(split, data=before / "data", out=run, device="cpu", log_every=1, resume=True, **options)
    resumed, whole = rows(run / "metrics.jsonl"), rows(BEFORE / "whole/metrics.jsonl")
    assert [row["step"] for row in resumed] == [row["step"] for row in whole]
    kept = [row for row in rows(BEFORE / "stopped/metrics.jsonl") if row["step"] <= step]
    assert resumed[: len(kept)] == kept != []
    config = json.loads((run / "config.json").read_text())
    assert config["options"]["changes"] == [{"step": step, "field": "accumulate", "was": 1, "now": 2}]
    log = (run / "train.log").read_text()
    assert f"BatchNorm statistics are over micro-batches of 2 images from step {step} on instead of 4" in log


def test_an_old_run_is_evaluated_and_reported(
    before: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = before / "whole"
    earlier = json.loads((run / "eval/knn-online.json").read_text())
    again = before / "again"
    where = ("--data", before / "data", "--device", "cpu", "--out", again)
    leave(monkeypatch, eval_cli, "knn", "--run", run, *where)
    result = json.loads((again / "knn-online.json").read_text())
    assert result["identity"] == earlier["identity"]
    assert result["results"]["best"]["top1"] == earlier["results"]["best"]["top1"]
    leave(monkeypatch, train_cli, "report", run)
    report = (run / "report.html").read_text()
    assert NAME in report
    assert "100.0" in report  # the kNN accuracy that the old evaluation found


def test_an_old_backbone_gives_the_old_features(before: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "features.npy"
    run = before / "whole"
    leave(monkeypatch, features_cli, before / "data/val", out, "--run", run, "--device", "cpu")
    np.testing.assert_allclose(np.load(out), np.load(BEFORE / "features.npy"), rtol=1e-3, atol=1e-4)
    with out.with_suffix(".csv").open() as mine, (BEFORE / "features.csv").open() as theirs:
        assert list(csv.reader(mine)) == list(csv.reader(theirs))


@pytest.mark.parametrize("converted", ["shards", "beton"])
def test_old_converted_data_are_the_images(before: Path, converted: str) -> None:
    with closing(open_source(before / "data/train")) as folder, closing(open_source(before / converted)) as source:
        assert len(source) == len(folder) == 12
        for number in range(len(folder)):
            assert source.key(number) == folder.key(number).removesuffix(".jpg")
            assert bytes(source.read(number)) == bytes(folder.read(number))
        np.testing.assert_array_equal(source.labels, folder.labels)
