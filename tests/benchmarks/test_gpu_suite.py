"""benchmarks/gpu_suite.sh calls commands that exist, with arguments that they take, and says if one fails."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro

from benchmarks import bench_loader, bench_start, bench_step, bench_train, bench_views, tune_fused
from benchmarks.measuring import draw_photos, view_bytes

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
    tests = [call for call in calls if call[1] == "pytest"]  # which run beside the others
    calls = [call for call in calls if call[1] != "pytest"]
    assert [call[2:6] for call in tests] == [["-m", "gpu", "-n", "5"]]
    assert [call[1].rpartition(".")[2] for call in calls] == [
        "draw_photos",
        "bench_step",
        "bench_loader",
        "bench_train",
        "bench_views",
        "bench_views",
        "tune_fused",
        "bench_start",
        "view_bytes",
    ]
    drawn = tyro.cli(draw_photos.Arguments, args=calls[0][2:])
    step = tyro.cli(bench_step.Arguments, args=calls[1][2:])
    loader, training = tyro.cli(bench_loader.Arguments, args=calls[2][2:]), bench_train.parse(calls[3][2:])
    runs = [tyro.cli(bench_views.Arguments, args=call[2:]) for call in calls[4:6]]
    start = bench_start.parse(calls[7][2:])
    assert [run.dtype for run in runs] == ["bfloat16", "float32"]
    assert {run.device for run in (step, loader, training, *runs, start)} == {"cuda"}
    assert {run.data for run in runs} == {step.data, training.data, *loader.data} == {drawn.out}
    assert not drawn.out.exists(), "the scratch folder is removed"
    assert drawn.count >= runs[0].num_images
    assert runs[0].contenders == ("fused", "reference")
    assert [run.out for run in runs] == [tmp_path / "out" / f"views_cuda_{run.dtype}.json" for run in runs]
    for name, run in {"step": step, "loader": loader, "train": training, "start": start}.items():
        assert run.out == tmp_path / "out" / f"{name}_cuda.json"
    assert step.batch_sizes is not None
    assert max(step.batch_sizes) <= drawn.count
    assert max(each.seconds or 0 for each in (step, loader, training)) < 270
    assert tyro.cli(tune_fused.Arguments, args=calls[6][2:]).out == tmp_path / "out" / "tune_fused.json"
    assert tyro.cli(view_bytes.Arguments, args=calls[8][2:]) == view_bytes.Arguments()


@pytest.mark.parametrize("code", ["0", "1"])
def test_own_data_and_failures(tmp_path: Path, code: str) -> None:
    done, calls = suite(tmp_path, DATA="my photos", CODE=code)
    assert done.returncode == int(code)
    assert sum("my photos" in call for call in calls) == 5
    assert len(calls) == 9, "the suite goes on after a failure"
    assert not any("--contenders" in call for call in calls)
    for name in ("views in bfloat16", "step", "GPU tests"):
        assert (f"FAILED: {name}" in done.stderr) == (code == "1")


def test_without_time_nothing_more_is_begun(tmp_path: Path) -> None:
    done, calls = suite(tmp_path, SECONDS_IN_ALL="0")
    assert done.returncode == 1
    assert [call[1] for call in calls] == ["pytest"]
    assert "FAILED: step (exit code 124)" in done.stderr


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
