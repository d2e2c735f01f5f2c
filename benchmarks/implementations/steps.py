"""Implementations of the training step: ours in every mode, a plain step, and a matrix product for the peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness.processes import Trials
from benchmarks.implementations.loaders import open_train
from benchmarks.implementations.training import synthetic
from mvssl.config.device import autocast_dtype
from mvssl.config.options import Execution
from mvssl.config.recipe import Recipe
from mvssl.models.encoder import build_networks
from mvssl.monitor.profiling import profile_steps, synchronize
from mvssl.training.compile import keep_compiled_code
from mvssl.training.memory import explain_out_of_memory
from mvssl.training.step import TrainStep
from pipelines.loader import Loader
from pipelines.order import Order
from pipelines.runtime import InputError

PLAIN = "plain step"
PEAK = "matrix product"
WITH_LOADER = ", loader at work"
PROFILED = 3  # steps under the profiler
TOTAL = 10_000  # steps of the run that the schedules see
_SIDE = {"cuda": 8192, "cpu": 1024}  # of the matrices
_PRODUCTS = 10


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How our step runs."""

    group_views: bool = True
    compile: Literal["on", "off"] = "off"
    cuda_graph: Literal["on", "off"] = "off"


OURS: dict[str, Mode] = {
    "captured": Mode(compile="on", cuda_graph="on"),
    "compiled": Mode(compile="on"),
    "grouped": Mode(),
    "view by view": Mode(group_views=False),
}
"""Our modes by name, from all optimisations to none."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What trains.

    Attributes:
        recipe: with its batch size.
        device: where.
        steps: of a trial.
        data: of the loader that works meanwhile; None leaves those trials out.
    """

    recipe: Recipe
    device: str
    steps: int
    data: Path | None = None


@contextmanager
def our_steps(setup: Setup, name: str) -> Iterator[Trials]:
    """Our step on one batch of noise, in the mode of this name."""
    mode, device = OURS[name], torch.device(setup.device)
    keep_compiled_code()
    step = TrainStep(
        setup.recipe,
        execution=Execution(compile=mode.compile, cuda_graph=mode.cuda_graph),
        device=device,
        total_steps=TOTAL,
        steps_per_epoch=TOTAL,
        group_views=mode.group_views,
    )
    views = noise(setup, step.input_dtype, torch.channels_last)

    def check() -> None:
        """Refuse a step that fell back: a failure to compile or record has only warned."""
        if step.compiled != (mode.compile == "on") or step.captured != (mode.cuda_graph == "on"):
            raise InputError(f"this step ran {step.description}: see the warning above.")

    with loading(setup) as batches:
        yield trials_of(
            name, setup, lambda number: step(views, number).loss, warm_up=step.warm_up, check=check, batches=batches
        )


@contextmanager
def plain_steps(setup: Setup) -> Iterator[Trials]:
    """The plain step on the same batch of noise, from the same weights."""
    from benchmarks.implementations.plain_step import PlainStep

    step = PlainStep(setup.recipe, device=torch.device(setup.device), total_steps=TOTAL, steps_per_epoch=TOTAL)
    step.take_weights(build_networks(setup.recipe)[0])
    views = noise(setup, torch.float32, torch.contiguous_format)
    with loading(setup) as batches:
        yield trials_of(
            PLAIN, setup, lambda number: step(views, number), warm_up=1, check=lambda: None, batches=batches
        )


@contextmanager
def matrix_product(setup: Setup) -> Iterator[Trials]:
    """The device's peak: large square matrix products in the steps' dtype."""
    device = torch.device(setup.device)
    dtype = autocast_dtype(setup.recipe.precision, device) or torch.float32
    side = _SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def trial() -> dict[str, Any]:
        for _ in range(3):
            a @ b
        synchronize(device)
        began = time.perf_counter()
        for _ in range(_PRODUCTS):
            a @ b
        synchronize(device)
        seconds = time.perf_counter() - began
        return {"tflops": 2e-12 * side**3 * _PRODUCTS / seconds, "side": side, "dtype": str(dtype)}

    yield {PEAK: trial}


def flops_per_image(recipe: Recipe) -> float:
    """FLOP of a step per source image: convolutions and matrix products, forward and backward, as torch counts them.

    Counted with few images on the CPU, which changes only MoCo v3's similarities.
    """
    few = replace(recipe, batch_size=2 * recipe.accumulate, precision="fp32")
    step = TrainStep(few, execution=Execution(compile="off"), device="cpu", total_steps=TOTAL, steps_per_epoch=TOTAL)
    views = synthetic(few, torch.device("cpu"), torch.float32, memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        step(views, 0)
    return float(counter.get_total_flops()) / few.batch_size


def noise(setup: Setup, dtype: torch.dtype, memory_format: torch.memory_format) -> list[Tensor]:
    """The same numbers for all implementations, up to the dtype."""
    torch.manual_seed(0)
    return synthetic(setup.recipe, torch.device(setup.device), dtype, memory_format=memory_format)


@contextmanager
def loading(setup: Setup) -> Iterator[Iterator[object] | None]:
    """Endless batches of our loader, whose threads work during the steps; None without data."""
    if setup.data is None:
        yield None
        return
    source = open_train(setup.data)
    loader = Loader(
        source,
        setup.recipe.views,
        Order(num_images=len(source), batch_size=setup.recipe.batch_size, seed=0),
        device=setup.device,
        dtype=autocast_dtype(setup.recipe.precision, torch.device(setup.device)) or torch.float32,
    )

    def batches() -> Generator[None, None, None]:
        for epoch in count():
            for batch in loader.epoch(epoch, until=2**62):
                del batch
                yield

    endless = batches()
    try:
        yield endless
    finally:
        endless.close()
        loader.close()
        source.close()


def trials_of(
    name: str,
    setup: Setup,
    take: Callable[[int], Tensor],
    *,
    warm_up: int,
    check: Callable[[], None],
    batches: Iterator[object] | None,
) -> Trials:
    """Trials of one step, alone and with the loader at work; the first of them also warms up and profiles.

    Args:
        name: of the implementation.
        setup: what it trains.
        take: runs update number n and returns its loss, on the device.
        warm_up: updates until all are alike.
        check: called after them; raises if the step fell back to another mode.
        batches: of the loader.
    """
    device = torch.device(setup.device)
    numbers = count()
    found: dict[str, Any] = {}

    def prepare() -> None:
        began = time.perf_counter()
        found["first_loss"] = float(take(next(numbers)))  # waits for the device
        found["first_step_seconds"] = time.perf_counter() - began
        for _ in range(warm_up):
            take(next(numbers))
        check()
        profile = profile_steps(lambda: take(next(numbers)), steps=PROFILED, device=device)
        for field in ("launches", "kernels", "host_milliseconds", "busy_milliseconds"):
            found[field] = getattr(profile, field)

    def trial(loading: bool) -> dict[str, Any]:
        cuda = device.type == "cuda"
        with explain_out_of_memory(setup.recipe, Execution()) if cuda else nullcontext():
            if not found:
                prepare()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            synchronize(device)
            began = time.perf_counter()
            for _ in range(setup.steps):
                if loading and batches is not None:
                    next(batches)
                take(next(numbers))
            synchronize(device)
            seconds = time.perf_counter() - began
        report = {"images": setup.steps * setup.recipe.batch_size, "seconds": seconds, "steps": setup.steps, **found}
        return report | ({"device_mib": torch.cuda.max_memory_allocated() / 2**20} if cuda else {})

    trials: dict[str, Callable[[], dict[str, Any]]] = {name: lambda: trial(False)}
    if batches is not None:
        trials[name + WITH_LOADER] = lambda: trial(True)
    return trials
