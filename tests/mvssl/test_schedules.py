"""Schedules against numbers worked out by hand, and the moment the target moves."""

from __future__ import annotations

import math

import pytest
import torch

from mvssl.optim import learning_rate, target_decay
from mvssl.target import ema_update


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.0),
        (5, 0.8),  # half of the warm-up
        (10, 1.6),  # its end: the peak
        (40, 1.6 * (0.75 + 0.001 * 0.25)),  # a third of the cosine: cos 60 degrees = 0.5
        (55, 1.6 * (0.5 + 0.001 * 0.5)),
        (70, 1.6 * (0.25 + 0.001 * 0.75)),
        (100, 0.0016),
    ],
)
def test_learning_rate(step: int, expected: float) -> None:
    assert learning_rate(step, 100, 10, 1.6, 0.001) == pytest.approx(expected, rel=1e-12)


def test_learning_rate_without_and_with_only_warmup() -> None:
    assert learning_rate(0, 10, 0, 2.0, 0.0) == 2.0
    assert learning_rate(9, 10, 10, 2.0, 0.0) == pytest.approx(1.8)
    assert learning_rate(1, 10, 2.5, 1.0, 0.0) == pytest.approx(0.4)  # a warm-up of two and a half steps


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.996), (25, 1 - 0.004 * (1 + math.sqrt(0.5)) / 2), (50, 0.998), (100, 1.0)]
)
def test_target_decay(step: int, expected: float) -> None:
    assert target_decay(step, 100, 0.996) == pytest.approx(expected, rel=1e-14)


def test_ema_moves_parameters_only_by_the_decay() -> None:
    target, online = [torch.tensor([1.0, 2.0]), torch.tensor(4.0)], [torch.tensor([3.0, 2.0]), torch.tensor(0.0)]
    ema_update(target, online, 0.75)
    assert target[0].tolist() == [1.5, 2.0]
    assert target[1].item() == 3.0
    ema_update(target, online, 1.0)
    assert target[0].tolist() == [1.5, 2.0]
