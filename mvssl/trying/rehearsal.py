"""A run that is built and takes steps but leaves nothing: what --dry-run and --profile share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

from rich.console import Console

from mvssl.distributed import join_world, process_local_rank
from mvssl.experiment import Experiment, open_experiment
from mvssl.recipe import Recipe
from mvssl.runs.options import RunOptions, resolve_device
from mvssl.training.step import StepOutput
from mvssl.trying.memory import explain_out_of_memory
from mvssl.weights.init_from import init_from
from pipelines.batch import ViewBatch
from pipelines.errors import InputError

FIRST = 2
"""Steps on batches of their own: the first one compiles, the second one shows that there is a next one."""


@dataclass
class Rehearsal:
    """A run that has been built.

    Attributes:
        experiment: its parts.
        console: where to report; quiet on all ranks but one.
        batches: of the run, in their order, epoch after epoch.
        batch: the last one that was taken.
        taken: steps so far.
        seconds: of the last step, until the device had done it.
    """

    experiment: Experiment
    console: Console
    batches: Iterator[ViewBatch]
    batch: ViewBatch
    taken: int = 0
    seconds: float = 0.0

    def step(self) -> StepOutput:
        """One update on the last batch. Steps beyond the run's end are as its last one."""
        output = self.experiment.step(self.batch.views, min(self.taken, self.experiment.total_steps - 1))
        self.taken += 1
        return output

    def first_steps(self) -> list[float]:
        """Take steps until all that follow are alike; the losses of the first ones, which have batches of their own."""
        losses: list[float] = []
        while self.taken < max(FIRST, self.experiment.step.warm_up):
            if 0 < self.taken < FIRST:
                self.batch = next(self.batches)
            began = time.perf_counter()
            output = self.step()
            loss = float(self.experiment.world.mean(output.loss))  # waits for the device
            self.seconds = time.perf_counter() - began
            if self.taken <= FIRST:
                losses.append(loss)
        return losses


@contextmanager
def rehearse(
    recipe: Recipe, options: RunOptions, console: Console, *, check: Callable[[Console], None]
) -> Iterator[Rehearsal]:
    """Build the whole run and take its first batch, after `check` has found on the first rank that it may be.

    Raises:
        InputError: as a real run would, and where the run is shorter than two steps.
    """
    device = resolve_device(options.device, local_rank=process_local_rank())
    with ExitStack() as stack:
        world = stack.enter_context(join_world(cuda=device.type == "cuda"))
        console = console if world.is_main else Console(quiet=True)
        world.on_main(lambda: check(console))
        experiment = stack.enter_context(open_experiment(recipe, options, console, world))
        stack.enter_context(explain_out_of_memory())
        init_from(experiment.step, recipe, options.init_from)
        if experiment.total_steps < FIRST:
            raise InputError(
                f"The whole run is {experiment.total_steps} step but {FIRST} are needed to measure one: lower "
                "--batch-size or train for more epochs."
            )
        batches = chain.from_iterable(map(experiment.loader.epoch, range(recipe.epochs)))
        yield Rehearsal(experiment=experiment, console=console, batches=batches, batch=next(batches))
