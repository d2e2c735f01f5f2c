"""The idle sampler, against a fake device that accounts for its idle time exactly."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mvssl.config.recipe import Recipe
from mvssl.monitor import idle_sampler
from mvssl.monitor.idle_sampler import IdleFractions, IdleSampler
from mvssl.runs.jsonl import read_jsonl
from tests.samples.fake_device import FakeDevice, needs_compiler
from tests.samples.tiny_runs import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SECONDS = 2.0  # of a trial: a thousand samples


def sampling() -> bool:
    """Whether the thread of a sampler is alive."""
    return any(thread.name == "mvssl-idle-sampler" for thread in threading.enumerate())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return FakeDevice(monkeypatch)


@pytest.fixture
def sampler(device: FakeDevice) -> Iterator[IdleSampler]:
    with closing(IdleSampler(CUDA)) as sampler:
        yield sampler
    assert not sampling()


def start(sampler: IdleSampler) -> None:
    """Let the thread start, so that what follows is measured from the beginning."""
    with sampler.step():
        pass
    give_up = time.monotonic() + 60
    while sampler.fractions() is None:
        assert time.monotonic() < give_up
        time.sleep(0.005)
    sampler.interrupt()
    time.sleep(0.01)  # a sample that is being taken
    sampler.fractions()


def watch(
    sampler: IdleSampler, device: FakeDevice, step: Callable[[FakeDevice], None], between: Callable[[], object]
) -> tuple[IdleFractions, IdleFractions]:
    """Idle fractions of steps and of the time between them, by the sampler and by the device."""
    start(sampler)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        between()
        with device.step(sampler):
            step(device)
    idle = sampler.fractions()
    assert idle is not None
    assert idle.samples > 50
    return idle, device.truth()


def watch_twice(trial: Callable[[], tuple[IdleFractions, IdleFractions]]) -> tuple[IdleFractions, IdleFractions]:
    """`watch`, repeated if they differ: on a crowded machine the thread may wake late and see too little."""
    idle, truth = trial()
    if idle.total != pytest.approx(truth.total, abs=0.05):
        idle, truth = trial()
    return idle, truth


def slowed(device: FakeDevice) -> None:
    """A host that takes longer to launch than the device works."""
    for _ in range(3):
        time.sleep(0.007)
        device.launch(0.003)


def fast(device: FakeDevice) -> None:
    """A host that launches ahead."""
    for _ in range(3):
        device.launch(0.02)
    time.sleep(0.02)


def holding_the_gil(device: FakeDevice) -> None:
    """A host that releases the GIL only while it launches."""
    for _ in range(3):
        device.launch(0.006)
        device.host_works(0.012)


@pytest.mark.timing
@needs_compiler
@pytest.mark.parametrize("pause", [0.0, 0.015])
@pytest.mark.parametrize("step", [slowed, fast, holding_the_gil])
def test_the_sampler_agrees_with_the_devices_own_account(
    step: Callable[[FakeDevice], None], pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step and between steps, whatever the host does; a thread that needs the GIL could not."""

    def trial() -> tuple[IdleFractions, IdleFractions]:
        device = FakeDevice(monkeypatch)
        with closing(IdleSampler(CUDA)) as sampler:
            return watch(sampler, device, step, lambda: time.sleep(pause))

    idle, truth = watch_twice(trial)
    assert idle.in_step == pytest.approx(truth.in_step, abs=0.05)
    assert idle.between == pytest.approx(truth.between, abs=0.05)
    assert idle.total == idle.in_step + idle.between
    if step is not fast:  # or there would be nothing to agree about
        assert truth.in_step > 0.2
        assert pause == 0 or truth.between > 0.1


@pytest.mark.timing
@needs_compiler
def test_work_that_is_launched_but_has_not_begun_leaves_the_device_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many short kernels launched one by one: queries alone would count the latency of each as busy."""

    def trial() -> tuple[IdleFractions, IdleFractions]:
        device = FakeDevice(monkeypatch, latency=0.002)
        with closing(IdleSampler(CUDA)) as sampler:
            return watch(sampler, device, slowed, lambda: None)

    idle, truth = watch_twice(trial)
    assert idle.total == pytest.approx(truth.total, abs=0.1)  # queries alone: 0.2 less
    assert truth.total > 0.5


@pytest.mark.timing
@needs_compiler
def test_interruptions_are_left_out(device: FakeDevice, sampler: IdleSampler) -> None:
    start(sampler)
    for interrupted in (True, False):
        with sampler.step():
            device.launch(0.2)
            time.sleep(0.2)
        if interrupted:
            sampler.interrupt()  # an evaluation, a save
        time.sleep(0.6)
        with sampler.step():
            device.launch(0.2)
            time.sleep(0.2)
        sampler.interrupt()
        idle = sampler.fractions()
        assert idle is not None
        assert (idle.between < 0.3) == interrupted  # of the 0.6 s in 1.0 s
    time.sleep(0.01)
    sampler.fractions()
    assert sampler.fractions() is None, "no sample in it"


@needs_compiler
def test_a_capture_is_never_queried(device: FakeDevice) -> None:
    capturing = threading.Event()
    with closing(IdleSampler(CUDA, hold=capturing.is_set)) as sampler:
        start(sampler)
        with sampler.step():
            capturing.set()
            time.sleep(1.0)  # it stops within 0.2 s
            device.fail(700)
            time.sleep(0.2)
            device.fail(0)
            capturing.clear()
        assert sampling(), "a query would have ended it"


@pytest.mark.timing
@needs_compiler
@pytest.mark.parametrize("holding", [True, False])
def test_nothing_is_asked_while_a_graph_is_captured(holding: bool, device: FakeDevice) -> None:
    capturing = threading.Event()
    with closing(IdleSampler(CUDA, hold=lambda: holding and capturing.is_set())) as sampler:
        start(sampler)
        with sampler.step():
            device.launch(0.4)
            time.sleep(0.4)
            capturing.set()
            time.sleep(0.6)  # it stops within 0.2 s
            device.fail(700 if holding else 0)
            time.sleep(0.5)
            device.fail(0)
            capturing.clear()
        idle = sampler.fractions()
    assert idle is not None, "a query would have ended it"
    assert (idle.in_step < 0.5) == holding  # of 1.1 s in 1.5 s


@needs_compiler
def test_a_query_that_fails_ends_the_sampling_quietly(
    device: FakeDevice, sampler: IdleSampler, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="mvssl")
    start(sampler)
    with sampler.step():
        device.fail(700)
        give_up = time.monotonic() + 60
        while sampling() and time.monotonic() < give_up:
            time.sleep(0.005)
    assert not sampling()
    assert (sampler.fractions(), sampler.run_fractions()) == (None, None)
    with sampler.step():
        pass
    assert not sampling()
    assert caplog.messages == ["GPU idle time is not measured: CUDA error 700"]


def test_without_a_compiler_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> None:
    monkeypatch.setattr(idle_sampler, "load_library", lambda source: "no C compiler was found")
    with closing(IdleSampler(CUDA)) as sampler:
        with sampler.step():
            pass
        give_up = time.monotonic() + 60
        while sampling() and time.monotonic() < give_up:
            time.sleep(0.005)
        assert sampler.fractions() is None


@pytest.mark.timing
@needs_compiler
def test_the_run_counts_from_the_first_reading(device: FakeDevice, sampler: IdleSampler) -> None:
    """Start-up and compilation before it do not count; readings in between do not matter."""
    with sampler.step():
        time.sleep(1.0)  # compiling
    assert sampler.run_fractions() is None
    first = sampler.fractions()
    assert first is not None
    assert first.total > 0.9
    for _ in range(3):
        with sampler.step():
            device.launch(0.2)
            time.sleep(0.2)
        assert sampler.fractions() is not None
    sampler.close()
    run = sampler.run_fractions()
    assert run is not None
    assert run.total < 0.5
    assert run.samples > 50


def test_on_the_cpu_nothing_is_measured() -> None:
    with closing(IdleSampler(CPU)) as sampler:
        with sampler.step():
            assert not sampling()
        assert (sampler.fractions(), sampler.run_fractions()) == (None, None)


def one_product(x: torch.Tensor) -> None:
    for _ in range(10):
        x @ x
        time.sleep(0.004)


def many_launches(x: torch.Tensor) -> None:
    small = x[:512, :512].contiguous()
    for _ in range(2000):
        small @ small


def sampling_error(fraction: float, samples: int) -> float:
    """Four standard errors of a fraction from so many samples: one run in 16,000 lies beyond.

    Samples are weighted by the 1 to 3 ms since the one before, which costs a twelfth of them.
    """
    return 4 * math.sqrt(fraction * (1 - fraction) * (1 + 1 / 12) / samples)


@pytest.mark.gpu
@pytest.mark.parametrize(("step", "steps", "bias"), [(one_product, 120, 0.02), (many_launches, 100, 0.08)])
def test_the_sampler_agrees_with_the_profiler(step: Callable[[torch.Tensor], None], steps: int, bias: float) -> None:
    """The profiler's idle time is the time between kernels.

    `bias` is a systematic error, from launch latencies, which matter where kernels are launched one by one.
    """
    from torch._C._autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    x = torch.randn(4096, 4096, device="cuda")
    step(x)
    torch.cuda.synchronize()
    with closing(IdleSampler(CUDA)) as sampler:
        start(sampler)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(steps):
                with sampler.step():
                    step(x)
            torch.cuda.synchronize()
            idle = sampler.fractions()
            sampler.interrupt()
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA and event.time_range.end > event.time_range.start
    )
    busy, last = 0.0, spans[0][0]
    for begin, end in spans:
        busy += max(0.0, end - max(begin, last))
        last = max(last, end)
    idle = 1 - busy / (last - spans[0][0])
    assert idle is not None
    assert idle.samples > 100, "too few to tell"
    assert idle.total == pytest.approx(idle, abs=bias + sampling_error(idle, idle.samples))


@pytest.mark.gpu
def test_the_sampler_invalidates_no_capture() -> None:
    """Even if it is not told of it."""
    x = torch.zeros(1024, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with closing(IdleSampler(CUDA)) as sampler:
        start(sampler)
        with sampler.step():
            with torch.cuda.graph(graph):
                for _ in range(10):
                    x += 1
                    time.sleep(0.02)
            graph.replay()
        torch.cuda.synchronize()
        assert sampler.fractions() is not None
    assert x.tolist() == [10.0] * 1024


class FixedSampler:
    """Always measures the same."""

    closed = False

    def __init__(self, device: torch.device, *, hold: Callable[[], bool]) -> None:
        assert not hold()

    def step(self) -> AbstractContextManager[None]:
        return nullcontext()

    def interrupt(self) -> None:
        pass

    def fractions(self) -> IdleFractions:
        return IdleFractions(in_step=0.9, between=0.0, samples=100)

    run_fractions = fractions

    def close(self) -> None:
        FixedSampler.closed = True


def test_a_run_logs_its_idle_time_and_ends_with_the_bottleneck(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvssl.training.monitor.IdleSampler", FixedSampler)
    train(replace(tiny_recipe, epochs=1), images, tmp_path / "run")
    for row in read_jsonl(tmp_path / "run" / "throughput.jsonl"):
        assert (row["device_idle"], row["launching"]) == (0.9, 0.9)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "gpu-idle 90.0 %" in log
    assert "the bottleneck is launching: the GPU had nothing queued 90.0 % of the time" in log
    assert FixedSampler.closed
