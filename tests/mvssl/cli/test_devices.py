"""--devices: processes of its own, which compute, stop and fail as those of torchrun, with the exit codes of one."""

from __future__ import annotations

import json
import os
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
from mvssl.cli import launch
from mvssl.cli.train import body
from mvssl.config.options import RunOptions
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from mvssl.ranks import LAUNCHED, Devices, asked_devices
from mvssl.runs.folder import RunFolder
from pipelines.runtime import InputError
from tests.samples.ranks import results, run_ranks
from tests.samples.tiny_runs import metrics, train

CORES = launch._cores()
two_cores = pytest.mark.skipif(CORES < 2, reason="needs two cores")


def command(recipe: Recipe, data: Path, folder: Path, *more: str) -> list[str]:
    (folder / "recipe.json").write_text(json.dumps(to_dict(recipe)))
    line = [
        sys.executable,
        "-m",
        "mvssl.cli.train",
        str(folder / "recipe.json"),
        "--data",
        str(data),
        "--device",
        "cpu",
    ]
    return [*line, "--out", str(folder / "run"), "--log-every", "1", "--devices", "2", *more]


def on_a_rank(recipe: Recipe, data: Path, out: Path) -> None:
    train(recipe, data, out, log_every=1)


@two_cores
def test_two_processes_compute_what_torchruns_do(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    recipe = replace(tiny_recipe, epochs=1)
    done = subprocess.run(command(recipe, images, tmp_path), capture_output=True, text=True, timeout=200, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "batch 8 (4 on each of 2 processes)" in done.stdout
    assert done.stdout.count("Training demo") == 1
    results(run_ranks(on_a_rank, 2, recipe, images, tmp_path / "other"))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "other")


@two_cores
@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_stops_all_with_the_exit_code_of_one(
    sent: signal.Signals, images: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    line = command(replace(tiny_recipe, epochs=500), images, tmp_path)
    run = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    folder, deadline = RunFolder(tmp_path / "run"), time.monotonic() + 120
    while not (folder.metrics.exists() and folder.metrics.read_bytes().count(b"\n") > 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if sent == signal.SIGINT:
        os.killpg(run.pid, sent)  # as a terminal does
    else:
        run.send_signal(sent)
    out, err = run.communicate(timeout=60)
    assert (run.returncode, err) == (75, "")
    assert out.count(f"{sent.name} came after step ") == 1
    assert folder.has_checkpoint()


@two_cores
@pytest.mark.slow
@pytest.mark.parametrize("killed", ["rank", "starting process"])
def test_a_process_that_is_killed(killed: str, images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    """Of a rank one sentence says so; after the starting one its ranks save and end, and the folder is free."""
    line = command(replace(tiny_recipe, epochs=500), images, tmp_path)
    run = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder, deadline = RunFolder(tmp_path / "run"), time.monotonic() + 120
    while not (folder.metrics.exists() and folder.metrics.read_bytes().count(b"\n") > 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    below = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    if killed == "starting process":
        run.kill()
        while any(Path(f"/proc/{one}/cmdline").exists() for one in below):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert folder.has_checkpoint()
        with folder.claim():
            return
    os.kill(int(below[-1]), signal.SIGKILL)
    _, err = run.communicate(timeout=90)
    assert run.returncode == 1
    assert err.startswith("error: rank ")
    assert "was killed by SIGKILL" in err
    assert err.count("\n") == 1


def test_a_rank_that_has_lost_its_parent_ends_before_torch_is_loaded(tmp_path: Path) -> None:
    given = {"folder": str(tmp_path), "parent": 1, "path": [], "argv": []}
    orphan = [sys.executable, "-S", "-c", launch._CODE]
    environment = {**os.environ, "MVSSL_LAUNCHED": json.dumps(given)}
    ended = subprocess.run(orphan, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "error: the process that --devices belongs to has ended.\n"


def test_what_may_be_asked_for() -> None:
    assert asked_devices("8") == Devices(count=8)
    assert asked_devices("all") == Devices()
    assert asked_devices("0,1,3") == Devices(count=3, indices=(0, 1, 3))
    assert asked_devices("3,") == Devices(count=1, indices=(3,))
    for wrong in ("0", "-1", "x", "0,0", "1,,2", "", "1.5", "٣", "gpu"):
        with pytest.raises(
            InputError, match=r"^RunOptions.devices is .* but must be a number of devices, different num"
        ):
            RunOptions(devices=wrong)


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    ("devices", "visible", "chosen"),
    [
        ("2", None, "0,1"),
        ("all", None, "0,1,2,3"),
        ("0,3", None, "0,3"),
        ("3,", None, "3"),
        ("all", "7,5,GPU-a,1", "7,5,GPU-a,1"),
        ("1,2", "7,5,GPU-a,1", "5,GPU-a"),
    ],
)
def test_gpus_are_numbered_as_they_are_visible(
    devices: str, visible: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert launch._resolve(RunOptions(devices=devices)) == (chosen.count(",") + 1, {"CUDA_VISIBLE_DEVICES": chosen})


@pytest.mark.parametrize(
    ("options", "there", "message"),
    [
        ({"devices": "5"}, 4, r"^devices is '5' but must be at most the 4 GPUs here: name fewer"),
        ({"devices": "0,4"}, 4, r"^devices is '0,4' but must be numbers of the 4 GPUs here, from 0: name"),
        ({"devices": "2"}, 1, r"^devices is '2' but must be at most the 1 GPU here"),
        (
            {"devices": "2"},
            0,
            r"^devices is '2' but PyTorch sees no GPU here: leave --devices out, or add --device cpu",
        ),
        ({"devices": "2", "device": "cuda:1"}, 4, r"which both choose devices: leave one of"),
        ({"devices": "0,1", "device": "cpu"}, 4, r"^devices is '0,1' but must be a number with --device cpu"),
        ({"devices": "9999", "device": "cpu"}, 0, rf"^devices is '9999' but must be at most {CORES}, the cores here"),
    ],
)
def test_devices_that_are_not_there_are_counted(
    options: dict[str, Any], there: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, there)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(InputError, match=message):
        launch._resolve(RunOptions(**options))


def test_not_within_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=r"^devices is '2' but torchrun has started this process.*leave --devices out"):
        body(["demo", "--devices", "2"])
    monkeypatch.setenv(LAUNCHED, "{}")
    assert not launch.wants_launch(RunOptions(devices="2"))


def test_not_from_python(images: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    for devices in (2, [0, 1], "all"):
        with pytest.raises(InputError, match=r"but this process is one of 1.*torchrun --standalone --nproc-per-node"):
            mvssl.train(tiny_recipe, data=images, out=tmp_path / "run", device="cpu", devices=devices)
    assert not (tmp_path / "run").exists()


def test_one_device_needs_no_other_process() -> None:
    assert not launch.wants_launch(RunOptions(devices="1"))
    assert launch.wants_launch(RunOptions(devices="1,"))
