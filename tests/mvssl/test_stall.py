"""The stall clock: what it measures on a GPU, and the sentence at the end of a run."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from test_monitor import STATUS

from mvssl.monitor.stall import DeviceClock, what_limits
from pipelines.loader_stats import StageSeconds

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class FakeEvent:
    """Stands in for a CUDA event: happens at the time a test has set, in milliseconds."""

    now = 0.0

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.now

    def elapsed_time(self, later: FakeEvent) -> float:
        return later.at - self.at


def test_device_clock_adds_up_the_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvssl.monitor.stall.cuda.Event", FakeEvent)
    clock = DeviceClock(CUDA)

    def step(begin: float, end: float) -> None:
        FakeEvent.now = begin
        with clock.step():
            FakeEvent.now = end

    assert clock.idle_share() is None
    step(0, 10)
    step(12, 20)
    step(20, 25)
    step(28, 40)
    assert clock.idle_share() == pytest.approx(5 / 40)  # gaps of 2 and 3 in 40 ms
    step(50, 60)  # the gap of 10 before it belongs to this window
    step(60, 70)
    assert clock.idle_share() == pytest.approx(10 / 30)
    clock.interrupt()  # an evaluation: no gap
    step(900, 910)
    assert clock.idle_share() == 0.0


def test_device_clock_measures_nothing_on_the_cpu() -> None:
    clock = DeviceClock(CPU)
    with clock.step():
        pass
    assert clock.idle_share() is None


@pytest.mark.gpu
def test_device_clock_sees_a_pause() -> None:
    clock = DeviceClock(torch.device("cuda"))
    x = torch.randn(4096, 4096, device="cuda")
    for _ in range(4):
        with clock.step():
            for _ in range(20):
                x @ x
        torch.cuda.synchronize()
        time.sleep(0.1)
    torch.cuda.synchronize()
    idle = clock.idle_share()
    assert idle is not None
    assert 0.3 < idle < 1.0


@pytest.mark.parametrize(
    ("wait", "stages", "device", "words"),
    [
        (0.004, StageSeconds(storage=1, decode=2, views=1), CPU, "the step limits the run: it waited for data 0.4 %"),
        (0.3, StageSeconds(storage=5, decode=2, views=1), CPU, "reading the images limits the run: convert them"),
        (0.3, StageSeconds(storage=1, decode=5, views=2), CPU, "decoding limits the run: give it more --threads"),
        (0.3, StageSeconds(storage=1, decode=2, views=5), CPU, "making the views limits the run: train on a GPU"),
        (0.3, StageSeconds(storage=1, decode=2, views=5), CUDA, "making the views limits the run: give the process"),
    ],
)
def test_the_sentence_names_the_stage_and_the_remedy(
    wait: float, stages: StageSeconds, device: torch.device, words: str
) -> None:
    sentence = what_limits(wait, stages, 800, device=device)
    assert sentence.startswith(words)
    seconds = stages.storage + stages.decode + stages.views
    assert f"the loader alone would prepare {800 / seconds:,.0f} images/s" in sentence
    if wait == 0.3:
        assert "62 % of preparing a batch; the step waited 30.0 % of the time" in sentence


def test_the_line_shows_the_idle_share_of_a_gpu() -> None:
    assert "gpu-idle" not in STATUS.line()
    assert "data-wait 1.2 %  gpu-idle 3.4 %  |" in replace(STATUS, idle_fraction=0.034).line()
