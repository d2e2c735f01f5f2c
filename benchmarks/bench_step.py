"""Cost of a step: ours captured, compiled, grouped and view by view, against a plain step, from the same weights.

python -m benchmarks.bench_step [--recipes NAME ...] [--batch-sizes 128 ...] [--device cuda] [--data DATA] [--out FILE]

All train on one batch of noise on the device, each in a process of its own, interleaved. With --data each also runs
trials while our loader prepares batches of that data in the same process. Every implementation is profiled once:
launches, kernels, host and device time; bench_compile's prediction of the compiled step is kept with them. The peak is
that of a large matrix product, interleaved with them. The first recipe at the first batch size comes first, then the
other recipes, then the other batch sizes; after --seconds nothing more begins, and what is left out is named.

Compiled code is cached across processes (`mvssl.training.compile`): the first compiled implementation of a recipe
compiles, the others find its code, as `first_step_seconds` of each shows.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.harness.command import DEFAULT_RECIPE, check_device, check_positive, command_of, finish
from benchmarks.harness.processes import Build, Trial
from benchmarks.harness.results import RESULTS, Result, measured_by, read_results, write_result
from benchmarks.harness.trials import Budget, Outcome, peak_memory, rates, ratios, run_trials, say
from benchmarks.implementations.loaders import check_fits
from benchmarks.implementations.peer_steps import PEER_STEPS, peer_steps
from benchmarks.implementations.steps import (
    PEAK,
    PLAIN,
    WITH_LOADER,
    Setup,
    flops_per_image,
    matrix_product,
    our_steps,
    plain_steps,
)
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import to_dict
from mvssl.recipes.files import resolve_recipe
from pipelines.runtime import InputError, invalid, parse_arguments, run_cli

PROG = "python -m benchmarks.bench_step"
ORDER = ("captured", PLAIN, "grouped", "compiled", "view by view")
"""The implementations, the most important ones first."""

PREDICTED = ("batch_size", "megabytes_per_image", "launches", "predicted_milliseconds")
"""Fields of a result of bench_compile that predict a step."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time the training step.

    Attributes:
        recipes: names or files of the recipes to train.
        batch_sizes: images of a step; None takes each recipe's own.
        contenders: implementations that take part: captured, plain step, grouped, compiled, view by view; where they
            are installed also lightly and stable-pretraining.
        device: where the steps run.
        data: folder of images or converted data set that a loader prepares meanwhile, in trials of their own.
        steps: updates of a trial.
        repeats: trials of each after a warm-up; the median counts.
        seconds: begin nothing more after so many; by default there is no limit.
        out: JSON file, rewritten after every trial.
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
            if name not in (*ORDER, *PEER_STEPS):
                raise invalid("contenders", name, f"some of {', '.join((*ORDER, *PEER_STEPS))}", "correct the name")
        check_positive(self, "steps", "repeats", "batch_sizes")

    def planned(self) -> list[Recipe]:
        """Each recipe at each batch size, in the order of importance."""
        recipes = [resolve_recipe(name) for name in self.recipes]
        if self.batch_sizes is None:
            return recipes
        return [replace(recipe, batch_size=size) for size in self.batch_sizes for recipe in recipes]


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values."""
    check_device(arguments.device)
    planned = arguments.planned()
    if arguments.data is not None:
        check_fits(arguments.data, *(recipe.batch_size for recipe in planned))
    budget = Budget(arguments.seconds)
    measured: list[dict[str, Any]] = []

    def result(now: Sequence[dict[str, Any]], *, unfinished: bool) -> dict[str, Any]:
        return {
            "benchmark": "step",
            "partial": unfinished,
            "device": arguments.device,
            "steps": arguments.steps,
            "recipes": [*measured, *now],
            **measured_by(command),
        }

    def save(summarise: Callable[[Outcome], dict[str, Any]], outcome: Outcome) -> None:
        write_result(arguments.out, result([summarise(outcome)], unfinished=True))

    for recipe in planned:
        prediction = predicted(recipe.name, device=arguments.device)
        say(f"{recipe.name}, batch {recipe.batch_size}; predicted: {prediction}")
        setup = Setup(recipe=recipe, device=arguments.device, steps=arguments.steps, data=arguments.data)
        with ThreadPoolExecutor(1) as pool:  # counts operations while the processes are built
            flops = float if budget.spent else pool.submit(flops_per_image, recipe).result
            summarise = partial(summary, recipe=recipe, flops=flops, prediction=prediction)
            outcome = run_trials(
                builds_of(setup, arguments.contenders),
                repeats=arguments.repeats,
                budget=budget,
                save=partial(save, summarise),
            )
            measured.append(summarise(outcome))
    return result([], unfinished=False)


def builds_of(setup: Setup, names: Sequence[str]) -> dict[str, Build]:
    """The processes of a recipe: the chosen implementations and the matrix product."""
    builds: dict[str, Build] = {
        name: partial(plain_steps, setup) if name == PLAIN else partial(our_steps, setup, name)
        for name in ORDER
        if name in names
    }
    builds |= {name: partial(peer_steps, setup, name) for name in PEER_STEPS if name in names}
    return builds | {PEAK: partial(matrix_product, setup)}


def predicted(recipe: str, *, device: str, compiled: Path = RESULTS / "compile.jsonl") -> dict[str, Any] | None:
    """Bytes, launches and time of the compiled step as bench_compile predicts them for this kind of GPU.

    Args:
        recipe: its name.
        device: where steps are measured; there is no prediction for a CPU.
        compiled: results of bench_compile.

    Returns:
        Those of `PREDICTED` that are known; None if there is no such result.
    """
    if device != "cuda" or not compiled.exists():
        return None
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    rows = [row for row in read_results(compiled) if (row["recipe"], row["target"]) == (recipe, target)]
    return prediction_of(rows[-1]) if rows else None


def prediction_of(row: Result) -> dict[str, Any]:
    """The part of a compilation's result that predicts a step."""
    return {name: row[name] for name in PREDICTED if row.get(name) is not None}


def summary(
    outcome: Outcome, *, recipe: Recipe, flops: Callable[[], float], prediction: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Result of one recipe, trials with the loader at work apart; `flops` returns the FLOP of an image."""
    trials = {name: own for name, own in outcome.trials.items() if name != PEAK}
    alone = [name for name in trials if not name.endswith(WITH_LOADER)]
    peak = [trial.report for trial in outcome.trials.get(PEAK, [])]
    tflops = statistics.median(report["tflops"] for report in peak) if peak else None
    views, gflops = len(recipe.views), flops() / 1e9
    times_plain = ratios(trials, PLAIN)
    return {
        "recipe": to_dict(recipe),
        "batch_size": recipe.batch_size,
        "views_per_image": views,
        "gflops_per_image": gflops,
        "predicted": prediction,
        "matrix_product": {**peak[-1], "tflops": tflops} if peak else None,
        "contenders": {name: _implementation(trials[name], views, gflops, peak=tflops) for name in alone},
        "with_loader": {
            name: rates(loaded, views=views)
            | peak_memory(loaded)
            | {"over_alone": ratios(trials, name)[name + WITH_LOADER]}
            for name in alone
            if (loaded := trials.get(name + WITH_LOADER))
        },
        "times_plain": {name: times_plain[name] for name in alone if name in times_plain},
        "left_out": outcome.left_out,
        "failed": outcome.failed,
    }


def _implementation(trials: Sequence[Trial], views: int, gflops: float, *, peak: float | None) -> dict[str, Any]:
    """Rates, memory and profile of one implementation, and its fraction of the peak of `peak` TFLOP/s."""
    last = trials[-1].report
    result = rates(trials, views=views) | peak_memory(trials)
    achieved = result["images_per_second"] * gflops / 1e3
    result |= {"tflops": achieved, "share_of_peak": None if peak is None else achieved / peak}
    result["milliseconds"] = 1e3 * statistics.median(
        trial.report["seconds"] / trial.report["steps"] for trial in trials
    )
    names = ("launches", "kernels", "host_milliseconds", "busy_milliseconds", "first_step_seconds", "first_loss")
    return result | {name: last[name] for name in (*names, "device_mib") if name in last}


def body() -> int:
    """Run the command; returns 1 if an implementation failed (the others' numbers stand) or none could run."""
    arguments = parse_arguments(Arguments, prog=PROG)
    result = measure(arguments, command=command_of(PROG, sys.argv[1:]))
    recipes = result["recipes"]
    failed = any(each["failed"] for each in recipes) or not any(each["contenders"] for each in recipes)
    return finish(result, arguments.out, failed=failed)


if __name__ == "__main__":
    run_cli(body)
