"""Scripts for programs that are not installed: settings of COCO detection, and the SLURM job with a fake srun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.runtime import InputError
from tools.coco_detection import CocoArguments, body, settings

ROOT = Path(__file__).resolve().parent.parent.parent


def test_schedule_scales_with_the_batch() -> None:
    """Mask R-CNN's 1x schedule: 90,000 steps of 16 images at 0.02, divided by ten after 60,000 and 80,000."""
    asked = settings(CocoArguments(weights=Path("b.pkl"), out=Path("out")))
    assert (asked["SOLVER.BASE_LR"], asked["SOLVER.MAX_ITER"]) == (0.02, 90_000)
    assert asked["SOLVER.STEPS"] == (60_000, 80_000)
    half = settings(CocoArguments(weights=Path("b.pkl"), out=Path("out"), batch_size=8, schedule="2x", gpus=8))
    assert (half["SOLVER.BASE_LR"], half["SOLVER.MAX_ITER"]) == (0.01, 360_000)
    assert (asked["MODEL.RESNETS.NORM"], half["MODEL.FPN.NORM"]) == ("BN", "SyncBN")
    assert asked["MODEL.PIXEL_MEAN"] == pytest.approx([123.675, 116.28, 103.53])  # RGB, as in pre-training
    assert asked["INPUT.FORMAT"] == "RGB"
    assert (
        asked["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    )  # the stride of torchvision's and timm's ResNets is in the 3 x 3


def test_missing_requirements_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^gpus is 0 but must be at least 1"):
        CocoArguments(weights=Path("b.pkl"), out=Path("out"), gpus=0)
    monkeypatch.setattr(sys, "argv", ["coco_detection", "--weights", "none.pkl", "--out", "out"])
    with pytest.raises(InputError, match=r"Detectron2 is not installed|there is no such file"):
        body()


def test_job_starts_a_run_and_resumes_it(tmp_path: Path) -> None:
    srun = tmp_path / "srun"
    srun.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/called\n')
    srun.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "4"}
    command = [str(ROOT / "tools/slurm_job.sh"), "demo", "my photos", str(tmp_path / "run"), "--seed", "3"]
    expected = ["torchrun", "--standalone", "--nproc-per-node", "4", "--no-python", "mvssl-train", "demo"]
    expected += ["--data", "my photos", "--out", str(tmp_path / "run")]
    for resume in ([], ["--resume"]):
        subprocess.run(command, env=environment, check=True)
        assert (tmp_path / "called").read_text().splitlines() == [*expected, *resume, "--seed", "3"]
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/config.json").write_text("{}")
    wrong = subprocess.run(command[:2], env=environment, check=False, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "usage: sbatch" in wrong.stderr
