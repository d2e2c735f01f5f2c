"""Schedules against numbers computed by hand, and in-place updates by a factor on the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mvssl.models.foreach_ops import foreach_lerp_, foreach_subtract_, lerp_, subtract_
from mvssl.optim import ema_momentum, learning_rate


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
    assert learning_rate(1, 10, 2.5, 1.0, 0.0) == pytest.approx(0.4)  # warm-up of 2.5 steps


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.996), (25, 1 - 0.004 * (1 + math.sqrt(0.5)) / 2), (50, 0.998), (100, 1.0)]
)
def test_ema_momentum(step: int, expected: float) -> None:
    assert ema_momentum(step, 100, 0.996) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("move", [lerp_, foreach_lerp_])
def test_lerp(move: Callable[..., None]) -> None:
    target, online = [torch.tensor([1.0, 2.0]), torch.tensor(4.0)], [torch.tensor([3.0, 2.0]), torch.tensor(0.0)]
    move(target, online, torch.tensor(0.25))
    assert target[0].tolist() == [1.5, 2.0]
    assert target[1].item() == 3.0
    move(target, online, torch.tensor(0.0))
    assert target[0].tolist() == [1.5, 2.0]


@pytest.mark.parametrize("move", [lerp_, foreach_lerp_])
def test_lerp_is_accurate_for_a_small_weight(move: Callable[..., None]) -> None:
    """1 - tau near the end of a run; float32 factors tau and 1 - tau would make equal weights drift apart."""
    end, weight = torch.randn(1000, generator=torch.Generator().manual_seed(0)), 3e-8
    at_rest, moved = end.clone(), torch.zeros(1000)
    for _ in range(100):
        move([at_rest, moved], [end, end], torch.tensor(weight))
    assert torch.equal(at_rest, end)
    torch.testing.assert_close(moved.double(), end.double() * (1 - (1 - weight) ** 100), rtol=1e-5, atol=0)


@pytest.mark.parametrize("move", [subtract_, foreach_subtract_])
def test_subtract(move: Callable[..., None]) -> None:
    weights, updates = [torch.tensor([1.0, 2.0]), torch.tensor(4.0)], [torch.tensor([3.0, -2.0]), torch.tensor(0.5)]
    move(weights, updates, torch.tensor(0.25))
    assert weights[0].tolist() == [0.25, 2.5]
    assert weights[1].item() == 3.875
    assert updates[0].tolist() == [3.0, -2.0]
