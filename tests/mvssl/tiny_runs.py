"""Whole runs of the tiny recipe, for the tests of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mvssl
from mvssl.recipe import Recipe
from mvssl.step import TrainStep

STEPS = 12  # 3 epochs of 4 steps, see conftest


class CrashError(Exception):
    """A crash in the middle of a run."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the training step number `step` (from 0) crash."""
    original = TrainStep.__call__

    def crashing(self: TrainStep, views: list[torch.Tensor], number: int) -> Any:
        if number == step:
            raise CrashError
        return original(self, views, number)

    monkeypatch.setattr(TrainStep, "__call__", crashing)


def train(recipe: Recipe, data: Path, out: Path, **options: Any) -> mvssl.TrainResult:
    return mvssl.train(recipe, data=data, out=out, device="cpu", **{"log_every": 3, **options})
