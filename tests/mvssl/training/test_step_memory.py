"""GPU memory of steps, for --batch-size auto and --cache; torch.cuda is faked in all tests but the last."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console

from mvssl.config.options import Execution, RunOptions
from mvssl.config.recipe import Recipe
from mvssl.distributed import World
from mvssl.training import experiment, memory
from mvssl.training.cuda_graph import WARM_UP
from mvssl.training.memory import fits_on, peak_step_memory, with_largest_batch
from mvssl.training.step import TrainStep
from pipelines.loading.pixel_cache import FreeMemory, pixel_bytes, with_cache
from pipelines.storage import open_source

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OFF, ON = Execution(compile="off", cuda_graph="off"), Execution(compile="off", cuda_graph="on")


class FakeStep:
    """Has a reference cycle, samples and allocates, as a real step does; living instances are in `alive`."""

    alive: ClassVar[weakref.WeakSet[FakeStep]] = weakref.WeakSet()
    made: ClassVar[list[tuple[int, str, str]]] = []  # of all steps
    taken: ClassVar[list[int]] = []

    def __init__(
        self, recipe: Recipe, *, execution: Execution, device: Any, total_steps: int, steps_per_epoch: int
    ) -> None:
        self.input_dtype, self.myself = torch.float32, self
        self.warm_up = 1 if execution.cuda_graph == "off" else WARM_UP + 1
        self.made.append((recipe.batch_size, execution.compile, execution.cuda_graph))
        self.alive.add(self)
        assert len(self.alive) == 1, "the earlier step is still alive"

    def __call__(self, views: list[torch.Tensor], number: int) -> None:
        torch.manual_seed(number)  # as with stochastic depth
        if len(views[0]) > 200:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.taken.append(number)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A GPU of 1000 bytes; the function sets the peak bytes that steps reserve."""
    FakeStep.made.clear()
    FakeStep.taken.clear()
    monkeypatch.setattr(memory, "TrainStep", FakeStep)
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: None)
    whole = type("Properties", (), {"total_memory": 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: whole)

    def reserves(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: count)

    return reserves


def test_all_kinds_of_steps_are_taken_and_freed(tiny_recipe: Recipe, gpu: Callable[[int], None]) -> None:
    gpu(500)
    before = torch.get_rng_state()
    assert peak_step_memory(tiny_recipe, OFF, CPU, images=32) == 500
    assert FakeStep.taken == [0, 1]
    assert peak_step_memory(tiny_recipe, ON, CPU, images=64) == 500
    assert FakeStep.taken[2:] == [*range(WARM_UP + 2)]  # the last one is a replay
    assert FakeStep.made == [(32, "off", "off"), (64, "off", "on")]
    assert peak_step_memory(tiny_recipe, OFF, CPU, images=201) is None
    assert not FakeStep.alive
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("cuda_graph", "most"), [("off", 900), ("auto", 800), ("on", 800)])
def test_more_memory_must_stay_free_beside_a_cuda_graph(
    tiny_recipe: Recipe,
    gpu: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    cuda_graph: Any,
    most: int,
) -> None:
    monkeypatch.setattr(memory, "_take_steps", lambda *arguments: None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: torch.no_grad())
    fits = fits_on(tiny_recipe, Execution(cuda_graph=cuda_graph), CUDA)
    gpu(most)
    assert fits(32)
    gpu(most + 1)
    assert not fits(32)


@pytest.mark.parametrize(
    ("cuda_graph", "processes", "tried"),
    [("auto", 1, "auto"), ("auto", 2, "off"), ("on", 2, "on"), ("off", 1, "off")],
)
def test_a_batch_size_is_tried_with_the_runs_own_cuda_graph_setting(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, cuda_graph: Any, processes: int, tried: str
) -> None:
    seen: list[str] = []

    def peak(recipe: Recipe, execution: Execution, device: Any, *, images: int) -> int | None:
        seen.append(execution.cuda_graph)
        return 1 if images <= 64 else None

    monkeypatch.setattr(memory, "peak_step_memory", peak)
    found, _ = with_largest_batch(tiny_recipe, Execution(cuda_graph=cuda_graph), CUDA, processes=processes, images=1000)
    assert found.batch_size == 64 * processes
    assert set(seen) == {tried}


def test_a_cache_leaves_the_memory_of_steps_free(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(images / "train")
    needed = int(pixel_bytes(source).sum())
    monkeypatch.setattr("pipelines.loading.pixel_cache.PixelCache", lambda sizes, device, on: device)

    def choose(choice: Any, steps: float) -> str:
        free = FreeMemory(host=needed, device=10 * needed, steps=int(steps * needed))
        return with_cache(source, choice, device=CUDA, memory=free)[1]

    assert "of pixels in GPU memory" in choose("auto", 8.8)
    told = choose("auto", 9.0)
    assert told.startswith("cache: off")
    assert "of GPU memory are for training steps)" in told
    assert "of pixels in GPU memory" in choose("device", 8.8)
    with pytest.raises(Exception, match=r"cache is 'device' but .* are for training steps\) can be taken"):
        choose("device", 9.0)
    with pytest.raises(Exception, match=r"can be taken: take --cache off"):  # not device: it is full
        choose("host", 9.0)
    with pytest.raises(Exception, match=r"can be taken: take --cache device"):
        choose("host", 8.0)


@pytest.mark.parametrize(
    ("cache", "device", "expected"),
    [("auto", CUDA, 600), ("host", CUDA, 600), ("off", CUDA, 0), ("auto", CPU, 0)],
)
def test_steps_are_measured_before_images_are_cached(
    tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch, cache: Any, device: torch.device, expected: int
) -> None:
    """With --cache host too: the validation images may be cached on the GPU."""
    seen: list[tuple[int, str]] = []

    def peak(recipe: Recipe, execution: Execution, device: Any, *, images: int) -> int | None:
        seen.append((images, execution.cuda_graph))
        return 600 if images < 8 else None

    monkeypatch.setattr(experiment, "peak_step_memory", peak)
    options = RunOptions(cache=cache)
    assert experiment._peak_memory(tiny_recipe, options, device, World(size=2)) == expected
    assert seen == ([(4, "off")] if expected else [])
    if expected:
        assert experiment._peak_memory(tiny_recipe, options, device, World()) == 1000  # do not fit: all memory
        assert seen[1] == (8, "auto")


def test_the_networks_are_counted_once(images: Path, tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks' memory, reserved by then, is part of the peak."""
    seen: list[FreeMemory] = []

    def keep(source: Any, choice: str, *, device: Any, memory: FreeMemory, progress: Any) -> tuple[Any, str]:
        seen.append(memory)
        return source, ""

    monkeypatch.setattr(experiment, "_peak_memory", lambda *arguments: 600)
    monkeypatch.setattr(experiment, "with_cache", keep)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100)
    options = RunOptions(data=images, device="cpu", cache="auto")
    with experiment.open_experiment(tiny_recipe, options, Console(quiet=True), World()):
        pass
    assert [free.steps for free in seen] == [500, 500]  # for the validation images as well


@pytest.mark.gpu
def test_a_run_takes_no_more_memory_than_was_measured(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    recipe = replace(tiny_recipe, batch_size=256)
    peak = peak_step_memory(recipe, ON, CUDA, images=256)
    left = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    step = TrainStep(recipe, execution=ON, device=CUDA, total_steps=40, steps_per_epoch=4)
    views = [torch.randn(256, 3, view.size, view.size, device="cuda") for view in recipe.views]
    for number in range(step.warm_up + 4):
        step(views, number)
    assert step.captured
    assert peak is not None
    assert left < peak / 4  # the trial is freed
    assert torch.cuda.max_memory_reserved() <= 1.1 * peak
