"""The stall clock, on a device that keeps an account of its own, and the sentence at the end of a run."""

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
from test_monitor import STATUS

from mvssl.config.recipe import Recipe
from mvssl.monitor import device_clock
from mvssl.monitor.bottleneck import what_limits
from mvssl.monitor.device_clock import DeviceClock, Shares
from mvssl.monitor.loggers import read_jsonl
from pipelines.loader import StageSeconds
from tests.samples.fake_device import FakeDevice, needs_compiler
from tests.samples.tiny_runs import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SECONDS = 2.0  # of a run under the clock: a thousand samples


def sampling() -> bool:
    """Whether the thread of a clock lives."""
    return any(thread.name == "mvssl-device-clock" for thread in threading.enumerate())


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    return FakeDevice(monkeypatch)


@pytest.fixture
def clock(device: FakeDevice) -> Iterator[DeviceClock]:
    with closing(DeviceClock(CUDA)) as clock:
        yield clock
    assert not sampling()


def start(clock: DeviceClock) -> None:
    """Let the thread begin, so that what follows is measured from its first moment."""
    with clock.step():
        pass
    give_up = time.monotonic() + 60
    while clock.shares() is None:
        assert time.monotonic() < give_up
        time.sleep(0.005)
    clock.interrupt()
    time.sleep(0.01)  # a sample that is being taken
    clock.shares()


def watch(
    clock: DeviceClock, device: FakeDevice, step: Callable[[FakeDevice], None], between: Callable[[], object]
) -> tuple[Shares, Shares]:
    """What the clock says of steps and of what is between them, and what the device says."""
    start(clock)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        between()
        with device.step(clock):
            step(device)
    shares = clock.shares()
    assert shares is not None
    assert shares.samples > 50
    return shares, device.truth()


def watch_twice(trial: Callable[[], tuple[Shares, Shares]]) -> tuple[Shares, Shares]:
    """`watch`, once more where they differ: a thread that a crowded machine wakes late has seen less than it should."""
    shares, truth = trial()
    if shares.idle != pytest.approx(truth.idle, abs=0.05):
        shares, truth = trial()
    return shares, truth


def slowed(device: FakeDevice) -> None:
    """A host that pauses longer before each launch than the device works on it."""
    for _ in range(3):
        time.sleep(0.007)
        device.launch(0.003)


def fast(device: FakeDevice) -> None:
    """A host that launches ahead."""
    for _ in range(3):
        device.launch(0.02)
    time.sleep(0.02)


def locking(device: FakeDevice) -> None:
    """A host that keeps Python's lock but for the moments of its launches."""
    for _ in range(3):
        device.launch(0.006)
        device.host_works(0.012)


@needs_compiler
@pytest.mark.parametrize("pause", [0.0, 0.015])
@pytest.mark.parametrize("step", [slowed, fast, locking])
def test_the_clock_agrees_with_the_devices_own_account(
    step: Callable[[FakeDevice], None], pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step and between steps, whatever the host does meanwhile; a thread that needs Python's lock could not."""

    def trial() -> tuple[Shares, Shares]:
        device = FakeDevice(monkeypatch)
        with closing(DeviceClock(CUDA)) as clock:
            return watch(clock, device, step, lambda: time.sleep(pause))

    shares, truth = watch_twice(trial)
    assert shares.idle_in_step == pytest.approx(truth.idle_in_step, abs=0.05)
    assert shares.idle_between == pytest.approx(truth.idle_between, abs=0.05)
    assert shares.idle == shares.idle_in_step + shares.idle_between
    if step is not fast:  # or there would be nothing to agree about
        assert truth.idle_in_step > 0.2
        assert pause == 0 or truth.idle_between > 0.1


@needs_compiler
def test_work_that_is_launched_but_has_not_begun_leaves_the_device_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of many short kernels launched one by one: queries alone would see it busy for the latency of each."""

    def trial() -> tuple[Shares, Shares]:
        device = FakeDevice(monkeypatch, latency=0.002)
        with closing(DeviceClock(CUDA)) as clock:
            return watch(clock, device, slowed, lambda: None)

    shares, truth = watch_twice(trial)
    assert shares.idle == pytest.approx(truth.idle, abs=0.1)  # queries alone: 0.2 less
    assert truth.idle > 0.5


@needs_compiler
def test_interruptions_are_left_out(device: FakeDevice, clock: DeviceClock) -> None:
    start(clock)
    for interrupted in (True, False):
        with clock.step():
            device.launch(0.2)
            time.sleep(0.2)
        if interrupted:
            clock.interrupt()  # an evaluation, a save
        time.sleep(0.6)
        with clock.step():
            device.launch(0.2)
            time.sleep(0.2)
        clock.interrupt()
        shares = clock.shares()
        assert shares is not None
        assert (shares.idle_between < 0.3) == interrupted  # of the 0.6 s in 1.0 s
    time.sleep(0.01)
    clock.shares()
    assert clock.shares() is None, "no sample in it"


@needs_compiler
@pytest.mark.parametrize("holding", [True, False])
def test_nothing_is_asked_while_a_graph_is_captured(holding: bool, device: FakeDevice) -> None:
    capturing = threading.Event()
    with closing(DeviceClock(CUDA, hold=lambda: holding and capturing.is_set())) as clock:
        start(clock)
        with clock.step():
            device.launch(0.4)
            time.sleep(0.4)
            capturing.set()
            time.sleep(0.6)  # it stops within 0.2 s
            device.fail(700 if holding else 0)
            time.sleep(0.5)
            device.fail(0)
            capturing.clear()
        shares = clock.shares()
    assert shares is not None, "a query would have ended it"
    assert (shares.idle_in_step < 0.5) == holding  # of 1.1 s in 1.5 s


@needs_compiler
def test_a_query_that_fails_ends_the_clock_quietly(
    device: FakeDevice, clock: DeviceClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="mvssl")
    start(clock)
    with clock.step():
        device.fail(700)
        give_up = time.monotonic() + 60
        while sampling() and time.monotonic() < give_up:
            time.sleep(0.005)
    assert not sampling()
    assert (clock.shares(), clock.idle_share(), clock.run_shares()) == (None, None, None)
    with clock.step():
        pass
    assert not sampling()
    assert caplog.messages == ["the GPU's idle share is not measured: CUDA error 700"]


def test_without_a_compiler_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, device: FakeDevice) -> None:
    monkeypatch.setattr(device_clock, "load_library", lambda source: "no C compiler was found")
    with closing(DeviceClock(CUDA)) as clock:
        with clock.step():
            pass
        give_up = time.monotonic() + 60
        while sampling() and time.monotonic() < give_up:
            time.sleep(0.005)
        assert clock.shares() is None


@needs_compiler
def test_the_run_is_counted_from_the_first_reading(device: FakeDevice, clock: DeviceClock) -> None:
    """What is before it, start and compilation, is no part of it; readings in between take nothing away."""
    with clock.step():
        time.sleep(1.0)  # compiling
    assert clock.run_shares() is None
    first = clock.shares()
    assert first is not None
    assert first.idle > 0.9
    for _ in range(3):
        with clock.step():
            device.launch(0.2)
            time.sleep(0.2)
        assert clock.shares() is not None
    clock.close()
    run = clock.run_shares()
    assert run is not None
    assert run.idle < 0.5
    assert run.samples > 50


def test_on_the_cpu_nothing_is_measured() -> None:
    with closing(DeviceClock(CPU)) as clock:
        with clock.step():
            assert not sampling()
        assert (clock.shares(), clock.idle_share(), clock.run_shares()) == (None, None, None)


def one_product(x: torch.Tensor) -> None:
    for _ in range(10):
        x @ x
        time.sleep(0.004)


def many_launches(x: torch.Tensor) -> None:
    small = x[:512, :512].contiguous()
    for _ in range(2000):
        small @ small


def sampling_error(share: float, samples: int) -> float:
    """Four standard errors of a share that so many samples give: beyond it lies one run in 16,000.

    Samples stand for the time since the one before, 1 to 3 ms, which costs a twelfth of them.
    """
    return 4 * math.sqrt(share * (1 - share) * (1 + 1 / 12) / samples)


@pytest.mark.gpu
@pytest.mark.parametrize(("step", "steps", "bias"), [(one_product, 120, 0.02), (many_launches, 100, 0.08)])
def test_the_clock_agrees_with_the_profiler(step: Callable[[torch.Tensor], None], steps: int, bias: float) -> None:
    """The profiler's idle time is what lies between the kernels.

    Launching one by one is where latencies tell: `bias` is what the clock may be wrong however long it samples.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    x = torch.randn(4096, 4096, device="cuda")
    step(x)
    torch.cuda.synchronize()
    with closing(DeviceClock(CUDA)) as clock:
        start(clock)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(steps):
                with clock.step():
                    step(x)
            torch.cuda.synchronize()
            shares = clock.shares()
            clock.interrupt()
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
    assert shares is not None
    assert shares.samples > 100, "too few to tell"
    assert shares.idle == pytest.approx(idle, abs=bias + sampling_error(idle, shares.samples))


@pytest.mark.gpu
def test_the_clock_spoils_no_capture() -> None:
    """Not even one that it is not told of."""
    x = torch.zeros(1024, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with closing(DeviceClock(CUDA)) as clock:
        start(clock)
        with clock.step():
            with torch.cuda.graph(graph):
                for _ in range(10):
                    x += 1
                    time.sleep(0.02)
            graph.replay()
        torch.cuda.synchronize()
        assert clock.shares() is not None
    assert x.tolist() == [10.0] * 1024


def shares(in_step: float, between: float) -> Shares:
    return Shares(idle_in_step=in_step, idle_between=between, samples=100)


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
    seconds = max(stages.storage, stages.decode, stages.views)
    sentence = what_limits(wait, stages, 800, device=device, pace=0.9 * 800 / seconds)
    assert sentence.startswith(words)
    assert f"the loader alone would prepare {800 / seconds:,.0f} images/s" in sentence
    if wait == 0.3:
        assert "62 % of the work on a batch; the step waited 30.0 % of the time" in sentence


@pytest.mark.parametrize(
    ("wait", "idle", "words"),
    [
        (
            0.004,
            shares(0.42, 0.01),
            "launching limits the run: the GPU had nothing queued 42.6 % of the time while the",
        ),
        (0.01, shares(0.0, 0.07), "launching limits the run: the GPU had nothing queued 6.0 %"),
        (
            0.004,
            shares(0.02, 0.01),
            "the step limits the run: it waited for data 0.4 % of the time and kept the GPU busy",
        ),
        (0.3, shares(0.2, 0.3), "decoding limits the run"),  # the wait explains what is between steps, and is larger
        (0.3, shares(0.4, 0.3), "launching limits the run: the GPU had nothing queued 40.0 %"),
        (0.03, shares(0.04, 0.03), "decoding limits the run"),  # 4 % are not worth a remedy, though they are more
        (0.004, None, "the step limits the run: it waited for data 0.4 % of the time (the loader"),
    ],
)
def test_the_sentence_names_launching_and_the_remedy(wait: float, idle: Shares | None, words: str) -> None:
    stages = StageSeconds(storage=1, decode=2, views=1)
    sentence = what_limits(wait, stages, 800, device=CUDA, pace=350.0, shares=idle)
    assert sentence.startswith(words)
    assert "the loader alone would prepare 400 images/s" in sentence
    assert f"{100 * wait:.1f} % of the time" in sentence
    if words.startswith("launching"):
        for remedy in ("--cuda-graph auto", "--compile on", "--step-mode joint", "--batch-size", "--threads"):
            assert remedy in sentence
    if words.endswith("GPU busy"):
        assert "kept the GPU busy 97.0 %" in sentence


def test_a_loader_that_is_far_ahead_limits_nothing() -> None:
    """A short run that waited now and then, with a loader six times as fast as the step."""
    stages = StageSeconds(storage=1, decode=2, views=1)
    sentence = what_limits(0.013, stages, 300, device=CPU, pace=23.0)
    assert sentence == (
        "the step limits the run: it waited for data 1.3 % of the time, in single moments (the loader alone would "
        "prepare 150 images/s)"
    )
    assert what_limits(0.013, stages, 300, device=CPU, pace=140.0).startswith("decoding limits the run")


def test_the_line_shows_the_idle_share_of_a_gpu() -> None:
    assert "gpu-idle" not in STATUS.line()
    assert "data-wait 1.2 %  gpu-idle 3.4 %  |" in replace(STATUS, idle_fraction=0.034).line()


class _Told:
    """A clock that says what it was told to."""

    closed = False

    def __init__(self, device: torch.device, *, hold: Callable[[], bool]) -> None:
        assert not hold()

    def step(self) -> AbstractContextManager[None]:
        return nullcontext()

    def interrupt(self) -> None:
        pass

    def shares(self) -> Shares:
        return shares(0.9, 0.0)

    run_shares = shares

    def close(self) -> None:
        _Told.closed = True


def test_a_run_writes_its_shares_and_ends_with_the_sentence(
    images: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mvssl.training.monitor.DeviceClock", _Told)
    train(replace(tiny_recipe, epochs=1), images, tmp_path / "run")
    for row in read_jsonl(tmp_path / "run" / "throughput.jsonl"):
        assert (row["device_idle"], row["launching"]) == (0.9, 0.9)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "gpu-idle 90.0 %" in log
    assert "launching limits the run: the GPU had nothing queued 90.0 % of the time" in log
    assert _Told.closed
