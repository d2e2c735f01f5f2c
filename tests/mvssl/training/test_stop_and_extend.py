"""Time limits, SLURM requeueing, extended runs, and the lock of a run folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import mvssl
from mvssl.config.options import RunOptions, parse_time
from mvssl.config.recipe import Recipe
from mvssl.distributed import World
from mvssl.runs import checkpoint
from mvssl.runs.jsonl import read_jsonl
from mvssl.training import shutdown
from mvssl.training.shutdown import TIME, StopRequest, requeue
from mvssl.training.step import TrainStep
from pipelines.runtime import InputError
from tests.samples.tiny_runs import metrics, train


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("7h30m", 27_000), ("90m", 5400), ("1d12h", 129_600), ("45s", 45), ("12:00:00", 43_200), ("1-02:00:01", 93_601)],
)
def test_durations(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "h", "0m", "7h 30m", "-1h", "12:0:0", "7.5h"])
def test_invalid_durations(text: str) -> None:
    with pytest.raises(InputError, match="must be a duration such as 7h30m"):
        RunOptions(time=text)


def stopping_clock(monkeypatch: pytest.MonkeyPatch, at_step: int) -> None:
    """Let an hour pass within training step `at_step`."""
    original, passed = TrainStep.__call__, [0.0]

    def slow(self: TrainStep, views: list[torch.Tensor], number: int) -> Any:
        if number == at_step:
            passed[0] = 3600.0
        return original(self, views, number)

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return passed[0]

    monkeypatch.setattr(TrainStep, "__call__", slow)
    monkeypatch.setattr(shutdown, "time", Clock)


def test_a_run_out_of_time_is_saved_and_resumes(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        stopping_clock(patch, at_step=5)
        with pytest.raises(mvssl.Interrupted, match=rf"^{TIME} came after step 6 of 12; everything is saved"):
            train(tiny_recipe, images, out, time="30m")
    assert checkpoint.load(out / "checkpoints/last").meta["step"] == 6
    train(tiny_recipe, images, out, resume=True, time="1h")
    assert metrics(out) == metrics(finished)


def test_a_run_stops_early_enough_to_save(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop = StopRequest(World(), seconds=100)
    now[0] = 89.0
    assert stop.agree() is None
    stop.reserve = 12.0
    assert stop.agree() == TIME
    with pytest.raises(StopRequest.Requested):
        stop.check()


def test_slurms_signal_stops_the_run_and_requeues_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest(World()) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.agree() == "SIGUSR1"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert requeue("SIGUSR1") is None  # no scontrol here
    for code, said in ((0, "requeued job 17"), (1, r"did not requeue job 17 \(not allowed\)")):
        (tmp_path / "scontrol").write_text(
            f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "not allowed" >&2\nexit {code}\n'
        )
        (tmp_path / "scontrol").chmod(0o755)
        result = requeue("SIGUSR1")
        assert result is not None
        assert re.search(said, result)
        assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert requeue("SIGTERM") is None
    monkeypatch.delenv("SLURM_JOB_ID")
    assert requeue("SIGUSR1") is None


def test_a_finished_run_is_extended(finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    before = metrics(out)
    longer = replace(tiny_recipe, epochs=5)
    with pytest.raises(InputError, match=r"was started for 3 epochs and not 5: .* add --extend"):
        train(longer, images, out, resume=True)
    with pytest.raises(InputError, match=r"^extend needs resume"):
        train(longer, images, out, extend=True)
    with pytest.raises(InputError, match=r"^epochs is 2 but must be more than the 3 of the run"):
        train(replace(tiny_recipe, epochs=2), images, out, resume=True, extend=True)
    with pytest.raises(InputError, match="started with another recipe"):
        train(replace(longer, seed=5), images, out, resume=True, extend=True)
    assert metrics(out) == before
    result = train(longer, images, out, resume=True, extend=True)
    assert result.steps == 20
    after = metrics(out)
    assert after.startswith(before)
    rows = [row for row in read_jsonl(out / "metrics.jsonl") if row["kind"] == "train"]
    whole = [row["lr"] for row in rows]
    assert whole[-1] < whole[rows.index(next(row for row in rows if row["step"] == 15))]
    log = (out / "train.log").read_text()
    assert "extended from 3 to 5 epochs: the learning rate continues at" in log
    rate = float(log.split("the learning rate continues at ")[1].split()[0])
    assert rate == pytest.approx(3.0 * 8 / 256 / 2, rel=0.01)  # halfway down the longer cosine
    config = json.loads((out / "config.json").read_text())
    assert (config["recipe"]["epochs"], config["options"]["earlier_epochs"]) == (5, [3])
    train(longer, images, out, resume=True)  # already finished
    assert metrics(out) == after


def test_an_extended_run_that_is_stopped_resumes_exactly(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = replace(tiny_recipe, epochs=5)
    for name in ("whole", "stopped"):
        shutil.copytree(finished, tmp_path / name, symlinks=True)
    train(longer, images, tmp_path / "whole", resume=True, extend=True)
    with monkeypatch.context() as patch:
        stopping_clock(patch, at_step=14)
        with pytest.raises(mvssl.Interrupted):
            train(longer, images, tmp_path / "stopped", resume=True, extend=True, time="30m")
    train(longer, images, tmp_path / "stopped", resume=True)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "stopped")


def test_two_processes_do_not_train_in_one_folder(
    finished: Path, images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and not path.is_symlink()}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(InputError, match=r"^Another process is training in .*run: wait for it"):
                train(tiny_recipe, images, out, **options)
        assert {path: path.read_bytes() for path in before} == before
    finally:
        holder.communicate("\n")
    train(tiny_recipe, images, out, overwrite=True)
    assert metrics(out) == metrics(finished)


HOLD = """
import sys
from pathlib import Path
from mvssl.runs.folder import RunFolder
with RunFolder(Path(sys.argv[1])).claim():
    print("held", flush=True)
    sys.stdin.read()
"""
