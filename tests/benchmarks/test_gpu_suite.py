"""benchmarks/gpu_suite.sh runs existing commands with valid arguments, within its time, and reports failures."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import tyro

from benchmarks import bench_loader, bench_micro, bench_start, bench_step, bench_train, bench_views
from benchmarks.compiled import view_kernels
from benchmarks.harness import synthetic_photos
from benchmarks.report.origins import MADE_BY, SUITE, load
from benchmarks.tables import render
from pipelines.conversion.command import Convert

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["step", "loader", "training", "views", "tests", "steps", "tiny", "kernels", "views32", "start"]
STUB = """#!/usr/bin/env bash
if [ "$1" = -c ]; then  # the check of what is installed
    echo "${FOUND:-decoder:dali tests:yes xdist:yes}"
    exit 0
fi
printf '%q ' "$@" >> "$CALLS"
echo >> "$CALLS"
[ -n "${CLOCK:-}" ] && echo $(($(cat "$CLOCK") + COST)) > "$CLOCK"
while [ $# -gt 0 ]; do [ "$1" = --out ] && echo '{"from": "'"${RESULT:-this call}"'"}' > "$2"; shift; done
while [ -n "${HANG:-}" ] && [ -e "$HANG" ]; do sleep 0.2; done
exit "${CODE:-0}"
"""
Done = subprocess.CompletedProcess[str]


def suite(tmp_path: Path, *words: str, timeout: float = 60, **environment: str) -> tuple[Done, list[list[str]]]:
    """Run the suite with a Python that only notes its arguments."""
    stub, calls = tmp_path / "python", tmp_path / "calls"
    stub.write_text(STUB)
    stub.chmod(0o755)
    calls.write_text("")
    given = {"PYTHON": str(stub), "CALLS": str(calls), "OUT": "out", **environment}
    done = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), *words],
        env={**os.environ, **given},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    return done, [shlex.split(line) for line in calls.read_text().splitlines()]


def packed(tmp_path: Path, name: str = "gpu_suite") -> dict[str, str]:
    """The files that came back, by name."""
    with tarfile.open(tmp_path / "out" / f"{name}.tgz") as tar:
        members = [(member.name, tar.extractfile(member)) for member in tar]
        return {name: file.read().decode() for name, file in members if file is not None}


def begun(done: Done) -> list[str]:
    """The parts that were begun, in order."""
    return re.findall(r"^--- (\w+), at most", done.stderr, flags=re.MULTILINE)


def command(call: list[str]) -> str:
    """The module that a call runs."""
    return call[1].rpartition(".")[2]


def test_commands_parse(tmp_path: Path) -> None:
    done, calls = suite(tmp_path, CONTENDERS="fused native")
    assert done.returncode == 0, done.stderr
    assert begun(done) == PARTS
    assert [command(call) for call in calls] == [
        "synthetic_photos",
        "bench_step",
        "convert",
        "bench_loader",
        "bench_train",
        "bench_views",
        "pytest",
        "bench_step",
        "synthetic_photos",
        "bench_loader",
        "bench_micro",
        "bench_micro",
        "bench_views",
        "bench_start",
    ]
    drawn, small = (tyro.cli(synthetic_photos.Arguments, args=calls[n][2:]) for n in (0, 8))
    step, steps = (tyro.cli(bench_step.Arguments, args=calls[n][2:]) for n in (1, 7))
    loader, tiny = (tyro.cli(bench_loader.Arguments, args=calls[n][2:]) for n in (3, 9))
    training, start = bench_train.parse(calls[4][2:]), bench_start.parse(calls[13][2:])
    views = [tyro.cli(bench_views.Arguments, args=calls[n][2:]) for n in (5, 12)]
    kernels = bench_micro.parse(calls[11][2:])
    assert isinstance(kernels, bench_micro.Fused)
    assert bench_micro.parse(calls[10][2:]) == view_kernels.Arguments()
    runs: list[Any] = [step, steps, loader, tiny, training, *views, start]
    assert {run.device for run in runs} == {"cuda"}

    assert (step.recipes, step.batch_sizes) == (("byol_resnet50_200ep",), (128,))
    assert step.contenders == ("captured", "plain step")
    assert step.data is None, "nothing else works beside the figure that matters most"
    converted = tyro.cli(Convert, args=calls[2][2:])
    assert (converted.src, loader.data) == (drawn.out, (converted.dst,))
    assert steps.data == training.data == converted.dst
    assert (loader.decoders, loader.cache, tiny.decoders, tiny.cache) == (("dali",), True, ("dali",), True)
    assert (training.decoder, training.recipe.batch_size, start.recipe.batch_size) == ("dali", 128, 128)
    assert tiny.data == (small.out,)
    assert drawn.count >= max(128, 2 * max(run.num_images for run in views) // 2)
    assert steps.batch_sizes is not None
    assert max(steps.batch_sizes) <= drawn.count
    assert small.count >= tiny.batch_size
    assert [run.dtype for run in views] == ["bfloat16", "float32"]
    assert {run.contenders for run in views} == {("fused", "native")}
    assert not drawn.out.exists(), "the scratch folder is removed"

    (pytest_call,) = (call for call in calls if command(call) == "pytest")
    assert pytest_call[2:4] == ["-m", "gpu"]
    assert pytest_call[pytest_call.index("-n") + 1] == "5"
    assert pytest_call[pytest_call.index("-o") + 1] == "addopts=-ra", "plugins may be missing"
    files = [Path(word) for word in pytest_call if word.endswith(".py")]
    assert all("mark.gpu" in (ROOT / file).read_text() for file in files)
    assert Path("tests/mvssl/training/test_capture.py") in files
    outs = [run.out for run in (*runs, kernels)]
    names = {path.name for path in outs if path is not None}
    assert packed(tmp_path).keys() == names | {"gpu_tests.txt", "view_bytes.md", "suite.log"}
    shown = {name.removesuffix(".json") for name in names}
    assert shown == {name for name, made_by in MADE_BY.items() if made_by == SUITE}, "every result table is fed"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu_suite.tgz"], "few files come back"


def test_without_dali_pillow_decodes_and_without_pytest_the_tests_are_left_out(tmp_path: Path) -> None:
    done, calls = suite(tmp_path, "loader", "tests", FOUND="decoder:pillow tests:no xdist:no")
    assert done.returncode == 0, done.stderr
    assert [command(call) for call in calls] == ["synthetic_photos", "convert", "bench_loader"]
    assert tyro.cli(bench_loader.Arguments, args=calls[2][2:]).decoders == ("pillow",)
    assert "The tests are left out: pytest or hypothesis is missing." in done.stderr
    _, calls = suite(tmp_path, "tests", FOUND="decoder:pillow tests:yes xdist:no")
    assert "-n" not in calls[-1]


@pytest.mark.parametrize("code", ["0", "1"])
def test_own_data_and_failures(tmp_path: Path, code: str) -> None:
    (tmp_path / "my photos").mkdir()
    done, calls = suite(tmp_path, DATA="my photos", CODE=code)
    assert done.returncode == int(code)
    own = str(tmp_path / "my photos")
    assert sum(own in call for call in calls) == (3 if code == "0" else 6), "read as it is where it cannot be converted"
    assert begun(done) == PARTS, "the suite goes on after a failure"
    assert not any("--contenders" in call for call in calls if command(call) == "bench_views")
    for name in ("views in bfloat16", "step", "tests"):
        assert (f"FAILED: {name}" in done.stderr) == (code == "1")


def test_parts_without_time_are_skipped_and_named(tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("0")
    done, calls = suite(tmp_path, CLOCK=str(clock), COST="70", SECONDS_IN_ALL="300")
    assert done.returncode == 0, done.stderr
    # Photos, step, conversion and loader have taken 280 s; 20 s are enough for the kernels alone.
    assert [command(call) for call in calls][:4] == ["synthetic_photos", "bench_step", "convert", "bench_loader"]
    assert begun(done) == ["step", "loader", "kernels"]
    assert "--- training is skipped: 20 s are left of 300, it takes 60 or more" in done.stderr
    left = "No time was left for: training views tests steps tiny views32 start."
    assert left in done.stderr
    assert left in packed(tmp_path)["suite.log"]
    step, loader = (tyro.cli(kind.Arguments, args=calls[n][2:]) for n, kind in ((1, bench_step), (3, bench_loader)))
    assert (step.seconds, loader.seconds) == (0.8 * 230, 0.8 * 90), "it ends by itself before it is killed"


def test_without_any_time_nothing_is_run_and_it_fails(tmp_path: Path) -> None:
    done, calls = suite(tmp_path, SECONDS_IN_ALL="0", DATA="photos")
    assert (done.returncode, calls) == (1, [])
    assert "--- step is skipped: " in done.stderr


def test_a_kill_leaves_what_there_was_and_a_later_call_adds_to_it(tmp_path: Path) -> None:
    stub, hang = tmp_path / "python", tmp_path / "hang"
    stub.write_text(STUB)
    stub.chmod(0o755)
    hang.touch()
    given = {"PYTHON": str(stub), "CALLS": os.devnull, "OUT": "out", "DATA": "photos", "RESULT": "killed"}
    script = ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), "step"]
    with subprocess.Popen(
        script, env={**os.environ, **given, "HANG": str(hang)}, cwd=tmp_path, stderr=subprocess.DEVNULL
    ) as hanging:
        while not (tmp_path / "out" / "gpu_suite.tgz").exists() or "step_cuda.json" not in packed(tmp_path):
            assert hanging.poll() is None
            time.sleep(0.2)
        hanging.kill()
    hang.unlink()
    assert json.loads(packed(tmp_path)["step_cuda.json"]) == {"from": "killed"}
    done, _ = suite(tmp_path, "kernels", DATA="photos")
    assert done.returncode == 0, done.stderr
    assert {"step_cuda.json", "tune_fused.json"} <= packed(tmp_path).keys()
    assert json.loads(packed(tmp_path)["step_cuda.json"]) == {"from": "killed"}


def test_wrong_words_are_explained(tmp_path: Path) -> None:
    done, _ = suite(tmp_path, "stpe")
    assert (done.returncode, done.stderr) == (
        2,
        f"part is stpe but must be one of {' '.join(PARTS)}: correct the name.\n",
    )
    done, _ = suite(tmp_path, "--device", "tpu")
    assert done.stderr == "--device is tpu but must be cuda or cpu: give one of them.\n"
    done, _ = suite(tmp_path, "--device")
    assert done.stderr == "--device is empty but must be cuda or cpu: give one of them.\n"


def run_suite(tmp_path: Path, *words: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the suite with this Python."""
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_suite.sh"), *words],
        env={**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_rehearsal_leaves_every_result_and_they_fill_the_tables(tmp_path: Path) -> None:
    done = run_suite(tmp_path, "--device", "cpu", "--rehearse", timeout=1400, SECONDS_IN_ALL="1300")
    assert done.returncode == 0, done.stderr
    assert begun(done) == PARTS
    files = packed(tmp_path, "gpu_suite_rehearsal")
    results = {
        name.removesuffix(".json").replace("_cpu", "_cuda"): json.loads(text)
        for name, text in files.items()
        if name.endswith(".json")
    }
    wanted = {name for name, made_by in MADE_BY.items() if made_by == SUITE} - {"tune_fused"}  # CUDA only
    assert results.keys() == wanted
    assert all(not result["partial"] for result in results.values())
    assert "skipped" in files["gpu_tests.txt"] or "passed" in files["gpu_tests.txt"]
    assert "| columns |" in files["view_bytes.md"]
    for name in ("loader", "loader_tiny"):
        assert any(loader.endswith(", kept") for loader in results[f"{name}_cuda"]["contenders"])
    lines = {name: made for rendered in render(load(ROOT) | results).values() for name, made in rendered.items()}
    gaps = {name: [line for line in made if line.startswith(("| GPU", "- GPU"))] for name, made in lines.items()}
    for name in ("views", "loader", "train", "step", "start", "views-details"):
        assert not any("not measured yet" in line for line in gaps[name]), name
    # On a CPU no step is compiled here; the first row's ratio is of captured or compiled steps, or of grouped ones.
    blank = [line.split(" | ")[0] for line in lines["headlines"] if line.split(" | ")[-1].startswith("not measured")]
    assert [row for row in blank if "alone" not in row and "five views" not in row] == []


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


def test_synthetic_photos_are_images(tmp_path: Path) -> None:
    from PIL import Image

    synthetic_photos.write_photos(synthetic_photos.Arguments(out=tmp_path / "p", count=2, height=40, width=60))
    with Image.open(tmp_path / "p" / "00001.jpg") as picture:
        assert picture.size == (60, 40)
