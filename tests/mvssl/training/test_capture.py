"""Steps recorded once and replayed: when, with what memory, and what happens where it cannot be.

On the CPU a stand-in repeats the recorded operations as CUDA's graphs do (`replayed_operations.py`); the same on CUDA
itself is marked `gpu`.
"""

from __future__ import annotations

import copy
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

import mvssl.training.step
from mvssl.config.options import Execution, RunOptions
from mvssl.config.recipe import Optimizer, Recipe
from mvssl.distributed import World
from mvssl.training import experiment
from mvssl.training.cuda_graph import WARM_UP, CudaGraph, Graph, StepGraph, describe, wants_capture
from mvssl.training.memory import explain_out_of_memory
from mvssl.training.step import StepOutput, TrainStep
from pipelines.loading.threads import receive
from pipelines.runtime import InputError
from tests.samples.capture_steps import ADAMW, MOCO, RECIPE, SIMSIAM, VIT, batches
from tests.samples.fake_cuda import ECHO, FakeCuda, FakeStream
from tests.samples.recorded_operations import kept_tensors
from tests.samples.replayed_operations import ReplayedGraph
from tests.samples.tiny_runs import make_step

STEPS = WARM_UP + 5


class Toy:
    """Work that adds its input to a sum; returns the sum and the input doubled."""

    def __init__(self) -> None:
        self.sum = torch.zeros(3)
        self.runs = 0

    def __call__(self, stacks: Any) -> tuple[Tensor, ...]:
        self.runs += 1
        self.sum += stacks[0]
        return self.sum + 0, 2 * stacks[0]


def toy_graph(**options: Any) -> tuple[Toy, StepGraph, list[ReplayedGraph]]:
    toy = Toy()
    made: list[ReplayedGraph] = []

    def make() -> Graph:
        made.append(ReplayedGraph(lambda: [toy.sum]))
        return made[-1]

    settings: dict[str, Any] = {"wanted": True, "graph": make} | options
    return toy, StepGraph(toy, lambda: None, **settings), made


def test_the_first_steps_are_run_and_the_others_replayed() -> None:
    toy, graph, made = toy_graph()
    seen = []
    for number in range(STEPS):
        assert graph.captured == (number > WARM_UP)
        stack = torch.full((3,), float(number + 1))
        if graph.inputs is not None:
            graph.inputs[0].copy_(stack)
            stack = graph.inputs[0]
        seen.append(graph([stack]))
    assert toy.runs == WARM_UP + 1  # the last of them is the recording
    assert [each.replays for each in made] == [STEPS - WARM_UP]
    for number, (total, doubled) in enumerate(seen):  # what earlier steps returned is theirs
        assert total.tolist() == [sum(range(number + 2))] * 3
        assert doubled.tolist() == [2.0 * (number + 1)] * 3
    assert graph.warm_up == WARM_UP + 1


def test_the_recorded_stacks_are_the_callers_no_longer() -> None:
    _, graph, _ = toy_graph(warm_up=0)
    own = torch.ones(3)
    graph([own])
    assert graph.inputs is not None
    assert graph.inputs[0].data_ptr() != own.data_ptr()
    own.fill_(7.0)  # as the loader does, which gets its memory back
    assert graph(graph.inputs)[1].tolist() == [2.0] * 3


def test_unwanted_graphs_are_never_made() -> None:
    toy, graph, made = toy_graph(wanted=False)
    for _ in range(STEPS):
        graph([torch.ones(3)])
    assert (toy.runs, made, graph.inputs, graph.captured, graph.warm_up) == (STEPS, [], None, False, 1)


def test_a_dropped_recording_is_made_anew() -> None:
    toy, graph, made = toy_graph(warm_up=1)
    for _ in range(3):
        graph([torch.ones(3)])
    graph.drop()
    assert not graph.captured
    assert graph.inputs is None
    for _ in range(3):
        graph([torch.ones(3)])
    assert graph.captured
    assert len(made) == 2
    assert toy.sum.tolist() == [6.0] * 3


def test_it_says_when_it_is_recording() -> None:
    seen = []
    toy = Toy()

    def work(stacks: Any) -> tuple[Tensor, ...]:
        seen.append(graph.capturing)
        return toy(stacks)

    graph = StepGraph(work, lambda: None, wanted=True, warm_up=2, graph=lambda: ReplayedGraph(lambda: [toy.sum]))
    for _ in range(5):
        graph([torch.ones(3)])
        assert not graph.capturing
    assert seen == [False, False, True]


class Unrecordable:
    """A graph that a library's call breaks in the middle of the recording."""

    def __init__(self, error: Exception, attempts: list[int]) -> None:
        self._error = error
        self._attempts = attempts

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        self._attempts.append(1)
        raise self._error

    def replay(self) -> None:
        raise AssertionError("nothing was recorded")


BROKEN = RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might be ...")


def test_what_cannot_be_recorded_runs_on_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    attempts: list[int] = []
    forgotten: list[int] = []
    toy = Toy()
    graph = StepGraph(toy, lambda: forgotten.append(1), wanted=True, graph=lambda: Unrecordable(BROKEN, attempts))
    with caplog.at_level(logging.WARNING, "mvssl"):
        for _ in range(STEPS):
            graph([torch.ones(3)])
    assert toy.sum.tolist() == [float(STEPS)] * 3
    assert (len(attempts), len(forgotten)) == (1, 1)
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "could NOT be recorded" in message
    assert "RuntimeError: CUDA error: operation not permitted when stream is capturing (in record" in message
    assert "--cuda-graph off" in message
    assert not graph.captured
    assert not graph.capturing
    assert graph.warm_up == 1


def test_who_asks_for_a_graph_gets_an_error() -> None:
    graph = StepGraph(Toy(), lambda: None, wanted=True, asked=True, graph=lambda: Unrecordable(BROKEN, []))
    for _ in range(WARM_UP):
        graph([torch.ones(3)])
    with pytest.raises(InputError, match=r"cuda_graph is 'on' but .*not permitted.*set it to auto or off"):
        graph([torch.ones(3)])
    assert not graph.capturing


def test_full_memory_while_recording_says_what_to_turn() -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    graph = StepGraph(Toy(), lambda: None, wanted=True, warm_up=0, graph=lambda: Unrecordable(full, []))
    with (
        pytest.raises(InputError, match=r"(?s)memory is full.*--cuda-graph off"),
        explain_out_of_memory(RECIPE, Execution()),
    ):
        graph([torch.ones(3)])


# What torch leaves behind a recording that CUDA broke, and what must be left: `FakeCuda`.

RELEASES = {
    "torch 2.11": {"end_closes": False, "reset_releases": False},
    "torch 2.13": {"end_closes": True, "reset_releases": False},
    "newer": {"end_closes": True, "reset_releases": True},
    "newer, scarce memory": {"end_closes": True, "reset_releases": True, "forgets": True},
}


@pytest.fixture(params=RELEASES.values(), ids=list(RELEASES))
def cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch, **request.param)


def test_all_steps_run_in_one_stream_of_the_device(cuda: FakeCuda) -> None:
    ran_in: list[FakeStream] = []

    def work(stacks: Any) -> tuple[Tensor, ...]:
        ran_in.append(cuda.current)
        return (2 * stacks[0],)

    graph = StepGraph(work, lambda: None, wanted=True, stream=cuda.stream, graph=lambda: CudaGraph(cuda.stream))
    for number in range(WARM_UP + 3):
        assert len(cuda.default.waited) == number + (number > WARM_UP)  # the recording waits, too
        graph([torch.ones(3)])
    assert cuda.recorded_in == [cuda.stream]
    assert ran_in == [cuda.stream] * (WARM_UP + 1)
    assert cuda.graphs[0].replayed_in == [cuda.stream] * 3
    assert cuda.current is cuda.default
    assert len(cuda.stream.waited) == len(cuda.default.waited)


def test_a_broken_recording_is_undone(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    runs: list[FakeStream] = []

    def work(stacks: Any) -> tuple[Tensor, ...]:
        runs.append(cuda.current)
        if cuda.underway:
            cuda.sync()
        return (2 * stacks[0],)

    graph = StepGraph(work, lambda: None, wanted=True, stream=cuda.stream, graph=lambda: CudaGraph(cuda.stream))
    with caplog.at_level(logging.WARNING, "mvssl"):
        for _ in range(STEPS):
            graph([torch.ones(3)])
            assert cuda.current is cuda.default
            assert (cuda.underway, cuda.generator_captures) == ([], False)
            assert cuda.users.get(cuda.pool, 0) == 0, "the pool's memory stays reserved"
    assert len(runs) == STEPS + 1
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "operation not permitted when stream is capturing (in sync, fake_cuda.py line" in message
    assert "previous error" not in message


@pytest.mark.parametrize("broken", [False, True])
def test_an_error_of_python_is_undone_as_well(cuda: FakeCuda, broken: bool) -> None:
    def work() -> tuple[Tensor, ...]:
        cuda.broken = broken  # as by a library that hides CUDA's error, or with work forked to another stream
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        CudaGraph(cuda.stream).record(work)
    assert (cuda.underway, cuda.generator_captures, cuda.current) == ([], False, cuda.default)
    assert cuda.graphs[0].was_reset


@pytest.mark.parametrize("asked", [False, True])
def test_what_cannot_be_undone_ends_the_run_with_the_cause(cuda: FakeCuda, asked: bool) -> None:
    def work(stacks: Any) -> tuple[Tensor, ...]:
        cuda.dead = True
        cuda.sync()
        return ()

    graph = StepGraph(
        work,
        lambda: None,
        wanted=True,
        asked=asked,
        warm_up=0,
        stream=cuda.stream,
        graph=lambda: CudaGraph(cuda.stream),
    )
    with pytest.raises(
        InputError, match=r"^cuda_graph is '(on|auto)' but must be 'off' .*not permitted.*previous error"
    ):
        graph([torch.ones(3)])


def test_an_empty_graph_is_an_error(cuda: FakeCuda) -> None:
    """The work ran, in another stream: a fallback would run it once more, and replays would do nothing."""
    cuda.empty = True
    graph = StepGraph(
        lambda stacks: (stacks[0],),
        lambda: None,
        wanted=True,
        warm_up=0,
        stream=cuda.stream,
        graph=lambda: CudaGraph(cuda.stream),
    )
    with pytest.raises(InputError, match=r"must be 'off' for this step.*launched nothing in the stream"):
        graph([torch.ones(3)])


def test_other_warnings_of_a_recording_are_passed_on(cuda: FakeCuda) -> None:
    def work() -> tuple[Tensor, ...]:
        warnings.warn("something else", UserWarning, stacklevel=1)
        return ()

    with pytest.warns(UserWarning, match="something else"):
        CudaGraph(cuda.stream).record(work)


def test_echoes_of_an_error_are_left_out() -> None:
    with pytest.raises(RuntimeError) as raised:  # noqa: PT012  # the second error has the first one as its context
        try:
            raise RuntimeError("CUDA error: the cause\nmore")
        finally:
            raise RuntimeError(ECHO)
    assert describe(raised.value).startswith("RuntimeError: CUDA error: the cause (in test_echoes_of")


def test_a_step_that_will_be_recorded_gets_a_stream_on_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch, end_closes=True, reset_releases=True)
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(mvssl.training.step, "wants_capture", lambda *asked, **options: True)
    step = make()
    assert step._graph._stream.device == step.device
    assert step.warm_up == WARM_UP + 1
    take(step, range(WARM_UP))
    assert len(cuda.default.waited) == WARM_UP + 1  # and for what was built there


def test_a_run_makes_its_device_the_current_one(
    monkeypatch: pytest.MonkeyPatch, images: Path, tiny_recipe: Recipe
) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    device = torch.device("cuda", 1)
    taken: list[torch.device] = []
    monkeypatch.setattr(experiment, "resolve_device", lambda name, local_rank: device)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(experiment, "keep_compiled_code", stop)
    with (
        pytest.raises(Stop),
        experiment.open_experiment(tiny_recipe, RunOptions(data=images, device="cuda:1"), Console(), World()),
    ):
        pass
    assert taken == [device]


@pytest.mark.parametrize(
    ("asked", "device", "ranks", "expected"),
    [
        ("auto", "cuda", 1, True),
        ("auto", "cuda", 2, False),
        ("auto", "cpu", 1, False),
        ("on", "cuda", 1, True),
        ("on", "cuda", 8, True),
        ("off", "cuda", 1, False),
        ("off", "cpu", 1, False),
    ],
)
def test_when_a_graph_is_wanted(asked: Literal["auto", "on", "off"], device: str, ranks: int, expected: bool) -> None:
    assert wants_capture(asked, torch.device(device), ranks=ranks) is expected


# Whole steps, replayed on the CPU.

CASES: dict[str, dict[str, Any]] = {
    "lars": {},
    "adamw, stochastic depth": VIT | ADAMW,
    "simsiam": SIMSIAM,
    "moco in parts": MOCO | {"accumulate": 2},
    "view by view": {"step_mode": "per-view"},
    "clipped": {"optimizer": replace(RECIPE.optimizer, clip_grad_norm=0.1, weight_decay_end=0.1)},
}


def make(*, device: str = "cpu", cuda_graph: Literal["auto", "on", "off"] = "off", **changes: Any) -> TrainStep:
    return make_step(RECIPE, device=device, total=40, cuda_graph=cuda_graph, **changes)


def replayed_step(graph: Callable[[TrainStep], Graph] | None = None, **changes: Any) -> TrainStep:
    """A step that is recorded and replayed on the CPU."""
    step = make(**changes)
    real = graph or (lambda step: ReplayedGraph(lambda: list(kept_tensors(step).values())))
    step._graph = StepGraph(step._device_step, step._discard_gradients, wanted=True, graph=lambda: real(step))
    return step


def scaled(step: TrainStep) -> TrainStep:
    """With the loss scaling of fp16, whose precision the CPU refuses."""
    step.scaler = GradScaler("cpu", init_scale=4.0, growth_interval=3)
    return step


def take(step: TrainStep, numbers: range) -> list[StepOutput]:
    make_batch = batches(step)
    return [step([view.to(step.device) for view in make_batch(number)], number) for number in numbers]


def assert_same(ours: list[StepOutput], expected: list[StepOutput]) -> None:
    for mine, theirs in zip(ours, expected, strict=True):
        for name in ("losses", "loss", "embedding", "grad_norm"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=0, atol=0)
        assert (mine.lr, mine.tau) == (theirs.lr, theirs.tau)


def assert_same_state(ours: TrainStep, expected: TrainStep) -> None:
    mine, theirs = kept_tensors(ours), kept_tensors(expected)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_replays_are_the_steps_bit_for_bit(changes: dict[str, Any]) -> None:
    replayed, expected = replayed_step(**changes), make(**changes)
    assert_same(take(replayed, range(STEPS)), take(expected, range(STEPS)))
    assert replayed.captured
    assert_same_state(replayed, expected)


def test_replays_scale_gradients_and_pass_over_an_overflow() -> None:
    replayed, expected = scaled(replayed_step()), scaled(make())
    assert_same(take(replayed, range(STEPS)), take(expected, range(STEPS)))
    before = {name: value.clone() for name, value in replayed.online.named_parameters()}
    assert replayed.scaler._scale is not None
    scale = float(replayed.scaler._scale)
    views = batches(replayed)(STEPS)
    views[0].fill_(float("inf"))
    replayed(views, STEPS)
    assert all(torch.equal(value, before[name]) for name, value in replayed.online.named_parameters())
    assert float(replayed.scaler._scale) == scale / 2


@pytest.fixture
def filled_memory() -> Iterator[None]:
    """`torch.empty` gives NaN, so that whoever reads memory that nobody wrote is found out."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


OPTIMIZERS: dict[str, Optimizer] = {
    "lars": RECIPE.optimizer,
    "sgd": Optimizer(kind="sgd", base_lr=0.5, warmup_epochs=3),
    "sgd, decay that changes": Optimizer(
        kind="sgd", base_lr=0.5, weight_decay=1e-4, weight_decay_end=0.1, warmup_epochs=3
    ),
    "adamw": ADAMW["optimizer"],
}


@pytest.mark.usefixtures("filled_memory")
@pytest.mark.parametrize("resumed", [False, True], ids=["", "resumed"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_an_overflow_in_the_first_step_changes_nothing(optimizer: Optimizer, resumed: bool) -> None:
    """As fp16 usually begins: its first scale, 65536, is too large."""
    ours, expected = scaled(make(optimizer=optimizer)), scaled(make(optimizer=optimizer))
    if resumed:  # from a checkpoint written before the first update
        ours.load_state_dict(copy.deepcopy(ours.state_dict()))
    views = batches(ours)(0)
    views[0].fill_(float("inf"))
    ours(views, 0)
    for number in range(6, 9):  # at the full learning rate
        mine, theirs = take(ours, range(number, number + 1)), take(expected, range(number, number + 1))
        assert torch.isfinite(mine[0].loss)
        assert torch.equal(mine[0].losses, theirs[0].losses)
    for name, value in expected.online.named_parameters():
        assert torch.equal(dict(ours.online.named_parameters())[name], value), name


def test_a_replayed_run_goes_on_from_a_checkpoint() -> None:
    replayed, expected = replayed_step(**VIT, **ADAMW), make(**VIT, **ADAMW)
    take(expected, range(STEPS))
    first = replayed_step(**VIT, **ADAMW)
    take(first, range(STEPS))
    take(replayed, range(WARM_UP + 2))  # was recorded on other values
    assert replayed.captured
    replayed.load_state_dict(first.state_dict())
    assert not replayed.captured
    further = range(STEPS, 2 * STEPS)
    assert_same(take(replayed, further), take(expected, further))
    assert replayed.captured
    assert_same_state(replayed, expected)


def test_a_step_that_cannot_be_recorded_loses_nothing() -> None:
    class Halfway(ReplayedGraph):
        """Fails when the gradients are there and the scaler has seen them, before anything is updated."""

        def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            super().record(work)
            # As it was before the clearing of gradients and the scaler's update.
            for parameter in step.online.parameters():
                parameter.grad = torch.full_like(parameter, float("nan"))
            step.scaler._per_optimizer_states[id(step.optimizer)]["stage"] = torch.amp.grad_scaler.OptState.UNSCALED
            raise BROKEN

    step = scaled(replayed_step(lambda step: Halfway(lambda: list(kept_tensors(step).values()))))
    expected = scaled(make())
    assert_same(take(step, range(STEPS)), take(expected, range(STEPS)))
    assert not step.captured
    assert_same_state(step, expected)


def test_a_batch_of_another_shape_is_refused_after_the_recording() -> None:
    step = replayed_step()
    take(step, range(STEPS))
    views = batches(step)(0)
    for wrong in ([view[:4] for view in views], views[:2], [*views[:-1], views[-1].double()]):
        with pytest.raises(InputError, match=r"^views"):
            step(wrong, STEPS)
    take(step, range(STEPS, STEPS + 1))


# The same on CUDA.

GPU_CASES = CASES | {
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "bf16, adamw": VIT | ADAMW | {"precision": "bf16"},
}


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("changes", GPU_CASES.values(), ids=GPU_CASES.keys())
def test_cuda_graphs_are_the_steps(changes: dict[str, Any]) -> None:
    plain = make(device="cuda", cuda_graph="off", **{"compile": "off"} | changes)
    captured = make(device="cuda", cuda_graph="on", **{"compile": "off"} | changes)
    expected = take(plain, range(STEPS))
    ours = take(captured, range(WARM_UP + 1))
    make_batch = batches(captured)
    later = [[view.cuda() for view in make_batch(number)] for number in range(WARM_UP + 1, STEPS)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # a replay waits for nothing
    try:
        ours += [captured(views, WARM_UP + 1 + number) for number, views in enumerate(later)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert captured.captured
    assert not plain.captured
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine.losses, theirs.losses, rtol=0, atol=5e-3)
        torch.testing.assert_close(mine.grad_norm, theirs.grad_norm, rtol=0.05, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_convolutions")
def test_a_compiled_step_is_recorded_too() -> None:
    torch._dynamo.reset()
    plain = make(device="cuda", cuda_graph="off", compile="off", precision="bf16")
    captured = make(device="cuda", cuda_graph="on", compile="on", precision="bf16")
    for mine, theirs in zip(take(captured, range(STEPS)), take(plain, range(STEPS)), strict=True):
        torch.testing.assert_close(mine.losses, theirs.losses, rtol=0, atol=0.05)
    assert captured.captured
    assert captured.compiled


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_convolutions")
def test_a_captured_run_goes_on_from_a_checkpoint() -> None:
    changes = VIT | ADAMW | {"compile": "off"}
    straight = make(device="cuda", cuda_graph="on", **changes)
    take(straight, range(STEPS))
    resumed = make(device="cuda", cuda_graph="on", **changes)
    take(resumed, range(WARM_UP + 2))
    resumed.load_state_dict(straight.state_dict())
    further = range(STEPS, 2 * STEPS)
    for mine, theirs in zip(take(resumed, further), take(straight, further), strict=True):
        torch.testing.assert_close(mine.losses, theirs.losses, rtol=0, atol=5e-3)
    assert resumed.captured


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_convolutions")
def test_a_step_that_waits_for_the_device_goes_on_as_if_nothing_had_been_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA breaks the recording; afterwards memory, random numbers and streams are those of a run without one."""

    def waiting(cuda_graph: Literal["auto", "off"]) -> tuple[TrainStep, list[Tensor], list[int]]:
        step = make(device="cuda", cuda_graph=cuda_graph, compile="off", **VIT | ADAMW)
        forward = step.online.projector.forward
        monkeypatch.setattr(step.online.projector, "forward", lambda x: (float(x.detach().sum()), forward(x))[1])
        side, losses, reserved = torch.cuda.Stream(), [], []
        for number in range(WARM_UP + 40):
            with torch.cuda.stream(side):
                views = [view.cuda() for view in batches(step)(number)]
                event = torch.cuda.Event()
                event.record(side)
            receive(views, event)  # as the loader's batches, with `record_stream`
            losses.append(step(views, number).losses)
            del views
            reserved.append(torch.cuda.memory_reserved())
        return step, losses, reserved

    def pools() -> set[tuple[int, int]]:
        gc.collect()
        torch.cuda.empty_cache()
        return {tuple(segment["segment_pool_id"]) for segment in torch.cuda.memory_snapshot()}

    before = pools() | {(0, 0)}
    step, ours, reserved = waiting("auto")
    assert not step.captured
    assert reserved[-1] == reserved[WARM_UP + 10]  # where batches are not freed it grows
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert pools() <= before, "the recording's memory stays reserved"
    _, expected, _ = waiting("off")  # with stochastic depth
    for mine, theirs in zip(ours[:STEPS], expected[:STEPS], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=5e-3)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_step_on_another_device_than_the_current_one_is_recorded() -> None:
    captured, plain = (make(device="cuda:1", cuda_graph=graph, compile="off") for graph in ("on", "off"))
    for mine, theirs in zip(take(captured, range(STEPS)), take(plain, range(STEPS)), strict=True):
        torch.testing.assert_close(mine.losses, theirs.losses, rtol=0, atol=5e-3)
    assert captured.captured
