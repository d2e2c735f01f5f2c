"""benchmarks/gpu_suite.sh calls commands that exist, with arguments that they take, and says if one fails."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from benchmarks import bench_loader, bench_train, bench_views, draw_photos, tune_fused, view_bytes

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/usr/bin/env bash
[ "$1" = -c ] && exit 0  # the check of what is installed
printf '%q ' "$@" >> "$CALLS"
echo >> "$CALLS"
exit "${CODE:-0}"
"""


def suite(tmp_path: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run the suite with a Python that only notes its arguments."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh")],
        env={**os.environ, "PYTHON": str(stub), "CALLS": str(calls), "OUT": str(tmp_path / "out"), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return done, [shlex.split(line) for line in calls.read_text().splitlines()]


def test_commands_parse(tmp_path: Path) -> None:
    done, calls = suite(tmp_path, CONTENDERS="fused reference")
    assert done.returncode == 0, done.stderr
    assert [call[1] for call in calls] == [
        "benchmarks.draw_photos",
        "benchmarks.bench_views",
        "benchmarks.bench_views",
        "benchmarks.bench_loader",
        "benchmarks.bench_train",
        "benchmarks.tune_fused",
        "benchmarks.view_bytes",
    ]
    drawn = tyro.cli(draw_photos.Arguments, args=calls[0][2:])
    runs = [tyro.cli(bench_views.Arguments, args=call[2:]) for call in calls[1:3]]
    assert [run.dtype for run in runs] == ["bfloat16", "float32"]
    assert {run.device for run in runs} == {"cuda"}
    assert {run.data for run in runs} == {drawn.out}
    assert not drawn.out.exists(), "the scratch folder is removed"
    assert drawn.count >= runs[0].num_images
    assert runs[0].contenders == ("fused", "reference")
    assert [run.out for run in runs] == [tmp_path / "out" / f"views_cuda_{run.dtype}.json" for run in runs]
    loader, training = tyro.cli(bench_loader.Arguments, args=calls[3][2:]), bench_train.parse(calls[4][2:])
    assert (loader.out, training.out) == (tmp_path / "out" / "loader_cuda.json", tmp_path / "out" / "train_cuda.json")
    assert (loader.data, training.data) == ((drawn.out,), drawn.out)
    assert loader.batch_size <= drawn.count
    assert tyro.cli(tune_fused.Arguments, args=calls[5][2:]).out == tmp_path / "out" / "tune_fused.json"
    assert tyro.cli(view_bytes.Arguments, args=calls[6][2:]) == view_bytes.Arguments()


@pytest.mark.parametrize("code", ["0", "1"])
def test_own_data_and_failures(tmp_path: Path, code: str) -> None:
    done, calls = suite(tmp_path, DATA="my photos", CODE=code)
    assert done.returncode == int(code)
    assert [call[2] for call in calls[:4]] == ["my photos"] * 4
    assert len(calls) == 6, "the suite goes on after a failure"
    assert "--contenders" not in calls[0]
    assert ("FAILED: views in bfloat16" in done.stderr) == (code == "1")


def run_suite(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the suite with this Python."""
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh")],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_without_a_gpu_nothing_is_run(tmp_path: Path) -> None:
    done = run_suite(tmp_path, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: torch finds no CUDA device here")
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("raise ModuleNotFoundError(name='tyro')")
    done = run_suite(tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert f"error: {sys.executable} lacks tyro: install what is missing" in done.stderr
    assert done.stdout == ""


def test_drawn_photos_are_pictures(tmp_path: Path) -> None:
    from PIL import Image

    draw_photos.draw_photos(draw_photos.Arguments(out=tmp_path / "p", count=2, height=40, width=60))
    with Image.open(tmp_path / "p" / "00001.jpg") as picture:
        assert picture.size == (60, 40)
