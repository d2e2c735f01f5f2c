"""Training on a CPU alone and beside busy processes, with the commands' setting of OpenMP's waiting and its default.

python -m benchmarks.bench_neighbour [--seconds 20] [--repeats 3] [--neighbours 1] [--out FILE]

Whole runs of `mvssl-train demo` and the bare step of the same recipe on noise, in turns, each in a process of its own.
The numbers hold only if nothing else runs on the machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.harness.command import check_positive, command_of, finish
from benchmarks.harness.results import measured_by
from benchmarks.harness.trials import say
from mvssl.cli import SPINS
from mvssl.recipes.files import resolve_recipe
from mvssl.training.step import TrainStep
from pipelines.runtime import InputError, parse_arguments, run_cli

PROG = "python -m benchmarks.bench_neighbour"
SETTINGS = {"set": {"GOMP_SPINCOUNT": SPINS}, "default": {"GOMP_SPINCOUNT": "300000"}}
"""Environment by setting: what the commands set, and libgomp's default (GNU libgomp manual, GOMP_SPINCOUNT)."""
_IMAGES = 512
_WARM_STEPS = 3
_SPIN = "while True: pass"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure images/s alone and beside busy processes.

    Attributes:
        seconds: of each measurement; of a whole run with its start-up, which its images/s leave out mostly.
        repeats: of each measurement.
        neighbours: busy processes.
        step: only print the images/s of the bare step, in this process.
        out: JSON file.
    """

    seconds: int = 20
    repeats: int = 3
    neighbours: int = 1
    step: bool = False
    out: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "seconds", "repeats", "neighbours")


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Processes that compute all the time."""
    running = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def write_images(folder: Path) -> None:
    """Images of 64 pixels, of two classes."""
    generator = np.random.default_rng(0)
    for number in range(_IMAGES):
        path = folder / f"class_{number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)


def step_rate(seconds: float) -> float:
    """Images/s of the demo's step on noise, in this process."""
    recipe = resolve_recipe("demo")
    step = TrainStep(recipe, device="cpu", total_steps=1 << 20, steps_per_epoch=1 << 10)
    generator = torch.Generator().manual_seed(0)
    views = [
        torch.randn(recipe.batch_size, 3, view.size, view.size, generator=generator).contiguous(
            memory_format=torch.channels_last
        )
        for view in recipe.views
    ]
    for number in range(_WARM_STEPS):
        step(views, number)
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        step(views, _WARM_STEPS + done)
        done += 1
    return done * recipe.batch_size / (time.perf_counter() - began)


def measure_step(folder: Path, arguments: Arguments, environment: dict[str, str]) -> float:
    """Images/s of the bare step, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_neighbour", "--step", "--seconds", str(arguments.seconds)]
    return float(_output(command, environment).split()[-1])


def measure_run(folder: Path, arguments: Arguments, environment: dict[str, str]) -> float:
    """Images/s of a whole run, by its summary.json; it stops by itself after the time."""
    out = folder / "run"
    options = ["--device", "cpu", "--evaluation.every-epochs", "0", "--save-every-epochs", "0", "--epochs", "100000"]
    limit = ["--time", f"{arguments.seconds}s", "--log", "none", "--overwrite"]
    command = [sys.executable, "-m", "mvssl.cli.train", "demo", "--data", str(folder / "images"), "--out", str(out)]
    _output([*command, *options, *limit], environment, codes=(75,))
    rate: float = json.loads((out / "summary.json").read_text())["images_per_second"]
    return rate


def _output(command: Sequence[str], environment: dict[str, str], *, codes: tuple[int, ...] = (0,)) -> str:
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=own | environment)
    if done.returncode not in codes:
        raise InputError(f"A measurement ended with exit code {done.returncode}: {(done.stderr or done.stdout)[-500:]}")
    return done.stdout


MEASURES = {"whole run": measure_run, "bare step": measure_step}


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values."""
    rates: dict[str, dict[str, dict[str, list[float]]]] = {
        what: {setting: {"alone": [], "busy": []} for setting in SETTINGS} for what in MEASURES
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images")
        for repeat in range(arguments.repeats):
            for setting, environment in SETTINGS.items():
                for beside in ("alone", "busy"):
                    for what, measured in MEASURES.items():
                        with busy(arguments.neighbours if beside == "busy" else 0):
                            rate = measured(folder, arguments, environment)
                        rates[what][setting][beside].append(round(rate, 2))
                        say(f"{repeat + 1}/{arguments.repeats} {what}, {setting}, {beside}: {rate:.1f} images/s")
    return {
        "benchmark": "neighbour",
        "neighbours": arguments.neighbours,
        "seconds": arguments.seconds,
        "spins": SPINS,
        "implementations": rates,
        "busy_over_alone": {what: ratio(rates[what]["set"], "busy", rates[what]["set"], "alone") for what in rates},
        "alone_over_default": {
            what: ratio(rates[what]["set"], "alone", rates[what]["default"], "alone") for what in rates
        },
        **measured_by(command),
    }


def ratio(of: dict[str, list[float]], one: str, to: dict[str, list[float]], other: str) -> float:
    """Ratio of the medians."""
    return round(median(of[one]) / median(to[other]), 3)


def body(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = parse_arguments(Arguments, prog=PROG, args=list(words))
    if arguments.step:
        print(step_rate(arguments.seconds))
        return 0
    return finish(measure(arguments, command=command_of(PROG, words)), arguments.out)


if __name__ == "__main__":
    run_cli(lambda: body(sys.argv[1:]))
