"""Source images/s of our loader from each storage against a DataLoader with worker processes, interleaved.

python -m benchmarks.bench_loader FOLDER [SHARDS ...] [--workers 2] [--device cuda] [--cache] [--cold [--chunk 64]] ..

A trial loads `--num-batches` batches of a recipe's views and discards them: storage, decoding and views, from the first
request to the last batch, nothing prepared before and nothing left over. All load the same images in the same order,
each in a persistent process of its own (with its workers), so that memory can be told apart; one works at a time.
DALI with its own views takes part if it is installed, and FFCV if a .beton file is among the data, once complete and
once with less work (see their `what`).

With --cache each of ours takes part a second time with all images decoded, as in later epochs. Files are in the page
cache, or with --cold dropped from it before each trial. With --chunk each of ours takes part a second time with
block-wise shuffling (`pipelines.order.Order`), which reads in long pieces.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.harness.command import DEFAULT_RECIPE, check_device, check_positive, command_of, finish
from benchmarks.harness.processes import Trial
from benchmarks.harness.results import measured_by, write_result
from benchmarks.harness.trials import Budget, Outcome, cpu_times, peak_memory, rates, ratios, run_trials
from benchmarks.implementations.loaders import (
    Setup,
    dali_loader,
    data_loader,
    ffcv_loader,
    open_train,
    our_loader,
    peer_loader,
)
from benchmarks.implementations.peers import PEERS
from mvssl.recipes.files import resolve_recipe
from pipelines.decode import DecoderName
from pipelines.order import Order
from pipelines.runtime import InputError, invalid, parse_arguments, run_cli

PROG = "python -m benchmarks.bench_loader"
BASELINE = "DataLoader"
ONE_GRAPH = "DALI, one graph"
FFCV = {"ffcv": True, "ffcv, crops and flips only": False}
"""FFCV's implementations, which read a .beton file among the data, and whether their views are complete."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time loaders.

    Attributes:
        data: the same images in one or more storages (folder, shards, ...); the DataLoader reads the first, DALI's
            own graph the last.
        device: of the finished views.
        decoders: of our loader, each with each storage.
        workers: processes of the DataLoader, threads of FFCV.
        threads: decoding threads of our loader; by default as in training.
        batch_size: images of a batch.
        num_batches: batches of a trial.
        repeats: trials of each after a warm-up; the median counts.
        cold: drop the files from the page cache before each trial.
        cache: let each of our implementations take part a second time with its decoded images in memory.
        chunk: consecutive images of a block for block-wise shuffling; 0 leaves it out.
        window: images in the shuffle buffer of block-wise shuffling.
        peers: let lightly-train, lightly, solo-learn and stable-pretraining take part, as far as they are installed.
        disk: the disk that holds the data, in words, for the result.
        recipe: name or file of the recipe whose views are made.
        seconds: begin nothing more after so many; by default there is no limit.
        out: JSON file, rewritten after every trial.
    """

    data: tyro.conf.Positional[tuple[Path, ...]]
    device: Literal["cpu", "cuda"] = "cpu"
    decoders: tuple[DecoderName, ...] = ("dali", "pillow")
    workers: int = 2
    threads: int | None = None
    batch_size: int = 64
    num_batches: int = 6
    repeats: int = 3
    cold: bool = False
    cache: bool = False
    chunk: int = 0
    window: int = 32_768
    peers: bool = False
    disk: str = ""
    recipe: str = DEFAULT_RECIPE
    seconds: float | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.cold and self.cache:
            raise InputError("cold and cache exclude each other, since cached images read no files: give one of them.")
        if not self.data:
            raise InputError("data is missing: give a folder of images, and the same images converted if you like.")
        if not self.decoders:
            raise InputError("decoders is empty: name dali, pillow or both.")
        check_positive(self, "workers", "batch_size", "num_batches", "repeats")


def setups(arguments: Arguments) -> dict[str, Setup]:
    """Every implementation's setup by name; the baseline's is last.

    Raises:
        InputError: the storages hold different numbers of images, or fewer than a batch; two are of one kind; or a cold
            trial is longer than an epoch.
    """
    shared = Setup(
        name=BASELINE,
        data=arguments.data[0],
        specs=resolve_recipe(arguments.recipe).views,
        batch_size=arguments.batch_size,
        num_batches=arguments.num_batches,
        device=arguments.device,
        threads=arguments.threads,
        workers=arguments.workers,
        cold=arguments.cold,
    )
    images: dict[str, int] = {}
    ours: list[Setup] = []
    peers = [replace(shared, name=ONE_GRAPH, data=arguments.data[-1])]
    for data in arguments.data:
        with closing(open_train(data)) as source:
            kind, count = type(source).__module__.rpartition(".")[2], len(source)
        if kind in images:
            raise InputError(f"data names the storage {kind!r} twice ({data} is one): give each storage once.")
        images[kind] = count
        for decoder in arguments.decoders:
            name = f"{kind} + {decoder}"
            own = replace(shared, name=name, data=data, decoder=decoder)
            ours.append(own)
            if arguments.cache:
                ours.append(replace(own, name=f"{name}, kept", cached=True))
            if arguments.chunk:
                named = f"{name}, chunked order"
                ours.append(replace(own, name=named, chunk=arguments.chunk, window=arguments.window))
        if kind == "beton":
            peers += [replace(shared, name=name, data=data, photometric=full) for name, full in FFCV.items()]
    if arguments.peers:
        peers += [replace(shared, name=name) for name in PEERS]
    if len(set(images.values())) != 1:
        raise InputError(f"data holds different numbers of images ({images}): give the same images in each storage.")
    order = Order(
        num_images=next(iter(images.values())),
        batch_size=arguments.batch_size,
        seed=0,
        chunk=arguments.chunk,
        window=arguments.window,
    )
    most = order.steps_per_epoch
    if arguments.cold and arguments.num_batches > most:
        raise invalid("num_batches", arguments.num_batches, f"at most {most} (one epoch) with --cold", "lower it")
    return {setup.name: setup for setup in (*ours, *peers, shared)}


def measure(arguments: Arguments, *, command: str) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values."""
    check_device(arguments.device)
    planned = setups(arguments)
    others = (
        {BASELINE: data_loader, ONE_GRAPH: dali_loader}
        | dict.fromkeys(FFCV, ffcv_loader)
        | dict.fromkeys(PEERS, peer_loader)
    )
    builds = {name: partial(others.get(name, our_loader), setup) for name, setup in planned.items()}
    specs = planned[BASELINE].specs
    with closing(open_train(arguments.data[0])) as source:
        images, mean_kilobytes = len(source), float(source.nbytes.mean()) / 1e3

    def result(outcome: Outcome, *, unfinished: bool) -> dict[str, Any]:
        spent = cpu_times(outcome.trials, next((name for name in planned if name in outcome.trials), BASELINE))
        return {
            "benchmark": "loader",
            "partial": unfinished,
            "device": arguments.device,
            "cold": arguments.cold,
            "disk": arguments.disk,
            "chunk": arguments.chunk,
            "window": arguments.window,
            "images": images,
            "mean_kilobytes": mean_kilobytes,
            "batch_size": arguments.batch_size,
            "batches": arguments.num_batches,
            "recipe": Path(arguments.recipe).name,
            "views_per_image": len(specs),
            "sizes": [spec.size for spec in specs],
            "contenders": {
                name: summary(trials, views=len(specs)) | spent[name] for name, trials in outcome.trials.items()
            },
            "times_dataloader": ratios(outcome.trials, BASELINE),
            "left_out": outcome.left_out,
            "failed": outcome.failed,
            **measured_by(command),
        }

    outcome = run_trials(
        builds,
        repeats=arguments.repeats,
        budget=Budget(arguments.seconds),
        save=lambda outcome: write_result(arguments.out, result(outcome, unfinished=True)),
    )
    return result(outcome, unfinished=False)


def summary(trials: Sequence[Trial], *, views: int) -> dict[str, Any]:
    """Rates, memory and seconds by stage of one implementation with `views` views an image."""
    last = trials[-1].report
    result = rates(trials, views=views) | peak_memory(trials) | {"decoder": last["decoder"]}
    result |= {
        name: last[name] for name in ("view_engine", "workers", "device_mib", "bad", "what", "version") if name in last
    }
    if "stage_seconds" in last:
        stages = [trial.report["stage_seconds"] for trial in trials]
        result["stage_seconds"] = {name: sum(stage[name] for stage in stages) for name in stages[0]}
        result["stage_images"] = sum(trial.report["images"] for trial in trials)
    if "cached_fraction" in last:
        result["cached_share_before_turns"] = max(trial.report["cached_fraction"] for trial in trials)
    return result


def body() -> int:
    """Run the command; returns 1 if an implementation failed (the others' numbers stand) or none could run."""
    arguments = parse_arguments(Arguments, prog=PROG)
    result = measure(arguments, command=command_of(PROG, sys.argv[1:]))
    return finish(result, arguments.out, failed=bool(result["failed"]) or not result["contenders"])


if __name__ == "__main__":
    run_cli(body)
