"""Memory of a training over many short epochs, each of which saves, evaluates and draws: is it flat?

python -m benchmarks.bench_memory [--epochs 2000] [--out FILE]

A growth that is not seen in one epoch fills a machine in a month. The slope is that of a line through the second half
of the run, when caches and the allocator's pools are full.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import mvssl
from benchmarks.bench_faults import tiny_recipe, write_images
from benchmarks.harness.command import check_positive, command_of, finish
from benchmarks.harness.results import measured_by
from benchmarks.harness.trials import say
from mvssl.evaluate.online_knn import OnlineAccuracy
from mvssl.training import run
from mvssl.training.monitor import Monitor
from pipelines.runtime import parse_arguments, run_cli

PROG = "python -m benchmarks.bench_memory"
SAMPLES = 40


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Train for many short epochs and follow the memory of the process.

    Attributes:
        epochs: of two steps each.
        out: JSON file.
    """

    epochs: int = 2000
    out: Path | None = None

    def __post_init__(self) -> None:
        check_positive(self, "epochs")


def resident_mib() -> float:
    """Resident memory of this process in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values."""
    samples: list[tuple[int, float]] = []
    every = max(1, arguments.epochs // SAMPLES)

    class Watched(Monitor):
        """A monitor that notes the memory after every few epochs."""

        def log_evaluation(self, accuracy: OnlineAccuracy, *, step: int, best: str) -> None:
            super().log_evaluation(accuracy, step=step, best=best)
            epoch = step // self._experiment.order.steps_per_epoch
            if epoch % every == 0:
                gc.collect()
                samples.append((epoch, resident_mib()))
                say(f"epoch {epoch}: {samples[-1][1]:.1f} MiB")

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(run, "Monitor", Watched):
        write_images(Path(folder))
        mvssl.train(
            replace(tiny_recipe(), epochs=arguments.epochs),
            data=Path(folder) / "base",
            out=Path(folder) / "run",
            device="cpu",
            decoder="pillow",
            log=("csv",),
        )
    return {"benchmark": "memory", "epochs": arguments.epochs, **slope(samples), **measured_by(command)}


def slope(samples: Sequence[tuple[int, float]]) -> dict[str, Any]:
    """Growth over the second half, in MiB per 100 epochs, and the samples (epoch, MiB)."""
    later = np.array([sample for sample in samples if sample[0] > samples[-1][0] / 2])
    growth = float(np.polyfit(later[:, 0], later[:, 1], 1)[0]) if len(later) > 1 else 0.0
    return {"mib_per_100_epochs": 100 * growth, "samples": [[epoch, round(mib, 1)] for epoch, mib in samples]}


def body(words: Sequence[str]) -> int:
    """Run the command; returns the exit code."""
    arguments = parse_arguments(Arguments, prog=PROG, args=list(words))
    return finish(measure(arguments, command=command_of(PROG, words)), arguments.out)


if __name__ == "__main__":
    run_cli(lambda: body(sys.argv[1:]))
