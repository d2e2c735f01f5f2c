"""Block sizes and warps of the fused engine's kernels on this GPU: times every candidate, names the best.

    python -m benchmarks.tune_fused [--num-images 256] [--out tune.json]

The paper's five views of random 500 x 375 pictures, one kernel changed at a time. What it finds belongs into
`LAUNCHES` of pipelines/views/fused/engine.py, with the JSON under results/. Also fills the table of kernel times.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro

from benchmarks.measuring.command_line import write_result
from benchmarks.measuring.turns import Budget
from mvssl.runs.environment import environment
from pipelines.batch import DecodedBatch
from pipelines.runtime import InputError, run_cli
from pipelines.views.engine import fused_obstacle
from pipelines.views.params import ViewParams
from pipelines.views.presets import paper_views
from pipelines.views.sampling import draw

CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "weights": {"block": (64, 128, 256)},
    "columns": {"block": (32, 64, 128), "block_rows": (4, 8, 16)},
    "rows": {"block": (256, 512, 1024)},
    "color": {"block": (256, 512, 1024)},
    "down": {"block": (512, 1024, 2048)},
    "along": {"block": (256, 512, 1024)},
}
WARPS = (2, 4, 8)

cuda: Any = torch.cuda  # Any: torch ships its events without types


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Tune the fused engine's kernels on this GPU.

    Attributes:
        num_images: images of a batch.
        repeats: timed batches of each candidate; the median counts.
        seconds: after which no other candidate is tried; all are by default. What is launched today comes first.
        out: JSON file, rewritten after every candidate.
    """

    num_images: int = 256
    repeats: int = 10
    seconds: float | None = None
    out: Path | None = None


def candidates(name: str) -> Iterator[tuple[dict[str, int], int]]:
    """Every combination of block sizes and warps of a kernel."""
    sizes = CANDIDATES[name]
    for values in itertools.product(*sizes.values(), WARPS):
        yield dict(zip(sizes, values, strict=False)), values[-1]


def kernel_milliseconds(name: str, batch: DecodedBatch, params: ViewParams, repeats: int) -> float:
    """Median time of one kernel over several batches, in milliseconds on the device."""
    from pipelines.views.fused import engine

    times: list[tuple[Any, Any]] = []
    launch = engine.Launch.__call__
    kernel = engine.LAUNCHES[name].kernel

    def timed(self: engine.Launch, grid: tuple[int, ...], *arguments: Any) -> None:
        if self.kernel is not kernel:
            return launch(self, grid, *arguments)
        begin, end = (cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch(self, grid, *arguments)
        end.record()
        times.append((begin, end))
        return None

    with mock.patch.object(engine.Launch, "__call__", timed):
        for _ in range(repeats + 2):  # the first ones build the kernel
            engine.make_views(batch, paper_views(), params, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in times[2:])


@contextmanager
def launched_with(name: str, constants: dict[str, int], num_warps: int) -> Iterator[None]:
    """Launch a kernel with other block sizes and warps while this lasts."""
    from pipelines.views.fused import engine

    changed = dataclasses.replace(engine.LAUNCHES[name], constants=constants, num_warps=num_warps)
    with mock.patch.dict(engine.LAUNCHES, {name: changed}):
        yield


def measure(arguments: Arguments) -> dict[str, Any]:
    """Time all candidates; the result as plain JSON values.

    Raises:
        InputError: there is no GPU that runs the kernels.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    obstacle = "there is no CUDA device here" if device.type != "cuda" else fused_obstacle(device)
    if obstacle is not None:
        raise InputError(f"The fused kernels cannot be tuned: {obstacle}; run this on a machine with a GPU.")
    from pipelines.views.fused import engine

    budget = Budget(arguments.seconds)
    generator = torch.Generator().manual_seed(0)
    count = arguments.num_images
    images = torch.randint(0, 256, (count, 375, 500, 3), generator=generator, dtype=torch.uint8)
    batch = DecodedBatch.from_images(list(images), index=range(count), device=device)
    params = draw(paper_views(), batch.sizes, seed=0, epoch=0, index=batch.index)
    rows: dict[str, list[dict[str, Any]]] = {}
    command = f"python -m benchmarks.tune_fused --num-images {count} --repeats {arguments.repeats}"
    about = environment() | {"command": command}

    def result(*, unfinished: bool) -> dict[str, Any]:
        return {
            "benchmark": "tune_fused",
            "partial": unfinished,
            "device": "cuda",
            "images": count,
            "kernels": {
                name: {"best": min(tried, key=lambda row: row["milliseconds"]), "now": tried[0], "all": tried}
                for name, tried in rows.items()
            },
            "environment": about,
        }

    for name, constants, num_warps in order(engine.LAUNCHES):
        if name in rows and budget.spent:
            break
        with launched_with(name, constants, num_warps):
            milliseconds = kernel_milliseconds(name, batch, params, arguments.repeats)
        rows.setdefault(name, []).append({**constants, "num_warps": num_warps, "milliseconds": milliseconds})
        write_result(arguments.out, result(unfinished=True))
    for name, tried in rows.items():
        best = min(tried, key=lambda row: row["milliseconds"])
        print(f"{name:8} now {1000 * tried[0]['milliseconds'] / count:.2f} us per image, best of {len(tried)}: {best}")
    return result(unfinished=False)


def order(launches: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, int], int]]:
    """Kernel, block sizes and warps of all that is timed: how each kernel is launched today, then the others."""
    for name, launch in launches.items():
        yield name, dict(launch.constants), launch.num_warps
    for name, launch in launches.items():
        for constants, num_warps in candidates(name):
            if (constants, num_warps) != (launch.constants, launch.num_warps):
                yield name, constants, num_warps


def body() -> int:
    """Run the command; returns the exit code."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.tune_fused")
    write_result(arguments.out, measure(arguments))
    return 0


if __name__ == "__main__":
    run_cli(body)
