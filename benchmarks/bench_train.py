"""Source images/s of training end to end: our loader and step, against the step alone and against what is common.

python -m benchmarks.bench_train DATA [--recipe byol_resnet50_200ep] [--batch-size 256] [--steps 20] [--out FILE]

Four contenders take turns: our step fed by our loader as in a run; the same step on one batch of noise that lies on the
device already (the ratio of the two says what loading costs); a plain eager step (`baselines/plain_step.py`) fed by a
DataLoader with worker processes; and that step on noise. Ours run in one process, the plain step's in another.
A turn trains for `--steps` steps after some that fill the queues; the first turn, which also compiles, is a warm-up.
Every field of the recipe can be overridden as with mvssl-train.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from benchmarks.contenders.loader import open_train
from benchmarks.contenders.train import (
    OURS,
    OURS_SYNTHETIC,
    PLAIN,
    PLAIN_SYNTHETIC,
    Setup,
    our_training,
    plain_training,
)
from benchmarks.measuring.command_line import command_of, finish, parse_with_recipe, write_result
from benchmarks.measuring.isolated import Turn
from benchmarks.measuring.turns import Budget, Outcome, rates, ratios, take_turns
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from mvssl.runs.environment import environment
from pipelines.decode import DecoderName
from pipelines.order import Order
from pipelines.runtime import InputError, invalid, run_cli

PROG = "python -m benchmarks.bench_train"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time training end to end. --recipe NAME (or a recipe file) chooses the recipe, whose fields follow below.

    Attributes:
        data: folder of images or converted data set.
        recipe: what is trained.
        device: where the steps run.
        steps: updates of a turn.
        repeats: turns each takes after a warm-up; the median counts.
        decoder: of our loader.
        threads: threads that decode in our loader; by default as in training.
        workers: processes of the DataLoader.
        baseline: whether the plain step takes part.
        seconds: after which nothing more is begun; all that is wanted by default.
        out: JSON file to write, anew after every turn.
    """

    data: tyro.conf.Positional[Path]
    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
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
        for name in ("steps", "repeats", "workers"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "1 or more", "give a larger number")


def parse(words: Sequence[str]) -> Arguments:
    """Parse the command line; see `parse_with_recipe`."""
    return parse_with_recipe(
        Arguments, words, prog=PROG, default=lambda recipe: Arguments(data=tyro.MISSING, recipe=recipe)
    )


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values.

    Args:
        arguments: what to measure.
        command: how it was asked for, for the result.

    Raises:
        InputError: there is no GPU, or the data cannot be used.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda but torch finds no CUDA device here: take --device cpu.")
    source = open_train(arguments.data)
    Order(num_images=len(source), batch_size=arguments.recipe.batch_size, seed=0)  # says what does not fit
    source.close()
    setup = Setup(
        recipe=arguments.recipe,
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
        turns = outcome.turns
        return {
            "benchmark": "train",
            "partial": unfinished,
            "device": arguments.device,
            "recipe": to_dict(setup.recipe),
            "views_per_image": views,
            "contenders": {name: summary(taken, views=views) for name, taken in turns.items()},
            "loaded_over_synthetic": ratio(turns, OURS, OURS_SYNTHETIC),
            "plain_loaded_over_synthetic": ratio(turns, PLAIN, PLAIN_SYNTHETIC),
            "times_plain_with_dataloader": ratio(turns, OURS, PLAIN),
            "step_times_plain_step": ratio(turns, OURS_SYNTHETIC, PLAIN_SYNTHETIC),
            "left_out": outcome.missing,
            "failed": outcome.failed,
            "environment": environment() | {"command": command},
        }

    return result(
        take_turns(
            builds,
            repeats=arguments.repeats,
            budget=Budget(arguments.seconds),
            keep=lambda outcome: write_result(arguments.out, result(outcome, unfinished=True)),
        ),
        unfinished=False,
    )


def ratio(turns: Mapping[str, Sequence[Turn]], one: str, other: str) -> dict[str, float] | None:
    """How many times the images/s of `other` contender `one` has; None if either is missing."""
    return ratios(turns, other).get(one)


def summary(turns: Sequence[Turn], *, views: int) -> dict[str, Any]:
    """Rates, waiting and memory of one contender with `views` views an image."""
    last = turns[-1].report
    result = rates(turns, views=views) | {"steps": last["steps"]}
    for name in ("data_wait", "device_idle", "launching"):
        if measured := [turn.report[name] for turn in turns if name in turn.report]:
            result[name] = statistics.median(measured)
    for name in ("device_mib", "decoder", "view_engine", "workers", "bad", "stage_seconds"):
        if name in last:
            result[name] = last[name]
    return result


def body() -> int:
    """Run the command; returns the exit code: 1 if a contender failed (the others' numbers stand) or none could run."""
    arguments = parse(sys.argv[1:])
    result = measure(arguments, command=command_of(PROG, sys.argv[1:]))
    return finish(result, arguments.out, failed=bool(result["failed"]) or not result["contenders"])


if __name__ == "__main__":
    run_cli(body)
