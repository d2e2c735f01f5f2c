"""benchmarks/gpu_suite.sh calls commands that exist, with arguments that they take, and says if one fails."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest
import tyro

from benchmarks import bench_views, draw_photos, view_bytes

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/usr/bin/env bash
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
    assert tyro.cli(view_bytes.Arguments, args=calls[3][2:]) == view_bytes.Arguments()


@pytest.mark.parametrize("code", ["0", "1"])
def test_own_data_and_failures(tmp_path: Path, code: str) -> None:
    done, calls = suite(tmp_path, DATA="my photos", CODE=code)
    assert done.returncode == int(code)
    assert [call[2] for call in calls[:2]] == ["my photos"] * 2
    assert len(calls) == 3, "the suite goes on after a failure"
    assert "--contenders" not in calls[0]
    assert ("FAILED: views in bfloat16" in done.stderr) == (code == "1")


def test_drawn_photos_are_pictures(tmp_path: Path) -> None:
    from PIL import Image

    draw_photos.draw_photos(draw_photos.Arguments(out=tmp_path / "p", count=2, height=40, width=60))
    with Image.open(tmp_path / "p" / "00001.jpg") as picture:
        assert picture.size == (60, 40)
