"""benchmarks/gpu_paper.sh continues after the committed cells, keeps the new ones, and explains errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import tyro

from benchmarks.harness.results import read_results
from benchmarks.paper import tables
from benchmarks.paper_small import Arguments

ROOT = Path(__file__).resolve().parents[2]
STUB = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$CALL"
while [ $# -gt 0 ]; do [ "$1" = --out ] && out=$2; [ "$1" = benchmarks.paper_small ] && data=$2; shift; done
ls "$data" > "$CALL.data"
echo '"first"' >> "$out"
while [ -n "${HANG:-}" ] && [ -e "$HANG" ]; do sleep 0.2; done
echo '"second"' >> "$out"
exit "${CODE:-0}"
"""


def run(
    tmp_path: Path, *words: str, root: Path = ROOT, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    given = {"PYTHON": str(stub), "CALL": str(tmp_path / "call"), "OUT": "out", **environment}
    return subprocess.run(
        ["bash", str(root / "benchmarks" / "gpu_paper.sh"), *words],
        env={**{key: value for key, value in os.environ.items() if key != "DATA"}, **given},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        (tmp_path / "set" / "tiny" / split / "a").mkdir(parents=True)
    with tarfile.open(tmp_path / "set.tar.xz", "w:xz") as tar:
        tar.add(tmp_path / "set" / "tiny", "tiny")
    return tmp_path / "set.tar.xz"


def kept(tmp_path: Path, name: str = "paper_small_gpu") -> list[str]:
    return [json.loads(line) for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]


def test_the_command_parses_and_new_cells_are_kept(tmp_path: Path, packed: Path) -> None:
    done = run(tmp_path, DATA=packed.name, SECONDS_IN_ALL="300")
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "call").read_text().splitlines()
    assert words[:2] == ["-m", "benchmarks.paper_small"]
    arguments = tyro.cli(Arguments, args=words[2:])
    assert (arguments.setting, arguments.device, arguments.jobs) == ("gpu", "cuda", 2)
    assert arguments.seconds is not None
    assert 280 < arguments.seconds <= 300
    assert (tmp_path / "call.data").read_text().split() == ["train", "val"]
    assert kept(tmp_path) == ["first", "second"]
    assert "New cells: 2 in out/paper_small_gpu.jsonl" in done.stdout


def test_other_options_are_handed_on_and_time_is_never_below_a_second(tmp_path: Path, packed: Path) -> None:
    words = ("--methods", "byol", "simsiam", "--optimizers", "adamw", "--seeds", "2")
    done = run(tmp_path, *words, DATA=packed.name, SECONDS_IN_ALL="0", JOBS="3")
    assert done.returncode == 0, done.stderr
    arguments = tyro.cli(Arguments, args=(tmp_path / "call").read_text().splitlines()[2:])
    assert (arguments.methods, arguments.optimizers, arguments.seeds) == (("byol", "simsiam"), ("adamw",), (2,))
    assert (arguments.seconds, arguments.jobs) == (1, 3)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_rehearsal_gives_the_first_rows_of_the_table(tmp_path: Path) -> None:
    done = run(tmp_path, "--rehearse", timeout=800, PYTHON=sys.executable, SECONDS_IN_ALL="700")
    assert done.returncode == 0, done.stderr
    assert "15 of 15 cells are left" in done.stdout, "none that tunes"
    cells = read_results(tmp_path / "out" / "paper_small_rehearsal.jsonl")
    assert {(cell["cell"]["variant"], cell["cell"]["seed"]) for cell in cells} == {
        (variant, seed) for variant in ("shared", "per-view") for seed in (1, 2, 3)
    }
    results = {"paper_small_gpu": {"cells": cells}}
    assert any(line.startswith("| GPU | BYOL, LARS | linear | | ") for line in tables.accuracies(results))
    assert any(line.startswith("| GPU | BYOL, LARS | per-view less shared |") for line in tables.differences(results))
    tuned = [line for line in tables.tuning(results) if line.startswith("| GPU |")]
    assert tuned == [
        f"| GPU | BYOL, LARS | {arm} | 6 | 1.5e-06 | 0.98 | as in paper_small_cpu |" for arm in ("shared", "per-view")
    ]


def test_it_continues_after_committed_cells_and_after_its_own(tmp_path: Path, packed: Path) -> None:
    root = tmp_path / "clone"
    (root / "benchmarks" / "results").mkdir(parents=True)
    (root / "benchmarks" / "gpu_paper.sh").write_bytes((ROOT / "benchmarks" / "gpu_paper.sh").read_bytes())
    (root / "benchmarks" / "results" / "paper_small_cpu.jsonl").write_text('"old"\n')
    expected = ["old"]
    for _ in range(2):
        done = run(tmp_path, root=root, DATA=str(packed), SETTING="cpu", DEVICE="cpu")
        assert done.returncode == 0, done.stderr
        expected += ["first", "second"]
        assert kept(tmp_path, "paper_small_cpu") == expected
        assert "New cells: 2 in out/paper_small_cpu.jsonl" in done.stdout


def test_finished_cells_survive_a_kill(tmp_path: Path, packed: Path) -> None:
    (tmp_path / "hang").touch()
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    given = {"PYTHON": str(stub), "CALL": str(tmp_path / "call"), "OUT": "out", "DATA": str(packed)}
    with subprocess.Popen(
        ["bash", str(ROOT / "benchmarks" / "gpu_paper.sh")],
        env={**os.environ, **given, "HANG": str(tmp_path / "hang")},
        cwd=tmp_path,
    ) as hanging:
        while not (tmp_path / "out" / "paper_small_gpu.jsonl").exists() or not kept(tmp_path):
            assert hanging.poll() is None
            time.sleep(0.2)
        hanging.kill()
    (tmp_path / "hang").unlink()
    assert kept(tmp_path)[0] == "first"


def test_errors_are_explained(tmp_path: Path, packed: Path) -> None:
    assert "DATA is missing: give tiny-imagenet-50" in run(tmp_path).stderr
    broken = tmp_path / "broken.tar"
    broken.write_bytes(b"no tar")
    done = run(tmp_path, DATA="broken.tar")
    assert done.returncode == 1
    assert "DATA (broken.tar) cannot be unpacked" in done.stderr
    assert run(tmp_path, DATA=str(packed), CODE="3").returncode == 3
    assert kept(tmp_path), "a failure keeps what there is"
