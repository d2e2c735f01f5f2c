"""mvssl-train doctor checks everything and names what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mvssl.cli import doctor
from mvssl.cli import train as train_cli
from pipelines.files import cache_folder, cache_obstacle


def test_the_doctor_checks_everything(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = train_cli.body(["doctor", "--json", "--data", str(images)])
    findings = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in findings] == [
        *("torch", "GPU", "DALI", "JPEG hardware", "FFCV", "HEIC", "Triton", "C compiler", "compiled code"),
        *("NCCL", "shared memory", "cores", "disk"),
    ]
    assert code == int(any(finding["state"] == "missing" for finding in findings))
    assert all(finding["remedy"] for finding in findings if finding["state"] != "ok")
    assert "images/s" in findings[-1]["found"]
    train_cli.body(["doctor"])
    assert "C compiler" in capsys.readouterr().out


def test_the_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> bool:
        raise RuntimeError("driver gone\nmore")

    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor, "native_obstacle", lambda: "no C compiler was found")
    monkeypatch.setattr(doctor, "missing_ffcv", lambda: "not installed")
    found = doctor.examine(tmp_path / "nowhere")
    assert found["DALI"].remedy == "pip install nvidia-dali-cuda120"
    assert (found["C compiler"].state, found["disk"].state) == ("slower", "missing")
    assert "does not exist" in found["disk"].found
    monkeypatch.setattr(doctor, "_driver_loads", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    gpu = doctor.examine()["GPU"]
    assert gpu.state == "missing"
    assert "driver gone" in gpu.found
    assert "more" not in gpu.found


def test_the_doctor_tells_a_cache_that_cannot_be_used_from_a_missing_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for obstacle, remedy in (
        (f"it could not be built ({cache_obstacle(cache_folder())}, and so on)", "set XDG_CACHE_HOME"),
        ("no C compiler was found", "apt-get install gcc"),
    ):
        monkeypatch.setattr(doctor, "native_obstacle", lambda obstacle=obstacle: obstacle)
        compiler = doctor.examine()["C compiler"]
        assert compiler.state == "slower"
        assert compiler.remedy.startswith(remedy)
    monkeypatch.setattr(doctor, "native_obstacle", lambda: None)
    found = doctor.examine()
    assert found["C compiler"].state == "ok"
    assert (found["compiled code"].state, found["compiled code"].remedy[:18]) == ("slower", "set XDG_CACHE_HOME")
    assert "Not a directory" in found["compiled code"].found
