"""What a step costs: ours captured, compiled, grouped and view by view, against a plain step, from the same weights.

python -m benchmarks.bench_step [--recipes NAME ...] [--batch-sizes 128 ...] [--device cuda] [--data DATA] [--out FILE]

All train on one batch of noise that lies on the device, each in a process of its own, and take turns. With --data each
also takes turns while our loader prepares batches of that data in the same process. Every contender is profiled once:
launches, kernels, time of the host and of the device; what bench_compile predicted of the compiled step stands beside.
The share of the peak is that of a large matrix product, which takes turns with them. The first recipe at the first
batch size comes first, then the other recipes, then the other batch sizes; --seconds says after which time nothing more
is begun, and what is left out is named.

Compiled code is kept from process to process (`mvssl.training.compile`): the first compiled contender of
a recipe compiles, the others find its code. `first_step_seconds` of each says so.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.contenders.loader import open_train
from benchmarks.contenders.step import (
    PEAK,
    PLAIN,
    WITH_LOADER,
    Setup,
    flops_per_image,
    matrix_product,
    our_steps,
    plain_steps,
)
from benchmarks.measuring.command_line import DEFAULT_RECIPE, command_of, finish, write_result
from benchmarks.measuring.isolated import Build, Turn
from benchmarks.measuring.prediction import predicted
from benchmarks.measuring.turns import Budget, Outcome, rates, ratios, take_turns
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from mvssl.recipes.files import resolve_recipe
from mvssl.runs.environment import environment
from pipelines.order import Order
from pipelines.runtime import InputError, invalid, run_cli

PROG = "python -m benchmarks.bench_step"
ORDER = ("captured", PLAIN, "grouped", "compiled", "view by view")
"""The contenders, the most important ones first."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time the training step.

    Attributes:
        recipes: names or files of what is trained.
        batch_sizes: images of a step; None takes each recipe's own.
        contenders: some of captured, plain step, grouped, compiled and view by view.
        device: where the steps run.
        data: folder of images or converted data set that a loader prepares meanwhile, in turns of their own.
        steps: updates of a turn.
        repeats: turns each takes after a warm-up; the median counts.
        seconds: after which nothing more is begun; all that is wanted by default.
        out: JSON file, rewritten after every turn.
    """

    recipes: tuple[str, ...] = (DEFAULT_RECIPE, "byol_vits16_200ep", "byol_vitb16_200ep")
    batch_sizes: tuple[int, ...] | None = None
    contenders: tuple[str, ...] = ORDER
    device: Literal["cpu", "cuda"] = "cpu"
    data: Path | None = None
    steps: int = 10
    repeats: int = 3
    seconds: float | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("recipes", "contenders"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty: name at least one.")
        for name in self.contenders:
            if name not in ORDER:
                raise invalid("contenders", name, f"some of {', '.join(ORDER)}", "correct the name")
        for name in ("steps", "repeats", *(() if self.batch_sizes is None else ("batch_sizes",))):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise invalid(name, value, "1 or more", "give a larger number")


def groups(arguments: Arguments) -> list[Recipe]:
    """Each recipe at each batch size, in the order of importance.

    Raises:
        InputError: there is no such recipe, or it cannot have this batch size.
    """
    recipes = [resolve_recipe(name) for name in arguments.recipes]
    sizes = arguments.batch_sizes
    if sizes is None:
        return recipes
    return [replace(recipe, batch_size=size) for size in sizes for recipe in recipes]


def builds_of(setup: Setup, contenders: Sequence[str]) -> dict[str, Build]:
    """What to build for a recipe: the contenders asked for, and the matrix product."""
    builds: dict[str, Build] = {}
    for name in ORDER:
        if name in contenders:
            builds[name] = partial(plain_steps, setup) if name == PLAIN else partial(our_steps, setup, name)
    return builds | {PEAK: partial(matrix_product, setup)}


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values.

    Args:
        arguments: what to measure.
        command: how it was asked for, for the result.

    Raises:
        InputError: there is no GPU, no such recipe, or the data cannot be used.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda but torch finds no CUDA device here: take --device cpu.")
    planned = groups(arguments)
    if arguments.data is not None:
        source = open_train(arguments.data)
        for recipe in planned:  # says what does not fit
            Order(num_images=len(source), batch_size=recipe.batch_size, seed=0)
        source.close()
    budget = Budget(arguments.seconds)
    measured: list[dict[str, Any]] = []

    def result(now: Sequence[dict[str, Any]], *, unfinished: bool) -> dict[str, Any]:
        return {
            "benchmark": "step",
            "partial": unfinished,
            "device": arguments.device,
            "steps": arguments.steps,
            "recipes": [*measured, *now],
            "environment": environment() | {"command": command},
        }

    def save(recipe: Recipe, prediction: dict[str, Any] | None, flops: Callable[[], float], outcome: Outcome) -> None:
        now = summary(outcome, recipe, flops=flops(), prediction=prediction)
        write_result(arguments.out, result([now], unfinished=True))

    for recipe in planned:
        prediction = predicted(recipe.name, device=arguments.device)
        print(f"{recipe.name}, batch {recipe.batch_size}; predicted: {prediction}", file=sys.stderr, flush=True)
        setup = Setup(recipe=recipe, device=arguments.device, steps=arguments.steps, data=arguments.data)
        with ThreadPoolExecutor(1) as beside:  # counts operations while the contenders' processes are built
            flops = float if budget.spent else beside.submit(flops_per_image, recipe).result
            outcome = take_turns(
                builds_of(setup, arguments.contenders),
                repeats=arguments.repeats,
                budget=budget,
                keep=partial(save, recipe, prediction, flops),
            )
            measured.append(summary(outcome, recipe, flops=flops(), prediction=prediction))
    return result([], unfinished=False)


def summary(
    outcome: Outcome, recipe: Recipe, *, flops: float, prediction: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What came of one recipe; `flops` an image. Turns with the loader at work stand beside those without."""
    turns = {name: taken for name, taken in outcome.turns.items() if name != PEAK}
    peak = [turn.report for turn in outcome.turns.get(PEAK, [])]
    tflops = statistics.median(report["tflops"] for report in peak) if peak else None
    views = len(recipe.views)
    return {
        "recipe": to_dict(recipe),
        "batch_size": recipe.batch_size,
        "views_per_image": views,
        "gflops_per_image": flops / 1e9,
        "predicted": prediction,
        "matrix_product": {**peak[-1], "tflops": tflops} if peak else None,
        "contenders": {
            name: contender(taken, views=views, flops=flops, peak=tflops)
            for name, taken in turns.items()
            if not name.endswith(WITH_LOADER)
        },
        "with_loader": {
            name: rates(turns[name + WITH_LOADER], views=views)
            | {"over_alone": ratios(turns, name)[name + WITH_LOADER]}
            for name in turns
            if name + WITH_LOADER in turns
        },
        "times_plain": {name: ratio for name, ratio in ratios(turns, PLAIN).items() if not name.endswith(WITH_LOADER)},
        "left_out": outcome.missing,
        "failed": outcome.failed,
    }


def contender(turns: Sequence[Turn], *, views: int, flops: float, peak: float | None) -> dict[str, Any]:
    """Rates, profile and memory of one contender, and its share of the peak of `peak` TFLOP/s."""
    last: Mapping[str, Any] = turns[-1].report
    result = rates(turns, views=views)
    achieved = result["images_per_second"] * flops / 1e12
    result |= {"tflops": achieved, "share_of_peak": None if peak is None else achieved / peak}
    result["milliseconds"] = 1e3 * statistics.median(turn.report["seconds"] / turn.report["steps"] for turn in turns)
    names = ("launches", "kernels", "host_milliseconds", "busy_milliseconds", "first_step_seconds", "first_loss")
    return result | {name: last[name] for name in (*names, "device_mib") if name in last}


def body() -> int:
    """Run the command; returns the exit code: 1 if a contender failed (the others' numbers stand) or none could run."""
    arguments = tyro.cli(Arguments, prog=PROG)
    result = measure(arguments, command=command_of(PROG, sys.argv[1:]))
    recipes = result["recipes"]
    failed = any(each["failed"] for each in recipes) or not any(each["contenders"] for each in recipes)
    return finish(result, arguments.out, failed=failed)


if __name__ == "__main__":
    run_cli(body)
