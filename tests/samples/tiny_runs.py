"""Whole runs of the tiny recipe for tests, with crashes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mvssl
from mvssl.config.options import Execution
from mvssl.config.recipe import Recipe
from mvssl.training.step import TrainStep

STEPS = 12  # 3 epochs of 4 steps, see tests/mvssl/conftest.py


def make_step(recipe: Recipe, *, device: str = "cpu", total: int, epoch: int = 2, **changes: Any) -> TrainStep:
    """A step of `total` updates, `epoch` in each epoch, with changed fields of `Recipe` and `Execution`."""
    changed, execution = split_changes(recipe, changes)
    return TrainStep(changed, execution=execution, device=device, total_steps=total, steps_per_epoch=epoch)


def split_changes(recipe: Recipe, changes: dict[str, Any]) -> tuple[Recipe, Execution]:
    """Changed fields of `Recipe` and `Execution`, each in its place."""
    names = {field.name for field in fields(Execution)}
    execution = Execution(**{name: value for name, value in changes.items() if name in names})
    return replace(recipe, **{name: value for name, value in changes.items() if name not in names}), execution


class CrashError(Exception):
    """A crash in the middle of a run."""


def write_images(root: Path, *, classes: int, per_class: int, seed: int) -> None:
    """Write noisy JPEGs of varied sizes into one folder per class."""
    generator = np.random.default_rng(seed)
    for c in range(classes):
        folder = root / f"class_{c}"
        folder.mkdir(parents=True)
        for i in range(per_class):
            height, width = generator.integers(33, 60, size=2)
            base = np.full((height, width, 3), 40 + 50 * c, dtype=np.int64)
            noise = generator.integers(-40, 40, size=(height, width, 3))
            pixels = np.clip(base + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i:03d}.jpg", quality=90)


@contextmanager
def crash_at(step: int) -> Iterator[None]:
    """Training step number `step` (from 0) crashes in the block, which must not survive it."""
    original = TrainStep.__call__

    def crashing(self: TrainStep, views: list[torch.Tensor], number: int) -> Any:
        if number == step:
            raise CrashError
        return original(self, views, number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "__call__", crashing)
        with pytest.raises(CrashError):
            yield


def metrics(out: Path) -> bytes:
    """metrics.jsonl: equal bytes show that two runs computed the same numbers."""
    return (out / "metrics.jsonl").read_bytes()


def train(recipe: Recipe, data: Path, out: Path, **options: Any) -> mvssl.TrainResult:
    return mvssl.train(recipe, data=data, out=out, device="cpu", **{"log_every": 3, **options})
