"""The paper's claim at a small scale: one predictor per view type against one for all, three methods, equal tuning.

    python -m benchmarks.paper_small tiny-imagenet-50 --jobs 2
    python -m benchmarks.paper_small tiny-imagenet-50 --setting gpu --seconds 540

Variants: two-view (the baseline), shared (global and local views, one predictor for both: the paper's failing control),
per-view (the same views, one predictor per view type), and both with a cutout view as well. All see the same images in
the same order for the same number of epochs. `benchmarks.paper.cells` has the tuning.

Every run is a cell with a JSON line in --out. Started again, also on another machine, the command continues with the
cells without one, the most informative first, and says how many are left. `--report` prints and plots the results.
"""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks.harness.command import check_positive, command_of
from benchmarks.harness.results import RESULTS
from benchmarks.paper.cells import METHODS, OPTIMIZERS, SECONDS, SETTINGS, TUNED_BY, Cell, Point, Setting, plan
from benchmarks.paper.picture import plot
from benchmarks.paper.results import Results
from benchmarks.paper.run_cell import Splits, run_cell, write_splits
from benchmarks.paper.tables import all_tables
from mvssl.training.monitor import Diverged
from mvssl.training.shutdown import Interrupted
from pipelines.runtime import InputError, invalid, parse_arguments, run_cli

PROG = "python -m benchmarks.paper_small"


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The paper's comparison at a small scale.

    Attributes:
        data: folder with train/ and val/, one folder a class in each, e.g. tiny-imagenet-50.
        setting: cpu is small and takes some hours on two cores, with timm's initial weights; cpu_release is the same
            with those of the paper's reference implementation; gpu is 40 epochs of all images with a larger network;
            rehearsal is a miniature of it that takes seconds.
        tune: also tune gpu and rehearsal; by default they take the points that cpu chose, whose cells are in
            benchmarks/results/paper_small_cpu.jsonl.
        out: file of the results, a line a cell; by default benchmarks/results/paper_small_SETTING.jsonl. A folder
            of cells from an earlier version is read too.
        runs: folder of runs in training; stopped ones resume.
        seeds: one run of every cell of the table for each; 0 is reserved for tuning.
        optimizers: paper is LARS, or SGD for SimSiam.
        methods: to compare.
        jobs: runs at a time, which divide the cores among them.
        seconds: begin no cell that would not end within so many; by default there is no limit.
        cells: begin so many at most.
        device: auto takes CUDA if there is a GPU.
        report: print and plot the results so far, and stop.
    """

    data: tyro.conf.Positional[Path | None] = None
    setting: Literal["cpu", "cpu_release", "gpu", "rehearsal"] = "cpu"
    tune: bool = False
    out: Path | None = None
    runs: Path = Path("runs/paper_small")
    seeds: tuple[int, ...] = (1, 2, 3)
    optimizers: tuple[Literal["paper", "adamw"], ...] = ("paper", "adamw")
    methods: tuple[Literal["byol", "simsiam", "mocov3"], ...] = ("byol", "simsiam", "mocov3")
    jobs: int = 1
    seconds: float | None = None
    cells: int | None = None
    device: str = "auto"
    report: bool = False

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 1:
            raise invalid("seeds", self.seeds, "one or more numbers of at least 1", "give --seeds 1 2 3")
        for name, known in (("optimizers", OPTIMIZERS), ("methods", METHODS)):
            if not getattr(self, name):
                raise invalid(name, getattr(self, name), f"some of {', '.join(known)}", "give one")
        check_positive(self, "jobs", "cells", "seconds")

    @property
    def results(self) -> Path:
        """File of the results."""
        return self.out or RESULTS / f"paper_small_{self.setting}.jsonl"

    @property
    def tuned_by(self) -> Literal["cpu"] | None:
        """The setting whose points are taken; None tunes here."""
        return None if self.tune else TUNED_BY.get(self.setting)


class Queue:
    """Chooses the next cell, if there is time for one."""

    def __init__(
        self, results: Results, cells: Sequence[Cell], *, expected: float, seconds: float | None, most: int | None
    ) -> None:
        """Start the clock.

        Args:
            results: finished cells.
            cells: in the order of their importance.
            expected: seconds of a run of all epochs, before one is known.
            seconds: time limit from now, if there is one.
            most: cells to begin, if there is a limit.
        """
        self._whole = expected
        self.results = results
        self.cells = cells
        self._end = None if seconds is None else time.monotonic() + seconds
        self._most = most
        self._begun: set[Cell] = set()
        self._last: dict[bool, float] = {}  # seconds of the last cell here, by whether it was a tuning run

    @property
    def left(self) -> int:
        """Cells without a result that counts."""
        return sum(not self.results.done(cell) for cell in self.cells)

    def take(self) -> tuple[Cell, Point] | None:
        """The next cell and its point; None if there is none, or none that would end in time."""
        if self._most is not None and len(self._begun) >= self._most:
            return None
        for cell, point in self.results.ready(self.cells):
            if cell not in self._begun and (self._end is None or time.monotonic() + self._expected(cell) < self._end):
                self._begun.add(cell)
                return cell, point
        return None

    def note(self, cell: Cell, seconds: float) -> None:
        """Note how long a cell took here: the next ones are expected to take as long. The first ones also compile."""
        self._last[cell.point is not None] = seconds

    def _expected(self, cell: Cell) -> float:
        setting, tunes = self.results.setting, cell.point is not None
        share = setting.tuning_epochs / setting.epochs if tunes else 1.0
        return self._last.get(tunes, share * self._whole)


def run_or_diverge(
    cell: Cell, point: Point, setting: Setting, splits: Splits, folder: Path, *, device: str, threads: int
) -> dict[str, Any]:
    """`run_cell`; divergence is a result too, the worst."""
    try:
        return run_cell(cell, point, setting, splits, folder, device=device, threads=threads)
    except Diverged as error:
        return {"diverged": str(error).replace(str(folder), cell.name), "tuning_knn": 0.0}
    finally:
        gc.collect()  # graphs and networks form cycles; the next cell needs their memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _stop_with_parent() -> None:
    """Make this worker save its run and exit when the command that started it is gone, even if killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def tuning_of(setting: Literal["cpu"] | None) -> tuple[str, Results] | None:
    """Name and committed results of a setting whose points are taken."""
    if setting is None:
        return None
    name = f"paper_small_{setting}"
    return name, Results.read(RESULTS / f"{name}.jsonl", SETTINGS[setting])


def compare(arguments: Arguments, data: Path, console: Console) -> bool:
    """Run cells while there is time; whether all of those that were begun have a result."""
    setting, runs = SETTINGS[arguments.setting], arguments.runs
    results = Results.read(arguments.results, setting, tuned=tuning_of(arguments.tuned_by))
    cells = plan(setting, arguments.seeds, arguments.optimizers, arguments.methods, tune=arguments.tuned_by is None)
    unknown = [cell.name for cell in cells if results.tuned is not None and results.point(cell) is None]
    if unknown:
        raise InputError(
            f"paper_small_{arguments.tuned_by}.jsonl lacks the tuning of {unknown[0]} (and {len(unknown) - 1} others): "
            "run it, or give --tune."
        )
    expected = SECONDS[arguments.setting]
    queue = Queue(results, cells, expected=expected, seconds=arguments.seconds, most=arguments.cells)
    work = partial(
        run_or_diverge,
        setting=setting,
        splits=write_splits(data, runs, setting),
        device=arguments.device,
        threads=max(1, len(os.sched_getaffinity(0)) // arguments.jobs),
    )
    running: dict[Future[dict[str, Any]], tuple[Cell, Point]] = {}
    sound = True
    console.print(f"{queue.left} of {len(cells)} cells are left", highlight=False)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn"), initializer=_stop_with_parent) as pool:
        while True:
            while len(running) < arguments.jobs and (ready := queue.take()) is not None:
                running[pool.submit(work, *ready, folder=runs / ready[0].name)] = ready
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, point = running.pop(future)
                try:
                    measured = future.result()
                except (InputError, Interrupted) as error:
                    console.print(f"{cell.name} failed: {error}", highlight=False, soft_wrap=True)
                    sound = False
                    continue
                results.add(cell, point, measured, out=arguments.results, command=command_of(PROG, sys.argv[1:]))
                shutil.rmtree(runs / cell.name, ignore_errors=True)  # with its checkpoints
                queue.note(cell, measured.get("seconds", 0.0))
                console.print(f"{cell.name}: {_said(measured)}; {queue.left} left", highlight=False, soft_wrap=True)
    console.print(f"{queue.left} of {len(cells)} cells are left; the same command continues", highlight=False)
    return sound


def _said(row: dict[str, Any]) -> str:
    if "diverged" in row:
        return "diverged"
    if "knn" not in row:
        return f"kNN {100 * row['tuning_knn']:.1f} % in {row['seconds']:.0f} s"
    return f"kNN {100 * row['knn']:.1f} %, linear {100 * row['linear']:.1f} % in {row['seconds']:.0f} s"


def body() -> int:
    """Run the command; returns the exit code."""
    arguments = parse_arguments(Arguments, prog=PROG)
    if arguments.report:
        found = Results.read(arguments.results, SETTINGS[arguments.setting])
        print("\n".join(all_tables({f"paper_small_{arguments.setting}": {"cells": list(found.rows.values())}})))
        plot(found, arguments.results.with_suffix(".png"))
        return 0
    if arguments.data is None:
        raise InputError("data is missing: give the folder of tiny-imagenet-50 (train/ and val/, a folder a class).")
    return 0 if compare(arguments, arguments.data, Console()) else 1


if __name__ == "__main__":
    run_cli(body)
