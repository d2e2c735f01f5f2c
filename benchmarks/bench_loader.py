"""Source images/s of our loader from each storage against a DataLoader with worker processes, taking turns.

python -m benchmarks.bench_loader FOLDER [SHARDS ...] [--workers 2] [--device cuda] [--cache] [--cold [--chunk 64]] ..

A turn loads `--num-batches` batches of a recipe's views and throws them away: storage, decoding and views, from the
first request to the last batch, nothing prepared before and nothing left over. All load the same images in the same
order, each in a process of its own that stays (its workers too), so that memory can be told apart; one works at a time.
DALI with its own views takes part where it is installed, and FFCV where a .beton file is among the data, once complete
and once with less work (see their `what`).
With --cache each of ours takes part a second time as it loads later epochs then: nothing is read or decoded.
Files are in the system's cache, or with --cold dropped from it before each turn. With --chunk each of our contenders
takes part a second time, in the chunked order of `pipelines.order.Order`, another one, which reads in long pieces.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks.contenders.loader import Setup, dali_loader, data_loader, ffcv_loader, open_train, our_loader
from benchmarks.measuring.command_line import DEFAULT_RECIPE, finish, write_result
from benchmarks.measuring.isolated import Turn
from benchmarks.measuring.turns import Budget, Outcome, rates, ratios, take_turns
from mvssl.recipes.files import resolve_recipe
from mvssl.runs.environment import environment
from pipelines.decode import DecoderName
from pipelines.order import Order
from pipelines.runtime import InputError, invalid, run_cli

BASELINE = "DataLoader"
ONE_GRAPH = "DALI, one graph"
FFCV = {"ffcv": True, "ffcv, crops and flips only": False}
"""FFCV's contenders, which read a .beton file among the data, and whether their views are complete."""


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Time loaders.

    Attributes:
        data: the same images in one or more storages (folder, shards, ...); the DataLoader reads the first, DALI's
            own graph the last.
        device: where the views are handed over.
        decoders: of our loader, each with each storage.
        workers: processes of the DataLoader, threads of FFCV.
        threads: threads that decode in our loader; by default as in training.
        batch_size: images of a batch.
        num_batches: batches of a turn.
        repeats: turns each takes after a warm-up; the median counts.
        cold: drop the files from the system's cache before each turn.
        cache: let each of our contenders take part a second time with its decoded images kept in memory.
        chunk: images of a run in the chunked order; 0 leaves it out.
        window: images that the chunked order mixes at a time.
        disk: what the data lies on, in words, for the result.
        recipe: whose views are made, by its name or its file.
        seconds: after which nothing more is begun; all that is wanted by default.
        out: JSON file to write, anew after every turn.
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
    disk: str = ""
    recipe: str = DEFAULT_RECIPE
    seconds: float | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        if self.cold and self.cache:
            raise InputError(
                "cold and cache exclude each other: what is kept decoded reads no files; give one of them."
            )
        if not self.data:
            raise InputError("data is missing: give a folder of images, and the same images converted if you like.")
        if not self.decoders:
            raise InputError("decoders is empty: name dali, pillow or both.")
        for name in ("workers", "batch_size", "num_batches", "repeats"):
            if getattr(self, name) < 1:
                raise invalid(name, getattr(self, name), "1 or more", "give a larger number")


def setups(arguments: Arguments) -> dict[str, Setup]:
    """Every contender's setup by name; the baseline's is last.

    Raises:
        InputError: the storages hold different numbers of images, or fewer than a batch; two are of one kind; or a cold
            turn is too long.
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
    found: dict[str, Setup] = {}
    ffcv: dict[str, Setup] = {}
    for data in arguments.data:
        source = open_train(data)
        kind = type(source).__module__.rpartition(".")[2]
        if kind in images:
            raise InputError(f"data names the storage {kind!r} twice ({data} is one): give each storage once.")
        images[kind] = len(source)
        source.close()
        for decoder in arguments.decoders:
            name = f"{kind} + {decoder}"
            found[name] = replace(shared, name=name, data=data, decoder=decoder)
            if arguments.cache:
                found[f"{name}, kept"] = replace(found[name], name=f"{name}, kept", kept=True)
            if arguments.chunk:
                chunked = replace(found[name], chunk=arguments.chunk, window=arguments.window)
                found[f"{name}, chunked order"] = replace(chunked, name=f"{name}, chunked order")
        if kind == "beton":
            ffcv |= {name: replace(shared, name=name, data=data, photometric=full) for name, full in FFCV.items()}
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
    peers = {ONE_GRAPH: replace(shared, name=ONE_GRAPH, data=arguments.data[-1])} | ffcv
    return found | peers | {BASELINE: shared}


def measure(arguments: Arguments) -> dict[str, Any]:
    """Run the benchmark; the result as plain JSON values.

    Raises:
        InputError: there is no GPU or the data cannot be used.
    """
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device is cuda but torch finds no CUDA device here: take --device cpu.")
    planned = setups(arguments)
    others = {BASELINE: data_loader, ONE_GRAPH: dali_loader} | dict.fromkeys(FFCV, ffcv_loader)
    builds = {name: partial(others.get(name, our_loader), setup) for name, setup in planned.items()}
    specs = planned[BASELINE].specs
    source = open_train(arguments.data[0])
    images, mean_kilobytes = len(source), float(source.nbytes.mean()) / 1e3
    source.close()

    def result(outcome: Outcome, *, unfinished: bool) -> dict[str, Any]:
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
            "contenders": {name: summary(taken, views=len(specs)) for name, taken in outcome.turns.items()},
            "times_dataloader": ratios(outcome.turns, BASELINE),
            "left_out": outcome.missing,
            "failed": outcome.failed,
            "environment": environment() | {"command": command(arguments)},
        }

    return result(
        take_turns(
            builds,
            repeats=arguments.repeats,
            budget=Budget(arguments.seconds),
            keep=lambda outcome: write_result(arguments.out, result(outcome, unfinished=True)),
        ),
        unfinished=False,
    )


def summary(turns: Sequence[Turn], *, views: int) -> dict[str, Any]:
    """Rates, memory and stages of one contender with `views` views an image."""
    last = turns[-1].report
    result = rates(turns, views=views) | {"decoder": last["decoder"]}
    for name in ("view_engine", "workers", "device_mib", "bad", "what"):
        if name in last:
            result[name] = last[name]
    if "stage_seconds" in last:
        stages = [turn.report["stage_seconds"] for turn in turns]
        result["stage_seconds"] = {name: sum(stage[name] for stage in stages) for name in stages[0]}
        result["stage_images"] = sum(turn.report["images"] for turn in turns)
    if "cached_share" in last:
        result["cached_share_before_turns"] = max(turn.report["cached_share"] for turn in turns)
    return result


def command(arguments: Arguments) -> str:
    """The command that repeats this measurement, without paths of this machine."""
    return (
        f"python -m benchmarks.bench_loader {' '.join(data.name for data in arguments.data)} "
        f"--device {arguments.device} --decoders {' '.join(arguments.decoders)} --workers {arguments.workers} "
        f"--batch-size {arguments.batch_size} --num-batches {arguments.num_batches} --repeats {arguments.repeats} "
        f"--recipe {Path(arguments.recipe).name}"
        + (f" --threads {arguments.threads}" if arguments.threads is not None else "")
        + (" --cold" if arguments.cold else "")
        + (" --cache" if arguments.cache else "")
        + (f" --chunk {arguments.chunk} --window {arguments.window}" if arguments.chunk else "")
        + (f" --disk {shlex.quote(arguments.disk)}" if arguments.disk else "")
    )


def body() -> int:
    """Run the command; returns the exit code: 1 if a contender failed (the others' numbers stand) or none could run."""
    arguments = tyro.cli(Arguments, prog="python -m benchmarks.bench_loader")
    result = measure(arguments)
    return finish(result, arguments.out, failed=bool(result["failed"]) or not result["contenders"])


if __name__ == "__main__":
    run_cli(body)
