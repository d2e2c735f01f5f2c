"""Seconds from a command to its steps: compiled for the first time, compiled before, and not compiled.

python -m benchmarks.bench_start [--recipe byol_resnet50_200ep] [--batch-size 128] [--device cuda] [--out FILE]

Each start is a process of its own that imports, builds the step, and takes steps on noise. The first compiled start of
a turn finds empty caches, the second what the first one left there. Every field of the recipe can be overridden as with
mvssl-train.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.measuring.command_line import command_of, finish, parse_with_recipe, write_result
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import from_dict, to_dict
from mvssl.runs.environment import environment
from mvssl.training.compile import CACHE_FOLDERS
from pipelines.runtime import InputError, invalid, run_cli

PROG = "python -m benchmarks.bench_start"
STARTS: dict[str, Literal["on", "off"]] = {
    "compiled, first start": "on",
    "compiled, second start": "on",
    "not compiled": "off",
}
"""Kinds of starts in the order of a turn, and the recipe's `compile`."""
STEPS = 3  # the first one compiles; the last one is what a step takes from then on
PHASES = ("imports", "build", "first_step", "later_step", "training_after")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time the start of training. --recipe NAME (or a recipe file) chooses the recipe, whose fields follow below.

    Attributes:
        recipe: what would be trained.
        device: where the steps run.
        compiled: whether compiled starts are timed too, which takes long.
        repeats: turns of all kinds of starts; the median counts.
        out: JSON file, rewritten after every start.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    device: Literal["cpu", "cuda"] = "cpu"
    compiled: bool = True
    repeats: int = 1
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise invalid("repeats", self.repeats, "1 or more", "give a larger number")


def parse(words: Sequence[str]) -> Arguments:
    """Parse the command line; see `parse_with_recipe`."""
    return parse_with_recipe(Arguments, words, prog=PROG, default=lambda recipe: Arguments(recipe=recipe))


def steps_of_a_start() -> None:
    """In a process of its own: take steps as stdin says (recipe and device); prints seconds and losses as JSON."""
    asked = json.loads(sys.stdin.read())
    marks = [time.time()]
    import torch

    from mvssl.training.step import TrainStep

    marks.append(time.time())
    recipe = from_dict(asked["recipe"])
    step = TrainStep(recipe, device=asked["device"], total_steps=STEPS, steps_per_epoch=STEPS, cuda_graph="off")
    compiled = step.compiled
    marks.append(time.time())
    losses = []
    torch.manual_seed(0)
    views = [
        torch.randn(recipe.batch_size, 3, spec.size, spec.size, device=asked["device"], dtype=step.input_dtype)
        for spec in recipe.views
    ]
    for number in range(STEPS):
        losses.append(float(step(views, number).loss))  # waits for the device
        marks.append(time.time())
    if step.compiled != compiled:
        raise InputError("the step could not be compiled, and says why above: there is nothing to compare.")
    print(json.dumps({"marks": marks, "losses": losses}))


def start(recipe: Recipe, device: str, caches: Path) -> dict[str, Any]:
    """Start training in a process that keeps compiled code in this folder: seconds of each phase, and its losses.

    Raises:
        InputError: it failed; what it said last.
    """
    began = time.time()
    process = subprocess.run(
        [sys.executable, "-c", "from benchmarks.bench_start import steps_of_a_start as work; work()"],
        input=json.dumps({"recipe": to_dict(recipe), "device": device}),
        env=os.environ | {variable: str(caches / name) for variable, name in CACHE_FOLDERS.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        said = process.stderr.strip().splitlines() or ["nothing"]
        raise InputError(f"a start failed with exit code {process.returncode}: {said[-1]}")
    report = json.loads(process.stdout.splitlines()[-1])
    imported, built, first, *later = report["marks"][1:]
    return {
        "imports": imported - began,
        "build": built - imported,
        "first_step": first - built,
        "later_step": later[-1] - later[-2],
        "training_after": first - began,
        "losses": report["losses"],
    }


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark, a line and a result for each start; the result as plain JSON values."""
    kinds = {kind: compiles for kind, compiles in STARTS.items() if arguments.compiled or compiles == "off"}
    seconds: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    result: dict[str, Any] = {}
    for turn in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as caches:
            for kind, compiles in kinds.items():
                recipe = replace(arguments.recipe, compile=compiles)
                seconds[kind].append(start(recipe, arguments.device, Path(caches)))
                now = seconds[kind][-1]
                print(
                    f"turn {turn + 1} of {arguments.repeats}, {kind}: training after {now['training_after']:.1f} s "
                    f"(first step {now['first_step']:.1f} s, later ones {now['later_step']:.3f} s)",
                    file=sys.stderr,
                    flush=True,
                )
                done = turn == arguments.repeats - 1 and kind == list(kinds)[-1]
                result = {
                    "benchmark": "start",
                    "partial": not done,
                    "device": arguments.device,
                    "recipe": to_dict(arguments.recipe),
                    "starts": {name: _median(taken) for name, taken in seconds.items() if taken},
                    "environment": environment() | {"command": command},
                }
                write_result(arguments.out, result)
    return result


def _median(taken: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds of each phase, the number of starts, and the losses of the last one, which all starts share."""
    medians = {phase: statistics.median(each[phase] for each in taken) for phase in PHASES}
    return medians | {"n": len(taken), "losses": taken[-1]["losses"]}


def body() -> int:
    """Run the command; returns the exit code."""
    arguments = parse(sys.argv[1:])
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("device is cuda but torch finds no CUDA device here: take --device cpu.")
    result = measure(arguments, command=command_of(PROG, sys.argv[1:]))
    return finish(result, arguments.out, failed=False)


if __name__ == "__main__":
    run_cli(body)
