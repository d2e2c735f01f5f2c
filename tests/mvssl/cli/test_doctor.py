"""mvssl-train doctor checks everything and names what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mvssl.cli import doctor
from mvssl.cli import train as train_cli


def test_the_doctor_checks_everything(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = train_cli.body(["doctor", "--json", "--data", str(images)])
    findings = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in findings] == [
        *("torch", "GPU", "DALI", "JPEG hardware", "FFCV", "Triton", "C compiler", "compiled code", "NCCL"),
        *("shared memory", "cores", "disk"),
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
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    gpu = doctor.examine()["GPU"]
    assert gpu.state == "missing"
    assert "driver gone" in gpu.found
    assert "more" not in gpu.found
