"""The paper's central comparison at a small scale: three methods, each in four variants, with one budget for all.

    python -m benchmarks.paper_small tiny-imagenet-50 --jobs 2 --out benchmarks/results/paper_small_cpu.json

Variants: two-view (the baseline), shared (global and local views, one predictor for both: the paper's failing control),
per-view (the same views, one predictor per view type), per-view + cutout (with a cutout view and its predictor). All
see the same images in the same order for the same number of epochs, with one optimiser, learning rate and network.

Every run is a folder of `--runs`. Started again, finished runs are kept and an interrupted one goes on, so that it may
be stopped at any time. `--table FILE` prints the table of a result.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

from benchmarks.paper_cells import METHODS, SETTINGS, TITLES, VARIANTS, Cell, Setting, make_recipe
from mvssl.evaluate.neighbours.online import evaluate_knn
from mvssl.monitor.places.jsonl import read_jsonl
from mvssl.networks.siamese import initial_backbone
from mvssl.runs.environment import environment
from mvssl.runs.folder import write_json
from mvssl.runs.options import RunOptions, resolve_device
from mvssl.training.trainer import run
from pipelines.console import run_cli
from pipelines.errors import InputError
from pipelines.storage import open_source


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The paper's comparison at a small scale.

    Attributes:
        data: folder with train/ and val/, one folder a class in each, e.g. tiny-imagenet-50.
        runs: where the runs lie; started again, finished ones are kept.
        out: file for the result as JSON.
        setting: cpu fits an hour on two cores and is small; gpu is at least 100 epochs of all images.
        seeds: one run of every cell for each.
        jobs: runs at a time, each with its share of the cores.
        device: auto takes CUDA where there is one.
        table: print the table of this result and stop.
    """

    data: tyro.conf.Positional[Path | None] = None
    runs: Path = Path("runs/paper_small")
    out: Path | None = None
    setting: Literal["cpu", "gpu"] = "cpu"
    seeds: tuple[int, ...] = (0, 1)
    jobs: int = 1
    device: str = "auto"
    table: Path | None = None


def write_lists(data: Path, runs: Path, setting: Setting) -> tuple[Path, Path]:
    """Write the lists of the training and validation images that a setting uses into `runs`.

    Raises:
        InputError: the data has not the folders, or too few classes or images.
    """
    train = data / "train"
    if not train.is_dir() or not (data / "val").is_dir():
        raise InputError(
            f"data is {str(data)!r} but must be a folder with train/ and val/, one folder a class in each: give the "
            "folder of tiny-imagenet-50."
        )
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())[: setting.classes]
    if len(classes) < setting.classes:
        raise InputError(f"{train} has {len(classes)} classes but the setting needs {setting.classes}: give more data.")
    runs.mkdir(parents=True, exist_ok=True)
    lists = []
    for split, most in (("train", setting.per_class), ("val", None)):
        lines: list[str] = []
        for name in classes:
            images = sorted((data / split / name).iterdir())[:most]
            if most is not None and len(images) < most:
                raise InputError(f"{train / name} has {len(images)} images but the setting needs {most}.")
            lines += [f"{image.resolve()}\t{name}" for image in images]
        path = runs / f"{split}.txt"
        text = "\n".join(lines) + "\n"
        if not path.exists() or path.read_text() != text:  # rewriting it would make the cached index stale
            path.write_text(text)
        lists.append(path)
    return lists[0], lists[1]


def run_cell(cell: Cell, setting: Setting, arguments: Arguments, train: Path, val: Path) -> dict[str, Any]:
    """Train a cell, or take what a finished run of it left; its row of the result."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(max(1, cores // arguments.jobs))
    folder = arguments.runs / cell.folder
    kept = arguments.runs / f"{cell.folder}.json"
    recipe = make_recipe(cell, setting)
    if kept.exists():
        row: dict[str, Any] = json.loads(kept.read_text())
        if row["recipe"] != dataclasses.asdict(setting):
            raise InputError(f"{folder} holds a run of another setting: give another --runs, or delete it.")
        return row
    options = RunOptions(
        data=train,
        val=val,
        out=folder,
        device=arguments.device,
        threads=max(1, cores // (2 * arguments.jobs)),
        log_every=20,
        save_every_epochs=1,
        keep_checkpoints=1,
        resume=(folder / "config.json").exists(),
    )
    began = time.perf_counter()
    result = run(recipe, options, console=Console(quiet=True))
    last = [row for row in read_jsonl(folder / "metrics.jsonl") if row["kind"] == "train"][-1]
    row = {
        "method": cell.method,
        "variant": cell.variant,
        "seed": cell.seed,
        "knn_k20": result.knn[20],
        "knn_k10": result.knn[10],
        "steps": result.steps,
        "effective_rank": last["effective_rank"],
        "embedding_std": last["embedding_std"],
        "images_per_second": result.images_per_second,
        "seconds_of_last_start": time.perf_counter() - began,
        "recipe": dataclasses.asdict(setting),
    }
    write_json(kept, row)
    return row


def untrained_row(setting: Setting, seed: int, arguments: Arguments, train: Path, val: Path) -> dict[str, Any]:
    """kNN accuracy of the initial weights, which all methods and variants of a seed share."""
    device = resolve_device(arguments.device)
    recipe = make_recipe(Cell(method="byol", variant="two-view", seed=seed), setting)
    with_train, with_val = open_source(train), open_source(val)
    accuracy = evaluate_knn(initial_backbone(recipe).to(device), with_train, with_val, recipe.evaluation, device=device)
    return {"seed": seed, "knn_k20": accuracy[20], "knn_k10": accuracy[10]}


def run_all(cells: Sequence[Cell], work: Callable[[Cell], dict[str, Any]], jobs: int) -> Iterator[dict[str, Any]]:
    """The rows of all cells, `jobs` at a time."""
    if jobs == 1:
        yield from map(work, cells)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, cells)


@dataclass(frozen=True, kw_only=True)
class _Work:
    """`run_cell` with everything but the cell, for another process."""

    setting: Setting
    arguments: Arguments
    train: Path
    val: Path

    def __call__(self, cell: Cell) -> dict[str, Any]:
        return run_cell(cell, self.setting, self.arguments, self.train, self.val)


def measure(arguments: Arguments, data: Path, console: Console) -> dict[str, Any]:
    """Run the comparison; the result as plain JSON values."""
    setting = SETTINGS[arguments.setting]
    train, val = write_lists(data, arguments.runs, setting)
    cells = [
        Cell(method=method, variant=variant, seed=seed)
        for seed, method, variant in product(arguments.seeds, METHODS, VARIANTS)
    ]
    untrained = [untrained_row(setting, seed, arguments, train, val) for seed in arguments.seeds]
    rows = []
    work = _Work(setting=setting, arguments=arguments, train=train, val=val)
    for number, row in enumerate(run_all(cells, work, arguments.jobs), start=1):
        rows.append(row)
        console.print(
            f"{number}/{len(cells)}  {row['method']} {row['variant']}, seed {row['seed']}: "
            f"kNN top-1 {100 * row['knn_k20']:.1f} % after {row['steps']} steps",
            highlight=False,
        )
    seeds = " ".join(map(str, arguments.seeds))
    command = f"python -m benchmarks.paper_small {data.name} --setting {arguments.setting} --seeds {seeds}"
    return {
        "benchmark": "paper_small",
        "setting": dataclasses.asdict(setting) | {"name": arguments.setting},
        "untrained": untrained,
        "rows": [{name: value for name, value in row.items() if name != "recipe"} for row in rows],
        "environment": environment() | {"command": f"{command} --jobs {arguments.jobs}"},
    }


def table(result: Mapping[str, Any]) -> str:
    """The result as a Markdown table: kNN top-1 (k = 20) in percent, mean over the seeds, and the seeds apart."""
    lines = ["| method | " + " | ".join(VARIANTS) + " |", "|---" * (len(VARIANTS) + 1) + "|"]
    for method in METHODS:
        found = [
            [100 * row["knn_k20"] for row in result["rows"] if (row["method"], row["variant"]) == (method, variant)]
            for variant in VARIANTS
        ]
        lines.append(f"| {TITLES[method]} | " + " | ".join(map(_percent, found)) + " |")
    return "\n".join(lines) + f"\n\nUntrained: {_percent([100 * row['knn_k20'] for row in result['untrained']])}"


def _percent(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.1f} ({', '.join(f'{value:.1f}' for value in values)})"


def body() -> int:
    """Run the command; returns the exit code."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.paper_small")
    console = Console()
    if arguments.table is not None:
        print(table(json.loads(arguments.table.read_text())))
        return 0
    if arguments.data is None:
        raise InputError("data is missing: give the folder of tiny-imagenet-50 (train/ and val/, a folder a class).")
    if not arguments.seeds or arguments.jobs < 1:
        raise InputError("seeds and jobs must hold at least one seed and be at least 1: leave them out.")
    result = measure(arguments, arguments.data, console)
    print(table(result))
    if arguments.out is not None:
        write_json(arguments.out, result)
    return 0


if __name__ == "__main__":
    run_cli(body)
