"""Metrics between two log points: averages over ranks, checkpoints, and values that are not finite."""

from __future__ import annotations

import pytest
import torch

from mvssl.distributed import World
from mvssl.training.metric_buffer import MetricBuffer
from mvssl.training.step import StepOutput


def output(loss: float, losses: list[float], grad_norm: float = 0.5) -> StepOutput:
    return StepOutput(
        losses=torch.tensor(losses),
        loss=torch.tensor(loss),
        embedding=torch.zeros(2, 2),
        grad_norm=torch.tensor(grad_norm),
        lr=0.1,
        tau=0.9,
    )


def test_the_mean_over_the_ranks_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if a checkpoint comes between two log points, and in the run resumed from it."""
    monkeypatch.setattr(World, "mean", lambda self, values: values / 2)  # a mean that shows when it is taken
    buffer = MetricBuffer()
    buffer.add(output(4.0, []), torch.arange(4))
    buffer.average(World())
    again = MetricBuffer()
    again.load_state_dict(buffer.state_dict(), torch.device("cpu"))
    for one in (buffer, again):
        one.add(output(8.0, []), torch.arange(4))
        one.average(World())
        assert one.rows()[:, 1].tolist() == [2.0, 4.0]
        one.clear()
        one.add(output(6.0, []), torch.arange(4))
        one.average(World())
        assert one.rows()[:, 1].tolist() == [3.0]


def test_rows_survive_a_checkpoint() -> None:
    buffer = MetricBuffer()
    for step in range(3):
        buffer.add(output(float(step), [float(step), 10.0 * step]), torch.arange(4) + step)
    again = MetricBuffer()
    again.load_state_dict(buffer.state_dict(), torch.device("cpu"))
    for one in (buffer, again):
        assert one.rows().tolist() == [[0.5, 0.0, 0.0, 0.0], [0.5, 1.0, 1.0, 10.0], [0.5, 2.0, 2.0, 20.0]]
        assert one.non_finite(last_step=7) is None
    buffer.clear()
    assert len(buffer) == 0
    assert buffer.non_finite(last_step=7) is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_it_finds_the_first_step_that_is_not_finite(poison: float) -> None:
    buffer = MetricBuffer()
    for step in range(5):
        task = poison if step in (2, 4) else 1.0
        buffer.add(output(1.0, [1.0, task]), torch.tensor([step, 10 + step]))
    failure = buffer.non_finite(last_step=20)  # the buffer holds steps 16 to 20
    assert failure is not None
    assert failure.step == 18
    assert failure.index == [2, 12]


def test_it_finds_a_gradient_that_is_not_finite_where_asked() -> None:
    buffer = MetricBuffer()
    for step in range(3):
        buffer.add(output(1.0, [1.0], grad_norm=float("inf") if step == 1 else 1.0), torch.tensor([step]))
    failure = buffer.non_finite(last_step=3)
    assert failure is not None
    assert (failure.step, failure.grad_norm, failure.index) == (2, float("inf"), [1])
    assert buffer.non_finite(last_step=3, gradients=False) is None
