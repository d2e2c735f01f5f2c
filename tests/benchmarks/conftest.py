"""Fixtures of the benchmarks' tests: a few images and a recipe that takes a moment."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

Bench = Callable[..., tuple[dict[str, Any], str]]

TINY = """
base = "demo"
backbone = {name = "test_resnet"}
projector = {hidden = [32], out = 16}
predictor = {hidden = [32], out = 16}
batch_size = 4
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen images of noise of 64 pixels."""
    root = tmp_path_factory.mktemp("noise")
    generator = np.random.default_rng(0)
    for n in range(12):
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / f"{n:02d}.jpg")
    return root


@pytest.fixture
def tiny_recipe_file(tmp_path: Path) -> Path:
    """A recipe of small networks with batches of 4."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs a benchmark's command with these words; returns its result, which stdout and --out share, and stderr."""

    def run(module: ModuleType, *words: object) -> tuple[dict[str, Any], str]:
        out = tmp_path / "results" / "out.json"
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words), "--out", str(out)])
        assert module.body() == 0
        result, told = json.loads(out.read_text()), capsys.readouterr()
        assert json.loads(told.out) == result
        assert str(tmp_path.parent) not in told.out, "no path of this machine is recorded"
        assert {"packages", "cores", "gpus"} <= set(result["environment"])
        return result, told.err

    return run
