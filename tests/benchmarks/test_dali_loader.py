"""The loader that is one DALI graph gives the images it is asked for, pass after pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from pipelines.storage import open_source
from pipelines.views.spec import IMAGENET_MEAN, IMAGENET_STD, ViewSpec

pytest.importorskip("nvidia.dali")


def test_loads_the_images_it_is_asked_for(tmp_path: Path) -> None:
    """Images of one gray value are known by it, whatever the crop."""
    from benchmarks.contenders.baselines.dali_loader import DaliLoader

    for n in range(12):
        Image.new("RGB", (48, 40 + n), (20 * n + 10,) * 3).save(tmp_path / f"{n:02d}.jpg")
    specs = [
        ViewSpec(name=name, task="t", size=size, is_target=True, jitter_p=0.0, grayscale=0.0, blur=0.0)
        for name, size in (("a", 32), ("b", 16))
    ]
    loader = DaliLoader(
        open_source(tmp_path), specs, batch_size=4, threads=1, device=torch.device("cpu"), dtype=torch.float32
    )
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    for batches in ([[3, 1, 11, 0], [5, 4, 2, 10], [7, 6, 8, 9]], [[9, 8, 7, 6]]):
        taken = list(loader(batches))  # all kept: they must not change
        assert len(taken) == len(batches)
        for views, wanted in zip(taken, batches, strict=True):
            for view, spec in zip(views, specs, strict=True):
                assert view.shape == (4, 3, spec.size, spec.size)
                levels = (view * std + mean) * 255 - (20 * torch.tensor(wanted) + 10)[:, None, None, None]
                assert levels.abs().max() < 3
    loader.close()
