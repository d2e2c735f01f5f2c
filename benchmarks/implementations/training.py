"""Implementations of training end to end: our step with our loader, a plain step with a DataLoader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import count, repeat
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.harness.processes import Trials
from benchmarks.implementations.loaders import indices_of, needs, open_train, stage_clock, views_of, waiter
from mvssl.config.options import Execution, RunOptions
from mvssl.config.recipe import Recipe
from mvssl.distributed import World
from mvssl.monitor.idle_sampler import IdleSampler
from mvssl.training.experiment import open_experiment
from mvssl.training.memory import explain_out_of_memory
from pipelines.decode import DecoderName
from pipelines.order import Order

OURS, OURS_SYNTHETIC = "mvssl", "mvssl, synthetic input"
PLAIN, PLAIN_SYNTHETIC = "plain step + DataLoader", "plain step, synthetic input"
LEAD = 3  # steps before the timed ones, in which our loader's queue fills

Train = Callable[[Sequence[Tensor], int], object]
"""A step: one view tensor [B, 3, S, S] per view and the number of the update."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained.

    Attributes:
        recipe: of both steps.
        execution: of ours; the plain step has its step mode.
        data: the data set.
        device: where the steps run.
        steps: timed updates of a trial.
        decoder, threads: of our loader.
        workers: processes of the DataLoader.
    """

    recipe: Recipe
    execution: Execution = field(default_factory=Execution)
    data: Path
    device: str
    steps: int
    decoder: DecoderName = "auto"
    threads: int | None = None
    workers: int = 2


@contextmanager
def our_training(setup: Setup) -> Iterator[Trials]:
    """Our step, fed by our loader as in a run, and the same step on one batch of noise that lies on the device."""
    device = torch.device(setup.device)
    recipe = replace(setup.recipe, evaluation=replace(setup.recipe.evaluation, every_epochs=0))
    options = RunOptions(
        data=setup.data,
        device=setup.device,
        decoder=setup.decoder,
        threads=setup.threads,
        **asdict(setup.execution),
    )
    with open_experiment(recipe, options, Console(quiet=True), World()) as experiment:
        step, loader, total = experiment.step, experiment.loader, experiment.total_steps
        epochs, number = count(), count()
        noise = synthetic(recipe, device, step.input_dtype, memory_format=torch.channels_last)

        def train(views: Sequence[Tensor], at: int) -> object:
            return step(views, at % total)

        def loaded() -> dict[str, Any]:
            stages = stage_clock(loader, setup.device)
            passes = ((epoch, 0) for epoch in count(next(epochs)))
            with closing(views_of(loader, passes, until=2**62)) as batches:
                report = timed(train, batches, number, setup, lead=LEAD, steps=setup.steps)
            return report | stages()

        def unloaded() -> dict[str, Any]:
            return timed(train, repeat(noise), number, setup, lead=LEAD, steps=setup.steps)

        yield {OURS: loaded, OURS_SYNTHETIC: unloaded}


@contextmanager
def plain_training(setup: Setup) -> Iterator[Trials]:
    """The plain step, fed by a DataLoader, and on one batch of noise that lies on the device."""
    with needs("install torchvision to measure the plain step with a DataLoader"):
        from benchmarks.implementations.plain_step import PlainStep
        from benchmarks.implementations.torchvision_baseline import WorkerLoader, torchvision_views
    device, recipe = torch.device(setup.device), setup.recipe
    source = open_train(setup.data)
    order = Order(num_images=len(source), batch_size=recipe.batch_size, seed=recipe.seed)
    loader = WorkerLoader(source, torchvision_views(recipe.views), workers=setup.workers, device=device)
    total = recipe.epochs * order.steps_per_epoch
    step = PlainStep(
        recipe,
        device=device,
        total_steps=total,
        steps_per_epoch=order.steps_per_epoch,
        step_mode=setup.execution.step_mode,
    )
    position, number = count(), count()
    noise = synthetic(recipe, device, torch.float32, memory_format=torch.contiguous_format)
    rounds = -(-setup.steps // setup.workers)  # slow workers finish together, so only whole rounds count

    def train(views: Sequence[Tensor], at: int) -> object:
        return step(views, at % total)

    def loaded() -> dict[str, Any]:
        lead, steps = max(LEAD, setup.workers), rounds * setup.workers
        wanted = [next(position) for _ in range(lead + steps + loader.ahead)]
        batches = loader(indices_of(order, [divmod(n, order.steps_per_epoch) for n in wanted]))
        report = timed(train, batches, number, setup, lead=lead, steps=steps)
        for views in batches:  # so that the workers idle during the trials of others
            del views
        return report | {"decoder": "PIL", "workers": setup.workers}

    def unloaded() -> dict[str, Any]:
        return timed(train, repeat(noise), number, setup, lead=LEAD, steps=setup.steps)

    yield {PLAIN: loaded, PLAIN_SYNTHETIC: unloaded}
    source.close()


def synthetic(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, *, memory_format: torch.memory_format
) -> list[Tensor]:
    """One batch of normal noise: V tensors [B, 3, S, S]."""
    return [
        torch.randn(recipe.batch_size, 3, view.size, view.size, device=device)
        .to(dtype)
        .contiguous(memory_format=memory_format)
        for view in recipe.views
    ]


def timed(
    train: Train,
    batches: Iterator[Sequence[Tensor]],
    number: Iterator[int],
    setup: Setup,
    *,
    lead: int,
    steps: int,
) -> dict[str, Any]:
    """Train for `lead` steps and then for `steps` timed ones, on CUDA until the device has finished them.

    Returns:
        images, seconds, steps, data_wait (fraction of the time in which the host waited for a batch), and on CUDA
        device_mib (peak of torch's allocator) and, if they can be measured, device_idle (fraction in which the GPU had
        nothing queued) and launching (the part of it that the wait for batches does not explain).
    """
    wait = waiter(setup.device)
    cuda = setup.device == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with (
        explain_out_of_memory(setup.recipe, setup.execution),
        closing(IdleSampler(torch.device(setup.device))) as sampler,
    ):
        for _ in range(lead):
            train(next(batches), next(number))
        wait()
        waited, began = 0.0, time.perf_counter()
        for _ in range(steps):
            asked = time.perf_counter()
            views = next(batches)
            waited += time.perf_counter() - asked
            with sampler.step():
                train(views, next(number))
            del views
        wait()
        seconds = time.perf_counter() - began
        idle = sampler.fractions()
    report: dict[str, Any] = {
        "images": steps * setup.recipe.batch_size,
        "seconds": seconds,
        "steps": steps,
        "data_wait": waited / seconds,
    }
    if idle is not None:
        report |= {"device_idle": idle.total, "launching": idle.launching(report["data_wait"])}
    if cuda:
        report["device_mib"] = torch.cuda.max_memory_allocated() / 2**20
        torch.cuda.empty_cache()  # for the other process
    return report
