"""Seconds from a command to its steps: compiled for the first time, compiled before, and not compiled.

python -m benchmarks.bench_start [--recipe byol_resnet50_200ep] [--batch-size 128] [--device cuda] [--out FILE]

Each start is a process of its own that imports, builds the step, and takes steps on noise. The first compiled start of
a trial finds empty caches, the second the code of the first. Every field of the recipe can be overridden as with
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.harness.command import check_device, check_positive, command_of, finish, parse_with_recipe
from benchmarks.harness.results import measured_by, write_result
from benchmarks.harness.trials import say
from mvssl.config.options import Execution
from mvssl.config.recipe import Recipe
from mvssl.config.serialize import from_dict, to_dict
from mvssl.training.compile import CACHE_FOLDERS
from pipelines.runtime import InputError, run_cli

PROG = "python -m benchmarks.bench_start"
STARTS: dict[str, Literal["on", "off"]] = {
    "compiled, first start": "on",
    "compiled, second start": "on",
    "not compiled": "off",
}
"""Kinds of starts in the order of a trial, and their `compile`."""
STEPS = 3  # the first one compiles; the last one takes as long as any later one
PHASES = ("imports", "build", "first_step", "later_step", "training_after")


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time the start of training. --recipe NAME (or a recipe file) chooses the recipe, whose fields follow below.

    Attributes:
        recipe: to train.
        execution: of the steps; `compile` and `cuda_graph` are those of the kind of start.
        device: where the steps run.
        compiled: whether compiled starts are timed too, which takes long.
        repeats: trials of all kinds of starts; the median counts.
        out: JSON file, rewritten after every start.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    execution: Annotated[Execution, tyro.conf.arg(name="")] = field(default_factory=Execution)
    device: Literal["cpu", "cuda"] = "cpu"
    compiled: bool = True
    repeats: int = 1
    out: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "repeats")


def parse(words: Sequence[str]) -> Arguments:
    """Parse the command line; see `parse_with_recipe`."""
    return parse_with_recipe(Arguments, words, prog=PROG, default=lambda recipe: Arguments(recipe=recipe))


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark, with a line and a result for each start; the result as plain JSON values."""
    kinds = {kind: compiles for kind, compiles in STARTS.items() if arguments.compiled or compiles == "off"}
    starts: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    result: dict[str, Any] = {}
    for trial in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as caches:
            for kind, compiles in kinds.items():
                execution = replace(arguments.execution, compile=compiles, cuda_graph="off")
                now = start(arguments.recipe, execution, arguments.device, Path(caches))
                starts[kind].append(now)
                say(
                    f"trial {trial + 1} of {arguments.repeats}, {kind}: training after {now['training_after']:.1f} s "
                    f"(first step {now['first_step']:.1f} s, later ones {now['later_step']:.3f} s)"
                )
                result = {
                    "benchmark": "start",
                    "partial": sum(map(len, starts.values())) < arguments.repeats * len(kinds),
                    "device": arguments.device,
                    "recipe": to_dict(arguments.recipe),
                    "step_mode": arguments.execution.step_mode,
                    "starts": {name: _median(taken) for name, taken in starts.items() if taken},
                    **measured_by(command),
                }
                write_result(arguments.out, result)
    return result


def start(recipe: Recipe, execution: Execution, device: str, caches: Path) -> dict[str, Any]:
    """Start training in a process that caches compiled code in this folder: seconds of each phase, and its losses.

    Raises:
        InputError: the process failed; with the last line of its stderr.
    """
    began = time.time()
    process = subprocess.run(
        [sys.executable, "-c", "from benchmarks.bench_start import steps_of_a_start as work; work()"],
        input=json.dumps({"recipe": to_dict(recipe), "execution": asdict(execution), "device": device}),
        env=os.environ | {variable: str(caches / name) for variable, name in CACHE_FOLDERS.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        said = process.stderr.strip().splitlines() or ["nothing"]
        raise InputError(f"a start failed with exit code {process.returncode}: {said[-1]}")
    report = json.loads(process.stdout.splitlines()[-1])
    imported, built, first, *later = report["marks"]
    return {
        "imports": imported - began,
        "build": built - imported,
        "first_step": first - built,
        "later_step": later[-1] - later[-2],
        "training_after": first - began,
        "losses": report["losses"],
    }


def steps_of_a_start() -> None:
    """In a process of its own: take steps as stdin says (recipe, execution, device); print times and losses."""
    asked = json.loads(sys.stdin.read())
    import torch

    from mvssl.training.step import TrainStep

    marks = [time.time()]
    recipe = from_dict(asked["recipe"])
    execution = Execution(**asked["execution"])
    step = TrainStep(recipe, execution=execution, device=asked["device"], total_steps=STEPS, steps_per_epoch=STEPS)
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
        raise InputError("the step did not compile, see above: there is nothing to compare.")
    print(json.dumps({"marks": marks, "losses": losses}))


def _median(starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median seconds of each phase, the number of starts, and the losses of the last one, which all starts share."""
    medians = {phase: statistics.median(each[phase] for each in starts) for phase in PHASES}
    return medians | {"n": len(starts), "losses": starts[-1]["losses"]}


def body() -> int:
    """Run the command; returns the exit code."""
    arguments = parse(sys.argv[1:])
    check_device(arguments.device)
    return finish(measure(arguments, command=command_of(PROG, sys.argv[1:])), arguments.out)


if __name__ == "__main__":
    run_cli(body)
