"""Time and accuracy of the fast linear probe: one setting, a whole grid, and scikit-learn's logistic regression.

python -m benchmarks.bench_linear TRAIN.npy VAL.npy [--repeats 3] [--out FILE]

The files are what mvssl-features writes, each with its .csv of labels. Contenders take turns in one process.
"""

from __future__ import annotations

import csv
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks.measuring.command_line import command_of, write_result
from mvssl.evaluate.linear import ROUNDS, FastLinear
from mvssl.evaluate.linear_fit import Setting, fit, race, stratified
from mvssl.runs.environment import environment
from pipelines.runtime import InputError, invalid, run_cli

PROG = "python -m benchmarks.bench_linear"
ONE, GRID, ALL, THEIRS = "one setting", "the grid, raced", "the grid, all epochs", "scikit-learn, best C"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time linear classifiers on features.

    Attributes:
        train: features to learn from.
        val: features to measure on.
        epochs: of one setting, and of the grid's best.
        strengths: the regularisations C that scikit-learn is tried with; the fit of the most accurate one is timed.
        whole: also train all settings for all epochs.
        repeats: turns that each takes; the median counts.
        out: JSON file to write.
    """

    train: tyro.conf.Positional[Path]
    val: tyro.conf.Positional[Path]
    epochs: int = 100
    strengths: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    whole: bool = False
    repeats: int = 3
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "repeats"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "at least 1", "give a positive number")


def load(path: Path) -> tuple[Tensor, Tensor]:
    """Features [N, D] and labels [N] that mvssl-features wrote.

    Raises:
        InputError: a file is missing, or images have no labels.
    """
    try:
        features = torch.from_numpy(np.load(path)).float()
        with path.with_suffix(".csv").open() as file:
            labels = torch.tensor([int(row["label"]) for row in csv.DictReader(file)])
    except OSError as error:
        raise InputError(f"{path} or its .csv cannot be read ({error}): write them with mvssl-features.") from error
    if len(labels) != len(features) or bool((labels < 0).any()):
        raise InputError(f"{path} has images without a label: give labelled images to mvssl-features.")
    return features, labels


def _contenders(asked: Arguments) -> dict[str, Callable[[], float]]:
    """What is timed; each gives its top-1 on val."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    (x, y), (x_val, y_val) = load(asked.train), load(asked.val)
    classes = int(y.max()) + 1
    fast = FastLinear(epochs=asked.epochs)
    grid, batch_size = fast.grid(), fast.batch_for(len(x))
    held_out = stratified(y, fast.held_out, seed=0)

    def raced() -> tuple[int, float]:
        rounds = [(max(1.0, share * asked.epochs), part) for share, part in ROUNDS]
        raced = race(x, y, grid, classes=classes, held_out=held_out, rounds=rounds, batch_size=batch_size)
        return raced.order[0], trained([grid[raced.order[0]]])

    def trained(settings: list[Setting]) -> float:
        final = fit(x, y, settings, classes=classes, epochs=asked.epochs, batch_size=batch_size)
        return float(final.right(x_val, y_val).max())

    chosen = grid[raced()[0]]
    scaler = StandardScaler().fit(x.numpy())

    def theirs(strength: float) -> float:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of iterations that do not suffice
            model = LogisticRegression(C=strength, max_iter=200).fit(scaler.transform(x.numpy()), y.numpy())
        return float(model.score(scaler.transform(x_val.numpy()), y_val.numpy()))

    strength = max(asked.strengths, key=theirs)
    contenders: dict[str, Callable[[], float]] = {
        ONE: lambda: trained([chosen]),
        GRID: lambda: raced()[1],
        THEIRS: lambda: theirs(strength),
    }
    if asked.whole:
        contenders[ALL] = lambda: trained(grid)
    return contenders


def measure(asked: Arguments) -> dict[str, Any]:
    """Seconds and accuracy of each, and how many times as long as one setting it takes."""
    contenders = _contenders(asked)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    top1: dict[str, float] = {}
    for turn in range(asked.repeats):
        for name, work in contenders.items():
            began = time.perf_counter()
            top1[name] = work()
            seconds[name].append(time.perf_counter() - began)
            print(f"turn {turn + 1}: {name} {seconds[name][-1]:.2f} s, top-1 {100 * top1[name]:.2f} %", file=sys.stderr)
    ratios = {name: [a / b for a, b in zip(s, seconds[ONE], strict=True)] for name, s in seconds.items()}
    return {
        "benchmark": "linear",
        "settings": len(FastLinear().grid()),
        "epochs": asked.epochs,
        "contenders": {
            name: {
                "seconds": statistics.median(seconds[name]),
                "spread": {"min": min(seconds[name]), "max": max(seconds[name]), "n": asked.repeats},
                "top1": top1[name],
                "times_one_setting": statistics.median(ratios[name]),
            }
            for name in contenders
        },
        "environment": {**environment(), "command": command_of(PROG, sys.argv[1:])},
    }


def body() -> None:
    """Run the command."""
    asked = tyro.cli(Arguments, prog=PROG, args=sys.argv[1:])
    write_result(asked.out, measure(asked))


if __name__ == "__main__":
    run_cli(body)
