"""Fixtures of the benchmarks' tests: a few images and a recipe that takes a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
