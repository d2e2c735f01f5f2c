"""Time of the decisions and job tables of a batch in C against those in torch, which give the same bits.

python -m benchmarks.bench_draw [--images 256 1024] [--out FILE]

Both take turns in this process with one thread of torch; nothing of a view's pixels is touched.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.measuring.command_line import command_of, finish
from mvssl.runs.environment import environment
from pipelines.batch import DecodedBatch
from pipelines.runtime import InputError, invalid, run_cli
from pipelines.views.fused.jobs import make_jobs, make_jobs_reference
from pipelines.views.native.sampling import native_obstacle
from pipelines.views.presets import paper_views
from pipelines.views.sampling import check_params, draw, sample_reference

PROG = "python -m benchmarks.bench_draw"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time draws and job tables of the paper's five views.

    Attributes:
        images: of a batch, for each measurement.
        repeats: turns that each takes; the median counts.
        out: JSON file to write.
    """

    images: tuple[int, ...] = (256, 1024)
    repeats: int = 15
    out: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("images", min(self.images, default=0)), ("repeats", self.repeats)):
            if least < 1:
                raise invalid(name, getattr(self, name), "1 or more", "give a larger number")


def works(images: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name, for photos of about 500 x 375 pixels."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(300, 600, (images, 2), generator=generator)
    index = torch.arange(images)
    bytes_each = sizes.prod(dim=1) * 3
    batch = DecodedBatch(
        pixels=torch.empty(0, dtype=torch.uint8),
        offset=bytes_each.cumsum(0) - bytes_each,
        sizes=sizes,
        row_stride=sizes[:, 1] * 3,
        index=index,
        labels=index,
    )
    specs = paper_views()
    params = draw(specs, sizes, seed=0, epoch=0, index=index)
    return {
        "draw": lambda: draw(specs, sizes, seed=0, epoch=0, index=index),
        "draw, torch": lambda: sample_reference(specs, sizes, seed=0, epoch=0, index=index),
        "jobs": lambda: make_jobs(batch, specs, params, images=slice(0, images)),
        "jobs, torch": lambda: make_jobs_reference(batch, specs, params, images=slice(0, images)),
        "check": lambda: check_params(params, specs, sizes),
    }


def milliseconds(timed: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, taking turns, after a turn to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(repeats + 1):
        for name, work in timed.items():
            began = time.perf_counter()
            work()
            if turn > 0:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: statistics.median(each) for name, each in taken.items()}


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values.

    Raises:
        InputError: there is no compiler, so there is nothing to compare.
    """
    if (obstacle := native_obstacle()) is not None:
        raise InputError(f"The C library cannot be used ({obstacle}): there is nothing to compare.")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = {}
        for images in arguments.images:
            row = milliseconds(works(images), repeats=arguments.repeats)
            ratio = (row["draw, torch"] + row["jobs, torch"]) / (row["draw"] + row["jobs"])
            rows[str(images)] = {"milliseconds": row, "times_faster": ratio}
    finally:
        torch.set_num_threads(before)
    return {
        "benchmark": "draw",
        "device": "cpu",
        "repeats": arguments.repeats,
        "images": rows,
        "environment": environment() | {"command": command},
    }


def body() -> int:
    """Run the command; returns the exit code."""
    arguments = tyro.cli(Arguments, prog=PROG)
    result = measure(arguments, command=command_of(PROG, sys.argv[1:]))
    return finish(result, arguments.out, failed=False)


if __name__ == "__main__":
    run_cli(body)
