"""What the loader takes from a thread that runs Python all the time: milliseconds a batch, and images/s beside it.

    python -m benchmarks.bench_lock photos [--other CHECKOUT] [--out FILE]

Such a thread stands in for the training thread, which launches kernels from Python: whatever a loader's threads do with
Python's lock held, or whenever they ask for it, it waits. `--other` names another version of this project, whose loader
takes turns with this one's. Takes two cores.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.measuring.command_line import command_of, finish
from mvssl.runs.environment import environment
from pipelines.runtime import InputError, invalid, run_cli

PROG = "python -m benchmarks.bench_lock"
ROOT = Path(__file__).resolve().parent.parent
CHILD = ROOT / "benchmarks" / "measuring" / "beside_python.py"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Measure what the loader takes from a thread that runs Python.

    Attributes:
        data: images in any form that --data of mvssl-train takes.
        other: checkout of another version, to be compared with.
        batch_size: images of a batch.
        size, local_size: pixels of the views.
        batches: of a turn.
        seconds: of a turn at most.
        repeats: turns of each.
        out: JSON file to write.
    """

    data: tyro.conf.Positional[Path]
    other: Path | None = None
    batch_size: int = 64
    size: int = 224
    local_size: int = 96
    batches: int = 8
    seconds: float = 120.0
    repeats: int = 3
    out: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "batches", "seconds", "repeats"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "at least 1", "give a positive number")
        if self.other is not None and not (self.other / "pipelines" / "loader.py").exists():
            raise InputError(f"other is {str(self.other)!r} but must be a checkout of this project: give its folder.")


def turn(arguments: Arguments, tree: Path) -> dict[str, float]:
    """One turn of the loader of a checkout, in a process of its own.

    Raises:
        InputError: it failed, or brought no two batches in time.
    """
    asked = {
        "data": str(arguments.data),
        "batch_size": arguments.batch_size,
        "size": arguments.size,
        "local_size": arguments.local_size,
        "blur_kernel": 23 if arguments.size >= 224 else 5,
        "batches": arguments.batches,
        "seconds": arguments.seconds,
    }
    done = subprocess.run(
        [sys.executable, str(CHILD), json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(f"The loader of {tree} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    if report["batches"] < 1:
        raise InputError(
            f"The loader of {tree} brought no two batches within {arguments.seconds:g} s: raise --seconds or lower "
            "--batch-size."
        )
    return report


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values.

    Raises:
        InputError: there are fewer than two cores, or a turn failed.
    """
    if len(os.sched_getaffinity(0)) < 2:
        raise InputError("This process may use one core only: the loop and the loader need one each.")
    trees = {"this": ROOT} | ({} if arguments.other is None else {"other": arguments.other.resolve()})
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
    for number in range(arguments.repeats):
        for name, tree in trees.items():
            turns[name].append(report := turn(arguments, tree))
            rate = report["batches"] * arguments.batch_size / report["wall"]
            said = f"{report['lost_milliseconds']:.2f} ms lost a batch, {rate:.0f} images/s"
            print(f"turn {number + 1} of {name}: {said}", file=sys.stderr, flush=True)
    rows = {}
    for name, reports in turns.items():
        lost = [report["lost_milliseconds"] for report in reports]
        rows[name] = {
            "lost_milliseconds": statistics.median(lost),
            "spread": {"min": min(lost), "max": max(lost), "n": len(lost)},
            "images_per_second": statistics.median(
                report["batches"] * arguments.batch_size / report["wall"] for report in reports
            ),
        }
    return {
        "benchmark": "lock",
        "device": "cpu",
        "batch_size": arguments.batch_size,
        "size": arguments.size,
        "contenders": rows,
        "environment": environment() | {"command": command},
    }


def body() -> int:
    """Run the command; returns the exit code."""
    arguments = tyro.cli(Arguments, prog=PROG)
    result = measure(arguments, command=command_of(PROG, sys.argv[1:]))
    return finish(result, arguments.out, failed=False)


if __name__ == "__main__":
    run_cli(body)
