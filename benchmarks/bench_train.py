"""Source images/s of training end to end: our loader and step, against the step alone and against common practice.

python -m benchmarks.bench_train DATA [--recipe byol_resnet50_200ep] [--batch-size 256] [--steps 20] [--out FILE]

Four implementations, interleaved: our step fed by our loader as in a run; the same step on one batch of noise on the
device (the ratio of the two is what loading costs); a plain eager step (`implementations/plain_step.py`) fed by a
DataLoader with worker processes; and that step on noise. Ours run in one process, the plain step's in another.
A trial trains for `--steps` steps after some that fill the queues; the first trial, which also compiles, is a warm-up.
Every field of the recipe can be overridden as with mvssl-train.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.harness.command import check_device, check_positive, command_of, finish, parse_with_recipe
from benchmarks.harness.processes import Trial
from benchmarks.harness.results import measured_by, write_result
from benchmarks.harness.trials import Budget, Outcome, peak_memory, rates, ratios, run_trials
from benchmarks.implementations.loaders import check_fits
from benchmarks.implementations.training import (
    OURS,
    OURS_SYNTHETIC,
    PLAIN,
    PLAIN_SYNTHETIC,
    Setup,
    our_training,
    plain_training,
)
from mvssl.config.options import Execution
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from pipelines.decode import DecoderName
from pipelines.runtime import run_cli

PROG = "python -m benchmarks.bench_train"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time training end to end. --recipe NAME (or a recipe file) chooses the recipe, whose fields follow below.

    Attributes:
        data: folder of images or converted data set.
        recipe: to train.
        execution: of our steps.
        device: where the steps run.
        steps: updates of a trial.
        repeats: trials of each after a warm-up; the median counts.
        decoder: of our loader.
        threads: decoding threads of our loader; by default as in training.
        workers: processes of the DataLoader.
        baseline: whether the plain step takes part.
        seconds: begin nothing more after so many; by default there is no limit.
        out: JSON file, rewritten after every trial.
    """

    data: tyro.conf.Positional[Path]
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    execution: Annotated[Execution, tyro.conf.arg(name="")] = field(default_factory=Execution)
    device: Literal["cpu", "cuda"] = "cpu"
    steps: int = 10
    repeats: int = 3
    decoder: DecoderName = "auto"
    threads: int | None = None
    workers: int = 2
    baseline: bool = True
    seconds: float | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "steps", "repeats", "workers")


def parse(words: Sequence[str]) -> Arguments:
    """Parse the command line; see `parse_with_recipe`."""
    return parse_with_recipe(
        Arguments, words, prog=PROG, default=lambda recipe: Arguments(data=tyro.MISSING, recipe=recipe)
    )


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values."""
    check_device(arguments.device)
    check_fits(arguments.data, arguments.recipe.batch_size)
    setup = Setup(
        recipe=arguments.recipe,
        execution=arguments.execution,
        data=arguments.data,
        device=arguments.device,
        steps=arguments.steps,
        decoder=arguments.decoder,
        threads=arguments.threads,
        workers=arguments.workers,
    )
    builds = {"mvssl's process": partial(our_training, setup)}
    if arguments.baseline:
        builds["the baseline's process"] = partial(plain_training, setup)
    views = len(setup.recipe.views)

    def result(outcome: Outcome, *, unfinished: bool) -> dict[str, Any]:
        trials = outcome.trials
        return {
            "benchmark": "train",
            "partial": unfinished,
            "device": arguments.device,
            "recipe": to_dict(setup.recipe),
            "execution": asdict(setup.execution),
            "views_per_image": views,
            "contenders": {name: summary(own, views=views) for name, own in trials.items()},
            "loaded_over_synthetic": ratio(trials, OURS, OURS_SYNTHETIC),
            "plain_loaded_over_synthetic": ratio(trials, PLAIN, PLAIN_SYNTHETIC),
            "times_plain_with_dataloader": ratio(trials, OURS, PLAIN),
            "step_times_plain_step": ratio(trials, OURS_SYNTHETIC, PLAIN_SYNTHETIC),
            "left_out": outcome.left_out,
            "failed": outcome.failed,
            **measured_by(command),
        }

    outcome = run_trials(
        builds,
        repeats=arguments.repeats,
        budget=Budget(arguments.seconds),
        save=lambda outcome: write_result(arguments.out, result(outcome, unfinished=True)),
    )
    return result(outcome, unfinished=False)


def ratio(trials: Mapping[str, Sequence[Trial]], one: str, other: str) -> dict[str, float] | None:
    """How many times the images/s of `other` implementation `one` has; None if either is missing."""
    return ratios(trials, other).get(one)


def summary(trials: Sequence[Trial], *, views: int) -> dict[str, Any]:
    """Rates, waiting and memory of one implementation with `views` views an image."""
    last = trials[-1].report
    result = rates(trials, views=views) | peak_memory(trials) | {"steps": last["steps"]}
    for name in ("data_wait", "device_idle", "launching"):
        if measured := [trial.report[name] for trial in trials if name in trial.report]:
            result[name] = statistics.median(measured)
    names = ("device_mib", "decoder", "view_engine", "workers", "bad", "stage_seconds")
    return result | {name: last[name] for name in names if name in last}


def body() -> int:
    """Run the command; returns 1 if an implementation failed (the others' numbers stand) or none could run."""
    arguments = parse(sys.argv[1:])
    result = measure(arguments, command=command_of(PROG, sys.argv[1:]))
    return finish(result, arguments.out, failed=bool(result["failed"]) or not result["contenders"])


if __name__ == "__main__":
    run_cli(body)
